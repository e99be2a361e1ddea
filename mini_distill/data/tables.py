"""Rows of JSONL, JSON, CSV and Parquet files."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError
from .row import Row, RowError
from .text_files import MEND_OR_SKIP, hash_files, to_text

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
BOM = b"\xef\xbb\xbf"


class Tables:
    """Rows of tables. A file that is neither CSV nor Parquet by its name is JSON lines or one JSON list, whichever it holds."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def rows(self) -> Iterator[Row | RowError]:
        """Every row.

        Raises:
            DataError: what follows in a file cannot be told apart any more, so nobody could count what is skipped.
        """
        readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
        for file in self.files:
            try:
                yield from readers.get(file.suffix.lower(), _json_rows)(file)
            except OSError as error:
                raise DataError(str(file), f"cannot be read ({error.strerror or error})") from error

    def fingerprint(self) -> dict[str, Any]:
        """The files' content."""
        return {"kind": "table", "files": hash_files(self.files)}


# ------------------------------------------------------------------------------------------------------------------------ JSON


def _json_rows(file: Path) -> Iterator[Row | RowError]:
    with open(file, "rb") as lines:
        if _first_character(lines) == b"[":
            yield from _json_list(file, lines.read())
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_line(file, number, line)


def _first_character(lines: BinaryIO) -> bytes:
    """The first that is not blank; `lines` then stands after a byte order mark, if there is one."""
    start = len(BOM) if lines.read(len(BOM)) == BOM else 0
    lines.seek(start)
    while (character := lines.read(1)).isspace():
        pass
    lines.seek(start)
    return character


def _json_line(file: Path, number: int, line: bytes) -> Row | RowError:
    origin = f"{file}:{number}"
    if not line.endswith(b"\n") and not line.rstrip().endswith(b"}"):
        return RowError(origin, "the last line is cut off", f"Fetch the file again, or delete the line. {MEND_OR_SKIP}", "cut off")
    try:
        value = json.loads(to_text(line, str(file), number))
    except RowError as error:
        return error
    except (ValueError, RecursionError) as error:
        return RowError(origin, f"not valid JSON ({error})", f"A line has to be one object. {MEND_OR_SKIP}")
    return _object(origin, value)


def _json_list(file: Path, data: bytes) -> Iterator[Row | RowError]:
    try:
        values = json.loads(to_text(data, str(file)))
    except (ValueError, RecursionError) as error:
        what, line = f"not valid JSON ({error})", getattr(error, "lineno", 1)
        raise DataError(f"{file}:{line}", what, "Expected a list of objects, or one object a line.") from error
    yield from (_object(f"{file}[{number}]", value) for number, value in enumerate(values, start=1))


def _object(origin: str, value: Any) -> Row | RowError:
    if isinstance(value, dict):
        return Row(origin, value)
    found = "null" if value is None else type(value).__name__
    return RowError(origin, f'got {found}, expected an object such as {{"text": …}}', MEND_OR_SKIP)


# ------------------------------------------------------------------------------------------------------------------------- CSV


def _csv_rows(file: Path) -> Iterator[Row | RowError]:
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 kB that the module allows
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{file}:1", f"two columns have the same name ({', '.join(header)})", "Rename one of them.")
            line = reader.line_num + 1
            for fields in reader:
                if fields:  # not a blank line
                    yield _csv_row(f"{file}:{line}", header, fields)
                line = reader.line_num + 1
        except csv.Error as error:
            remedy = "Mend the line: what follows it cannot be told apart."
            raise DataError(f"{file}:{reader.line_num}", f"not valid CSV ({error})", remedy) from error


def _csv_row(origin: str, header: list[str], fields: list[str]) -> Row | RowError:
    if len(fields) != len(header):
        return RowError(origin, f"got {len(fields)} fields, expected {len(header)} as in the header", MEND_OR_SKIP)
    text = "".join(fields)
    if "\0" in text:
        return RowError(origin, "holds a NUL, so it is not text", MEND_OR_SKIP, "holds a NUL")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # undecodable bytes were read as lone surrogates
        what = f"not UTF-8 (byte 0x{ord(text[error.start]) & 0xFF:02x})"
        return RowError(origin, what, f"Convert the file to UTF-8. {MEND_OR_SKIP}", "not UTF-8")
    return Row(origin, dict(zip(header, fields, strict=True)))


# --------------------------------------------------------------------------------------------------------------------- Parquet


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for columns in batch.to_pylist():
                number += 1
                yield Row(f"{file}[{number}]", columns)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}[{number + 1}]", f"not a whole Parquet file ({error})", "Fetch or write the file again.") from error
