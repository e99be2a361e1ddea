"""What a single number hides: calibration, slices, the texts in which the student differs most, samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..evaluation.table import count, decimals, percent
from .charts import Chart, Drawing, Series, draw
from .figures import MODELS, Cell, Figure, Table
from .measured import Measured, finite
from .places import short_path


def reliability(found: Measured) -> Drawing | None:
    """How often the most likely token is right, against how likely the models say it is."""
    series = []
    for model in MODELS:  # the first is on top
        bins = [b for b in found.details.get("reliability", {}).get(model, []) if b.get("tokens") and _is_known(b)]
        points = [(float(b["confidence"]), float(b["accuracy"])) for b in bins]
        titles = [
            f"{model}: sure of {percent(b['confidence'])}, right in {percent(b['accuracy'])} of {count(b['tokens'])} tokens" for b in bins
        ]
        if points:
            series.append(Series(model, points, model, titles=titles))
    if not series:
        return None
    labels = ("how sure the model is", "how often it is right")
    chart = Chart("Calibration", *labels, series, "reliability", diagonal="as sure as right", square=True, x_text=percent, y_text=percent)
    return draw(chart)


def _is_known(one_bin: dict[str, Any]) -> bool:
    return finite(one_bin.get("confidence")) is not None and finite(one_bin.get("accuracy")) is not None


@dataclass(frozen=True)
class SliceView:
    """The figures by parts of the held-out text: a name, two charts and the table behind them."""

    name: str
    charts: list[Drawing]
    table: Table


SLICE_NAMES = {"position": "tokens before the predicted one", "teacher_entropy": "the teacher's uncertainty (entropy, nats)"}
SLICE_COLUMNS = (
    ("tokens", "tokens", count),
    ("student loss", "student_nll", decimals(3)),
    ("teacher loss", "teacher_nll", decimals(3)),
    ("KL", "forward_kl", decimals(3)),
    ("top-1 agreement", "top1_agreement", percent),
)


def slices(found: Measured) -> list[SliceView]:
    """Where the student is good and where not."""
    views = []
    for name, rows in found.details.get("slices", {}).items():
        if not rows:
            continue
        columns = [c for c in SLICE_COLUMNS if any(finite(row.get(c[1])) is not None for row in rows)]
        label = SLICE_NAMES.get(name, name)
        cells: list[list[Cell]] = [
            [str(row.get("label", "")), *(_cell(f"slices/{name}", row, key, text) for _, key, text in columns)] for row in rows
        ]
        table = Table(f"By {label}", [label, *(title for title, _, _ in columns)], cells)
        views.append(SliceView(f"By {label}", list(_slice_charts(name, label, rows)), table))
    return views


def _cell(path: str, row: dict[str, Any], key: str, text: Any) -> Figure | None:
    value = finite(row.get(key))
    return None if value is None else Figure(text(value), f"{path}/{row.get('label', '')}/{key}", value)


def _slice_charts(name: str, label: str, rows: list[dict[str, Any]]) -> Iterator[Drawing]:
    names = [short(str(row.get("label", ""))) for row in rows]
    joined = name in SLICE_NAMES  # a column of the rows has no order
    for title, unit, keys in (
        ("Loss", "nats per token", (("student_nll", "student"), ("teacher_nll", "teacher"))),
        ("KL to the teacher", "nats per token", (("forward_kl", "student"),)),
    ):
        series = []
        for key, style in keys:
            points = [(float(i), value) for i, row in enumerate(rows) if (value := finite(row.get(key))) is not None]
            series.append(Series(style, points, style, line=joined, marks=True))
        if any(s.points for s in series) and len(rows) > 1:
            yield draw(Chart(title, label, unit, [s for s in series if s.points], f"slices/{name}", categories=names))


def short(label: str) -> str:
    """A slice's label for an axis: `below 0.1` is `<0.1`, `6 and more` is `≥6`."""
    return f"<{label[6:]}" if label.startswith("below ") else f"≥{label[:-9]}" if label.endswith(" and more") else label


