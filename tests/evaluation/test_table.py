"""The final table: its numbers, its shape in a terminal and in a model card."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mini_distill.evaluation.table import build_summary, count, format_table, markdown_table


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
