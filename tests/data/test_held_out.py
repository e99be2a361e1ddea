"""Which rows are held out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mini_distill.config import DataConfig
from mini_distill.data.held_out import HELD_OUT, OVERLAP, TRAIN, split_rows
from mini_distill.data.row import Row, RowError


class Rows:
    def __init__(self, *rows: Row | RowError) -> None:
        self.given = rows

    def rows(self) -> Iterator[Row | RowError]:
        return iter(self.given)

    def fingerprint(self) -> dict[str, Any]:
        return {}


def texts(*values: str) -> Rows:
    return Rows(*(Row(f"row {i}", {"text": value, "id": i}) for i, value in enumerate(values)))


def sides(config: DataConfig, source: Rows, held_out: Rows | None = None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {TRAIN: [], HELD_OUT: []}
    for side, row in split_rows(config, source, held_out):
        found[side].append(row.columns["text"] if isinstance(row, Row) else row.reason)
    return found


def test_the_share_that_is_held_out_is_about_what_was_asked_for() -> None:
    found = sides(DataConfig(eval_fraction=0.2), texts(*(f"text {i}" for i in range(2000))))
    assert 330 < len(found[HELD_OUT]) < 470 and len(found[TRAIN]) + len(found[HELD_OUT]) == 2000


def test_a_row_s_side_depends_on_itself_alone() -> None:
    some, more = [f"text {i}" for i in range(100)], [f"text {i}" for i in reversed(range(300))]
    before, after = (sides(DataConfig(eval_fraction=0.3), texts(*values))[HELD_OUT] for values in (some, more))
    assert set(before) == set(after) & set(some)


def test_duplicates_stay_on_one_side_even_with_ids_of_their_own() -> None:
    """The id was hashed too, so that copies of a training text were held out."""
    found = sides(DataConfig(eval_fraction=0.5), texts(*(f"text {i % 40}" for i in range(400))))
    assert not set(found[TRAIN]) & set(found[HELD_OUT]) and found[HELD_OUT]


def test_a_source_may_say_what_decides_the_side() -> None:
    source = texts(*(f"text {i}" for i in range(50)))
    source.split_key = lambda row: "all the same"  # type: ignore[attr-defined]
    assert sorted(len(rows) for rows in sides(DataConfig(eval_fraction=0.5), source).values()) == [0, 50]


def test_a_text_that_is_alone_is_held_out_by_its_end() -> None:
    lines = "".join(f"line {i}\n" for i in range(100))
    found = sides(DataConfig(eval_fraction=0.1), texts(lines))
    assert found[TRAIN][0] + found[HELD_OUT][0] == lines
    assert found[TRAIN][0].endswith("\n") and 80 <= found[TRAIN][0].count("\n") <= 92
    ends = [row.origin for _, row in split_rows(DataConfig(), texts(lines), None) if isinstance(row, Row)]
    assert ends == ["row 0", "row 0 (its end)"]


@pytest.mark.parametrize("text", ["one line", "two lines, the second empty\n", ""])
def test_a_text_without_a_place_to_cut_stays_whole(text: str) -> None:
    found = sides(DataConfig(eval_fraction=0.05), texts(text))
    assert found[TRAIN] + found[HELD_OUT] == [text]


def test_held_out_rows_that_are_trained_on_are_left_out() -> None:
    train, held_out = texts("a", "b", "c"), texts("b", "new", "b")
    assert sides(DataConfig(eval_path="x"), train, held_out) == {TRAIN: ["a", "b", "c"], HELD_OUT: [OVERLAP, "new", OVERLAP]}


def test_only_the_rows_that_are_used_count_as_trained_on() -> None:
    found = sides(DataConfig(eval_path="x", max_rows=1), texts("a", "b"), texts("b"))
    assert found == {TRAIN: ["a"], HELD_OUT: ["b"]}


def test_bad_rows_pass_through_on_their_side() -> None:
    bad = RowError("row 9", "is bad")
    assert sides(DataConfig(eval_fraction=0.0), Rows(Row("r", {"text": "a"}), bad)) == {TRAIN: ["a", "malformed"], HELD_OUT: []}
    assert sides(DataConfig(eval_path="x"), Rows(bad), Rows(bad)) == {TRAIN: ["malformed"], HELD_OUT: ["malformed"]}