HEAT = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Upper limits of the KL (nats) of each background but the last."""


@dataclass(frozen=True)
class Token:
    """A token of a text: its spelling, how strong its background is (0 … 6; None: it was not predicted), and what its title says."""

    text: str
    heat: int | None
    title: str


@dataclass(frozen=True)
class Difference:
    """A text in which the student is far from its teacher: where it stands, how far, its tokens, the worst of them."""

    place: str
    kl: Figure
    tokens: list[Token]
    worst: Table


def differences(found: Measured) -> list[Difference]:
    """The texts in which the student is furthest from its teacher, token by token."""
    shown: list[Difference] = []
    for i, entry in enumerate(found.details.get("differences", [])):
        kl = finite(entry.get("forward_kl"))
        if kl is None:
            continue
        tokens = [_token(token) for token in entry["tokens"]]
        figure = Figure(f"{kl:.2f}", f"differences/{i}/forward_kl", kl)
        shown.append(Difference(_place(entry) or f"text {len(shown) + 1}", figure, tokens, _worst(i, entry["tokens"])))
    return shown


def _place(entry: dict[str, Any]) -> str:
    """The row of the data, and where in the held-out sequences the text begins."""
    sequence, token = finite(entry.get("sequence")), finite(entry.get("token"))
    held_out = "" if sequence is None or token is None else f"held-out sequence {sequence:.0f}, token {token:.0f}"
    return ", ".join(part for part in (short_path(str(entry.get("row", ""))), held_out) if part)


def _token(token: dict[str, Any]) -> Token:
    text, kl = str(token.get("text", "")), finite(token.get("forward_kl"))
    if kl is None:
        return Token(text, None, "not predicted")
    lines = [f"KL {kl:.2f} nats"]
    for model in MODELS:
        nll, top = finite(token.get(f"{model}_nll")), token.get(f"{model}_top")
        likely = "" if nll is None else f" gives it {percent(math.exp(-nll))}"
        lines.append(f"{model}{likely}{', expects' if likely else ' expects'} “{top}”" if top is not None else f"{model}{likely}")
    return Token(text, sum(kl >= limit for limit in HEAT), "\n".join(lines))


def _worst(number: int, tokens: list[dict[str, Any]], most: int = 6) -> Table:
    """The tokens with the highest KL, for who cannot point at them."""
    known = [(i, token) for i, token in enumerate(tokens) if finite(token.get("forward_kl")) is not None]
    rows: list[list[Cell]] = []
    for i, token in sorted(known, key=lambda pair: -pair[1]["forward_kl"])[:most]:
        path = f"differences/{number}/tokens/{i}"
        rows.append(
            [
                _visible(token.get("text")),
                _plain(path, token, "forward_kl"),
                _visible(token.get("teacher_top")),
                _visible(token.get("student_top")),
                _plain(path, token, "teacher_nll"),
                _plain(path, token, "student_nll"),
            ]
        )
    return Table("Furthest apart", ["token", "KL", "teacher expects", "student expects", "teacher's loss", "student's loss"], rows)


def _visible(text: Any) -> str:
    return "" if text is None else str(text).replace(" ", "·").replace("\n", "↵")


def _plain(path: str, token: dict[str, Any], key: str) -> Figure | None:
    value = finite(token.get(key))
    return None if value is None else Figure(f"{value:.2f}", f"{path}/{key}", value)


@dataclass(frozen=True)
class SampleView:
    """A prompt and (model, text) pairs."""

    prompt: str
    continuations: list[tuple[str, str]]


def samples(found: Measured) -> list[SampleView]:
    """Side by side."""
    return [
        SampleView(str(sample.get("prompt", "")), [(str(name), str(text)) for name, text in sample["continuations"].items()])
        for sample in found.details.get("samples", [])
    ]
