"""The terms of an objective: their names, options, layers and schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..config import Config, TermConfig
from ..contract import did_you_mean, objective_terms, shown
from ..errors import ConfigError, Problem
from ..losses.catalogue import divergence_parameters, matching_parameters
from ..targets import cache_command
from .targets import check_cached, check_served, check_targets

LOGGED_BESIDES = ("ce", "loss", "grad_norm", "learning_rate", "tokens")
"""What metrics have under `train/` besides the divergences: a term of such a name would hide it, or be hidden."""


def check_objective(config: Config) -> Iterator[Problem]:
    """Every term, and whether the teacher can give what it looks at."""
    objective = config.objective
    try:
        terms = objective_terms(objective)
    except ConfigError as error:
        yield from error.problems
        return
    weights = {"kl_weight": objective.kl_weight, **{f"terms.{name}.weight": term.weight for name, term in terms.items()}}
    if not any(weights.values()) and objective.ce_weight == 0:
        yield Problem("objective.kl_weight", "0, and objective.ce_weight is 0 too: nothing would be learnt", "Give one of them a weight.")
    for name, weight in weights.items():
        if weight > 0 and config.teacher.kind == "none":
            yield Problem(f"objective.{name}", f"got {weight}, and there is no teacher", "Choose a teacher, or objective=ce.")
    if "." not in objective.divergence:  # the user's own function is checked when it is imported
        known = divergence_parameters()
        yield from _check_kind(objective.divergence, "objective.divergence", "divergence", known)
        yield from _check_options(objective.divergence_options, objective.divergence, "objective.divergence_options", known)
    for name, term in terms.items():
        yield from _check_term(term, f"objective.terms.{name}", config)
    first = objective.divergence.rpartition(".")[2]
    if first in LOGGED_BESIDES:
        what = f"the name '{first}' is that of another figure in the metrics"
        yield Problem("objective.divergence", what, "Rename the function.")
    for name in sorted(set(terms) & {*LOGGED_BESIDES, first}):
        yield Problem(f"objective.terms.{name}", "has the name of another figure or term", "Choose a name of its own, and set its kind.")
    if config.teacher.kind == "server":
        yield from check_served(config)
    elif config.teacher.cache_kind is not None:
        yield from check_targets(config, cache_command(config).cache)
    elif config.teacher.cache_dir is not None:
        yield from check_cached(config)
    scheduled = {first: objective.kl_weight, "ce": objective.ce_weight, **{name: term.weight for name, term in terms.items()}}
    for name, points in objective.schedules.items():
        yield from _check_schedule(name, points, scheduled)


def _check_term(term: TermConfig, where: str, config: Config) -> Iterator[Problem]:
    assert term.kind is not None
    divergences, matching = divergence_parameters(), matching_parameters()
    if "." not in term.kind:
        yield from _check_kind(term.kind, f"{where}.kind", "term", divergences | matching)
        yield from _check_options(term.options, term.kind, f"{where}.options", divergences | matching)
    if term.kind in matching:
        yield from _check_matching(term, where, config)
        return
    for name in ("layers", "layer_map"):
        if getattr(term, name):
            yield Problem(f"{where}.{name}", f"given, and {term.kind} compares what comes out of the models", "Leave it out.")


_MATCHING_OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_relation_heads": ("a whole number of at least 1", lambda value: _is_whole(value) and not isinstance(value, str) and value >= 1),
    "normalise": ("true or false", lambda value: isinstance(value, bool)),
}
"""Option of a function that matches -> what it may be."""


def _check_matching(term: TermConfig, where: str, config: Config) -> Iterator[Problem]:
    for name, value in term.options.items():
        expected, is_good = _MATCHING_OPTIONS.get(name, ("", lambda _: True))
        if not is_good(value):
            yield Problem(f"{where}.options.{name}", f"got {shown(value)}, expected {expected}")
    if term.layers and term.layer_map:
        yield Problem(f"{where}.layer_map", f"given together with {where}.layers", "Name one.")
    for student, teacher in term.layer_map.items():
        if not _is_whole(student) or not _is_whole(teacher):
            yield Problem(
                f"{where}.layer_map", f"got {shown({student: teacher})}, expected whole numbers", "Give {student block: teacher block}."
            )
    trainer = config.trainer
    if trainer.compile and trainer.gradient_checkpointing and term.weight > 0 and not str(term.kind).startswith("hidden"):
        what = f"true with trainer.gradient_checkpointing=true, and {where} looks into the blocks, which are not seen in compiled recomputation"
        yield Problem("trainer.compile", what, "Leave one of the two out; hidden_mse and hidden_cosine go with both.")
    if str(term.kind).startswith("attention"):
        for group, part in (("teacher", config.teacher), ("student", config.student)):
            if part.attn_implementation != "eager":
                yield Problem(
                    f"{group}.attn_implementation",
                    f"got {shown(part.attn_implementation)}, and {where} looks at attention probabilities",
                    f"Set {group}.attn_implementation=eager; relation_kl needs no such thing.",
                )


def _check_kind(kind: str, where: str, what: str, known: Mapping[str, tuple[str, ...]]) -> Iterator[Problem]:
    if kind not in known:
        yield Problem(where, f"no {what} called {shown(kind)}", did_you_mean(kind, list(known)) or f"Known: {', '.join(known)}.")


def _check_options(options: Mapping[str, object], kind: str, where: str, known: Mapping[str, tuple[str, ...]]) -> Iterator[Problem]:
    for name in options:
        if kind in known and name not in known[kind]:
            yield Problem(
                f"{where}.{name}", f"{kind} takes {', '.join(known[kind]) or 'no options'}", did_you_mean(name, list(known[kind]))
            )


def _check_schedule(name: str, points: object, weights: Mapping[str, float]) -> Iterator[Problem]:
    where = f"objective.schedules.{name}"
    if name not in weights:
        yield Problem(where, "no term of that name", did_you_mean(name, list(weights)) or f"Terms: {', '.join(weights)}.")
    elif weights[name] == 0:
        yield Problem(where, "given, and the term's weight is 0 at every step", "Give it a weight, which the factors multiply.")
    if not isinstance(points, Mapping) or not points:
        yield Problem(where, f"got {shown(points)}, expected a mapping", "Give {step: factor}, such as {0: 1, 1000: 0.1}.")
        return
    for step, factor in points.items():
        good_factor = isinstance(factor, int | float) and not isinstance(factor, bool) and 0 <= factor < math.inf
        if not _is_whole(step) or int(step) < 0 or not good_factor:
            yield Problem(where, f"got {shown({step: factor})}, expected a step and a factor of at least 0", "Give {0: 1, 1000: 0.1}.")


def _is_whole(value: object) -> bool:
    """Also for the keys of a mapping typed on the command line, which are texts."""
    return isinstance(value, int | str) and not isinstance(value, bool) and re.fullmatch(r"-?\d{1,9}", str(value)) is not None
