"""What a cache is a cache of, and the comparison that keeps a wrong one from being used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..config import CacheConfig
from ..errors import CacheError, Problem
from ..storage import atomic_write_text, read_regular

DESCRIPTION = "cache.json"
FORMAT = 3


def identity(config: CacheConfig, *, data: dict[str, Any], tokenizer: str, teacher: dict[str, Any], precision: str) -> dict[str, Any]:
    """Everything that the targets depend on, as nested JSON values.

    Args:
        config: What is kept of the distribution.
        data: `PreparedData.fingerprint_parts`: sources and their rows, rendering with the chat template, length and packing.
        tokenizer: Its fingerprint.
        teacher: What it is: the fingerprint of its weights, their dtype, and the rest of what it computes with.
        precision: Of its forward passes: shards of one cache are scored alike.
    """
    matters = {"sampled": ["k", "sampling", "seed"], "topk": ["k", "tail"], "full": [], "hidden": []}[config.kind]
    matters += ["proposal"] if config.kind == "sampled" and config.sampling == "draws" else []
    matters += ["temperature"] if config.kind != "hidden" else []
    return {
        "format": FORMAT,
        "cache": {"kind": config.kind, **{name: getattr(config, name) for name in matters}},
        "teacher": teacher,
        "scoring": {"precision": precision},
        "tokenizer": tokenizer,
        "data": data,
    }


def digest(of: dict[str, Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """`cache.json`, with its own checksum: how the targets are read depends on it."""
    atomic_write_text(folder / DESCRIPTION, json.dumps(description | {"sha256": digest(description)}, indent=2) + "\n")


def read_description(folder: Path) -> dict[str, Any]:
    """What `write_description` wrote.

    Raises:
        CacheError: there is none, or it is no description of a cache that this version reads.
    """
    file = folder / DESCRIPTION
    try:
        found = json.loads(read_regular(file))
        known = found["identity"]["format"]
    except FileNotFoundError as error:
        raise CacheError(str(folder), "no cache of teacher targets", "Build it: python -m mini_distill.cache cache.dir=….") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(
            str(file), f"cannot be read ({type(error).__name__}: {error})", "Build the cache again in another folder."
        ) from error
    if known != FORMAT:
        raise CacheError(str(file), f"format {known}, expected {FORMAT}", "Build the cache again with this version, in another folder.")
    if found.pop("sha256", None) != digest(found):
        raise CacheError(str(file), "was changed since it was written: wrong checksum", "Build the cache again in another folder.")
    return found


def check_same(cached: dict[str, Any], wanted: dict[str, Any], folder: Path, remedy: str) -> None:
    """Refuse a cache of something else.

    Args:
        cached: The identity in the cache.
        wanted: That of this run; what it leaves out is not compared.
        folder: The cache.
        remedy: What to do.

    Raises:
        CacheError: one problem for each field that differs, with both values.
    """
    old, new = _leaves(cached), _leaves(wanted)
    groups = {key.partition(".")[0] for key in new}
    keys = [key for key in {**old, **new} if key.partition(".")[0] in groups and old.get(key) != new.get(key)]
    if keys:
        raise CacheError.from_problems(
            Problem(f"{folder}: {key}", f"the cache has {_shown(old.get(key))}, this run {_shown(new.get(key))}", remedy)
            for key in sorted(keys)
        )


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Full path -> value."""
    if not isinstance(value, dict) or (path and not value):
        return {path: value}
    return {key: leaf for name, inner in value.items() for key, leaf in _leaves(inner, f"{path}.{name}" if path else str(name)).items()}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
