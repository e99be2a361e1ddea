"""Which losses exist and what they take, read from the source of the functions.

Configuration errors must come before torch is imported, and a loss should be one function and one YAML, without a third place
to register it; so the names and options are read from the syntax tree.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

FALL_AS_ONE_OVER_T = ("total_variation", "ranking_hinge", "teacher_argmax_ce", "teacher_sample_ce")
"""Divergences whose gradient falls as 1/T at high temperatures, that of all others as 1/T²: with the factor T² theirs grows as T.

(A divergence that is smooth has a slope of 0 at equality, to which temperature brings both distributions; these have a step there, or
their least value elsewhere.)
"""

Parameters = dict[str, tuple[str, ...]]
"""Function name -> its options: the keyword-only arguments."""


Function = TypeVar("Function", bound=Callable[..., Any])


def looks_at(tokens: str) -> Callable[[Function], Function]:
    """Marks a divergence of single tokens; all others compare distributions over outcomes, whatever these are.

    It matters against a short list of the teacher's tokens: the mass of all others is one more outcome there, and no token.

    Args:
        tokens: `likeliest`: those that the teacher ranks first, one or as many as the option `top_k` says; `any`.
    """

    def mark(function: Function) -> Function:
        vars(function)["looks_at"] = tokens
        return function

    return mark


def divergence_parameters() -> Parameters:
    """The functions of divergences.py."""
    return _functions("divergences.py")


def tokens_looked_at(name: str, options: Mapping[str, object]) -> float:
    """How many of the teacher's likeliest tokens a divergence looks at with these options: 0 if it compares whole distributions.

    Infinitely many if it may look at any token.
    """
    function = _syntax("divergences.py").get(name)
    marks = [ast.literal_eval(call.args[0]) for call in function.decorator_list if isinstance(call, ast.Call)] if function else []
    if function is None or not marks:
        return 0
    if marks == ["any"]:
        return math.inf
    given = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    defaults = {arg.arg: ast.literal_eval(value) for arg, value in given if value is not None}
    top_k = options.get("top_k", defaults.get("top_k", 1))
    return top_k if isinstance(top_k, int) else 0  # anything else is refused by the function


def matching_parameters() -> Parameters:
    """The functions of hidden.py and attention.py."""
    return _functions("hidden.py") | _functions("attention.py")


def _functions(file: str) -> Parameters:
    return {name: tuple(arg.arg for arg in function.args.kwonlyargs) for name, function in _syntax(file).items()}


@cache
def _syntax(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {function.name: function for function in functions}
