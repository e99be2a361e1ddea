"""Which losses exist and what they take, read from the source of the functions.

Configuration errors must come before torch is imported, and a loss should be one function and one YAML, without a third place
to register it; so the names and options are read from the syntax tree.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

Parameters = dict[str, tuple[str, ...]]
"""Function name -> its options: the keyword-only arguments."""


def divergence_parameters() -> Parameters:
    """The functions of divergences.py."""
    return _functions("divergences.py")


def matching_parameters() -> Parameters:
    """The functions of hidden.py and attention.py."""
    return _functions("hidden.py") | _functions("attention.py")


@cache
def _functions(file: str) -> Parameters:
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {f.name: tuple(arg.arg for arg in f.args.kwonlyargs) for f in functions}
