"""What stands on a command line: `group=preset` and `key=value`, read, checked and made ready for Hydra, all problems together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .config import Config
from .contract import did_you_mean
from .errors import ConfigError, Problem

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

GROUPS = [f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory)]
"""Groups of the contract: one preset of each is always chosen. `experiment`, and a user's own groups, may be left out."""

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+*@-]*")  # a text that Hydra takes without quotes


def prepare_overrides(overrides: Sequence[str], folders: Sequence[Path], sweep: bool = False) -> list[str]:
    """The overrides as Hydra should see them: every key as "add or override" (`++key=value`).

    Hydra stops at the first key that no YAML mentions; so it composes, and `build_config` reports all unknown keys together.

    Args:
        overrides: `group=preset`, `key=value`, `~key`.
        folders: Where presets are looked up.
        sweep: Whether several values (`key=a,b`) are meant.

    Raises:
        ConfigError: one problem for each override that cannot be read and each preset that is not there.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    prepared, problems = [], []
    for text in overrides:
        try:
            override = parser.parse_override(text if not _is_path(text) else _as_text(*text.split("=", 1)))
        except HydraException:
            problems.append(_unreadable(text))
            continue
        problems += _problems(override, folders, sweep)
        prepared.append(_add_or_override(override, folders))
    if problems:
        raise ConfigError.from_problems(problems)
    return prepared


def fixed_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that have one value in all jobs of a sweep, of overrides that `prepare_overrides` gave."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [override.key_or_group for override in parsed if not override.is_sweep_override()]


def _unreadable(text: str) -> Problem:
    key, equals, value = text.partition("=")
    if not equals or not key:
        return Problem("command line", f"got '{text}', expected group=preset or key=value", "--help lists them.")
    if value.startswith(("[", "{")):
        return Problem(key, f"cannot read '{value}'", "A list is [a,b], a mapping is {name: value}.")
    return Problem(key, f"cannot read '{value}'", f"Quote a text of special characters: {_quoted(key, value)}.")


def _is_path(text: str) -> bool:
    """Whether a value is a path with `=` in it, as the folders of runs have: `model=runs/seed=1`. Hydra wants it quoted."""
    return re.fullmatch(r"\+{0,2}[\w.]+=[\w.~+-]*/[\w./~+-]*=[\w./~+=-]*", text) is not None


def _as_text(key: str, value: str) -> str:
    """As Hydra takes a text of any characters."""
    text = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{text}"'


def override(key: str, value: object) -> str:
    """`key=value` in Hydra's grammar, before the shell's quotes; the value may be a list or a mapping."""
    return f"{key}={_in_grammar(value)}"


def _in_grammar(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_in_grammar(key)}: {_in_grammar(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_in_grammar, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    if _PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" + m[2] if m[2] else ""), value) + '"'


def _quoted(key: str, value: str) -> str:
    """As a shell takes it, and Hydra after the shell."""
    return shlex.quote(_as_text(key, value))


def _problems(override: Override, folders: Sequence[Path], sweep: bool) -> Iterator[Problem]:
    key, value = override.key_or_group, (override.input_line or "").partition("=")[2]
    if not key:
        yield _unreadable(override.input_line or "")
    elif override.is_delete() and key in GROUPS:
        presets = _presets(key, folders)
        remedy = f"Choose {key}=none." if "none" in presets else f"Choose one of {', '.join(presets)}."
        yield Problem(key, "cannot be left out (got '~')", remedy)
    elif override.is_sweep_override() and not sweep:
        yield Problem(key, f"got several values ({value}), expected one", f"Sweep with -m, or quote a text: {_quoted(key, value)}.")
    elif _is_group(key, folders) and not override.is_delete():
        yield from (missing_preset(key, name, _presets(key, folders)) for name in _chosen(override) if not _exists(key, name, folders))


PLUGINS = {"hydra/launcher=joblib", "hydra/launcher=submitit_local", "hydra/launcher=submitit_slurm", "hydra/sweeper=optuna"}
"""What the extra mini_distill[sweep] adds to Hydra."""


def missing_preset(group: str, name: str | None, presets: Sequence[str]) -> Problem:
    """No such preset: which there are, and the nearest."""
    what = f"no preset '{name}'" if name else "got no preset's name"
    if f"{group}={name}" in PLUGINS:
        return Problem(f"{group}={name}", "not installed", "pip install 'mini_distill[sweep]'.")
    return Problem(group, f"{what} (choices: {', '.join(presets)})", did_you_mean(name or "", list(presets)))


def _chosen(override: Override) -> list[str | None]:
    """The presets an override names; none where a sweep computes them."""
    from hydra.core.override_parser.types import ChoiceSweep

    value = override.value()
    if isinstance(value, ChoiceSweep):
        value = value.list
    elif override.is_sweep_override():
        return []
    return [None if name is None else str(name) for name in (value if isinstance(value, list) else [value])]


def _exists(group: str, name: str | None, folders: Sequence[Path]) -> bool:
    if name is None:  # `group=null`: left out
        return group not in GROUPS
    return bool(name) and any((folder / group / f"{name}.yaml").is_file() for folder in folders)


def _presets(group: str, folders: Sequence[Path]) -> list[str]:
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _is_group(key: str, folders: Sequence[Path]) -> bool:
    return key in GROUPS or any((folder / key).is_dir() for folder in folders)


def _add_or_override(override: Override, folders: Sequence[Path]) -> str:
    text, key = override.input_line or "", override.key_or_group
    if override.is_delete() or key.startswith(("hydra.", "hydra/")):
        return text
    if _is_group(key, folders):
        return text.lstrip("+") if key in (*GROUPS, "experiment", "sweep") else text  # the defaults list has chosen these already
    return "++" + text.lstrip("+")


def run_name(overrides: Sequence[str]) -> str:
    """A folder name for these overrides: the same command finds its run again, another command gets another run."""
    ignored = ("output_dir=", "resume=", "resume_allow=", "debug=", "tracking", "hydra")
    last_of_each = {text.lstrip("+").partition("=")[0]: text.lstrip("+") for text in overrides}  # as Hydra has it: the last one counts
    kept = sorted(text for text in last_of_each.values() if not text.startswith(ignored))
    if not kept:
        return "default"
    name = "+".join(kept)
    if len(name) <= 100 and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*[A-Za-z0-9_=]", name) and name.count("+") == len(kept) - 1:
        return name
    readable = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", name).strip("-.")[:90]
    return f"{readable}-{hashlib.sha256(repr(kept).encode()).hexdigest()[:8]}"  # the hash keeps different commands apart
