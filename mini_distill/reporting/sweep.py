"""A sweep: its runs ranked, what each swept setting did, and what is missing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from ..contract import did_you_mean
from ..errors import ConfigError, StorageError
from .charts import Chart, Drawing, Series, draw
from .comparison import Group, grouped
from .figures import text_of
from .measured import Measured, is_measured, open_measured
from .settings import command_of, differing, shown

BY_DEFAULT = "eval/student_nll"
HIGHER_IS_BETTER = re.compile(r"agreement|correlation|gap_closed|kl_reduction|tokens_per_second|distinct|^task/")
MOST_FACTORS = 12
_MOVED_ASIDE = re.compile(r"\.old-\d+$")
_LOST = 20_000  # characters at the end of a log that are searched for the error


@dataclass(frozen=True)
class Missing:
    """A run without the metric: its folder, what became of it, and why."""

    name: str
    state: str
    why: str


@dataclass(frozen=True)
class Factor:
    """Settings that were swept together.

    Attributes:
        keys: Their full paths; several where each value of one goes with one value of the other.
        values: In words, of each group.
        order: What the values are sorted by.
    """

    keys: tuple[str, ...]
    values: tuple[str, ...]
    order: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The first key, and how many go with it."""
        return self.keys[0] if len(self.keys) == 1 else f"{self.keys[0]} (and {len(self.keys) - 1} that go with it)"


@dataclass(frozen=True)
class Sweep:
    """What is in a sweep's folder.

    Attributes:
        path: The folder.
        metric: By which the runs are ranked.
        highest: Whether more of it is better.
        groups: Best first; runs that differ in the seed alone are one.
        missing: The others.
        factors: What was swept.
    """

    path: Path
    metric: str
    highest: bool
    groups: list[Group]
    missing: list[Missing]
    factors: list[Factor]

    @property
    def best(self) -> Group:
        """The first."""
        return self.groups[0]

    @property
    def command(self) -> str:
        """What trains the best again, as a shell takes it; "" where its settings are not known."""
        config = self.best.members[0].config
        return command_of(config) if "trainer" in config else ""


def runs_below(folder: Path) -> list[Path]:
    """The folders of runs in a folder, at any depth; none within a run, none that was moved aside for a new one."""
    found = []
    for inner in sorted(folder.iterdir()):
        if not inner.is_dir() or inner.is_symlink() or inner.name.startswith(".") or _MOVED_ASIDE.search(inner.name):
            continue
        found += [inner] if is_measured(inner) else runs_below(inner)
    return found


def is_sweep(path: Path) -> bool:
    """Whether a folder is no run and holds runs."""
    return path.is_dir() and not is_measured(path) and bool(runs_below(path))


def open_sweep(path: Path, metric: str | None = None) -> Sweep:
    """Read a sweep's folder.

    Args:
        path: The folder.
        metric: Of summary.json, by which the runs are ranked; None: the held-out loss.

    Raises:
        ConfigError: no run has the metric.
    """
    key = metric or BY_DEFAULT
    runs, missing = [], []
    for folder in runs_below(path):
        name = str(folder.relative_to(path))
        try:
            run = open_measured(folder)
        except StorageError as error:
            missing.append(Missing(name, "damaged", str(error)))
            continue
        if _is_control_of_a_job(folder, run):
            continue
        runs.append(run)
        if run.value(key) is None:
            missing.append(Missing(name, run.state, _why(run, key)))
    ranked = [run for run in runs if run.value(key) is not None]
    if not ranked:
        raise ConfigError(str(path), f"no run has '{key}' yet", _remedy(key, runs, missing))
    highest = bool(HIGHER_IS_BETTER.search(key))
    groups = sorted(grouped(ranked), key=lambda group: (group.mean(key) or 0.0) * (-1 if highest else 1))
    groups = [replace(group, number=i) for i, group in enumerate(groups, start=1)]
    return Sweep(path, key, highest, groups, missing, factors(groups))


