"""What may not change between a run and its resumption."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..contract import known_keys
from ..errors import ConfigError, Problem

HARMLESS = (
    "output_dir",  # where the run lies, not what it computes
    "resume",  # how it was found
    "resume_allow",  # this very comparison
    "debug",  # tracebacks
    "control",  # another run, beside this one
    "tracking",  # a copy of the metrics
    "teacher.gated",  # the wording of an error
    "teacher.cache_dir",  # where the cache lies; what it holds is compared as `cache`
    "teacher.cache_k",  # likewise
    "teacher.url",  # where it is served; what it is is compared as `teacher`
    "teacher.num_requests",
    "teacher.timeout",
    "trainer.save_every",  # saving draws no random numbers and changes no tensor
    "trainer.keep_checkpoints",  # which of them stay
    "trainer.stuck_after",  # when a run is given up
    "trainer.log_every",  # which steps get a row; the steps are the same
    "data.num_workers",  # the order of rows is the seed's alone
    "data.cache_dir",  # where tokenised data is kept; what it holds is compared as `data`
    "evaluation.prompts",  # samples are shown and never measured; evaluation leaves all random states as they were
    "evaluation.num_samples",
    "evaluation.sample_tokens",
    "evaluation.sampling_temperature",
)
"""Settings that cannot change the student. Those of the measurements are compared: they choose the best checkpoint."""

ABSENT = object()


def compare_fingerprints(saved: Mapping[str, Any], current: Mapping[str, Any], allow: Sequence[str] = (), finished: bool = False) -> None:
    """Refuse to go on with a run whose settings, data, tokenizer, models or imported code are not what they were.

    Args:
        saved: Nested JSON values of the checkpoint; `config` holds the settings.
        current: The same of this command.
        allow: Keys that may differ, such as `trainer.max_steps` or `data`; a key allows all that lies below it.
        finished: The run has no step left, in which an allowed value could be used.

    Raises:
        ConfigError: one problem for each key that differs, with old and new value.
    """
    old, new = (_leaves(json.loads(json.dumps(tree)), "") for tree in (saved, current))
    differing = [key for key in {**old, **new} if old.get(key, ABSENT) != new.get(key, ABSENT)]
    harmless = [f"config.{name}" for name in HARMLESS]
    allowed = [*harmless, *allow, *(f"config.{name}" for name in allow)]
    refused = [key for key in differing if not any(_covers(name, key) for name in allowed)]
    twice = [key for key in refused if (old.get(key), new.get(key)) == (old.get(f"config.{key}", ABSENT), new.get(f"config.{key}", ABSENT))]
    refused = [key for key in refused if key not in twice]  # seq_len, say, is a setting and a property of the data
    refused = [
        key for key in refused if not any(_covers(key, other) for other in refused if other != key)
    ]  # that a group was empty says nothing more
    if refused:
        raise ConfigError.from_problems(_problem(key, old.get(key, ABSENT), new.get(key, ABSENT), finished) for key in refused)


def _leaves(value: Any, path: str) -> dict[str, Any]:
    """Full path -> value."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= _leaves(inner, f"{path}.{key}" if path else key)
    return leaves


def _covers(name: str, key: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _problem(key: str, old: Any, new: Any, finished: bool) -> Problem:
    going_on = "" if finished else f" add resume_allow=[{_allowable(key)}] to go on with the new one,"
    remedy = f"Give the old value back,{going_on} or start anew with resume=never or another output_dir."
    run = "the run, which has finished," if finished else "the run to be resumed"
    if key.startswith("code.") and ABSENT not in (old, new):  # digests of a source say nothing to anybody
        return Problem(key, f"not the code that {run} has", remedy)
    return Problem(key.removeprefix("config."), f"got {_shown(new)}, and {run} has {_shown(old)}", remedy)


def _allowable(key: str) -> str:
    """What `resume_allow` takes for this key: a setting of the contract, or a whole fingerprint such as data."""
    if not key.startswith("config."):
        return key.partition(".")[0]
    name, known = key.removeprefix("config."), known_keys()
    while name not in known and "." in name:  # inside a free mapping such as data.mixture
        name = name.rpartition(".")[0]
    return name


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
