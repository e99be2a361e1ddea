"""Numbers as the page shows them: each with the key it comes from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.table import COLUMNS, ROWS, Row, count, decimals, percent
from ..storage import size_text
from .measured import Measured, finite

MODELS = ("student", "teacher")  # in this order on the whole page: a narrow screen shows the first
PAGE_COLUMNS = (3, 2, 0, 1)  # of a table of keys: student after, control, teacher, student before; the first are what a narrow screen shows
HIGHER_IS_BETTER = re.compile(r"agreement|correlation|gap_closed|kl_reduction|tokens_per_second|distinct|^task/(?!.*from_half)")
NOT_FINITE = "not finite"
LOSS = Row("loss (nats per token)", ("eval/teacher_nll", "before/student_nll", "control/student_nll", "eval/student_nll"), decimals(3))
"""What the answers on the page are in; a terminal has it as perplexity alone."""


@dataclass(frozen=True)
class Figure:
    """A number on the page.

    Attributes:
        text: As it is shown.
        keys: The keys of summary.json that it was made from.
        value: The number itself; None where it is not finite.
        of: The names of the folders, where the page has several.
        spread: What is shown behind it, such as `± 0.02`.
        half: Half a confidence interval of the number, where it is a mean over several.
    """

    text: str
    keys: str
    value: float | None
    of: str = ""
    spread: str = ""
    half: float | None = None


@dataclass(frozen=True)
class Numbered:
    """A name with the number and the colour (a class of the style sheet) that it has on the whole page."""

    number: int
    name: str
    style: str


Cell = Figure | Numbered | str | None


@dataclass(frozen=True)
class Table:
    """A table of the page: the first cell of each row is its heading.

    Attributes:
        caption: What it shows.
        header: Names of the columns.
        rows: Of cells; None is shown as a dash.
        numeric: Whether the cells behind the first are numbers, set flush right.
        note: What is to be said of it, below it.
    """

    caption: str
    header: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    numeric: bool = True
    note: str = ""


def seconds(value: float) -> str:
    """A duration: 3.2 ms, 41 s, 12 min, 3.4 h."""
    if value < 1:
        return f"{1000 * value:.3g} ms"
    for size, unit in ((3600, "h"), (60, "min")):
        if value >= 2 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} s"


def count_text(value: float) -> str:
    """A number of steps."""
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def signed_free(value: float) -> str:
    """Four digits, without an exponent where that reads well."""
    if 1e4 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:,.4g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3e}"


BY_ENDING: tuple[tuple[tuple[str, ...], Callable[[float], str]], ...] = (
    (("gap_closed", "kl_reduction", "_agreement", "_ece"), percent),
    (("_nll", "_kl", "_bits_per_byte", "rank_correlation"), decimals(3)),
    (("_seconds", "_time_to_first_token", "train/seconds"), seconds),
    (("_parameters", "tokens_seen", "/tokens"), count),
    (("_bytes",), size_text),
    (("/steps", "_supervised_tokens"), count_text),
)


def text_of(key: str, value: float) -> str:
    """A figure in the form that suits its key: that of the final table, a share as per cent, a count with its unit."""
    for row in ROWS:
        if key in row.keys and "time_to_first_token" not in key:
            return row.text(value)
    if "tokens_per_second" in key:  # also at a batch size
        return decimals(0)(value)
    for endings, text in BY_ENDING:
        if key.endswith(endings):
            return text(value)
    if key.startswith(("task/", "text/")) and 0 <= value <= 1 and not key.endswith("_tokens"):
        return percent(value)
    return signed_free(value)


def figure(found: Measured, key: str) -> Figure | None:
    """A figure of one folder; None where it was not measured."""
    if not key or key not in found.summary:
        return None
    value = finite(found.summary[key])
    return Figure(NOT_FINITE if value is None else text_of(key, value), key, value)


def ratio(found: Measured, above: str, below: str, text: Callable[[float], str]) -> Figure | None:
    """One figure over another; None where either is missing or the lower is 0."""
    top, bottom = found.value(above), found.value(below)
    if top is None or not bottom:
        return None
    return Figure(text(top / bottom), f"{above} {below}", top / bottom)


def unit_of(key: str) -> str:
    """In what a metric is measured, where its figures do not say it themselves."""
    return "nats per token" if key.endswith(("_nll", "_kl")) else ""


def points(value: float) -> str:
    """How far two shares are apart: 4.7 points."""
    return f"{100 * abs(value):.1f} points"


def factor(value: float) -> str:
    """A ratio, three digits: 5.35, 0.333."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if 1e-3 < value < 1e4 else f"{value:.3g}"


def times(value: float) -> str:
    """A ratio as a factor: 5.35 ×."""
    return f"{factor(value)} ×"


def columns_of(found: Measured, keys: Sequence[Sequence[str]]) -> list[int]:
    """Which columns of a table of keys hold something of their own."""
    return [i for i in range(len(keys[0])) if any(row[i] in found.summary and list(row).count(row[i]) == 1 for row in keys)]


def figures_table(found: Measured) -> Table | None:
    """Teacher, student before, control and student after, as at the end of a run; what costs are in a table of their own."""
    known = [row for row in (LOSS, *ROWS) if any(key.startswith("eval/") for key in row.keys)]
    rows = [row for row in known if any(key in found.summary for key in row.keys)]
    if not rows:
        return None
    own = columns_of(found, [row.keys for row in rows])
    shown = [i for i in PAGE_COLUMNS if i in own]
    titles: Any = COLUMNS if 1 in shown else (*COLUMNS[:3], "student")
    cells = [[f"{_label(found, row)}{better(row.keys[-1])}", *(figure(found, row.keys[i]) for i in shown)] for row in rows]
    return Table("On held-out text: ↓ lower is better, ↑ higher is better", ["", *(titles[i] for i in shown)], cells)


def _label(found: Measured, row: Row) -> str:
    """With the number that k was."""
    k = (found.evaluator.get("evaluation") or {}).get("top_k")
    return row.label.replace("top-k", f"top-{k}") if k else row.label


def better(key: str) -> str:
    """Which way is good, to stand behind a label on the same line."""
    return "\u00a0↑" if HIGHER_IS_BETTER.search(key) else "\u00a0↓"
