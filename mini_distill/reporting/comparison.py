"""Several runs beside each other: seeds together, what differs, quality against size and speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ..compare import NOT_COMPARED, gap_closed, has_teacher_signal, interval
from .charts import Chart, Drawing, Series, draw, thinned
from .figures import Cell, Figure, Table, signed_free, text_of
from .measured import Measured, leaves
from .run_page import CURVES, FEWEST_POINTS, count_text, percent_whole
from .settings import WHERE_IT_RAN, differing, shown

COLOURS = 8
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
            members[0].name,
            tuple(members),
            tuple(controls.get(_but_for(run, NOT_COMPARED) + str(run.seed)) if not _is_control(run) else None for run in members),
        )
        for i, members in enumerate(by_settings.values(), start=1)
    ]


def _but_for(run: Measured, keys: Sequence[str]) -> str:
    kept = {key: value for key, value in leaves(run.config) if not any(key == name or key.startswith(f"{name}.") for name in keys)}
    return json.dumps(kept, sort_keys=True, default=str)


def _is_control(run: Measured) -> bool:
    objective = run.config.get("objective")
    return bool(objective) and not has_teacher_signal(objective)


# ---------------------------------------------------------------------------------------------------------------------------- tables


def overview(groups: Sequence[Group], factors: Sequence[str] = (), first: str = "") -> Table:
    """All groups with their figures.

    Args:
        groups: In the order to show.
        factors: Settings that get a column of their own.
        first: A metric that is shown before the others, whether or not it is one of the usual.
    """
    metrics = [*([(_label(first), first)] if first else []), *(pair for pair in METRICS if pair[1] != first)]
    metrics = [(label, key) for label, key in metrics if any(group.values(key) for group in groups)]
    several = any(len(group.members) > 1 for group in groups)
    header = ["run", *factors, *(["seeds"] if several else []), *(label for label, _ in metrics)]
    rows: list[list[Cell]] = []
    for group in groups:
        values: list[Cell] = [_setting(group.members[0], factor) for factor in factors]
        rows.append(
            [f"{group.number}  {group.name}", *values, *([group.seeds] if several else []), *(group.figure(key) for _, key in metrics)]
        )
    if any("teacher" in key for run in groups[0].members for key in run.summary) and (teacher := _teacher_row(groups, metrics)):
        rows.append(["teacher", *[None] * (len(factors) + several), *teacher])
    note = "± is half a 95 % confidence interval over seeds (Student's t)." if several else "One seed each: no error bars."
    return Table(note, header, rows)


def _label(key: str) -> str:
    return next((label for label, known in METRICS if known == key), key)


def _teacher_row(groups: Sequence[Group], metrics: Sequence[tuple[str, str]]) -> list[Figure | None] | None:
    """The teacher's figures, if it is the same for all of the runs."""
    cells = []
    for _, key in metrics:
        own = key.replace("student_", "teacher_")
        cells.append(groups[0].figure(own) if own != key else None)
    firsts = {group.mean("eval/teacher_nll") for group in groups}
    return cells if any(cells) and len(firsts) == 1 else None


def _setting(run: Measured, key: str) -> str:
    found = dict(leaves(run.config))
    return shown(found[key]) if key in found else ""


def settings_that_differ(groups: Sequence[Group]) -> Table | None:
    """The settings in which the groups differ."""
    found = {key: values for key, values in differing([group.members[0] for group in groups]).items() if key not in ("seed", "control")}
    rows: list[list[Cell]] = [[key, *(None if value is None else shown(value) for value in values)] for key, values in found.items()]
    return (
        Table("Settings that differ", ["setting", *(f"{group.number}  {group.name}" for group in groups)], rows, numeric=False)
        if rows
        else None
    )


# ---------------------------------------------------------------------------------------------------------------------------- charts

AGAINST = (
    ("Quality against size", "parameters", "model/{}_parameters"),
    ("Quality against the time to the first token", "seconds", "perf/{}_time_to_first_token"),
    ("Quality against writing speed", "tokens written per second", "perf/{}_generation_tokens_per_second"),
    ("Quality against reading speed", "tokens read per second", "perf/{}_tokens_per_second"),
)


def trade_offs(groups: Sequence[Group]) -> list[Drawing]:
    """Held-out perplexity against what a model costs; the teacher among the students."""
    drawn = []
    for title, unit, template in AGAINST:
        key, quality = template.format("student"), "eval/student_perplexity"
        series = [_spot(group, key, quality) for group in groups if (group.mean(key) or 0) > 0 and group.mean(quality) is not None]
        if len(series) < FEWEST_POINTS:
            continue
        x, y = groups[0].mean(template.format("teacher")), groups[0].mean("eval/teacher_perplexity")
        if x and y:
            series.append(Series("teacher", [(x, y)], "teacher", line=False, marks=True, labels=["teacher"]))
        text = lambda value, key=key: text_of(key, value)  # noqa: E731
        drawn.append(draw(Chart(title, unit, "perplexity", series, f"{key} {quality}", logarithmic=True, x_text=text)))
    return drawn


def _spot(group: Group, key: str, quality: str) -> Series:
    point = (group.mean(key) or 0.0, group.mean(quality) or 0.0)
    title = f"{group.number} {group.name}: perplexity {point[1]:.2f}, {text_of(key, point[0])}"
    return Series(f"{group.number}  {group.name}", [point], group.style, line=False, marks=True, titles=[title], labels=[str(group.number)])


def overlaid(groups: Sequence[Group]) -> list[Drawing]:
    """The curves of all runs in one chart a metric; of the runs beyond the eighth in grey, behind the others."""
    drawn = []
    for title, unit, keys, level_keys in CURVES:
        key = keys[0][0]
        series = []
        for group in reversed(groups):
            for member in group.members:
                points, _ = thinned(member.curve(key))
                if len(points) >= FEWEST_POINTS:
                    name = f"{group.number}  {group.name}" if group.number <= COLOURS else "others"
                    series.append(Series(name, points, group.style, marks=False))
        levels = [
            ("teacher", value, "teacher") for name, own in level_keys if name == "teacher" and (value := groups[0].mean(own)) is not None
        ]
        if len(series) >= FEWEST_POINTS:
            text = percent_whole if unit == "share of tokens" else signed_free
            drawn.append(draw(Chart(title, "optimizer step", unit, series, key, levels, x_text=count_text, y_text=text)))
    return drawn
