"""What the targets of a cache or of a server can give, and what an objective wants of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..config import CacheCommand, CacheConfig, Config
from ..contract import objective_terms
from ..errors import Problem
from ..losses.catalogue import matching_parameters, tokens_looked_at
from ..storage import read_regular


class Compared(NamedTuple):
    """A term of the objective, and where its parts are set."""

    name: str
    name_at: str
    options: Mapping[str, Any]
    options_at: str
    temperature: float
    temperature_at: str


def compared(config: Config) -> Iterator[Compared]:
    """The terms of the objective that have a weight."""
    objective, terms = config.objective, objective_terms(config.objective)
    if objective.kl_weight > 0:
        options = objective.divergence_options, "objective.divergence_options"
        yield Compared(objective.divergence, "objective.divergence", *options, objective.temperature, "objective.temperature")
    for name, term in terms.items():
        if term.weight > 0:
            where, temperature = f"objective.terms.{name}", term.temperature or 1.0
            yield Compared(str(term.kind), f"{where}.kind", term.options, f"{where}.options", temperature, f"{where}.temperature")


def check_served(config: Config) -> Iterator[Problem]:
    """What a server cannot give."""
    top_k = config.teacher.top_k
    for term in compared(config):
        if term.name in matching_parameters():
            what = f"{term.name} looks into the teacher, and a server gives its most likely tokens only"
            yield Problem(term.name_at, what, "Load the teacher here: teacher=hf.")
        elif term.temperature != 1:
            what = f"got {term.temperature}, and a server gives temperature 1 only"
            yield Problem(term.temperature_at, what, f"Set {term.temperature_at}=1, or load the teacher here: teacher=hf.")
        else:
            yield from _check_listed(term, top_k, "teacher.top_k", is_whole=False)


def check_cached(config: Config) -> Iterator[Problem]:
    """What the targets of a cache cannot give, as far as its description tells."""
    folder = config.teacher.cache_dir
    try:
        cache = json.loads(read_regular(Path(os.path.expanduser(str(folder))) / "cache.json"))["cache"]
        settings = CacheConfig(**cache)
    except (OSError, ValueError, KeyError, TypeError):
        return  # said, with what to do, where the cache is opened
    yield from check_targets(config, settings)


SAME_GRADIENT = "Use forward_kl, which has the same gradient on average and less noise"

OTHER_TEMPERATURE = {
    "sampled": "what was drawn at one temperature is biased at another",
    "topk": "the mass of what is not listed is known at that one only",
}
"""Why targets of a kind hold at one temperature; the other kinds have the whole distribution."""


def check_targets(config: Config, cache: CacheConfig) -> Iterator[Problem]:
    """What the objective wants and a cache of these settings does not hold."""
    for term in compared(config):
        if term.name in matching_parameters():
            yield Problem(term.name_at, f"{term.name} looks into the teacher, and there is only a cache", "Leave the cache out.")
        elif cache.kind == "sampled" and tokens_looked_at(term.name, term.options) == math.inf:
            what = f"{term.name} draws from the teacher, and the weights of a sample are no distribution: some can be negative"
            yield Problem(term.name_at, what, f"{SAME_GRADIENT}, or a cache of kind hidden or full.")
        elif cache.kind == "sampled" and term.name != "forward_kl":
            what = f"{term.name} from sampled targets is biased: only the forward KL is linear in the teacher's distribution"
            yield Problem(term.name_at, what, "Use objective=forward_kl, or a cache of kind hidden, full or topk.")
        elif cache.kind in OTHER_TEMPERATURE and term.temperature != cache.temperature:
            what = f"got {term.temperature}, and the cache's temperature is {cache.temperature}: {OTHER_TEMPERATURE[cache.kind]}"
            remedy = f"Train at {cache.temperature}, or from a cache written at {term.temperature}; kinds hidden and full hold at any."
            yield Problem(term.temperature_at, what, remedy)
        elif cache.kind == "topk":
            k = "teacher.cache_k" if config.teacher.cache_kind else "cache.k"
            yield from _check_listed(term, cache.k, k, is_whole=cache.tail == "spread")


def _check_listed(term: Compared, listed: int, setting: str, is_whole: bool) -> Iterator[Problem]:
    """A divergence of single tokens against a list of so many; whole: those that are not listed have a probability each."""
    needed = tokens_looked_at(term.name, term.options)
    if needed == math.inf and not is_whole:
        what = f"{term.name} draws a token, and of those that are not listed only the mass is known"
        yield Problem(term.name_at, what, f"{SAME_GRADIENT}, or a teacher whose whole distribution is known.")
    elif listed < needed < math.inf:
        what = f"{term.name} ranks {needed} of the teacher's tokens, and {listed} are listed"
        yield Problem(f"{term.options_at}.top_k", what, f"Rank at most {listed}, or list more: {setting}={needed}.")


def check_cache(command: CacheCommand) -> Iterator[Problem]:
    """What a cache is to hold, and who can be asked for it."""
    cache = command.cache
    if cache.dir is None:
        yield Problem("cache.dir", "missing", "Give the folder of the cache.")
    teacher = command.teacher
    if teacher.kind in ("none", "cached") or teacher.cache_dir or teacher.cache_kind or teacher.cache_k:
        yield Problem(
            "teacher", "nobody to ask", "Choose teacher=embedded, hf or server, without teacher.cache_dir, cache_kind and cache_k."
        )
    if teacher.kind == "server":
        yield from _check_cache_of_server(command)
    belongs = {
        "sampling": ["sampled"],
        "proposal": ["sampled"],
        "tail": ["topk"],
        "k": ["sampled", "topk"],
        "temperature": ["sampled", "topk", "full"],
    }
    for name, kinds in belongs.items():
        if cache.kind not in kinds and getattr(cache, name) != getattr(CacheConfig(), name):
            yield Problem(f"cache.{name}", f"given, and cache.kind is {cache.kind}", f"It belongs to {' and '.join(kinds)}.")
    if cache.proposal != 1 and cache.sampling != "draws":
        yield Problem("cache.proposal", f"got {cache.proposal}, and cache.sampling is {cache.sampling}", "Set cache.sampling=draws.")


def _check_cache_of_server(command: CacheCommand) -> Iterator[Problem]:
    cache, top_k = command.cache, command.teacher.top_k
    if cache.kind != "topk":
        what = f"got {cache.kind}, and a server gives the most likely tokens only"
        yield Problem("cache.kind", what, f"Set cache.kind=topk cache.k={top_k}.")
    elif cache.k > top_k:
        what = f"got {cache.k}, and teacher.top_k is {top_k}"
        yield Problem("cache.k", what, f"Set cache.k={top_k}, or teacher.top_k={cache.k} (vllm serve --max-logprobs {cache.k}).")
    if cache.temperature != 1:
        yield Problem("cache.temperature", f"got {cache.temperature}, and a server gives temperature 1 only", "Leave it out.")
