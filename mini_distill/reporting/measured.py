"""A measured folder as the report reads it: five files, each of which may be missing and none of which may be damaged."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..comparable import what_differs
from ..errors import ConfigError, StorageError
from ..folder_lock import is_abandoned
from ..redaction import redact
from ..storage import near_path
from ..written import read_object, read_rows, read_settings, remedy_for
from .places import place_of, without_paths

FROM_TRAINING = ("eval/", "before/", "control/", "train/", "data/")
"""Families of figures that a run measures itself; the others are taken from its `evaluation` folder where it has one."""


UNFINISHED = {
    "running": ("is still running", "Its figures are those up to here and will change."),
    "killed": ("was killed", "Its figures are those up to there; the same command takes it up again."),
    "preempted": ("was stopped", "Its figures are those up to there; the same command takes it up again."),
    "failed": ("failed", "Its figures are those up to there; the same command takes it up again."),
}
"""State of a run that did not come to its end -> how, and what can be done."""


@dataclass(frozen=True)
class Measured:
    """A run, or what `python -m mini_distill.evaluate` wrote.

    Attributes:
        path: The folder, as it was given.
        config: Its settings, as nested plain values; empty where there are none.
        status: `state`, `step`, … of a run; empty for an evaluation.
        summary: Every final number; null where one was not finite. Empty while a run is not finished.
        rows: What was logged, by step.
        details: `reliability`, `slices`, `differences`, `samples`, as far as they are there.
        evaluation: What was taken from the `evaluation` folder of a run and what was not, in words, or "".
        is_evaluated: Whether anything was.
        evaluator: The settings of the `evaluate` that measured it; empty where none did.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    evaluation: str = ""
    is_evaluated: bool = False
    evaluator: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called: its folder; for the `evaluation` of a run, the run's too."""
        path = self.path.resolve()
        return f"{path.parent.name}/{path.name}" if path.name == "evaluation" else path.name

    @property
    def place(self) -> str:
        """Where it is, short."""
        return place_of(self.path)

    @property
    def state(self) -> str:
        """running, killed, finished, preempted, failed; `measured` for an evaluation."""
        return str(self.status.get("state", "measured" if self.summary else "unknown"))

    @property
    def step(self) -> int:
        """How far it came: the last that was logged, since a status lags behind."""
        return max([int(finite(self.status.get("step")) or 0), *(row["step"] for row in self.rows)])

    @property
    def unfinished(self) -> str:
        """What became of a run that did not come to its end, in a sentence; "" of all others."""
        if self.state not in UNFINISHED:
            return ""
        of = (self.config.get("trainer") or {}).get("max_steps")
        how, what_now = UNFINISHED[self.state]
        why = without_paths(str(self.status.get("error") or ""))
        return f"{how} at step {self.step}{f' of {of}' if of else ''}{f' ({why})' if why else ''}. {what_now}"

    @property
    def seed(self) -> int | None:
        """Its seed, if it has a configuration."""
        return self.config.get("seed")

    @property
    def is_training(self) -> bool:
        """Whether it was trained here, and not only measured."""
        return "trainer" in self.config or bool(self.rows)

    def value(self, key: str) -> float | None:
        """A figure of the summary; None where it is missing or not finite."""
        return finite(self.summary.get(key))

    def curve(self, key: str) -> list[tuple[float, float]]:
        """What was logged of a metric: (step, value)."""
        return [(float(row["step"]), value) for row in self.rows if (value := finite(row.get(key))) is not None]


