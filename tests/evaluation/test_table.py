"""The final table: its numbers, its shape in a terminal and in a model card."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mini_distill.evaluation.table import build_summary, count, format_table, format_tasks, markdown_table, markdown_tasks


def metrics(scale: float, teacher: bool = True) -> dict[str, float]:
    names = {"perplexity": 20.0, "nll": 3.0, "bits_per_byte": 1.5}
    found = {f"eval/student_{name}": value * scale for name, value in names.items()} | {"eval/student_ece": 0.04, "eval/tokens": 81600.0}
    if teacher:
        found |= {f"eval/teacher_{name}": value for name, value in names.items()}
        found |= {"eval/forward_kl": 0.5 * scale, "eval/reverse_kl": 0.7 * scale, "eval/top1_agreement": 0.6}
    return found


EXTRA = {
    "model/teacher_parameters": 8_030_000_000,
    "model/student_parameters": 1_234_567,
    "perf/teacher_tokens_per_second": 1234.5,
    "perf/student_tokens_per_second": 123456.7,
}


@pytest.fixture
def summary() -> dict[str, Any]:
    return build_summary(metrics(100.0), metrics(1.1), EXTRA)


def test_the_summary_keeps_after_and_renames_before(summary: dict[str, Any]) -> None:
    assert summary["eval/student_perplexity"] == pytest.approx(22.0)
    assert summary["before/student_perplexity"] == pytest.approx(2000.0)
    assert summary["before/forward_kl"] == pytest.approx(50.0)
    assert summary["eval/tokens"] == 81600.0
    assert not [key for key in summary if key.startswith("before/teacher_")]
    assert summary["model/student_parameters"] == 1_234_567


def cells(table: str, label: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(label))
    return line[len(label) :].split()


def test_each_number_stands_in_its_column(summary: dict[str, Any]) -> None:
    table = format_table(summary)
    assert cells(table, "perplexity") == ["20.00", "2,000.00", "22.00"]
    assert cells(table, "KL to the teacher (nats)") == ["–", "50.000", "0.550"]
    assert cells(table, "parameters") == ["8.03", "B", "1.23", "M", "1.23", "M"]
    assert cells(table, "tokens read per second") == ["1,234", "–", "123,457"]
    assert "81,600 held-out tokens" in table


@pytest.mark.parametrize("scale", [1.0, 1e5, 1e30, math.inf, math.nan])
def test_the_table_is_aligned_within_80_columns(scale: float) -> None:
    lines = format_table(build_summary(metrics(scale), metrics(scale), EXTRA)).splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1 and len(lines[0]) <= 80


def test_without_a_teacher_there_is_no_column_and_no_row_for_it() -> None:
    extra = {key: value for key, value in EXTRA.items() if "teacher" not in key}
    table = format_table(build_summary(metrics(100.0, teacher=False), metrics(1.0, teacher=False), extra))
    assert "teacher" not in table and "student before" in table


def test_a_student_that_was_not_measured_before_has_no_such_column(summary: dict[str, Any]) -> None:
    table = format_table(build_summary({}, metrics(1.0), EXTRA))
    assert "student before" not in table
    assert cells(table, "perplexity") == ["20.00", "20.00"]


def test_an_empty_summary_is_no_error() -> None:
    assert isinstance(format_table({}), str) and isinstance(markdown_table({}), str)


def test_a_part_of_the_held_out_text_is_called_a_part(summary: dict[str, Any]) -> None:
    assert "Measured over 81,600 of 163,200 held-out tokens (evaluation.max_batches)." in format_table(
        summary | {"data/held_out_supervised_tokens": 163200}
    )
    assert "Measured over 81,600 held-out tokens." in format_table(summary | {"data/held_out_supervised_tokens": 81600})


TASKS = {
    "task/blimp/teacher": 0.564,
    "task/blimp/teacher_standard_error": 0.006,
    "task/blimp/student": 0.519,
    "task/words/word_perplexity/student": 123.4,
    "task/crows/race-color/teacher": 0.31,
    "task/crows/race-color/teacher_standard_error": 0.021,
    "task/crows/race-color/teacher_from_half": 0.19,
    "task/crows/race-color/student": 0.55,
    "task/crows/race-color/student_standard_error": 0.022,
    "task/crows/race-color/student_from_half": 0.05,
}


def test_tasks_have_their_error_and_stereotypes_their_distance_from_no_preference() -> None:
    """A score that went from 31 % to 55 % `rose by 24 points`, and had come nearer to 50 %."""
    table = format_tasks(TASKS)
    assert cells(table, "blimp") == ["56.4", "±", "0.6", "%", "51.9", "%"]
    assert cells(table, "words/word_perplexity") == ["–", "123.400"]
    assert cells(table, "stereotypes") == ["teacher", "from", "50", "%", "student", "from", "50", "%"]
    assert cells(table, "crows/race-color") == ["31.0", "±", "2.1", "%", "19.0", "55.0", "±", "2.2", "%", "5.0"]
    assert all(len(line) <= 80 for line in table.splitlines()) and table.endswith("50 % is no preference; the distance counts.")


def test_a_task_stands_before_its_groups() -> None:
    """As summary.json has its keys, the row of all items stood between two of its groups."""
    keys = ["blimp/binding", "blimp", "blimp/s-selection", "blimp-2"]
    rows = markdown_tasks({f"task/{key}/student": 0.5 for key in keys}, str).splitlines()[2:6]
    assert [row.split("|")[1].strip() for row in rows] == ["blimp", "blimp/binding", "blimp/s-selection", "blimp-2"]


def test_names_of_tasks_in_a_card_are_spelt_by_whoever_writes_it() -> None:
    table = markdown_tasks({"task/<b>/student": 0.5}, lambda name: name.replace("<", "&lt;"))
    assert "| &lt;b> | 50.0 % |" in table


def test_names_of_tasks_cannot_drive_a_terminal() -> None:
    assert "\x1b" not in format_tasks({"task/a\x1b[2J/student": 0.5})


def test_the_markdown_table_has_the_same_cells(summary: dict[str, Any]) -> None:
    rows = [line for line in markdown_table(summary).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert "| perplexity | 20.00 | 2,000.00 | 22.00 |" in rows


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (24_736, "24.7 k"), (999_499, "999 k"), (999_999, "1.00 M"), (7.25e9, "7.25 B")],
)
def test_counts_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert count(value) == text
