"""Several runs beside each other: seeds together, what differs, quality against size and speed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..compare import NOT_COMPARED, gap_closed, has_teacher_signal, interval
from .charts import MOST_POINTS, Chart, Drawing, Series, draw, thinned
from .figures import Cell, Figure, Numbered, Table, count_text, factor, figure, percent_whole, signed_free, text_of
from .measured import Measured, leaves
from .run_page import CURVES, FEWEST_POINTS, has_objective
from .settings import WHERE_IT_RAN, differing, shown

COLOURS = 8
FEWER_POINTS = 40  # of a curve in grey, of which there may be hundreds
QUALITY = "eval/student_perplexity"
SAME_TEXT = ("data.num_workers", "data.cache_dir", "data.on_bad_row")
CLOSE = 1.05
"""Costs that differ by less than this factor are not worth a chart."""
METRICS = (
    ("held-out loss", "eval/student_nll"),
    ("perplexity", "eval/student_perplexity"),
    ("KL", "eval/forward_kl"),
    ("top-1 agreement", "eval/top1_agreement"),
    ("calibration error", "eval/student_ece"),
    ("gap closed", "control/gap_closed"),
    ("parameters", "model/student_parameters"),
    ("tokens read per s", "perf/student_tokens_per_second"),
    ("tokens written per s", "perf/student_generation_tokens_per_second"),
    ("steps", "train/steps"),
)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        number: From 1, as the page has it.
        name: Of its first run.
        members: The runs.
        controls: The control of each run, as far as it is among those given.
    """

    number: int
    name: str
    members: tuple[Measured, ...]
    controls: tuple[Measured | None, ...] = ()

    @property
    def style(self) -> str:
        """Its colour: one of eight; beyond them the same grey."""
        return f"run{self.number - 1}" if self.number <= COLOURS else "other"

    @property
    def seeds(self) -> str:
        """Those of its runs."""
        return ", ".join(str(member.seed) for member in self.members if member.seed is not None)

    def values(self, key: str) -> list[tuple[Measured, float]]:
        """A figure of each run that has it; the gap closed also where the control was trained apart."""
        found = []
        for member, control in zip(self.members, self.controls or [None] * len(self.members), strict=True):
            value = member.value(key)
            if value is None and key == "control/gap_closed" and control is not None:
                value = gap_closed(member.summary, control.summary)
            if value is not None:
                found.append((member, value))
        return found

    def mean(self, key: str) -> float | None:
        """Over its runs; None where no run has it."""
        values = [value for _, value in self.values(key)]
        return fmean(values) if values else None

    def figure(self, key: str) -> Figure | None:
        """The mean, ± half a 95 % confidence interval over seeds where there are several."""
        values = self.values(key)
        if not values:
            return None
        average = fmean(value for _, value in values)
        spread = ""
        if len(values) > 1 and not key.startswith(("model/", "train/")):
            half = interval([value for _, value in values])
            spread = f"± {text_of(key, half).removesuffix(' %')}"
        return Figure(text_of(key, average), key, average, "\n".join(str(member.path) for member, _ in values), spread)


def grouped(runs: Sequence[Measured]) -> list[Group]:
    """Runs of the same settings but for the seed together, in the order in which they were given."""
    by_settings: dict[str, list[Measured]] = {}
    controls = {_but_for(run, NOT_COMPARED) + str(run.seed): run for run in runs if _is_control(run)}
    for run in runs:
        own = str(run.path.resolve()) if not run.is_training else _but_for(run, ("seed", *WHERE_IT_RAN, "control"))
        by_settings.setdefault(own, []).append(run)
    return [
        Group(
            i,
            common_name([member.name for member in members]),
            tuple(members),
            tuple(controls.get(_but_for(run, NOT_COMPARED) + str(run.seed)) if not _is_control(run) else None for run in members),
        )
        for i, members in enumerate(by_settings.values(), start=1)
    ]


def common_name(names: Sequence[str]) -> str:
    """What the names of the runs of a group begin with alike: `small` of `small-seed=0` and `small-seed=1`."""
    if len(names) == 1:
        return names[0]
    return re.sub(r"([-_+. ]|seed|=)+$", "", os.path.commonprefix(list(names))) or names[0]  # noqa: RUF071 - letters are meant


def _but_for(run: Measured, keys: Sequence[str]) -> str:
    kept = {key: value for key, value in leaves(run.config) if not any(key == name or key.startswith(f"{name}.") for name in keys)}
    return json.dumps(kept, sort_keys=True, default=str)


def _is_control(run: Measured) -> bool:
    return has_objective(run.config) and not has_teacher_signal(run.config["objective"])


# ---------------------------------------------------------------------------------------------------------------------------- tables


def overview(groups: Sequence[Group], factors: Mapping[str, Sequence[str]] | None = None, first: str = "") -> Table:
    """All groups with their figures, and the teacher's, if it is one for all.

    Args:
        groups: In the order to show.
        factors: Columns of their own, which say enough to tell the groups apart: what was swept -> its value in each group.
        first: A metric that is shown before the others, whether or not it is one of the usual.
    """
    factors = factors or {}
    metrics = [*([(label_of(first), first)] if first else []), *(pair for pair in METRICS if pair[1] != first)]
    metrics = [(label, key) for label, key in metrics if any(group.values(key) for group in groups)]
    several = any(len(group.members) > 1 for group in groups)
    header = ["run", *map(last_part, factors), *(["seeds"] if several else []), *(label for label, _ in metrics)]
    rows: list[list[Cell]] = []
    for i, group in enumerate(groups):
        values: list[Cell] = [of_groups[i] for of_groups in factors.values()]
        seeds: list[Cell] = [group.seeds] if several else []
        figures = [group.figure(key) for _, key in metrics]
        rows.append([Numbered(group.number, "" if factors else group.name, group.style), *values, *seeds, *figures])
    if teacher := _teacher_row(groups, [key for _, key in metrics]):
        rows.append(["teacher", *[""] * (len(factors) + several), *teacher])
    note = "± is half a 95 % confidence interval over seeds (Student's t)." if several else "One seed each: no error bars."
    note += " Each run timed its speed by itself." if any("tokens_per_second" in key for _, key in metrics) else ""
    return Table(note, header, rows)


