"""Which divergences exist and what they take, read from the source of divergences.py.

Configuration errors must come before torch is imported, and a divergence should be one function and one YAML, without a
third place to register it; so the names and options are read from the syntax tree.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path


@cache
def divergence_parameters() -> dict[str, tuple[str, ...]]:
    """Divergence name -> its options: the keyword-only arguments."""
    tree = ast.parse((Path(__file__).parent / "divergences.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {f.name: tuple(arg.arg for arg in f.args.kwonlyargs) for f in functions}
