"""Several runs beside each other: seeds together, what differs, quality against size and speed."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ..compare import against_control, has_teacher_signal, interval, objective_text, shared_with_control
from ..evaluation.table import percent
from .charts import MOST_POINTS, Chart, Drawing, Series, draw, thinned
from .figures import Cell, Figure, Numbered, Table, better, count_text, factor, figure, signed_free, text_of
from .measured import Measured, finite, leaves
from .run_page import CURVES, FEWEST_POINTS, NOT_TRAINING_LOSS, ends_alone, has_objective
from .settings import WHERE_IT_RAN, differing, shown_apart

COLOURS = 8
FEWER_POINTS = 40  # of a curve in grey, of which there may be hundreds
QUALITY = "eval/student_perplexity"
SAME_TEXT = ("data.num_workers", "data.cache_dir", "data.on_bad_row")
CLOSE = 1.05
"""Costs that differ by less than this factor are not worth a chart."""
GAP = "control/gap_closed"
NOT_THE_LOSS = "objective.logits_memory_mib"
QUALITIES = (
    ("held-out loss", "eval/student_nll"),
    ("perplexity", "eval/student_perplexity"),
    ("KL", "eval/forward_kl"),
    ("top-1 agreement", "eval/top1_agreement"),
    ("calibration error", "eval/student_ece"),
    ("gap closed", GAP),
)
SPEEDS = ("perf/student_tokens_per_second", "perf/teacher_tokens_per_second")
WRITING = ("perf/student_generation_tokens_per_second", "perf/teacher_generation_tokens_per_second")
COSTS = (
    ("parameters", ("model/student_parameters",)),
    ("reading speed ÷ teacher's", SPEEDS),
    ("writing speed ÷ teacher's", WRITING),
    ("steps", ("train/steps",)),
)
"""Of two figures the ratio: a machine is not equally busy for all runs, but teacher and student of one were timed in turns."""
Metric = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        number: From 1, as the page has it.
        name: What the folders of its runs are called.
        members: The runs.
        controls: The control of each run, as far as it is among those given.
        label: What tells it from the others: its objective, its name, or both.
    """

    number: int
    name: str
    members: tuple[Measured, ...]
    controls: tuple[Measured | None, ...] = ()
    label: str = ""

    @property
    def numbered(self) -> Numbered:
        """What it is called, with its number and colour."""
        return Numbered(self.number, self.label or self.name, self.style)

    @property
    def is_control(self) -> bool:
        """Whether its runs were trained without a teacher's signal."""
        return _is_control(self.members[0])

    @property
    def has_figures(self) -> bool:
        """Whether any of its runs came to its end."""
        return any(member.summary for member in self.members)

    @property
    def style(self) -> str:
        """Its colour: one of eight; beyond them the same grey."""
        return f"run{self.number - 1}" if self.number <= COLOURS else "other"

    @property
    def seeds(self) -> str:
        """Those of its runs."""
        return ", ".join(str(member.seed) for member in self.members if member.seed is not None)

    def values(self, key: str) -> list[tuple[Measured, float]]:
        """A figure of each run that has it; those of a control also where it was trained apart."""
        found = [(member, self._value(member, control, key)) for member, control in self._pairs()]
        return [(member, value) for member, value in found if value is not None]

    def _pairs(self) -> list[tuple[Measured, Measured | None]]:
        return list(zip(self.members, self.controls or [None] * len(self.members), strict=True))

    def _value(self, member: Measured, control: Measured | None, key: str) -> float | None:
        if control is None or not _is_of_a_control_apart(member, key):
            return member.value(key)
        return finite(against_control(_finite_figures(member), _finite_figures(control)).get(key))

    def mean(self, key: str) -> float | None:
        """Over its runs; None where no run has it."""
        values = [value for _, value in self.values(key)]
        return fmean(values) if values else None

    def figure(self, key: str) -> Figure | None:
        """The mean."""
        return self.made((key,), lambda value: value, lambda value: text_of(key, value))

    def made(self, keys: Sequence[str], formula: Callable[..., float], text: Callable[[float], str]) -> Figure | None:
        """The mean of what is made of figures of each run that has them all, ± half an interval over seeds; None where no run has them."""
        rows = [(member, control, [self._value(member, control, key) for key in keys]) for member, control in self._pairs()]
        known = [(member, control, formula(*row)) for member, control, row in rows if None not in row]
        if not known:
            return None
        values = [value for _, _, value in known]
        apart = [control.place for member, control, _ in known if control and any(_is_of_a_control_apart(member, key) for key in keys)]
        places = [*(member.place for member, _, _ in known), *apart]
        half = interval(values) if len(values) > 1 else None
        return Figure(text(fmean(values)), " ".join(keys), fmean(values), "\n".join(places), _spread(keys[0], values, text), half)


def quotient(above: float, below: float) -> float:
    """One figure over another; 0 where there is none."""
    return above / below if below else 0.0


def _is_of_a_control_apart(run: Measured, key: str) -> bool:
    """Whether a figure of the control is not the run's own."""
    return key.startswith("control/") and "control/student_nll" not in run.summary


