"""Caches of teacher targets for tests: built in this process, changed on disk."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mini_distill.cli import load_config
from mini_distill.config import CacheCommand
from mini_distill.storage import MANIFEST

cache_module: Any = importlib.import_module("mini_distill.cache")

KINDS: dict[str, list[str]] = {
    "sampled": ["cache.kind=sampled", "cache.k=8"],
    "draws": ["cache.kind=sampled", "cache.k=20", "cache.sampling=draws"],
    "topk": ["cache.kind=topk", "cache.k=8"],
    "full": ["cache.kind=full"],
    "hidden": ["cache.kind=hidden"],
}


def cache_command(run_command: list[str]) -> list[str]:
    """What a run's command says of teacher and data, for the cache."""
    return [*(text for text in run_command if text.startswith(("teacher", "data"))), "precision=fp32", "num_threads=1"]


def cache_config(run_command: list[str], folder: Path, *more: str) -> CacheCommand:
    """The checked configuration of the cache command."""
    return load_config([*cache_command(run_command), f"cache.dir={folder}", *more], "cache", CacheCommand)


def build(run_command: list[str], folder: Path, *more: str) -> dict[str, Any]:
    """Build the cache in this process, as the command line would; gives the summary."""
    return cache_module.build(cache_config(run_command, folder, *more))


def content(cache: Path) -> dict[str, bytes]:
    """Every file but those that hold figures of time and place."""
    files = sorted(file for file in cache.rglob("*") if file.is_file() and file.name not in ("summary.json", "cache.json"))
    return {file.relative_to(cache).as_posix(): file.read_bytes() for file in files}


def change_column(shard: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    """Change one column, in place or to what is returned, and write the manifest anew, as a bug in the builder would."""
    file = shard / f"{name}.npy"
    values = np.load(file)
    changed = change(values)
    np.save(file, values if changed is None else changed)
    sign(shard)


def sign(folder: Path) -> None:
    """A manifest that fits what is there."""
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}))
