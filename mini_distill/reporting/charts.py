"""Charts, drawn by matplotlib as SVG in the page's own colours: they need no script and weigh a few kilobytes."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ..evaluation.printable import printable
from ..evaluation.table import percent
from .figures import signed_free

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

WIDTH, HEIGHT = 340.0, 226.0
MOST_POINTS = 240
MOST_LABELS = 8
MOST_CATEGORIES = 20
LETTER = 7.5  # width of one on an axis
TILTED = 38.0  # more height for names that do not fit side by side
LONGEST = 14
SAME = 1e-12  # relative difference below which values have one place
MOST_DIGITS = 12  # of a number on an axis
LETTER_SHARE, LINE_SHARE = 0.035, 0.095  # of the axes' width and height, that a letter and a line of a label take
COLOURS = ("soft", "rule", "card", "student", "teacher", "control", "other", *(f"run{i}" for i in range(8)))
"""Colours of the style sheet. matplotlib is given a number in their place: which colour it is, the reader's light or dark page decides."""

DASHES: dict[str, Any] = {"control": (0, (2, 2)), **dict.fromkeys(("run4", "run5", "run6", "run7"), (0, (5, 2)))}

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
        y_label: Of the axis, with its unit; in two lines where one would be longer than the axis.
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
class Drawing:
    """A chart as SVG, for the page; `alt` says in words what it shows, `legend` is (name, style, whether it is a line across)."""

    chart: Chart
    alt: str
    svg: Markup
    legend: list[tuple[str, str, bool]]


