"""The final table: teacher, student before, student after."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..storage import size_text

MISSING = "–"


def build_summary(before: Mapping[str, float], after: Mapping[str, float], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every number of the final table, flat and keyed like the metrics.

    Args:
        before: Metrics of the untrained student, keyed `eval/…`; they become `before/…`. Those of the teacher are left out,
            since it does not change. Empty when the student was not measured before.
        after: Metrics of the trained student; their keys stay.
        extra: Whatever else belongs into the summary. The table shows `model/teacher_parameters`, `model/student_parameters`,
            `perf/teacher_tokens_per_second` and `perf/student_tokens_per_second`.
    """
    renamed = {key.replace("eval/", "before/", 1): value for key, value in before.items() if key.startswith("eval/")}
    about_student = {key: value for key, value in renamed.items() if not key.startswith("before/teacher_") and key != "before/tokens"}
    return {**after, **about_student, **(extra or {})}


@dataclass(frozen=True)
class Row:
    """A line of the table: its label, the keys of teacher, student before, control and student after, and how a number is written."""

    label: str
    keys: tuple[str, str, str, str]
    text: Callable[[float], str]


def _of_each(label: str, name: str, text: Callable[[float], str]) -> Row:
    return Row(label, (f"eval/teacher_{name}", f"before/student_{name}", f"control/student_{name}", f"eval/student_{name}"), text)


def _between(label: str, name: str, text: Callable[[float], str]) -> Row:
    return Row(label, ("", f"before/{name}", f"control/{name}", f"eval/{name}"), text)


def _measured(label: str, family: str, name: str, text: Callable[[float], str]) -> Row:
    return Row(label, (f"{family}/teacher_{name}", "", "", f"{family}/student_{name}"), text)


def decimals(digits: int) -> Callable[[float], str]:
    """A number with `digits` behind the point; with an exponent where that would not fit a column."""
    return lambda value: f"{value:,.{digits}f}" if abs(value) < 1e7 else f"{value:.2e}"


def percent(value: float) -> str:
    """A share: 61.3 %."""
    return f"{100 * value:.1f} %"


def count(value: float) -> str:
    """A number of things: 950, 48.2 k, 1.52 M, 7.25 B."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * size:  # what would be rounded up to the unit belongs to it
            return f"{value / size:,.{max(0, 2 - int(math.log10(max(1, value / size))))}f}{unit}"
    return f"{value:.0f}"


OWN_SIZE = "model/student_parameters"
ROWS = (
    _of_each("perplexity", "perplexity", decimals(2)),
    _of_each("bits per byte", "bits_per_byte", decimals(3)),
    _between("KL to the teacher (nats)", "forward_kl", decimals(3)),
    _between("reverse KL (nats)", "reverse_kl", decimals(3)),
    _between("top-1 agreement", "top1_agreement", percent),
    _between("top-k agreement", "topk_agreement", percent),
    _between("rank correlation", "rank_correlation", decimals(3)),
    _of_each("calibration error", "ece", percent),
    Row("parameters", ("model/teacher_parameters", OWN_SIZE, OWN_SIZE, OWN_SIZE), count),
    _measured("weight files", "model", "file_bytes", size_text),
    _measured("operations per token", "model", "flops_per_token", count),
    _measured("tokens read per second", "perf", "tokens_per_second", decimals(0)),
    _measured("seconds to the first token", "perf", "time_to_first_token", decimals(3)),
    _measured("tokens written per second", "perf", "generation_tokens_per_second", decimals(0)),
    _measured("peak memory", "perf", "peak_memory_bytes", size_text),
    _measured("cost of a million tokens", "cost", "per_million_tokens", decimals(4)),
    _measured("joules per million tokens (estimate)", "energy", "joules_per_million_tokens_estimate", count),
    _measured("repeated 4-grams in generations", "text", "repetition", percent),
    _measured("distinct word pairs in generations", "text", "distinct_2", percent),
)
COLUMNS = ("teacher", "student before", "control", "student after")
TASKS = "task/"


def _cells(summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows; rows without a number and columns without one of their own are left out."""
    rows = [row for row in ROWS if any(key in summary for key in row.keys)]
    shown = [i for i in range(len(COLUMNS)) if any(row.keys[i] in summary and row.keys.count(row.keys[i]) == 1 for row in rows)]
    cells = [[row.label, *(_cell(summary, row.keys[i], row.text) for i in shown)] for row in rows]
    titles = COLUMNS if 1 in shown else (*COLUMNS[:3], "student")
    return [["", *(titles[i] for i in shown)], *cells]


def _cell(summary: Mapping[str, Any], key: str, text: Callable[[float], str]) -> str:
    value = summary.get(key)
    return MISSING if value is None else text(value)


def _footnote(summary: Mapping[str, Any]) -> str:
    tokens, gap = summary.get("eval/tokens"), summary.get("control/gap_closed")
    notes = [] if tokens is None else [f"Measured over {tokens:,.0f} held-out tokens."]
    if gap is not None:
        notes.append(f"Of the gap between the control (the same student without the teacher) and the teacher, {percent(gap)} is closed.")
    return " ".join(notes)


def format_table(summary: Mapping[str, Any]) -> str:
    """The table for a terminal of 80 columns or more.

    Args:
        summary: As `build_summary` makes it; what is missing is shown as a dash or left out.
    """
    return f"{_aligned(_cells(summary))}\n{_footnote(summary)}".rstrip()


def _aligned(cells: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in cells) + 2 for i in range(len(cells[0]))]
    rule = "─" * sum(widths)
    lines = [
        "".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in cells
    ]
    return "\n".join([lines[0], rule, *lines[1:], rule])


def format_tasks(summary: Mapping[str, Any]) -> str:
    """What the models got on each task, and on each group of it: `task/<name>/<model>` and `task/<name>/<group>/<model>`."""
    scores: dict[str, dict[str, float]] = {}
    for key, value in summary.items():
        task, _, model = key.removeprefix(TASKS).rpartition("/")
        if key.startswith(TASKS) and model in ("teacher", "student"):
            scores.setdefault(task, {})[model] = value
    models = [name for name in ("teacher", "student") if any(name in of_task for of_task in scores.values())]
    cells = [
        ["task", *models],
        *([task, *(percent(of_task[m]) if m in of_task else MISSING for m in models)] for task, of_task in scores.items()),
    ]
    return _aligned(cells)


def markdown_table(summary: Mapping[str, Any]) -> str:
    """The same table for a model card."""
    header, *rows = _cells(summary)
    marks = [":--", *["--:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in [header, marks, *rows]]
    return "\n".join([*lines, "", _footnote(summary)]).rstrip()
