"""A sweep: its runs ranked, what each swept setting did, and what is missing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..contract import did_you_mean
from ..errors import ConfigError, StorageError
from ..evaluation.table import percent
from ..overrides import GROUPS
from ..sweep import how_it_ended, jobs_of
from .charts import Chart, Drawing, Series, draw
from .comparison import Group, grouped, label_of
from .figures import HIGHER_IS_BETTER, signed_free, text_of, unit_of
from .measured import Measured, finite, is_measured, open_measured
from .places import place_of, without_paths
from .settings import command_of, differing, preset_of, shown_apart, with_short_paths, written

BY_DEFAULT, PERPLEXITY = "eval/student_nll", "eval/student_perplexity"
MOST_COLUMNS = 4  # of swept settings in the ranking
MOST_FACTORS = 12
MOST_VALUES = 8  # that are places on an axis; more are an axis of numbers
WIDE = 20  # from the lowest to the highest value of a logarithmic axis
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
    """What was swept: a setting, or the preset of a group.

    Attributes:
        key: Its full path, or the group's name.
        values: In words, of each group of runs.
        order: What the values are sorted by: numbers first, as numbers.
    """

    key: str
    values: tuple[str, ...]
    order: tuple[tuple[bool, float, str], ...]

    @property
    def numbers(self) -> list[float]:
        """The values, if all are numbers."""
        return [] if any(is_text for is_text, _, _ in self.order) else [number for _, number, _ in self.order]


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
    def place(self) -> str:
        """Where it is, short."""
        return place_of(self.path)

    @property
    def best(self) -> Group:
        """The first."""
        return self.groups[0]

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Swept setting -> its value in each group; where they are too many for a table, the folders' names have to do."""
        return {factor.key: factor.values for factor in self.factors} if len(self.factors) <= MOST_COLUMNS else {}

    @property
    def best_settings(self) -> str:
        """What tells the best from the others."""
        return ", ".join(f"{key} = {values[0]}" for key, values in self.columns.items())

    @property
    def command(self) -> str:
        """What trains the best again, as a shell takes it; "" where its settings are not known."""
        config = self.best.members[0].config
        return command_of(config) if "trainer" in config else ""

    @property
    def command_to_pass_on(self) -> str:
        """The same with short paths, which tell nobody whose machine it was."""
        config = self.best.members[0].config
        return command_of(with_short_paths(config)) if "trainer" in config else ""


def runs_below(folder: Path) -> list[Path]:
    """The folders of runs in a folder, at any depth; none within a run, none that was moved aside for a new one."""
    found = []
    for inner in sorted(folder.iterdir()):
        if not inner.is_dir() or inner.is_symlink() or inner.name.startswith(".") or _MOVED_ASIDE.search(inner.name):
            continue
        found += [inner] if is_measured(inner) else runs_below(inner)
    return found


def _never_began(folder: Path) -> Iterator[Missing]:
    """Jobs that ended before they were runs: folders with a log that says why."""
    inner = [path for path in sorted(folder.rglob("*.log")) if not any(map(is_measured, path.parents))]
    for path in dict.fromkeys(log.parent for log in inner):
        if why := _error_in_logs(path):
            yield Missing(str(path.relative_to(folder)), "failed", without_paths(why))


def is_sweep(path: Path) -> bool:
    """Whether a folder is no run and holds runs."""
    return path.is_dir() and not is_measured(path) and bool(runs_below(path))


def open_sweep(path: Path, metric: str | None = None) -> Sweep:
    """Read a sweep's folder.

    Args:
        path: The folder.
        metric: Of summary.json, by which the runs are ranked; None: that by which they chose their own best.

    Raises:
        ConfigError: no run has the metric.
    """
    runs, missing = [], list(_never_began(path))
    for folder in runs_below(path):
        name = str(folder.relative_to(path))
        try:
            run = open_measured(folder)
        except StorageError as error:
            missing.append(Missing(name, "damaged", without_paths(str(error))))
            continue
        if _is_control_of_a_job(folder, run):
            continue
        runs.append(run)
    key, highest = _chosen_by(runs, metric)
    missing += [Missing(str(run.path.relative_to(path)), run.state, _why(run, key)) for run in runs if run.value(key) is None]
    ranked = [run for run in runs if run.value(key) is not None]
    if not ranked:
        raise ConfigError(str(path), f"no run has '{key}' yet", _remedy(key, runs, missing))
    groups = sorted(grouped(ranked), key=lambda group: (group.mean(key) or 0.0) * (-1 if highest else 1))
    groups = [replace(group, number=i, label="") for i, group in enumerate(groups, start=1)]
    return Sweep(path, key, highest, groups, missing, factors(groups))