def draw(chart: Chart) -> Drawing:
    """Let matplotlib draw it."""
    from matplotlib.figure import Figure
    from matplotlib.style import context

    alt, names = printable(_in_words(chart)), [_short(name, LONGEST) for name in chart.categories]
    tilted = (max(map(len, names), default=0) + 1) * LETTER * len(names) > WIDTH - 70
    titles: list[str] = []
    with context(["default", _settings() | {"svg.hashsalt": alt}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the browser has it
        figure = Figure(figsize=(WIDTH / 72, (HEIGHT + TILTED * tilted) / 72), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none", xlabel=_short(chart.x_label, 56), ylabel=chart.y_label)
        _set_axes(axes, chart, names, tilted)
        for name, y, style in chart.levels:
            axes.axhline(y, color=_colour(style), linestyle="--", gid=_noted(titles, f"{name}: {chart.y_text(y)}"))
        for series in reversed(chart.series):
            _draw_series(axes, chart, series, titles)
        for text, point, colour in apart(_labels(axes, chart)):
            _label(axes, text, point, colour)
        if chart.diagonal:
            axes.plot([0, 1], [0, 1], color=_colour("soft"), linestyle="--")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return Drawing(chart, alt, _for_the_page(file.getvalue(), alt, titles), _legend(chart))


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


# ---------------------------------------------------------------------------------------------------------------------- matplotlib


def _settings() -> dict[str, Any]:
    plain = {"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0}
    text = {"font.size": 14, "axes.labelsize": 14, "svg.fonttype": "none", "text.parse_math": False}  # the page's font, and no formulas
    soft = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), _colour("soft"))
    return {**plain, **text, **soft, "axes.grid": True, "axes.grid.axis": "y", "grid.color": _colour("rule"), "axes.axisbelow": True}


def _set_axes(axes: Axes, chart: Chart, names: Sequence[str], tilted: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    points = [point for series in chart.series for point in series.points]
    axes.margins(0.04)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(_ticks(chart.y_text))
    if chart.square:
        axes.set(xlim=(0, 1), ylim=(0, 1))
    elif (limits := _around([*(y for _, y in points), *(y for _, y, _ in chart.levels)])) is not None:
        axes.set_ylim(limits)
    if names:
        places = range(0, len(names), math.ceil(len(names) / MOST_CATEGORIES))
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xticks(places, [names[i] for i in places])
        if tilted:
            for label in axes.get_xticklabels():
                label.set(rotation=35, horizontalalignment="right", rotation_mode="anchor")
        return
    if chart.logarithmic:
        low, high = min(x for x, _ in points) / 1.3, max(x for x, _ in points) * 1.3
        decades = math.log10(high / low)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 3 else (1, 3) if decades > 1.5 else (1, 2, 5), numticks=8))
        axes.minorticks_off()
        axes.set_xlim(low, high)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        if not chart.square and (limits := _around([x for x, _ in points])) is not None:
            axes.set_xlim(limits)
    axes.xaxis.set_major_formatter(_ticks(chart.x_text))


def _ticks(text: Callable[[float], str]) -> Formatter:
    """Numbers of an axis, written as its points are."""
    from matplotlib.ticker import FuncFormatter

    class Ticks(FuncFormatter):
        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return tick_texts(list(values), text)

    return Ticks(lambda value, _: text(value))


def tick_texts(values: Sequence[float], text: Callable[[float], str]) -> list[str]:
    """The numbers of an axis, all with the same decimals: a share with as few as say it exactly, others with as many as tell them apart."""
    if text is percent:
        digits = next((n for n in range(MOST_DIGITS) if all(abs(round(100 * v, n) - 100 * v) < 1e-9 for v in values)), MOST_DIGITS)
        return [f"{round(100 * value, digits) + 0.0:.{digits}f} %" for value in values]
    texts = [text(value) for value in values]
    digits = 4
    while len(set(texts)) < len(set(values)) and digits < MOST_DIGITS:
        digits += 1
        texts = [f"{value:,.{digits}g}" for value in values]
    return texts


def _around(values: Iterable[float]) -> tuple[float, float] | None:
    """Limits of an axis on which all values are the same: ticks a rounding error apart would say nothing."""
    values = list(values)
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    if high - low > SAME * max(largest, SAME):
        return None
    room = largest / 2 if largest > SAME else 1.0
    return low - room, high + room


def _draw_series(axes: Axes, chart: Chart, series: Series, titles: list[str]) -> None:
    colour, thin = _colour(series.style), series.style == "other"
    if series.line and len(series.points) > 1:
        dashes = DASHES.get(series.style, "-")
        axes.plot(*zip(*series.points, strict=True), color=colour, linewidth=1 if thin else 2, alpha=0.7 if thin else 1, linestyle=dashes)
    if not (series.marks if series.marks is not None else len(series.points) <= 30):
        return
    for i, (x, y) in enumerate(series.points):
        where = chart.categories[int(x)] if chart.categories else f"{chart.x_label} {chart.x_text(x)}"
        title = series.titles[i] if series.titles else f"{series.name}, {where}: {chart.y_text(y)}"
        axes.plot(x, y, "o", color=colour, markersize=8, markeredgecolor=_colour("card"), clip_on=False, gid=_noted(titles, title))


Label = tuple[str, Point, str]
"""A text, where its point is (from the lower left of the axes, 1: their other end), and its colour."""


def _labels(axes: Axes, chart: Chart) -> list[Label]:
    axes.get_xlim(), axes.get_ylim()  # matplotlib settles them when it is asked
    place = axes.transData - axes.transAxes
    return [
        (_short(text, LONGEST), tuple(place.transform(point)), _colour(series.style))
        for series in chart.series
        for text, point in zip(series.labels, series.points, strict=False)
        if text
    ]


def apart(labels: Sequence[Label]) -> list[Label]:
    """The same, each raised above those on which it would lie: its colour says which point is meant."""
    placed: list[Label] = []
    for text, (x, y), colour in sorted(labels, key=lambda label: label[1][1]):
        for other, (x2, y2), _ in placed:  # from below
            if abs(x - x2) < max(len(text), len(other)) * LETTER_SHARE and y < y2 + LINE_SHARE:
                y = y2 + LINE_SHARE
        placed = sorted([*placed, (text, (x, y), colour)], key=lambda label: label[1][1])
    return placed


def _label(axes: Axes, text: str, point: Point, colour: str) -> None:
    """Beside a point, on the side where there is room."""
    place: dict[str, Any] = {"xytext": (-7, 5), "ha": "right"} if point[0] > 0.8 else {"xytext": (7, 5), "ha": "left"}
    axes.annotate(text, point, xycoords="axes fraction", textcoords="offset points", color=colour, weight="bold", **place)


def _colour(name: str) -> str:
    return f"#0000{COLOURS.index(name) + 1:02x}"


def _noted(titles: list[str], title: str) -> str:
    """The mark by which `_for_the_page` finds what says this when it is pointed at."""
    titles.append(printable(title))
    return f"title-{len(titles) - 1}"


def _for_the_page(svg: str, alt: str, titles: Sequence[str]) -> Markup:
    """Without what is for a file of its own: prologue, metadata, a style for the whole page, names that several charts would share."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = f'<svg {box[0]} role="img" aria-label="{escape(alt)}">{svg[svg.index(">") + 1 :]}'
    svg = re.sub(r"<[^/>][^>]*>", lambda tag: _tag(tag[0], titles), svg)
    return Markup(re.sub(r"\s*\n\s*", " ", svg))


def _tag(tag: str, titles: Sequence[str]) -> str:
    """In the colours and the font of the page."""
    if title := re.fullmatch(r'<g id="title-(\d+)">', tag):
        return f"<g><title>{escape(titles[int(title[1])])}</title>"
    tag = re.sub(r'(?<=<g) id="[^"]*"|font-family: [^;"]*;? ?| transform="rotate\(-0 [^"]*"', "", tag)
    return re.sub("#0000([0-9a-f]{2})", lambda colour: f"var(--{COLOURS[int(colour[1], 16) - 1]})", tag)


def _short(text: str, longest: int) -> str:
    text = " ".join(printable(text).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _in_words(chart: Chart) -> str:
    """For who does not see it."""
    y_label = ", ".join(chart.y_label.splitlines())
    parts = [f"{chart.title}: {y_label} against {chart.x_label}."]
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