def _finite_figures(run: Measured) -> dict[str, float]:
    return {key: value for key in run.summary if (value := run.value(key)) is not None}


def _spread(key: str, values: Sequence[float], text: Callable[[float], str]) -> str:
    """± half an interval over seeds; of speeds, which have nothing to do with seeds, the lowest and the highest; of sizes nothing."""
    if len(set(values)) < 2 or key.startswith(("model/", "train/")):
        return ""
    if key.startswith("perf/"):
        return f"{text(min(values))} – {text(max(values))}"
    return f"± {text(interval(values)).removesuffix(' %').removesuffix(' points')}"


def grouped(runs: Sequence[Measured]) -> list[Group]:
    """Runs of the same settings but for the seed together, in the order in which they were given."""
    by_settings: dict[str, list[Measured]] = {}
    controls = {_paired_by(run): run for run in runs if _is_control(run)}
    for run in runs:
        own = str(run.path.resolve()) if not run.is_training else _but_for(run, ("seed", *WHERE_IT_RAN, "control"))
        by_settings.setdefault(own, []).append(run)
    groups = [
        Group(
            i,
            common_name([member.name for member in members]),
            tuple(members),
            tuple(controls.get(_paired_by(run)) if not _is_control(run) else None for run in members),
        )
        for i, members in enumerate(by_settings.values(), start=1)
    ]
    return [replace(group, label=label) for group, label in zip(groups, _labels(groups), strict=True)]


def _labels(groups: Sequence[Group]) -> list[str]:
    """What tells groups apart: the objective where it does, the folders' name where all have the same, and else both."""
    configs = [group.members[0].config for group in groups]
    objectives = [objective_text(config["objective"]) if has_objective(config) else "" for config in configs]
    times = Counter(objectives)
    both = [f"{objective} ({group.name})" if objective else group.name for group, objective in zip(groups, objectives, strict=True)]
    if len(times) == 1:
        return [group.name for group in groups]
    return [objective if objective and times[objective] == 1 else named for objective, named in zip(objectives, both, strict=True)]


def common_name(names: Sequence[str]) -> str:
    """What the names of the runs of a group begin with alike, and end with: `small` of `small-seed=0` and `small-seed=1`."""
    if len(names) == 1:
        return names[0]
    begin = re.sub(r"([-_+. ]|seed|=)+$", "", os.path.commonprefix(list(names)))  # noqa: RUF071 - letters are meant
    end = re.search(r"[-_+. ]\D*$", os.path.commonprefix([name[::-1] for name in names])[::-1])  # noqa: RUF071
    return f"{begin}…{end[0]}" if begin and end else begin or names[0]


def _but_for(run: Measured, keys: Sequence[str]) -> str:
    kept = {key: value for key, value in leaves(run.config) if not any(key == name or key.startswith(f"{name}.") for name in keys)}
    return json.dumps(kept, sort_keys=True, default=str)


def _paired_by(run: Measured) -> str:
    """What a run and its control have in common."""
    return shared_with_control(run.config) + str(run.seed)


def _is_control(run: Measured) -> bool:
    return has_objective(run.config) and not has_teacher_signal(run.config["objective"])


# ---------------------------------------------------------------------------------------------------------------------------- tables


def overview(groups: Sequence[Group], factors: Mapping[str, Sequence[str]] | None = None, first: str = "") -> Table:
    """How good the students of all groups are, and the teacher, if it is one for all.

    Args:
        groups: In the order to show.
        factors: Columns of their own, which say enough to tell the groups apart: what was swept -> its value in each group.
        first: A metric that is shown before the others, whether or not it is one of the usual.
    """
    keys = dict.fromkeys([*([first] if first else []), *(key for _, key in QUALITIES)])
    metrics: list[Metric] = [(label_of(key), (key,)) for key in keys]
    several = any(len(group.members) > 1 for group in groups)
    note = "± is half a 95 % confidence interval over seeds (Student's t)." if several else "One seed each: no error bars."
    return _side_by_side(groups, f"↓ lower is better, ↑ higher is better. {note}", metrics, factors or {}, arrows=True)


def costs(groups: Sequence[Group], factors: Mapping[str, Sequence[str]] | None = None) -> Table | None:
    """What the students of all groups cost, and the teacher; None where nothing of it was measured."""
    timed = any(_of_group(group, keys) for group in groups for keys in (SPEEDS, WRITING))
    several = any(len(group.members) > 1 for group in groups)
    note = "What was counted"
    note += "; of speeds the ratio, since each run timed its student and its teacher in turns" if timed else ""
    note += "; below a mean over seeds the lowest and the highest." if timed and several else "."
    table = _side_by_side(groups, note, COSTS, factors or {})
    return table if any(isinstance(cell, Figure) for row in table.rows for cell in row) else None


