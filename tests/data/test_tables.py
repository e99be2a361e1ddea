"""Rows of JSON, CSV and Parquet files, whole and damaged."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mini_distill.data.row import Row
from mini_distill.data.tables import Tables
from mini_distill.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/corpora"


def read(file: Path) -> list[Any]:
    """`(place, columns)` of each row, or `(place, message)`."""
    rows = []
    for row in Tables([file]).rows():
        if isinstance(row, Row):
            rows.append((row.origin.removeprefix(str(file)), row.columns))
        else:
            rows.append((row.problems[0].where.removeprefix(str(file)), str(row)))
    return rows


def write(folder: Path, name: str, content: bytes | str) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_blank_lines_keep_the_line_numbers_true(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", '\n{"text": "one"}\n\n  \n{"text": "two"}\r\n')
    assert read(file) == [(":2", {"text": "one"}), (":5", {"text": "two"})]


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path: Path) -> None:
    for name, content in {"a.jsonl": '{"text": "x"}\n', "a.json": '[{"text": "x"}]', "a.csv": "text\nx\n"}.items():
        assert [columns for _, columns in read(write(tmp_path, name, b"\xef\xbb\xbf" + content.encode()))] == [{"text": "x"}]


def test_json_is_a_list_or_lines_whatever_the_file_is_called(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        assert read(write(tmp_path, name, '{"a": 1}\n{"a": 2}')) == [(":1", {"a": 1}), (":2", {"a": 2})]
        assert read(write(tmp_path, name, ' \n[{"a": 1},\n {"a": 2}]\n')) == [("[1]", {"a": 1}), ("[2]", {"a": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b"[1, 2]", "got list, expected an object"),
        (b"null", "got null, expected an object"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 0xff"),
        (b'{"text": "a\0b"}', "holds a NUL"),
        (b"\0" * 40, "holds a NUL"),  # what a crashed file system leaves
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_malformed_line_costs_itself_and_names_its_place(tmp_path: Path, line: bytes, message: str) -> None:
    good = b'{"text": "good"}\n'
    first, bad, last = read(write(tmp_path, "a.jsonl", good + line + b"\n" + good))
    assert first == (":1", {"text": "good"}) and last == (":3", {"text": "good"})
    assert bad[0] == ":2" and message in bad[1] and "\n" not in bad[1] and "data.on_bad_row=skip" in bad[1]


@pytest.mark.parametrize("end", ['{"text": "tw', '{"text": "tw"', '{"text": tr', "{", '{"text": "é'.encode()[:-1]])
def test_a_last_line_that_is_cut_off_is_called_so(tmp_path: Path, end: bytes | str) -> None:
    end = end if isinstance(end, bytes) else end.encode()
    rows = read(write(tmp_path, "a.jsonl", b'{"text": "one"}\n' + end))
    assert rows[0] == (":1", {"text": "one"}) and rows[1][0] == ":2" and "the last line is cut off" in rows[1][1]


def test_a_damaged_json_list_stops_at_its_line(tmp_path: Path) -> None:
    """Nobody could count the rows that are lost with it, so it cannot be skipped either."""
    with pytest.raises(DataError, match=r"a\.json:2: not valid JSON"):
        read(write(tmp_path, "a.json", '[{"a": 1},\n{"a": oops}]'))


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert read(write(tmp_path, name, "")) == []


def test_a_csv_row_is_named_by_its_first_line(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", 'id,text\n1,"two\nlines"\n\n2,three\n')
    assert read(file) == [(":2", {"id": "1", "text": "two\nlines"}), (":5", {"id": "2", "text": "three"})]


def test_a_csv_field_may_be_a_whole_book(tmp_path: Path) -> None:
    """Python's csv module stops at 131,072 characters."""
    assert len(read(write(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n"))[0][1]["text"]) == 200_000


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"1", "got 1 fields, expected 2"), (b"1,2,3", "got 3 fields"), (b"1,\xff", "not UTF-8 (byte 0xff"), (b"1,a\0b", "holds a NUL")],
)
def test_a_malformed_csv_row_costs_itself(tmp_path: Path, line: bytes, message: str) -> None:
    rows = read(write(tmp_path, "a.csv", b"id,text\n1,a\n" + line + b"\n2,b\n"))
    assert [place for place, _ in rows] == [":2", ":3", ":4"] and message in rows[1][1]


@pytest.mark.parametrize("content", ['text\n"never closed\nb\n', 'text\n"a"b\n'])
def test_csv_that_cannot_be_told_apart_stops(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="not valid CSV"):
        read(write(tmp_path, "a.csv", content))


def test_two_csv_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two columns have the same name"):
        read(write(tmp_path, "a.csv", "text,text\na,b\n"))


def test_parquet_keeps_types_and_a_damaged_file_stops(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    rows = [{"text": "a", "turns": [{"role": "user"}]}, {"text": None, "turns": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert read(file) == [("[1]", rows[0]), ("[2]", rows[1])]
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet.*not a whole Parquet file"):
        read(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read \(No such file"):
        read(tmp_path / "gone.jsonl")


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One to three bits flipped, bytes taken out or put in, or the end cut off."""
    for _ in range(chance.randint(1, 3)):
        at, change = chance.randrange(len(data)), chance.randrange(4)
        if change == 0:
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif change == 1:
            data = data[:at] + data[at + chance.randint(1, 9) :] or b"{"
        elif change == 2:
            data = data[:at] + chance.choice((b'"', b"\n", b"\0", b"\xff", b"{", b"]", b"\\u12", b"\xe2\x80\xa8")) + data[at:]
        else:
            data = data[: max(at, 1)]
    return data


def test_two_thousand_damaged_files_mean_the_same_or_say_where(tmp_path: Path) -> None:
    """Every line is a row or an error that names it, and an undamaged line is what it was."""
    chance, stopped = random.Random(0), 0
    rows = [{"id": i, "text": f"row {i} é"} for i in range(6)]
    lines = {json.dumps(row, ensure_ascii=row["id"] % 2 == 0).encode(): row for row in rows}
    for _ in range(2000):
        data = damaged(b"".join(line + b"\n" for line in lines), chance)
        file = write(tmp_path, "a.jsonl", data)
        try:
            found = read(file)
        except DataError as error:  # it begins with "[" now
            assert str(error).startswith(f"{file}:") and "\n" not in str(error)
            stopped += 1
            continue
        expected = [(f":{number}", line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
        assert [place for place, _ in found] == [place for place, _ in expected], data
        assert all(columns == lines[line] for (_, columns), (_, line) in zip(found, expected, strict=True) if line in lines), data
    assert stopped < 20


@pytest.mark.parametrize(
    "name",
    ["bfcl/BFCL_v4_multiple.json", "mbpp_sanitized/sanitized-mbpp.json", "gsm8k/train.jsonl", "crows_pairs/crows_pairs_anonymized.csv"],
)
def test_real_corpora_have_no_bad_row(name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    rows = list(Tables([SHARED / name]).rows())
    assert len(rows) >= 100 and all(isinstance(row, Row) and len(row.columns) >= 2 for row in rows)


def test_fingerprints_are_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "in").mkdir(parents=True)
        for name in ("a.jsonl", "in/b.jsonl"):
            (tmp_path / folder / name).write_text(json.dumps({"text": name}))
    one, two = (Tables(sorted((tmp_path / folder).rglob("*.jsonl"))).fingerprint() for folder in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "in" / "b.jsonl").write_text(json.dumps({"text": "other"}))
    assert Tables(sorted((tmp_path / "two").rglob("*.jsonl"))).fingerprint() != one
