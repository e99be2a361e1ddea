"""The first rows of a source, and of their text no more than there is time for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mini_distill.config import DataConfig
from mini_distill.data.row import Row, RowError
from mini_distill.diagnosis import first_rows as module
from mini_distill.diagnosis.first_rows import FirstRows


class Given:
    """A source that counts what is read of it."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.given, self.read = rows, 0

    def rows(self) -> Iterator[Any]:
        for row in self.given:
            self.read += 1
            yield row

    def fingerprint(self) -> dict[str, Any]:
        raise AssertionError("all of it would be read")


def first(rows: Sequence[Any], config: DataConfig | None = None) -> tuple[list[Any], bool, int]:
    source = Given(rows)
    found = FirstRows(source, config or DataConfig(source="jsonl"))
    assert found.fingerprint() == FirstRows(Given(rows), found.config).fingerprint()
    return list(found.rows()), found.was_cut, source.read


def texts(*given: str) -> list[Row]:
    return [Row(f"a:{i}", {"text": text}) for i, text in enumerate(given)]


def test_a_small_source_is_taken_whole() -> None:
    rows = [*texts("one", "two"), RowError("a:3", "broken")]
    assert first(rows) == (rows, False, 3)


def test_no_more_rows_are_read_than_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 3)
    found, was_cut, read = first(texts(*"abcdefgh"))
    assert (len(found), was_cut, read) == (3, True, 4)
    assert not first(texts(*"abc"))[1]


def test_a_text_that_fills_a_file_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of text is one row, and all of it was tokenised."""
    monkeypatch.setattr(module, "MOST_CHARACTERS", 10)
    found, was_cut, _ = first(texts("four", "seven more letters", "never read"))
    assert [row.columns["text"] for row in found] == ["four", "seven "] and was_cut


def test_a_conversation_is_whole_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CHARACTERS", 10)
    config = DataConfig(source="jsonl", messages_column="text")
    assert [row.columns["text"] for row in first(texts("four", "seven more letters"), config)[0]] == ["four"]
    assert [row.columns["text"] for row in first(texts("seven more letters", "four"), config)[0]] == ["seven more letters"]