def _chosen_by(runs: Sequence[Measured], metric: str | None) -> tuple[str, bool]:
    """The metric, and whether more of it is better: `evaluation.best_metric` and `best_is`, where all runs agree.

    For a perplexity its logarithm, the held-out loss, which puts runs in the same order and has better means over seeds.
    """
    choices = {(own["best_metric"], own["best_is"]) for run in runs if (own := run.config.get("evaluation", {})).get("best_metric")}
    best_metric, best_is = choices.pop() if len(choices) == 1 else (PERPLEXITY, "lowest")
    if metric is None and (best_metric, best_is) == (PERPLEXITY, "lowest"):
        return BY_DEFAULT, False
    if metric is None or metric == best_metric:
        return best_metric, best_is == "highest"
    return metric, bool(HIGHER_IS_BETTER.search(metric))


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
        return without_paths(str(error))
    if run.summary:
        return f"no '{key}' in its summary"
    of = (run.config.get("trainer") or {}).get("max_steps")
    return f"{_killed(run.path)}at step {run.step}{f' of {of}' if of else ''}"


def _killed(job: Path) -> str:
    """By which signal, where that is how a job of a sweep ended last."""
    codes = {entry["folder"]: entry["exit_code"] for entry in jobs_of(job.parent)}
    code = codes.get(job.name, 0)
    return f"{how_it_ended(code)} " if code < 0 else ""


def _error_in_logs(folder: Path) -> str:
    """The last `error:` line of a job's logs, of those that ended before there was a status to write."""
    for log in sorted(folder.glob("*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace")[-_LOST:].splitlines()
        if errors := [line.strip() for line in lines if line.startswith("error:")]:
            return errors[-1].removeprefix("error:").strip()
    return ""


# -------------------------------------------------------------------------------------------------------------- swept settings


def factors(groups: Sequence[Group]) -> list[Factor]:
    """What is not the same in all groups: presets, and the settings that no preset explains."""
    runs = [group.members[0] for group in groups]
    found = {key: values for key, values in differing(runs).items() if key not in ("seed", "control")}
    chosen = []
    for name in GROUPS:
        presets = [preset_of(run.config, name) for run in runs]
        explained = [key for key, values in found.items() if key.startswith(f"{name}.") and _follows(values, presets)]
        if len(set(presets)) > 1 and len(explained) > 1:
            sizes = [group.mean("model/student_parameters") or 0.0 for group in groups]
            chosen.append(
                Factor(
                    name, tuple(map(str, presets)), tuple((True, size, str(preset)) for size, preset in zip(sizes, presets, strict=True))
                )
            )
            found = {key: values for key, values in found.items() if key not in explained}
    return chosen + [Factor(key, tuple(shown_apart(values)), tuple(map(_order, values))) for key, values in found.items()]


def _follows(values: Sequence[Any], presets: Sequence[str | None]) -> bool:
    """Whether the preset decides the value."""
    return len({(preset, written(value)) for preset, value in zip(presets, values, strict=True)}) == len(set(presets))


def _order(value: Any) -> tuple[bool, float, str]:
    number = finite(value)
    return number is None, number or 0.0, written(value)


def is_full_grid(sweep: Sweep) -> bool:
    """Whether each value of each factor was tried with all values of the others, so that means compare like with like."""
    return not sweep.missing and len(sweep.groups) == math.prod(len(set(factor.values)) for factor in sweep.factors)


def effects(sweep: Sweep) -> list[Drawing]:
    """The metric by the value of each factor, one small chart each."""
    return [_effect(sweep, factor) for factor in sweep.factors[:MOST_FACTORS]]


def _effect(sweep: Sweep, factor: Factor) -> Drawing:
    metric = [group.mean(sweep.metric) or 0.0 for group in sweep.groups]
    titles = [f"{group.number} {group.name}: {text_of(sweep.metric, value)}" for group, value in zip(sweep.groups, metric, strict=True)]
    y_text = percent if text_of(sweep.metric, metric[0]).endswith("%") else signed_free
    label = "\n".join(filter(None, (label_of(sweep.metric), unit_of(sweep.metric))))  # in one line it is longer than the axis
    names = [text for _, text in sorted(set(zip(factor.order, factor.values, strict=True)))]
    if len(names) > MOST_VALUES and factor.numbers:  # as a random search has them: no two alike, so there is nothing to average
        each = Series("each run", list(zip(factor.numbers, metric, strict=True)), "student", line=False, marks=True, titles=titles)
        wide = min(factor.numbers) > 0 and max(factor.numbers) > WIDE * min(factor.numbers)
        return draw(Chart(factor.key, factor.key, label, [each], sweep.metric, logarithmic=wide, y_text=y_text))
    places = [float(names.index(text)) for text in factor.values]
    each = Series("each run", list(zip(places, metric, strict=True)), "other", line=False, marks=True, titles=titles)
    means = [(float(i), fmean(y for x, y in zip(places, metric, strict=True) if x == i)) for i in range(len(names))]
    mean = Series("mean", means, "student", line=bool(factor.numbers), marks=True)  # names have no order to be joined in
    return draw(Chart(factor.key, factor.key, label, [mean, each], sweep.metric, categories=names, y_text=y_text))
