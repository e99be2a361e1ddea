"""Documents in plain text files, the standard library's source among them."""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .row import Row, RowError

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
NEWLINE, NUL = b"\n", b"\0"
MEND_OR_SKIP = "Mend it, or set data.on_bad_row=skip."


def read_text(file: Path) -> str:
    """A file as text, without a byte order mark.

    Raises:
        RowError: it cannot be read, is not UTF-8, or holds a NUL as no text does.
    """
    return to_text(_read(file), str(file)).removeprefix("\ufeff")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RowError(str(file), f"cannot be read ({error.strerror})", reason="unreadable") from error


def to_text(data: bytes, file: str, line: int = 1, offset: int = 0) -> str:
    """The text that `data`, which begins at this line and byte of the file, holds in UTF-8.

    Raises:
        RowError: it is not UTF-8, or holds a NUL as no text does.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        where = f"{file}:{line + data.count(NEWLINE, 0, error.start)}"
        what = f"not UTF-8 (byte 0x{data[error.start]:02x} at offset {offset + error.start})"
        raise RowError(where, what, f"Convert the file to UTF-8. {MEND_OR_SKIP}", "not UTF-8") from error
    if NUL in data:
        where = f"{file}:{line + data.count(NEWLINE, 0, data.index(NUL))}"
        raise RowError(where, "holds a NUL, so it is not text", MEND_OR_SKIP, "holds a NUL")
    return text


def hash_files(files: list[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its path within the folder that holds them all."""
    above = os.path.commonpath([file.absolute().parent for file in files])
    return {os.path.relpath(file.absolute(), above): _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise RowError(str(file), f"cannot be read ({error.strerror})") from error


class TextFiles:
    """Plain text: a document is a file, or what stands between the matches of `separator` in one."""

    def __init__(self, files: list[Path], separator: str | None) -> None:
        self.files = files
        self.separator = re.compile(separator) if separator else None
        self.total = None if separator else len(files)

    def rows(self) -> Iterator[Row | RowError]:
        """Every document, in the order of the files."""
        for file in self.files:
            try:
                if self.separator is None:
                    yield Row(str(file), {"text": read_text(file)})
                else:
                    yield from _documents(file, _read(file), self.separator)
            except RowError as error:
                yield error

    def fingerprint(self) -> dict[str, Any]:
        """The files' content and how it is cut into documents."""
        return {"kind": "text", "files": hash_files(self.files), "separator": self.separator.pattern if self.separator else None}


def _documents(file: Path, data: bytes, separator: re.Pattern[str]) -> Iterator[Row | RowError]:
    """What stands between the separators. A byte that is no text costs its document and not the others."""
    offset = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    text = data[offset:].decode(errors="surrogateescape")
    begin, line = 0, 1
    for start, end in [*(match.span() for match in separator.finditer(text)), (len(text), len(text))]:
        document = text[begin:start]
        if document.strip():
            yield _document(file, document, line, offset)
        line += text.count("\n", begin, end)
        offset += len(text[begin:end].encode(errors="surrogateescape"))
        begin = end


def _document(file: Path, document: str, line: int, offset: int) -> Row | RowError:
    blank_lines = document.count("\n", 0, len(document) - len(document.lstrip()))
    try:
        text = to_text(document.encode(errors="surrogateescape"), str(file), line, offset)
    except RowError as error:
        return error
    return Row(f"{file}:{line + blank_lines}", {"text": text})


class PythonStandardLibrary:
    """The running Python's own modules, without their tests: a document is a file, its origin the path within the library."""

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_path("stdlib"))
        self.names = sorted(self._walk())
        self.total = len(self.names)

    def rows(self) -> Iterator[Row | RowError]:
        """Every module; a few are kept in other encodings on purpose, and are counted under a reason of their own."""
        for name in self.names:
            try:
                yield Row(name, {"text": read_text(self.root / name)})
            except RowError as error:
                yield RowError(name, error.problems[0].what, reason="other encoding")

    def fingerprint(self) -> dict[str, Any]:
        """Names and contents of all modules in one hash: there are hundreds."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0".encode() + (self.root / name).read_bytes())
        return {"kind": "python_stdlib", "sha256": digest.hexdigest()}

    def split_key(self, row: Row) -> str:
        """A module stays on its side whatever its version, so that a teacher has nowhere seen what is held out."""
        return row.origin

    def _walk(self) -> Iterator[str]:
        for folder, inner, names in os.walk(self.root):
            inner[:] = [name for name in inner if name not in NOT_LIBRARY]
            yield from ((Path(folder) / name).relative_to(self.root).as_posix() for name in names if name.endswith(".py"))
