"""Where rows come from: the standard library's source, text files, tables, the hub, or a user's own class."""

from __future__ import annotations

import csv
import glob
import hashlib
import importlib
import io
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..config import DataConfig
from ..errors import DataError
from .row import Row

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class Source(Protocol):
    """What a data source has to offer; a user's own class is given the DataConfig."""

    def rows(self) -> Iterator[Row | DataError]:
        """Every row, in a fixed order; a row that cannot be read comes as the error it would raise."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the content is, as plain JSON values: equal for equal content."""
        ...


def open_source(config: DataConfig, where: str = "data", held_out: bool = False) -> Source:
    """The source of the training rows, or with `held_out` that of `eval_path` or `eval_split`.

    Raises:
        DataError: a path, a data set or a class that cannot be opened.
    """
    path = config.eval_path if held_out and config.eval_path else config.path
    if config.source == "python_stdlib":
        return PythonStandardLibrary()
    if config.source == "text":
        return TextFiles(_files(path, (".txt",), f"{where}.{'eval_path' if held_out else 'path'}"), config.document_separator)
    if config.source == "jsonl":
        return Tables(_files(path, TABLE_SUFFIXES, f"{where}.{'eval_path' if held_out else 'path'}"), columns_of(config))
    if config.source == "hub":
        return HubDataset(config, config.eval_split if held_out and config.eval_split else config.split, where)
    return _user_source(config, where)


def columns_of(config: DataConfig) -> tuple[str, ...]:
    """The columns that every row must have."""
    if config.messages_column:
        return (config.messages_column,)
    if config.prompt_column and config.completion_column:
        return (config.prompt_column, config.completion_column)
    return (config.text_column or "text",)


def _files(path: str | None, suffixes: tuple[str, ...], where: str) -> list[Path]:
    """The files that a path, folder or glob names, sorted."""
    assert path is not None
    found = Path(path).expanduser()
    if found.is_file():
        return [found]
    if found.is_dir():
        files = sorted(file for file in found.rglob("*") if file.suffix in suffixes and file.is_file())
        what = f"no {', '.join(suffixes)} file in the folder '{path}'"
    else:
        files = sorted(Path(name) for name in glob.glob(str(found), recursive=True) if Path(name).is_file())
        what = f"no file matches '{path}'"
    if not files:
        raise DataError(where, what, "Name a file, a folder or a glob such as 'corpus/**/*.txt'.")
    return files


def _read_text(file: Path) -> str:
    """A file as text, without a byte order mark.

    Raises:
        DataError: it is not UTF-8, or holds a NUL byte as no text does.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(str(file), f"cannot be read ({error.strerror})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{file}:{line}", f"not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})", "Convert the file to UTF-8.") from error
    if "\0" in text:
        raise DataError(f"{file}:{text[: text.index(chr(0))].count(chr(10)) + 1}", "holds a NUL byte, so it is not text")
    return text


def _fingerprint_of(files: list[Path]) -> dict[str, str]:
    return {file.name if len(files) == 1 else file.as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class PythonStandardLibrary:
    """The running Python's own modules: a document is a file, its origin the path within the library. Tests are left out."""

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_path("stdlib"))
        self.files = sorted(
            file for file in self.root.rglob("*.py") if not NOT_LIBRARY & set(file.relative_to(self.root).parts[:-1])
        )

    def rows(self) -> Iterator[Row | DataError]:
        for file in self.files:
            try:
                yield Row(self._name(file), {"text": _read_text(file)})
            except DataError:
                continue  # a few files are kept in other encodings on purpose

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{self._name(file)}\0".encode() + file.read_bytes())
        return {"kind": "python_stdlib", "sha256": digest.hexdigest()}

    def split_key(self, row: Row) -> str:
        """A file stays on its side whatever becomes of its content, so that a teacher never sees what is held out."""
        return row.origin

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()


class TextFiles:
    """Plain text: a document is a file, or what stands between the matches of `separator` in one."""

    def __init__(self, files: list[Path], separator: str | None) -> None:
        self.files = files
        self.separator = re.compile(separator) if separator else None

    def rows(self) -> Iterator[Row | DataError]:
        for file in self.files:
            try:
                text = _read_text(file)
            except DataError as error:
                yield error
                continue
            if self.separator is None:
                yield Row(str(file), {"text": text})
            else:
                yield from self._documents(file, text)

    def _documents(self, file: Path, text: str) -> Iterator[Row]:
        assert self.separator is not None
        ends = [match.span() for match in self.separator.finditer(text)] + [(len(text), len(text))]
        begin = line = 0
        for start, end in ends:
            document = text[begin:start]
            if document.strip():
                yield Row(f"{file}:{line + 1}", {"text": document})
            line += text.count("\n", begin, end)
            begin = end

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "text", "files": _fingerprint_of(self.files), "separator": self.separator.pattern if self.separator else None}


