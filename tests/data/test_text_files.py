"""Documents in plain files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mini_distill.data.row import Row, RowError
from mini_distill.data.text_files import PythonStandardLibrary, TextFiles


def documents(file: Path, separator: str | None = None) -> list[tuple[str, str]]:
    rows = list(TextFiles([file], separator).rows())
    return [(row.origin.removeprefix(str(file)), row.columns["text"]) for row in rows if isinstance(row, Row)]


def test_a_file_is_a_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert documents(file) == [("", "one\r\n\r\ntwo")]


def test_a_separator_cuts_a_file_into_documents_named_by_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\nstill one\n\n===\n\ntwo\n===\n   \n===\nthree")
    assert [(place, text.strip()) for place, text in documents(file, r"={3}\n")] == [
        (":1", "one\nstill one"),
        (":6", "two"),
        (":10", "three"),
    ]


def test_a_separator_may_look_ahead_so_that_headings_stay(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("# A\ntext\n# B\nmore\n")
    assert documents(file, r"(?m)^(?=# )") == [(":1", "# A\ntext\n"), (":3", "# B\nmore\n")]


@pytest.mark.parametrize(
    ("content", "place", "what"), [(b"a\nb\n\xff\xfe", ":3", "not UTF-8 (byte 0xff at offset 4)"), (b"a\nb\0", ":2", "holds a NUL")]
)
def test_what_is_not_text_is_named_and_costs_its_file_only(tmp_path: Path, content: bytes, place: str, what: str) -> None:
    bad, good = tmp_path / "a.txt", tmp_path / "b.txt"
    bad.write_bytes(content)
    good.write_text("good")
    error, row = TextFiles([bad, good], None).rows()
    assert isinstance(error, RowError) and isinstance(row, Row)
    assert error.problems[0].where == f"{bad}{place}" and what in str(error)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(("bad", "what"), [(b"\xff\xfe", "not UTF-8 (byte 0xff at offset {})"), (b"\0", "holds a NUL")])
def test_what_is_not_text_costs_its_document_and_not_the_others(tmp_path: Path, start: bytes, bad: bytes, what: str) -> None:
    """One byte of Latin-1 among a million documents took the whole file with it."""
    file = tmp_path / "a.txt"
    before = start + "öne\n===\n\ntwo\n".encode()
    file.write_bytes(before + b"b" + bad + b"d\n===\nthree\n===\n" + bad)
    first, second, third, fourth = TextFiles([file], r"={3}\n").rows()
    assert isinstance(first, Row) and (first.origin, first.columns) == (f"{file}:1", {"text": "öne\n"})
    assert isinstance(third, Row) and (third.origin, third.columns) == (f"{file}:7", {"text": "three\n"})
    assert isinstance(second, RowError) and isinstance(fourth, RowError)
    assert [error.problems[0].where for error in (second, fourth)] == [f"{file}:5", f"{file}:9"]
    assert what.format(len(before) + 1) in str(second) and what.format(file.stat().st_size - len(bad)) in str(fourth)


@pytest.mark.parametrize("separator", [None, "=+"])
def test_an_unreadable_file_is_a_bad_row(tmp_path: Path, separator: str | None) -> None:
    (error,) = TextFiles([tmp_path / "gone.txt"], separator).rows()
    assert isinstance(error, RowError) and "gone.txt: cannot be read (No such file" in str(error)


def test_the_separator_is_part_of_what_the_content_is(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    assert TextFiles([file], "x").fingerprint() != TextFiles([file], None).fingerprint()
    os.utime(file, (0, 0))  # touched and not changed
    assert TextFiles([file], None).fingerprint() == TextFiles([file], None).fingerprint()


def test_the_standard_library_comes_without_its_tests_and_packages() -> None:
    library = PythonStandardLibrary()
    assert {"ast.py", "json/decoder.py"} <= set(library.names) and library.names == sorted(library.names)
    assert not [name for name in library.names if {"site-packages", "test", "tests", "idle_test"} & set(name.split("/")[:-1])]
    row = next(row for row in library.rows() if isinstance(row, Row) and row.origin == "json/decoder.py")
    assert "class JSONDecoder" in row.columns["text"] and library.split_key(row) == "json/decoder.py"


def test_a_module_in_another_encoding_is_counted_and_no_error(tmp_path: Path) -> None:
    library = PythonStandardLibrary()
    (tmp_path / "latin.py").write_bytes("# é".encode("latin-1"))
    (tmp_path / "ascii.py").write_text("pass")
    library.root, library.names = tmp_path, ["ascii.py", "latin.py"]
    good, bad = library.rows()
    assert isinstance(good, Row) and isinstance(bad, RowError) and bad.reason == "other encoding"
