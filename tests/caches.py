"""Caches of teacher targets for tests: built in this process, changed on disk."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mini_distill.cli import load_config
from mini_distill.config import CacheCommand
from mini_distill.errors import CacheError, MiniDistillError
from mini_distill.storage import MANIFEST
from mini_distill.teachers.bit_packing import pack, packed_bytes, unpack
from mini_distill.teachers.cache_files import Columns, Reading, Shard
from mini_distill.teachers.cache_kinds import Kind

cache_module: Any = importlib.import_module("mini_distill.cache")

KINDS: dict[str, list[str]] = {
    "sampled": ["cache.kind=sampled", "cache.k=8"],
    "draws": ["cache.kind=sampled", "cache.k=20", "cache.sampling=draws"],
    "topk": ["cache.kind=topk", "cache.k=8"],
    "full": ["cache.kind=full"],
    "hidden": ["cache.kind=hidden"],
}
SCRATCH = [
    *("student=mini_2m", "student.hidden_size=32", "student.intermediate_size=64"),
    *("student.num_layers=1", "student.num_heads=2", "student.num_kv_heads=1"),
]
SMALL = ["cache.kind=topk", "cache.k=8", "cache.shard_sequences=20", "cache.batch_size=8"]
"""A cache of a few shards."""


def cache_command(run_command: list[str]) -> list[str]:
    """What a run's command says of teacher and data, for the cache."""
    return [*(text for text in run_command if text.startswith(("teacher", "data"))), "precision=fp32", "num_threads=1"]


def cache_config(run_command: list[str], folder: Path, *more: str) -> CacheCommand:
    """The checked configuration of the cache command."""
    config = copy.deepcopy(checked((*cache_command(run_command), *more)))
    config.cache.dir = str(folder)
    return config


@functools.cache
def checked(command: tuple[str, ...]) -> CacheCommand:
    """The configuration of a command for some folder: composing it takes longer than a tiny build."""
    return load_config([*command, "cache.dir=somewhere"], "cache", CacheCommand)


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


def change_numbers(shard: Path, name: str, width: int, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    """The same for a column of numbers that are packed in `width` bits, of a cache with k = 8."""
    tokens = np.diff(np.load(shard / "starts.npy"))
    if (shard / "entries.npy").exists():
        entries = np.load(shard / "entries.npy").astype(np.int64)
        counts = {"counts": tokens * entries.shape[1], "ids": entries.sum(1), "head_levels": entries[:, 0]}[name]
    else:
        counts = tokens * 8
    pieces = np.split(np.load(shard / f"{name}.npy"), np.cumsum(packed_bytes(counts, width)))[:-1]
    numbers = unpack(pieces, counts, width)
    changed = change(numbers)
    parts = np.split(numbers if changed is None else changed, np.cumsum(counts))[:-1]
    change_column(shard, name, lambda _: np.concatenate([pack(part, width) for part in parts]))


class InMemory(Shard):
    """A shard of one sequence that was never written."""

    def __init__(self, columns: Columns, tokens: int) -> None:
        self._columns, self._starts = columns, {}
        self.starts, self.checksums = np.array([0, tokens]), np.zeros(1, dtype=np.uint32)


def read_back(kind: Kind, columns: Columns, tokens: int) -> Any:
    """The rows that a kind makes of the columns that it encoded, as if they had been written."""
    shard = InMemory(kind.pack(columns), tokens)
    kind.check(shard)
    return kind.decode(Reading([(shard, 0)]), torch.device("cpu")).rows(slice(None), kind.vocab_size)


def sign(folder: Path) -> None:
    """A manifest that fits what is there."""
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}))


def without(command: list[str], *groups: str) -> list[str]:
    """A command less the settings of these groups."""
    return [text for text in command if not text.startswith(groups)]


def live(command: list[str]) -> list[str]:
    """A student from scratch beside the live teacher."""
    return [*without(command, "student"), *SCRATCH]


def from_cache(command: list[str], folder: Path) -> list[str]:
    """The same without the teacher."""
    return [*without(command, "student", "teacher"), "teacher=cached", f"teacher.cache_dir={folder}", *SCRATCH]


def refused(body: Callable[[], object], kind: type[MiniDistillError] = CacheError) -> str:
    """The lines of an error, none of which may be split."""
    with pytest.raises(kind) as caught:
        body()
    lines = [str(problem) for problem in caught.value.problems]
    assert all("\n" not in line for line in lines)
    return "\n".join(lines)


def one_weight_changed(teacher: Path) -> None:
    """By one unit in the last place."""
    file = teacher / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(10.0))
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
