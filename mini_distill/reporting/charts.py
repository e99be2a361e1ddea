"""Charts as plain geometry, which a template draws as SVG: they follow the page's colours, need no script and weigh a few kilobytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from .figures import signed_free

WIDTH, HEIGHT = 400.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 24.0, 12.0, 46.0
MOST_POINTS = 240
MOST_LABELS = 8
MOST_CATEGORIES = 20
LETTER = 7.5  # width of one on an axis
TILTED = 38.0  # room below the axis for names that do not fit side by side
LONGEST = 14
SAME = 1e-12  # relative difference below which values have one place

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: In the legend.
        points: (x, y), in the order of x.
        style: A class of the style sheet that has a colour: `student`, `teacher`, `control`, `run0` … `run7`, `other`.
        line: Whether the points are joined.
        marks: Whether the points are marked; None: where there are few.
        titles: What a point says when it is pointed at; empty: its coordinates.
        labels: Short texts beside the points.
    """

    name: str
    points: Sequence[Point]
    style: str
    line: bool = True
    marks: bool | None = None
    titles: Sequence[str] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """What is to be drawn.

    Attributes:
        title: Above it.
        x_label: Of the axis, with its unit.
        y_label: Of the axis, with its unit.
        series: At least one point among them; the first is drawn on top.
        keys: The keys of the files that it is made from.
        levels: (name, y, style): horizontal lines.
        categories: Names of the places 0, 1, … on the x axis; empty: x is a number.
        logarithmic: Whether the x axis is, whose values are then above 0.
        diagonal: Name of the line y = x, or "".
        square: Whether both axes go from 0 to 1.
        y_text: How a number of the y axis is written.
        x_text: How one of the x axis is.
        note: Below it.
        labelled: Whether the points are labelled, so that a legend would only repeat it.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    keys: str = ""
    levels: Sequence[tuple[str, float, str]] = ()
    categories: Sequence[str] = ()
    logarithmic: bool = False
    diagonal: str = ""
    square: bool = False
    y_text: Callable[[float], str] = signed_free
    x_text: Callable[[float], str] = signed_free
    note: str = ""
    labelled: bool = False


@dataclass(frozen=True)
class Mark:
    """A point as it is drawn."""

    x: float
    y: float
    style: str
    title: str
    label: str = ""


@dataclass(frozen=True)
class Drawing:
    """A chart in the coordinates of its SVG: `ticks` are (place, text), `lines` are (style, points of a polyline)."""

    chart: Chart
    alt: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    levels: list[tuple[str, float, str]]
    lines: list[tuple[str, str]]
    marks: list[Mark]
    diagonal: tuple[float, float, float, float] | None
    legend: list[tuple[str, str, bool]]
    tilted: bool
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def draw(chart: Chart) -> Drawing:
    """Place everything."""
    points = [point for series in chart.series for point in series.points]
    x_axis = _category_axis(chart) if chart.categories else _axis([x for x, _ in points], chart.square, chart.logarithmic)
    y_axis = _axis([*(y for _, y in points), *(y for _, y, _ in chart.levels)], chart.square, False)
    x_place = lambda x: LEFT + x_axis.share(x) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    y_place = lambda y: HEIGHT - BOTTOM - y_axis.share(y) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    widest = max((min(len(name), LONGEST) + 1 for name in chart.categories), default=0)
    tilted = widest * LETTER * len(chart.categories) > WIDTH - LEFT - RIGHT
    texts = {float(i): name for i, name in enumerate(chart.categories)}
    return Drawing(
        chart=chart,
        alt=_in_words(chart),
        x_ticks=[(x_place(x), texts.get(x) or chart.x_text(x)) for x in x_axis.ticks],
        y_ticks=[(y_place(y), chart.y_text(y)) for y in y_axis.ticks],
        levels=[(name, y_place(y), style) for name, y, style in chart.levels],
        lines=[
            (series.style, _polyline(series, x_place, y_place))
            for series in reversed(chart.series)
            if series.line and len(series.points) > 1
        ],
        marks=[mark for series in reversed(chart.series) for mark in _marks(chart, series, texts, x_place, y_place)],
        diagonal=(x_place(0), y_place(0), x_place(1), y_place(1)) if chart.diagonal else None,
        legend=_legend(chart),
        tilted=tilted,
        height=HEIGHT + TILTED * tilted,
    )


def _legend(chart: Chart) -> list[tuple[str, str, bool]]:
    """(name, style, whether it is a line across); one alone needs none."""
    entries = [(series.name, series.style, False) for series in chart.series if series.points]
    entries += [(name, style, True) for name, _, style in chart.levels]
    entries += [(chart.diagonal, "diagonal", True)] if chart.diagonal else []
    return list(dict.fromkeys(entries)) if len(entries) > 1 and not chart.labelled else []


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[list[Point], int]:
    """A curve of at most `most` points, each the mean of as many neighbours as are given back with them."""
    size = math.ceil(len(points) / most) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups], size


# ------------------------------------------------------------------------------------------------------------------------------ axes


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with its ticks."""

    low: float
    high: float
    ticks: list[float]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where a value stands between low (0) and high (1)."""
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        return (value - low) / (high - low)


def _category_axis(chart: Chart) -> Axis:
    number = len(chart.categories)
    every = math.ceil(number / MOST_CATEGORIES)
    return Axis(-0.5, number - 0.5, [float(i) for i in range(0, number, every)])


def _axis(values: Iterable[float], unit: bool, logarithmic: bool) -> Axis:
    values = list(values)
    low, high = (0.0, 1.0) if unit else (min(values), max(values))
    if logarithmic:
        return _log_axis(low, high)
    if high - low <= SAME * max(abs(low), abs(high), SAME):
        room = max(abs(low), abs(high)) / 2 if max(abs(low), abs(high)) > SAME else 1.0
        low, high = low - room, high + room
    ticks = nice_ticks(low, high)
    margin = 0.0 if unit else 0.04 * (high - low)
    low, high = (low if unit else min(low - margin, low)), high + margin
    return Axis(low, high, [tick for tick in ticks if low <= tick <= high])


def nice_ticks(low: float, high: float, number: int = 5) -> list[float]:
    """Round numbers between low and high: multiples of 1, 2 or 5 times a power of ten, about `number` of them."""
    raw = (high - low) / number
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def _log_axis(low: float, high: float) -> Axis:
    low, high = low / 1.3, high * 1.3
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5)):  # as few as do, as many as it takes
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) >= 3:
            break
    return Axis(low, high, ticks or [low, high], logarithmic=True)


# ---------------------------------------------------------------------------------------------------------------------------- marks

Place = Callable[[float], float]


def _polyline(series: Series, x_place: Place, y_place: Place) -> str:
    return " ".join(f"{x_place(x):.1f},{y_place(y):.1f}" for x, y in series.points)


def _marks(chart: Chart, series: Series, texts: dict[float, str], x_place: Place, y_place: Place) -> list[Mark]:
    if not (series.marks if series.marks is not None else len(series.points) <= 30):
        return []
    marks = []
    for i, (x, y) in enumerate(series.points):
        where = texts.get(x) or f"{chart.x_label} {chart.x_text(x)}"
        title = series.titles[i] if series.titles else f"{series.name}, {where}: {chart.y_text(y)}"
        marks.append(Mark(x_place(x), y_place(y), series.style, title, series.labels[i] if series.labels else ""))
    return marks


def _in_words(chart: Chart) -> str:
    """For who does not see it."""
    parts = [f"{chart.title}: {chart.y_label} against {chart.x_label}."]
    for series in [s for s in chart.series if s.points][:MOST_LABELS]:
        values = [y for _, y in series.points]
        if series.line and len(values) > 1:
            way = "falls" if values[-1] < values[0] else "rises"
            monotone = all((b <= a) if values[-1] < values[0] else (b >= a) for a, b in pairwise(values))
            parts.append(
                f"{series.name} {'' if monotone else 'on the whole '}{way} from {chart.y_text(values[0])} to {chart.y_text(values[-1])}."
            )
        else:
            parts.append(
                f"{series.name}: {chart.y_text(min(values))}{f' to {chart.y_text(max(values))}' if min(values) < max(values) else ''}."
            )
    parts += [f"{name}: {chart.y_text(y)}." for name, y, _ in chart.levels]
    return " ".join(parts)