def label_of(key: str) -> str:
    """What a metric is called."""
    return next((label for label, known in METRICS if known == key), key)


def last_part(key: str) -> str:
    """`temperature` of `objective.temperature`: enough for a column."""
    return key.rpartition(".")[2]


def _teacher_row(groups: Sequence[Group], keys: Sequence[str]) -> list[Figure | None] | None:
    own = [key.replace("student_", "teacher_") for key in keys]
    first = groups[0].members[0]
    of_each = {member.value("eval/teacher_nll") for group in groups for member in group.members}
    cells = [figure(first, name) if name != key else None for name, key in zip(own, keys, strict=True)]
    return cells if any(cells) and len(of_each) == 1 else None


def text_differs(groups: Sequence[Group]) -> bool:
    """Whether the groups were measured on different held-out text, or on another part of it."""
    data = {key for key in differing([group.members[0] for group in groups]) if key.startswith("data.") and key not in SAME_TEXT}
    return bool(data) or len({group.mean("eval/tokens") for group in groups}) > 1


def settings_that_differ(groups: Sequence[Group]) -> Table | None:
    """The settings in which the groups differ."""
    found = {key: values for key, values in differing([group.members[0] for group in groups]).items() if key not in ("seed", "control")}
    names = [Numbered(group.number, group.name, group.style) for group in groups]
    rows: list[list[Cell]] = [[key, *(None if value is None else shown(value) for value in values)] for key, values in found.items()]
    return Table("Settings that differ", ["setting", *names], rows, numeric=False) if rows else None


# ---------------------------------------------------------------------------------------------------------------------------- charts

AGAINST = (
    ("Quality against size", "parameters", "model/{}_parameters"),
    ("Quality against the time to the first token", "time to the first token", "perf/{}_time_to_first_token"),
    ("Quality against writing speed", "tokens written per second", "perf/{}_generation_tokens_per_second"),
    ("Quality against reading speed", "tokens read per second", "perf/{}_tokens_per_second"),
)


def trade_offs(groups: Sequence[Group]) -> list[Drawing]:
    """Held-out perplexity against what a model costs; the teacher among the students.

    Times are over the teacher's of the same run where it was timed, since machines are not equally busy on all days. Students of one size
    cost the same, whatever was timed: of them nothing is drawn.
    """
    drawn = []
    alike = len({group.mean("model/student_parameters") for group in groups}) == 1
    for title, unit, template in AGAINST[: 0 if alike else None]:
        key, own = template.format("student"), template.format("teacher")
        relative = key.startswith("perf/") and all(member.value(own) for group in groups for member in group.members)
        spots = [(group, _cost(group, key, own if relative else None), group.mean(QUALITY)) for group in groups]
        known = [(group, cost, quality) for group, cost, quality in spots if cost and quality]
        if len(known) < FEWEST_POINTS or max(cost for _, cost, _ in known) < CLOSE * min(cost for _, cost, _ in known):
            continue
        text = factor if relative else lambda value, key=key: text_of(key, value)
        series = [_spot(group, (cost, quality), text(cost)) for group, cost, quality in known]
        x, y = 1.0 if relative else groups[0].mean(own), groups[0].mean("eval/teacher_perplexity")
        if x and y:
            series.append(Series("teacher", [(x, y)], "teacher", line=False, marks=True, labels=["teacher"]))
        label = f"{unit} ÷ the teacher's" if relative else unit
        keys = f"{key} {own} {QUALITY}" if relative else f"{key} {QUALITY}"
        x_text = signed_free if relative else text
        drawn.append(draw(Chart(title, label, "perplexity", series, keys, logarithmic=True, x_text=x_text, labelled=True)))
    return drawn


def _cost(group: Group, key: str, below: str | None) -> float | None:
    """The mean of a figure, or of its ratio to another of the same run."""
    values = [value / ((member.value(below) or math.nan) if below else 1.0) for member, value in group.values(key)]
    return fmean(values) if values else None


def _spot(group: Group, point: tuple[float, float], cost: str) -> Series:
    title = f"{group.number} {group.name}: perplexity {point[1]:.2f}, {cost}"
    return Series(str(group.number), [point], group.style, line=False, marks=True, titles=[title], labels=[str(group.number)])


def overlaid(groups: Sequence[Group]) -> list[Drawing]:
    """The curves of all runs in one chart a metric; of the runs beyond the eighth in grey, behind the others."""
    drawn = []
    for title, unit, keys, level_keys in CURVES:
        key = keys[0][0]
        series = []
        for group in groups:
            for member in group.members:
                points, _ = thinned(member.curve(key), MOST_POINTS if group.number <= COLOURS else FEWER_POINTS)
                if len(points) >= FEWEST_POINTS:
                    name = str(group.number) if group.number <= COLOURS else "others"
                    series.append(Series(name, points, group.style, marks=False))
        levels = [
            ("teacher", value, "teacher") for name, own in level_keys if name == "teacher" and (value := groups[0].mean(own)) is not None
        ]
        if len(series) >= FEWEST_POINTS:
            text = percent_whole if unit == "share of tokens" else signed_free
            drawn.append(draw(Chart(title, "optimizer step", unit, series, key, levels, x_text=count_text, y_text=text)))
    return drawn