def _side_by_side(
    groups: Sequence[Group], note: str, metrics: Sequence[Metric], factors: Mapping[str, Sequence[str]], arrows: bool = False
) -> Table:
    metrics = [(label, keys) for label, keys in metrics if any(_of_group(group, keys) for group in groups)]
    several = any(len(group.members) > 1 for group in groups)
    names = [f"{label}{better(keys[0])}" if arrows else label for label, keys in metrics]
    header = ["run", *map(last_part, factors), *names, *(["seeds"] if several else [])]
    rows: list[list[Cell]] = []
    for i, group in enumerate(groups):
        values: list[Cell] = [of_groups[i] for of_groups in factors.values()]
        figures = [_of_group(group, keys) for _, keys in metrics]
        seeds: list[Cell] = [group.seeds] if several else []
        rows.append([replace(group.numbered, name="") if factors else group.numbered, *values, *figures, *seeds])
    if teacher := _teacher_row(groups, [keys for _, keys in metrics]):
        rows.append(["teacher", *[""] * len(factors), *teacher, *([""] if several else [])])
    return Table(note, header, rows)


def _of_group(group: Group, keys: tuple[str, ...]) -> Figure | None:
    """A figure of it, or the ratio of two."""
    return group.figure(keys[0]) if len(keys) == 1 else group.made(keys, quotient, factor)


def label_of(key: str) -> str:
    """What a metric is called."""
    known: list[Metric] = [*((label, (key,)) for label, key in QUALITIES), *COSTS]
    return next((label for label, keys in known if keys == (key,)), key)


def last_part(key: str) -> str:
    """`temperature` of `objective.temperature`: enough for a column."""
    return key.rpartition(".")[2]


def _teacher_row(groups: Sequence[Group], keys: Sequence[tuple[str, ...]]) -> list[Cell] | None:
    own = [key.replace("student_", "teacher_") for key, *_ in keys]
    first = next((member for group in groups for member in group.members if member.summary), groups[0].members[0])
    of_each = {member.value("eval/teacher_nll") for group in groups for member in group.members if member.summary}
    found = [figure(first, name) if (name,) != key and len(key) == 1 else None for name, key in zip(own, keys, strict=True)]
    cells: list[Cell] = [None if shown is None else replace(shown, of=first.place) for shown in found]
    return cells if any(cells) and len(of_each) == 1 else None


def warning_of_text(groups: Sequence[Group]) -> str:
    """What is to be said where the groups were measured on different held-out text, or on another part of it; else ""."""
    data = {key for key in differing([group.members[0] for group in groups]) if key.startswith("data.") and key not in SAME_TEXT}
    differs = bool(data) or len({group.mean("eval/tokens") for group in groups if group.has_figures}) > 1
    return "Not all were measured on the same held-out text: losses and perplexities of different text do not compare." if differs else ""


def settings_that_differ(groups: Sequence[Group]) -> Table | None:
    """The settings in which the groups differ."""
    found = {key: values for key, values in differing([group.members[0] for group in groups]).items() if key not in ("seed", "control")}
    rows: list[list[Cell]] = [[key, *_settings(values)] for key, values in found.items()]
    return Table("Settings that differ", ["setting", *(group.numbered for group in groups)], rows, numeric=False) if rows else None


def _settings(values: Sequence[Any]) -> list[Cell]:
    return [None if value is None else text for value, text in zip(values, shown_apart(values), strict=True)]


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
    groups = [group for group in groups if group.has_figures]
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
    title = f"{group.number} {group.label or group.name}: perplexity {point[1]:.2f}, {cost}"
    return Series(str(group.number), [point], group.style, line=False, marks=True, titles=[title], labels=[str(group.number)])


def same_objective(groups: Sequence[Group]) -> bool:
    """Whether all groups minimise the same loss."""
    found = differing([group.members[0] for group in groups])
    return not any(key.startswith("objective.") and key != NOT_THE_LOSS for key in found)


def overlaid(groups: Sequence[Group]) -> list[Drawing]:
    """The curves of all runs in one chart a metric; of the runs beyond the eighth in grey, behind the others.

    The training loss only where all minimise the same: losses of different objectives are not on one scale.
    """
    drawn = []
    for title, unit, keys, level_keys in CURVES if same_objective(groups) else NOT_TRAINING_LOSS:
        key = keys[0][0]
        series = []
        for group in groups:
            for member in group.members:
                points, _ = thinned(member.curve(key), MOST_POINTS if group.number <= COLOURS else FEWER_POINTS)
                if len(points) >= FEWEST_POINTS:
                    name = ": ".join(filter(None, (str(group.number), group.label))) if group.number <= COLOURS else "others"
                    series.append(Series(name, points, group.style, marks=None if group.number <= COLOURS else False))
        teachers = [group.mean(own) for name, own in level_keys if name == "teacher" for group in groups]
        levels = [("teacher", value, "teacher") for value in teachers if value is not None][:1]
        if len(series) >= FEWEST_POINTS:
            text, note = percent if unit == "share of tokens" else signed_free, ends_alone(series)
            drawn.append(draw(Chart(title, "optimizer step", unit, series, key, levels, x_text=count_text, y_text=text, note=note)))
    return drawn
