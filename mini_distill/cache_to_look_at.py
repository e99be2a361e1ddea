"""The settings with which a cache is looked at (`verify`, `info`): its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .config import CacheConfig
from .contract import shown
from .errors import CacheError, Problem
from .teachers.cache_identity import read_description


def with_settings_of_cache(composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """What the cache in `cache.dir` is, where the command line does not say it.

    Raises:
        CacheError: the command line says otherwise; one problem for each setting.
    """
    folder = Path(str(OmegaConf.select(composed, "cache.dir"))).expanduser()
    try:
        of_cache = read_description(folder)["identity"]["cache"]
    except CacheError:
        return composed  # said where it is opened
    keys = {text.lstrip("+~").partition("=")[0] for text in overrides}
    given = {name: value for name, value in composed.cache.items() if f"cache.{name}" in keys or not _is_default(name, value)}
    if wrong := [name for name, value in of_cache.items() if given.get(name, value) != value]:
        remedy = "Leave it out, or give the folder of another cache."
        raise CacheError.from_problems(
            Problem(f"{folder}: cache.{name}", f"the cache has {shown(of_cache[name])}, this run {shown(given[name])}", remedy)
            for name in wrong
        )
    OmegaConf.update(composed, "cache", of_cache, force_add=True)
    return composed


def _is_default(name: str, value: Any) -> bool:
    return getattr(CacheConfig(), name, None) == value  # else a preset has set it