def finite(value: Any) -> float | None:
    """A number, as such; None for anything else, NaN and infinities."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def is_measured(path: Path) -> bool:
    """Whether a folder is a run or an evaluation, whatever it has come to."""
    return any((path / name).is_file() for name in ("status.json", "summary.json", "config.yaml"))


def open_measured(path: Path) -> Measured:
    """Read a folder.

    Raises:
        ConfigError: there is no such folder, or it holds nothing that a run or an evaluation leaves.
        StorageError: a file in it is damaged: which, and on what line.
    """
    if not path.is_dir():
        raise ConfigError(str(path), "no such folder", near_path(path) or "Give the output_dir of a run, of an evaluation or of a sweep.")
    if not is_measured(path):
        raise ConfigError(str(path), "neither a run nor an evaluation (no status.json, summary.json or config.yaml)", "Give an output_dir.")
    summary, details = read_object(path / "summary.json"), _details(path / "details.json")
    config, rows = _settings(path / "config.yaml"), read_rows(path / "metrics.jsonl")
    evaluator = {} if "trainer" in config else config
    return _with_evaluation(Measured(path, config, _status(path), summary, rows, details, evaluator=evaluator))


def check_something_is_measured(found: Measured) -> None:
    """Refuse what has no figure yet.

    Raises:
        ConfigError: nothing was logged.
    """
    if not found.summary and not found.rows:
        why = f": {error}" if (error := found.status.get("error")) else ""
        raise ConfigError(
            str(found.path), f"nothing has been logged yet (the run is {found.state}{why})", "Run its command again to finish it."
        )


def _with_evaluation(run: Measured) -> Measured:
    """A run with the further figures of its `evaluation` folder, unless that is older than the run's own or of something else.

    Figures on held-out text belong to those of the run where they are over as many tokens; what depends on no text always does.
    """
    folder = run.path / "evaluation"
    if not run.summary or not (folder / "summary.json").is_file():
        return run
    summary, details = read_object(folder / "summary.json"), _details(folder / "details.json")
    if reason := _why_not(run, folder):
        note = f"evaluation/ {reason} and is left out. Its own page: python -m mini_distill.report {shlex.quote(str(folder))}"
        return replace(run, evaluation=note)
    further = {key: value for key, value in summary.items() if not key.startswith(FROM_TRAINING)}
    tokens = [finite(figures.get("eval/tokens")) for figures in (run.summary, summary)]
    if tokens[0] == tokens[1]:
        further |= {key: value for key, value in summary.items() if key not in run.summary}
        note = "Speed, tasks, slices, calibration, differences and samples are those of evaluation/."
    else:
        details = {name: value for name, value in details.items() if name in ("tasks", "samples")}
        its_own, of_it = ("no" if size is None else f"{size:,.0f}" for size in tokens)
        note = "Speed, tasks and samples are those of evaluation/. "
        note += f"On held-out text it measured {of_it} tokens and the run {its_own}: figures there are the run's alone."
    taken = replace(run, summary=run.summary | further, details=run.details | details, evaluation=note, is_evaluated=True)
    return replace(taken, evaluator=_settings(folder / "config.yaml"))


def _why_not(run: Measured, folder: Path) -> str:
    """Why an evaluation is none of this run as it stands; "" where it is one."""
    if (folder / "summary.json").stat().st_mtime < (run.path / "summary.json").stat().st_mtime:
        return "is older than the run's own figures"
    settings = _settings(folder / "config.yaml")
    if not settings:
        return "does not say what it was measured on"
    differs = what_differs(run.config, settings)
    return f"was measured otherwise ({differs})" if differs else ""


# --------------------------------------------------------------------------------------------------------------------------- files


def _settings(file: Path) -> dict[str, Any]:
    """Without secrets once more: whoever gets the page may not be who has the folder."""
    redacted: dict[str, Any] = redact(read_settings(file))
    return redacted


def _status(folder: Path) -> dict[str, Any]:
    """A process that is killed has no time to say so: its status is still `running`, and its lock is there."""
    status = read_object(folder / "status.json")
    return status | {"state": "killed"} if status.get("state") == "running" and is_abandoned(folder) else status


Shape = Callable[[Any], bool]


def _objects_with(*lists: str) -> Shape:
    """A list of objects, which have lists of objects under these names."""

    def fits(value: Any) -> bool:
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            return False
        return all(_objects_with()(entry.get(name)) for entry in value for name in lists)

    return fits


def _by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_objects_with(), value.values()))


def _samples(value: Any) -> bool:
    return _objects_with()(value) and all(isinstance(sample.get("continuations"), dict) for sample in value)


def _tasks(value: Any) -> bool:
    return isinstance(value, dict) and _objects_with("groups")(list(value.values()))


SHAPES: Mapping[str, Shape] = {
    "reliability": _by_name,
    "slices": _by_name,
    "differences": _objects_with("tokens"),
    "samples": _samples,
    "tasks": _tasks,
    "device": lambda value: isinstance(value, str),
}


def _details(file: Path) -> dict[str, Any]:
    found = read_object(file)
    for name, fits in SHAPES.items():
        if name in found and not fits(found[name]):
            raise StorageError(str(file), f"'{name}' is not as this version writes it", remedy_for(file))
    return found


# -------------------------------------------------------------------------------------------------------------------------- settings


def leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full path and value of each setting: ("trainer.max_steps", 100). A mapping of a user's own, such as a mixture, is walked too."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
