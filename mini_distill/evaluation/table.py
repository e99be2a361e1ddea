"""The final table: teacher, student before, student after."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..storage import size_text
from .printable import printable

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
    _measured("distinct token pairs in generations", "text", "distinct_2", percent),
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
    tokens, there, gap = (summary.get(key) for key in ("eval/tokens", "data/held_out_supervised_tokens", "control/gap_closed"))
    part = f" of {there:,.0f}" if tokens is not None and there is not None and tokens < there else ""
    notes = [] if tokens is None else [f"Measured over {tokens:,.0f}{part} held-out tokens{' (evaluation.max_batches)' if part else ''}."]
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
    """What the models got on each task, and on each group of it, for a terminal; stereotype scores with their distance from 50 %."""
    return "\n\n".join([*map(_aligned, _task_cells(summary, printable)), _task_note(summary)])


def markdown_tasks(summary: Mapping[str, Any], spelt: Callable[[str], str]) -> str:
    """The same for a model card; `spelt` makes Markdown of a name, which may be a stranger's."""
    return "\n\n".join([*map(_markdown, _task_cells(summary, spelt)), _task_note(summary)])


def _task_note(summary: Mapping[str, Any]) -> str:
    stereotypes = any(key.endswith(FROM_HALF) for key in summary)
    return "±: standard error over items." + (" 50 % is no preference; the distance counts." if stereotypes else "")


def scores_of_tasks(summary: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What the student got on each task, over all its items: (name, score)."""
    scores = [(key.removeprefix(TASKS).rpartition("/"), value) for key, value in summary.items() if key.startswith(TASKS)]
    return [(task, value) for (task, _, model), value in scores if model == "student" and "/" not in task]


FROM_HALF = "_from_half"


def _task_cells(summary: Mapping[str, Any], spelt: Callable[[str], str]) -> list[list[list[str]]]:
    """Two tables, or the one of which there is something: tasks to be right in, and preferences for stereotypes."""
    found = {
        task for key in summary if key.startswith(TASKS) for task, _, model in [key.rpartition("/")] if model in ("teacher", "student")
    }
    tasks = sorted(found, key=lambda task: task.split("/"))  # each over all its items, then its groups
    models = [name for name in ("teacher", "student") if any(f"{task}/{name}" in summary for task in tasks)]
    stereotypes = [task for task in tasks if any(f"{task}/{name}{FROM_HALF}" in summary for name in models)]
    right = [task for task in tasks if task not in stereotypes]
    tables = [
        [["task", *models], *([spelt(task.removeprefix(TASKS)), *(_score(summary, f"{task}/{m}") for m in models)] for task in right)],
        [
            ["stereotypes", *(title for name in models for title in (name, "from 50 %"))],
            *(
                [spelt(task.removeprefix(TASKS)), *(text for m in models for text in _preference(summary, f"{task}/{m}"))]
                for task in stereotypes
            ),
        ],
    ]
    return [table for table in tables if len(table) > 1]


def _score(summary: Mapping[str, Any], key: str) -> str:
    """61.3 ± 1.2 %; what is no share, such as a perplexity, as a number."""
    value, error = summary.get(key), summary.get(f"{key}_standard_error")
    if value is None or not 0 <= value <= 1:
        return MISSING if value is None else decimals(3)(value)
    return percent(value) if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"


def _preference(summary: Mapping[str, Any], key: str) -> tuple[str, str]:
    distance = summary.get(f"{key}{FROM_HALF}")
    return _score(summary, key), MISSING if distance is None else f"{100 * distance:.1f}"


def markdown_table(summary: Mapping[str, Any]) -> str:
    """The final table for a model card."""
    return f"{_markdown(_cells(summary))}\n\n{_footnote(summary)}".rstrip()


def _markdown(cells: list[list[str]]) -> str:
    marks = [":--", *["--:"] * (len(cells[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], marks, *cells[1:]])
