"""Which losses exist and what they take, read from the source of the functions.

Configuration errors must come before torch is imported, and a loss should be one function and one YAML, without a third place
to register it; so the names and options are read from the syntax tree.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

FALL_AS_ONE_OVER_T = ("total_variation", "ranking_hinge", "teacher_argmax_ce", "teacher_sample_ce")
"""Divergences whose gradient falls as 1/T at high temperatures, that of all others as 1/T²: with the factor T² theirs grows as T.

(A divergence that is smooth has a slope of 0 at equality, to which temperature brings both distributions; these have a step there, or
their least value elsewhere.)
"""

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
