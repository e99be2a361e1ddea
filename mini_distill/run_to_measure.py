"""The settings of a verb that is about a run: its student, teacher and data, unless the command line says otherwise."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .comparable import OF_THE_MACHINE
from .contract import as_it_stands, shown
from .errors import ConfigError
from .written import read_object, read_settings, remedy_for

HOW_A_RUN_MEASURES = {"seed": "seed", "precision": "trainer.precision", "num_threads": "trainer.num_threads"}
"""Settings that are the run's, so that its figures come out again, and their names there."""
HOW_MUCH_IT_MEASURES = ("evaluation.max_batches", "evaluation.batch_size")
"""The same over its own text: together they say which sequences are measured."""

logger = logging.getLogger(__name__)


def with_settings_of_run(composed: DictConfig, overrides: Sequence[str], results: str) -> DictConfig:
    """Where `model` is the folder of a run: its student, its teacher and data, and, for a verb that measures, its way of measuring.

    What the command line says goes first: `data=…` and `teacher=…` replace the run's whole group, `data.seq_len=…` one setting of it.

    Args:
        composed: The settings of the verb.
        overrides: Its command line.
        results: The folder within the run for what comes out.

    Raises:
        ConfigError: the run has no student yet, or wants to be trusted.
    """
    run = Path(str(OmegaConf.select(composed, "model", throw_on_missing=False))).expanduser()
    if not (run / "config.yaml").is_file():
        return composed
    if not (run / "student" / "config.json").is_file():
        raise ConfigError("model", f"the run '{run}' has no student yet", "Run its command again to finish it.")
    if (state := read_object(run / "status.json").get("state", "finished")) != "finished":
        logger.warning("%s: its status is '%s', so this is about the student of an earlier end of the run", run, state)
    of_run = _groups_of(run / "config.yaml")
    given = {text.lstrip("+~").partition("=")[0] for text in overrides}
    for group in {"teacher", "data"} - given:
        composed[group] = _with_overrides(group, of_run.get(group, {}), composed, given)
    if "teacher" not in given:
        _check_trusted(composed.teacher, run / "config.yaml", given)
    if "evaluation" in composed:
        _measure_alike(composed, of_run, given)
    composed["model"] = str(run / "student")
    if composed.get("output_dir") is None and not _changes(given, "data") and not _changes(given, "teacher"):
        composed["output_dir"] = str(run / results)
    return composed


def _groups_of(file: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        ConfigError: what should be a group of settings is none.
    """
    found = read_settings(file)
    for group in ("teacher", "data", "evaluation", "trainer"):
        if not isinstance(found.get(group, {}), dict):
            raise ConfigError(str(file), f"got {shown(found[group])} for {group}, expected a group of settings", remedy_for(file))
    return found


def _with_overrides(group: str, of_run: Mapping[str, Any], composed: DictConfig, given: Collection[str]) -> DictConfig:
    """A group of the run, with those of its settings that the command line names as they stand in `composed`."""
    merged = OmegaConf.create({group: as_it_stands(of_run)})
    if group == "teacher" and of_run.get("kind") != "cached":
        merged.teacher.cache_dir = merged.teacher.cache_kind = merged.teacher.cache_k = None  # the live teacher stood beside the cache
    for key in sorted(key for key in given if key.startswith(f"{group}.")):
        value: Any = OmegaConf.to_container(composed)  # not resolved: what `${…}` refers to may be a setting of the run
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        OmegaConf.update(merged, key, value, merge=False, force_add=True)
    result: DictConfig = merged[group]
    return result


def _measure_alike(composed: DictConfig, of_run: dict[str, Any], given: Collection[str]) -> None:
    """Give `composed` the run's settings that its figures depend on, but for those that the command line names."""
    alike = HOW_A_RUN_MEASURES | ({} if _changes(given, "data") else dict(zip(HOW_MUCH_IT_MEASURES, HOW_MUCH_IT_MEASURES, strict=True)))
    settings = OmegaConf.create(as_it_stands(of_run))
    for key, its_name in alike.items():
        if key not in given and (value := OmegaConf.select(settings, its_name)) is not None:
            OmegaConf.update(composed, key, value, force_add=True)


def _changes(given: Collection[str], group: str) -> bool:
    """Whether the command line makes another text or another teacher of the run's."""
    return any(
        key == group or (key.startswith(f"{group}.") and key.removeprefix(f"{group}.") not in OF_THE_MACHINE[group]) for key in given
    )


def _check_trusted(teacher: DictConfig, file: Path, given: Collection[str]) -> None:
    """A run may be anybody's: what its settings cannot decide is whose code is run here, and who is shown a key.

    Raises:
        ConfigError: they would.
    """
    remedy = "If you trust it, give teacher=… with its settings in the command."
    if teacher.get("trust_remote_code") and "teacher.trust_remote_code" not in given:
        raise ConfigError("teacher.trust_remote_code", f"{file} asks to run code from the repository of '{teacher.get('path')}'", remedy)
    if teacher.get("kind") == "server" and os.environ.get("MINI_DISTILL_API_KEY") and "teacher.url" not in given:
        raise ConfigError("teacher.url", f"{file} asks to show the key in MINI_DISTILL_API_KEY to {teacher.get('url')}", remedy)
