"""Token rows on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from faults.injection import with_file_size_limit

from mini_distill.data import token_rows
from mini_distill.data.row import Rendered
from mini_distill.data.token_rows import TokenRows, TokenRowsWriter
from mini_distill.errors import DataError


def rendered(ids: list[int], supervised: list[bool]) -> Rendered:
    return Rendered(np.array(ids), np.array(supervised), np.arange(len(ids)))


def write(folder: Path, rows: list[tuple[str, Rendered]], num_ids: int = 100) -> TokenRows:
    writer = TokenRowsWriter(folder, "train", num_ids)
    for origin, row in rows:
        writer.add(origin, row)
    writer.close()
    return TokenRows(folder, "train")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = write(tmp_path, [("a:1", rendered([5, 6, 7], [False, True, True])), ("b/é:2", rendered([8], [True]))])
    assert rows.tokens["input_ids"].tolist() == [5, 6, 7, 8] and rows.tokens["supervised"].tolist() == [False, True, True, True]
    assert rows.tokens["num_bytes"].tolist() == [0, 1, 2, 0] and rows.offset.tolist() == [0, 3, 4]
    assert len(rows) == 2 and rows.lengths.tolist() == [3, 1] and [rows.origin(0), rows.origin(1)] == ["a:1", "b/é:2"]


def test_an_origin_may_be_a_file_name_that_is_not_text(tmp_path: Path) -> None:
    assert write(tmp_path, [("bad\udcff.txt", rendered([1, 2], [True, True]))]).origin(0) == "bad\udcff.txt"


@pytest.mark.parametrize(("num_ids", "bytes_each"), [(2**16, 2), (2**16 + 1, 4)])
def test_the_highest_token_id_decides_the_width(tmp_path: Path, num_ids: int, bytes_each: int) -> None:
    rows = write(tmp_path, [("a", rendered([0, num_ids - 1], [True, True]))], num_ids)
    assert rows.tokens["input_ids"].tolist() == [0, num_ids - 1] and rows.tokens["input_ids"].itemsize == bytes_each


def test_no_rows_are_read_back_too(tmp_path: Path) -> None:
    rows = write(tmp_path, [])
    assert len(rows) == 0 and rows.tokens["input_ids"].size == 0 and rows.count_supervised(np.zeros(0, int), np.zeros(0, int)).size == 0


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_supervised_tokens_are_counted_range_by_range_in_any_bite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(token_rows, "TOKENS_AT_ONCE", at_once)
    chance = np.random.default_rng(0)
    supervised = chance.random(300) < 0.5
    rows = write(tmp_path, [("a", rendered([1] * 300, supervised.tolist()))])
    edges = np.sort(chance.choice(301, 40, replace=False))
    begin, end = edges[::2], edges[1::2]
    assert rows.count_supervised(begin, end).tolist() == [int(supervised[a:b].sum()) for a, b in zip(begin, end, strict=True)]


def test_a_piece_is_read_from_anywhere_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "STRETCH", 4)
    rows = write(tmp_path, [("a", rendered(list(range(9)), [True] * 9)), ("b", rendered([50, 51], [False, True])), ("c", rendered([], []))])
    for start in range(9):
        for length in range(1, 10 - start):
            assert rows.read(0, start, length)["input_ids"].tolist() == list(range(start, start + length))
    assert rows.read(1, 0, 2).tolist() == [(50, 0, False), (51, 1, True)]


@pytest.mark.parametrize("damage", ["cut short", "one bit", "emptied"])
def test_what_changes_on_disk_while_it_is_in_use_is_not_read(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a run were mapped into memory, verified once, and then believed for days: zeros were trained on."""
    monkeypatch.setattr(token_rows, "STRETCH", 100)
    rows = write(tmp_path, [("a", rendered(list(range(1000)), [True] * 1000)), ("b", rendered([1] * 4000, [True] * 4000))], 2000)
    file = tmp_path / "train.tokens.npy"
    before = file.read_bytes()
    flipped = bytearray(before)
    flipped[len(before) // 2] ^= 4
    content = {"cut short": before[: len(before) // 2], "one bit": bytes(flipped), "emptied": b""}[damage]
    with file.open("r+b") as opened:  # the same file, as it is open
        opened.write(content)
        opened.truncate(len(content))
    refused = 0
    for row, length in ((0, 1000), (1, 4000)):
        for start in range(0, length, 100):
            try:
                rows.read(row, start, 50)
            except DataError as error:
                refused += 1
                assert str(error).startswith(f"{file}: the tokens of {'ab'[row]} are no longer what was written: ") and error.exit_code == 3
    assert refused == {"cut short": 26, "one bit": 1, "emptied": 50}[damage]


def test_a_spawned_worker_gets_file_names_and_no_copy(tmp_path: Path) -> None:
    """A memory map is pickled with all that it maps: every spawned worker held the corpus once more."""
    rows = write(tmp_path, [("a", rendered([3] * 50_000, [True] * 50_000))])
    sent = pickle.dumps(rows)
    assert len(sent) < 1000 and pickle.loads(sent).tokens["input_ids"].tolist() == rows.tokens["input_ids"].tolist()


@pytest.mark.parametrize(("limit", "ending"), [(9000, 0), (6000, 1)])
def test_no_file_is_cut_short_silently_on_a_full_disk(limit: int, ending: int, tmp_path: Path) -> None:
    """`np.save` left out what did not fit, and said nothing; the manifest was then made of what was there."""

    def write_many() -> None:
        writer = TokenRowsWriter(tmp_path, "train", 100)
        for _ in range(1000):
            writer.add("", rendered([1], [True]))  # offsets take eight bytes a row, more than any other file
        writer.close()

    assert with_file_size_limit(limit, write_many) == ending
