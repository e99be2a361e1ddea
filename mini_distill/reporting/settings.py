"""Settings: how they differ from the defaults and between runs, and the command that gives them."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..cli import config_dir
from ..config import Config
from ..overrides import GROUPS, override
from .figures import Cell, Table
from .measured import Measured, leaves
from .places import KEPT, short_path, without_paths

WHERE_IT_RAN = ("output_dir", "resume", "resume_allow", "debug", "tracking", "trainer.num_threads", "trainer.stuck_after")
"""Settings that say nothing about what a run computes."""


def written(value: Any) -> str:
    """A value as YAML has it, in a line."""
    if isinstance(value, dict | list | bool) or value is None:
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def shown(value: Any, kept: int = KEPT) -> str:
    """The same, of absolute paths the last parts."""
    text = written(value)
    return short_path(text, kept) if isinstance(value, str) else without_paths(text, kept)


def shown_apart(values: Sequence[Any]) -> list[str]:
    """Values beside each other: of paths as many parts as tell them apart."""
    longest = max(len(written(value)) for value in values)
    texts = ([shown(value, kept) for value in values] for kept in range(KEPT, longest + KEPT + 1))
    return next(row for row in texts if len(set(row)) == len(set(map(written, values))))


def settings_tables(found: Measured) -> tuple[Table, Table] | None:
    """What differs from the default, with it beside; and all the rest. None without a configuration."""
    if not found.config:
        return None
    usual = default_settings("train" if "trainer" in found.config else "evaluate")
    own = dict(leaves(found.config))
    changed: list[list[Cell]] = [
        [key, shown(value), shown(usual[key]) if key in usual else None] for key, value in own.items() if usual.get(key) != value
    ]
    rest: list[list[Cell]] = [[key, shown(value)] for key, value in own.items() if key in usual and usual[key] == value]
    return (
        Table("Settings that are not the default", ["setting", "here", "default"], changed, numeric=False),
        Table("As by default", ["setting", "value"], rest, numeric=False),
    )


@cache
def default_settings(verb: str) -> dict[str, Any]:
    """What a bare command of a verb would run with, by full path, but for `output_dir`."""
    from ..cli import load_config
    from ..config import EvaluateCommand

    config = load_config() if verb == "train" else EvaluateCommand()
    return dict(leaves(dataclasses.asdict(config) | {"output_dir": None}))


def differing(runs: Sequence[Measured]) -> dict[str, list[Any]]:
    """Full path -> the value in each run (None where it has none), for the settings that are not the same in all."""
    of_each = [{key: value for key, value in leaves(run.config) if not _covered(key)} for run in runs]
    keys = dict.fromkeys(key for settings in of_each for key in settings)
    values = {key: [settings.get(key) for settings in of_each] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row) and not _is_told_below(key, row, keys)}


def _is_told_below(key: str, row: Sequence[Any], keys: Iterable[str]) -> bool:
    """Whether a mapping is only empty or not, and what it holds where it is not has lines of its own."""
    return all(value in (None, {}) for value in row) and any(other.startswith(f"{key}.") for other in keys)


def _covered(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in WHERE_IT_RAN)


def with_short_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which each absolute path is short."""
    return {key: with_short_paths(value) if isinstance(value, Mapping) else _with_short_path(value) for key, value in settings.items()}


def _with_short_path(value: Any) -> Any:
    return short_path(value) if isinstance(value, str) else value


# -------------------------------------------------------------------------------------------------------------------- the command


def command_of(config: Mapping[str, Any]) -> str:
    """The command that trains with these settings: the nearest preset of each group, then what differs from it."""
    usual = dataclasses.asdict(Config())
    chosen = []
    for group in GROUPS:
        names = presets(group)
        name = _nearest(config.get(group, {}), usual[group], names, _default_preset(group))
        if name is None:
            continue
        usual[group] = merged(usual[group], names[name])
        if name != _default_preset(group):
            chosen.append(f"{group}={name}")
    wanted, given = dict(_settings(config)), dict(_settings(usual))
    changed = [override(key, value) for key, value in wanted.items() if not _covered(key) and given.get(key) != value]
    return " ".join(["python -m mini_distill.train", *chosen, *map(shlex.quote, changed)])


def preset_of(config: Mapping[str, Any], group: str) -> str | None:
    """The preset from which the fewest settings of a group differ."""
    return _nearest(config.get(group) or {}, dataclasses.asdict(Config())[group], presets(group), _default_preset(group))


def _settings(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings of the contract: mappings of the user's own stay whole."""
    return [(f"{group}.{name}", value) for group in GROUPS for name, value in config.get(group, {}).items()] + [
        (name, value) for name, value in config.items() if name not in GROUPS
    ]


@cache
def presets(group: str) -> dict[str, dict[str, Any]]:
    """The presets that only set keys of their own group."""
    import yaml

    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted((Path(config_dir()) / group).glob("*.yaml"))}
    found = {name: yaml.safe_load(text) or {} for name, text in texts.items() if "@package" not in text}
    return {name: values for name, values in found.items() if "defaults" not in values}


@cache
def _default_preset(group: str) -> str | None:
    import yaml

    lines: Any = yaml.safe_load((config_dir() / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    return next((str(line[group]) for line in lines if isinstance(line, dict) and group in line), None)


def _nearest(own: Mapping[str, Any], usual: Mapping[str, Any], names: Mapping[str, Mapping[str, Any]], default: str | None) -> str | None:
    def distance(name: str) -> tuple[int, bool, int]:
        """What differs from it; of several as near, the default; then the one that sets the least that has to be set anew."""
        given = merged(usual, names[name])
        anew = sum(own.get(key) != value for key, value in names[name].items())
        return sum(given.get(key) != value for key, value in own.items()), name != default, anew

    def possible(name: str) -> bool:
        """An override adds to a mapping that a preset brings, and takes nothing from it."""
        return all(own.get(key) == value for key, value in names[name].items() if isinstance(value, Mapping) and value)

    return min(filter(possible, names), key=distance, default=None)


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes, mappings key by key."""
    whole = dict(settings)
    for key, value in changes.items():
        whole[key] = merged(whole[key], value) if isinstance(value, Mapping) and isinstance(whole.get(key), Mapping) else value
    return whole