def _is_control_of_a_job(folder: Path, run: Measured) -> bool:
    """`control=true` leaves `<job>-control` beside each job: a yardstick, no candidate."""
    return folder.name.endswith("-control") and is_measured(folder.with_name(folder.name.removesuffix("-control"))) and bool(run.config)


def _remedy(key: str, runs: Sequence[Measured], missing: Sequence[Missing]) -> str:
    known = sorted({name for run in runs for name in run.summary if run.value(name) is not None})
    if known:
        return did_you_mean(key, known) or f"Known: {', '.join(known)}."
    why = next((f"{entry.name}: {entry.why}" for entry in missing if entry.why), "")
    return f"Run the command again to finish the jobs{f' ({why})' if why else ''}."


def _why(run: Measured, key: str) -> str:
    """Why a run has no figure: its error, or how far it came."""
    if error := run.status.get("error") or _error_in_logs(run.path):
        return str(error)
    if run.summary:
        return f"no '{key}' in its summary"
    of = (run.config.get("trainer") or {}).get("max_steps")
    return f"at step {run.status.get('step', 0)}{f' of {of}' if of else ''}"


def _error_in_logs(folder: Path) -> str:
    """The last `error:` line of a job's logs, of those that ended before there was a status to write."""
    for log in sorted(folder.glob("*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace")[-_LOST:].splitlines()
        if errors := [line.strip() for line in lines if line.startswith("error:")]:
            return errors[-1].removeprefix("error:").strip()
    return ""


# -------------------------------------------------------------------------------------------------------------- swept settings


def factors(groups: Sequence[Group]) -> list[Factor]:
    """The settings that are not the same in all groups; those that always change together as one."""
    found = [(key, values) for key, values in differing([group.members[0] for group in groups]).items() if key not in ("seed", "control")]
    together: dict[tuple[int, ...], list[tuple[str, list[Any]]]] = {}
    for key, values in found:
        texts = [shown(value) for value in values]
        together.setdefault(tuple(texts.index(text) for text in texts), []).append((key, values))
    return [_factor(members) for members in together.values()]


def _factor(members: list[tuple[str, list[Any]]]) -> Factor:
    """Of settings that go together a number stands for all, since it has an order."""
    members = sorted(members, key=lambda member: not all(isinstance(value, int | float) for value in member[1]))
    values = members[0][1]
    return Factor(tuple(key for key, _ in members), tuple(map(shown, values)), tuple(map(_order, values)))


def _order(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float)
    return not is_number, float(value) if is_number else 0.0, shown(value)


def is_full_grid(sweep: Sweep) -> bool:
    """Whether each value of each factor was tried with all values of the others, so that means compare like with like."""
    return len(sweep.groups) == math.prod(len(set(factor.values)) for factor in sweep.factors)


def effects(sweep: Sweep) -> Iterator[Drawing]:
    """The metric by the value of each swept setting, one small chart each."""
    for factor in sweep.factors[:MOST_FACTORS]:
        of_group = [
            (order, text, group.mean(sweep.metric) or 0.0, group)
            for order, text, group in zip(factor.order, factor.values, sweep.groups, strict=True)
        ]
        of_group.sort(key=lambda entry: entry[0])
        names = [text for (_, text), _ in groupby(entry[:2] for entry in of_group)]
        each = Series(
            "each run",
            [(float(names.index(text)), value) for _, text, value, _ in of_group],
            "other",
            line=False,
            marks=True,
            titles=[f"{group.number} {group.name}: {text_of(sweep.metric, value)}" for _, _, value, group in of_group],
        )
        means = [(float(i), fmean(value for _, text, value, _ in of_group if text == name)) for i, name in enumerate(names)]
        average = Series("mean", means, "student", marks=True)
        text = lambda value: text_of(sweep.metric, value)  # noqa: E731
        yield draw(Chart(factor.name, factor.keys[0], sweep.metric, [each, average], sweep.metric, categories=names, y_text=text))
