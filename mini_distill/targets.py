"""Which cache a run with `teacher.cache_kind` trains from: it and all runs with the same teacher and data have one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from .config import CacheCommand, CacheConfig, Config
from .storage import user_cache

NEUTRAL = (
    *("teacher.device", "teacher.gated", "teacher.cache_dir", "teacher.cache_k"),  # the last one is cache.k here
    *("data.cache_dir", "data.num_workers", "cache.dir", "num_threads"),
)
"""Settings on which no target depends."""


def cache_command(config: Config) -> CacheCommand:
    """What `python -m mini_distill.cache` would be told to write the targets of this run."""
    assert config.teacher.cache_kind is not None
    teacher = config.teacher
    live = dataclasses.replace(teacher, cache_kind=None, cache_dir=None, cache_k=None)
    temperature = 1.0 if teacher.cache_kind in ("full", "hidden") else config.objective.temperature  # these hold at any
    cache = CacheConfig(dir=teacher.cache_dir, kind=str(teacher.cache_kind), k=teacher.cache_k or CacheConfig().k, temperature=temperature)
    return CacheCommand(live, config.data, cache, config.trainer.precision, config.trainer.num_threads)


def default_folder(command: CacheCommand) -> Path:
    """Where these targets are looked for, if no folder is named: the same settings in the same place, the same folder.

    What it holds is compared with the run in any case, weights and rows too.
    """
    settings = _leaves(dataclasses.asdict(command)) | {"": str(Path.cwd())}  # paths are relative to it
    decisive = {key: value for key, value in settings.items() if key not in NEUTRAL}
    return user_cache() / "targets" / hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _leaves(settings: dict[str, Any]) -> dict[str, Any]:
    groups = {key: value for key, value in settings.items() if isinstance(value, dict)}
    return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()} | {
        key: value for key, value in settings.items() if key not in groups
    }