class Tables:
    """Rows of JSONL, JSON, CSV or Parquet files."""

    def __init__(self, files: list[Path], required: tuple[str, ...]) -> None:
        self.files, self.required = files, required

    def rows(self) -> Iterator[Row | DataError]:
        readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
        for file in self.files:
            for row in readers.get(file.suffix, _json_rows)(file):
                yield row if isinstance(row, DataError) else _with_columns(row, self.required)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "table", "files": _fingerprint_of(self.files)}


def _with_columns(row: Row, required: tuple[str, ...]) -> Row | DataError:
    missing = [name for name in required if name not in row.columns]
    if not missing:
        return row
    there = ", ".join(map(str, list(row.columns)[:8])) or "none"
    return DataError(row.origin, f"no column '{missing[0]}' (there are: {there})", "Name the columns: data.text_column, or data.prompt_column and data.completion_column, or data.messages_column.")


def _json_rows(file: Path) -> Iterator[Row | DataError]:
    """JSON lines, or one JSON list of objects, whatever the file is called."""
    try:
        text = _read_text(file)
    except DataError as error:
        yield error
        return
    if text.lstrip()[:1] == "[":
        yield from _json_list(file, text)
        return
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_line(f"{file}:{number}", line, is_last=number == len(lines))


def _json_line(origin: str, line: str, is_last: bool) -> Row | DataError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = "the last line is cut off" if is_last else "not valid JSON"
        return DataError(origin, f"{what} ({error})", "Mend the line, or set data.on_bad_row=skip.")
    if not isinstance(value, dict):
        return DataError(origin, f"got {type(value).__name__}, expected an object such as {{\"text\": …}}", "Mend the line, or set data.on_bad_row=skip.")
    return Row(origin, value)


def _json_list(file: Path, text: str) -> Iterator[Row | DataError]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        yield DataError(f"{file}:{line}", f"not valid JSON ({error})")
        return
    for number, value in enumerate(values, start=1):
        origin = f"{file}[{number}]"
        yield Row(origin, value) if isinstance(value, dict) else DataError(origin, f"got {type(value).__name__}, expected an object")


def _csv_rows(file: Path) -> Iterator[Row | DataError]:
    try:
        reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
        for row in reader:
            origin = f"{file}:{reader.line_num}"
            if None in row or None in row.values():
                yield DataError(origin, f"has {'more' if None in row else 'fewer'} fields than the header ({len(reader.fieldnames or [])})")
            else:
                yield Row(origin, dict(row))
    except csv.Error as error:
        yield DataError(f"{file}:{reader.line_num}", f"not valid CSV ({error})")
    except DataError as error:
        yield error


def _parquet_rows(file: Path) -> Iterator[Row | DataError]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield Row(f"{file}[{number}]", row)
    except (pyarrow.ArrowInvalid, OSError) as error:
        yield DataError(str(file), f"not a whole Parquet file ({error})")


class HubDataset:
    """A data set on the hub, or a folder that `Dataset.save_to_disk` wrote; `streaming` reads it row by row over the network."""

    def __init__(self, config: DataConfig, split: str, where: str) -> None:
        assert config.path is not None
        self.config, self.split, self.required = config, split, columns_of(config)
        self.data = self._load(config, split, where)

    def _load(self, config: DataConfig, split: str, where: str) -> Any:
        import datasets

        folder = Path(config.path or "").expanduser()
        try:
            if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(str(folder))
                return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return datasets.load_dataset(config.path, config.name, split=split, revision=config.revision, streaming=config.streaming)
        except Exception as error:  # the library's many; all are about what the user named
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            remedy = "Check the name, log in for a gated one (hf auth login), or without network give a folder written by save_to_disk, or local files with data=jsonl."
            raise DataError(f"{where}.path", f"cannot load the data set '{config.path}' split '{split}' ({first[:200]})", remedy) from error

    def rows(self) -> Iterator[Row | DataError]:
        for number, columns in enumerate(self.data):
            yield _with_columns(Row(f"{self.config.path}[{self.split}][{number}]", dict(columns)), self.required)

    def fingerprint(self) -> dict[str, Any]:
        content = getattr(self.data, "_fingerprint", None) if not self.config.streaming else None
        return {"kind": "hub", "path": self.config.path, "name": self.config.name, "revision": self.config.revision, "split": self.split, "content": content}


def _user_source(config: DataConfig, where: str) -> Source:
    module, _, name = config.source.rpartition(".")
    try:
        source: Source = getattr(importlib.import_module(module), name)(config)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{where}.source", f"cannot import '{config.source}' ({error})", "Give package.module.Class.") from error
    for method in ("rows", "fingerprint"):
        if not callable(getattr(source, method, None)):
            raise DataError(f"{where}.source", f"{config.source} has no method {method}()", "See the protocol Source in mini_distill/data/sources.py.")
    return source
