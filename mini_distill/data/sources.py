"""Where rows come from: the standard library's source, text files, tables, the hub, or a user's own class."""

from __future__ import annotations

import glob
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..config import DataConfig
from ..errors import DataError, MiniDistillError
from .row import Row, RowError
from .tables import TABLE_SUFFIXES, Tables
from .text_files import PythonStandardLibrary, TextFiles


class Source(Protocol):
    """What a data source has to offer; a user's own class is given the DataConfig.

    It may also have `total`, the number of rows for the progress bar, and `split_key(row)`, a text whose hash decides whether
    the row is held out (by default the row's content).
    """

    def rows(self) -> Iterator[Row | RowError]:
        """Every row, in a fixed order, from the first one at every call; a row that cannot be read comes as a `RowError`.

        Raises:
            DataError: the rest cannot be read at all.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the content is, as plain JSON values: equal for equal content."""
        ...


def open_source(config: DataConfig, where: str = "data", held_out: bool = False) -> Source:
    """The source of the rows, or with `held_out` that of `eval_path` or `eval_split`.

    Raises:
        DataError: a path, a data set or a class that cannot be opened.
    """
    path, setting = (config.eval_path, f"{where}.eval_path") if held_out and config.eval_path else (config.path, f"{where}.path")
    if config.source == "python_stdlib":
        return PythonStandardLibrary()
    if config.source == "text":
        return TextFiles(find_files(path, (".txt",), setting), config.document_separator)
    if config.source == "jsonl":
        return Tables(find_files(path, TABLE_SUFFIXES, setting))
    if config.source == "hub":
        return HubDataset(config, held_out, where)
    return _user_source(config, where)


def columns_of(config: DataConfig) -> tuple[str, ...]:
    """The columns that every row must have."""
    if config.messages_column:
        return (config.messages_column,)
    if config.prompt_column and config.completion_column:
        return (config.prompt_column, config.completion_column)
    return (config.text_column or "text",)


def checked_rows(source: Source, config: DataConfig, where: str = "data") -> Iterator[Row | RowError]:
    """The rows of a source; one that lacks a column comes as an error that names those it has.

    Raises:
        DataError: a user's own class yields something else than rows.
    """
    required = columns_of(config)
    for row in source.rows():
        if isinstance(row, Row):
            yield _with_columns(row, required, where)
        elif isinstance(row, RowError):
            yield row
        else:
            raise DataError(f"{where}.source", f"rows() of {config.source} gave {type(row).__name__}, expected mini_distill.data.row.Row")


def _with_columns(row: Row, required: tuple[str, ...], where: str) -> Row | RowError:
    missing = [name for name in required if name not in row.columns]
    if not missing:
        return row
    there = ", ".join(map(str, list(row.columns)[:8])) or "none"
    remedy = f"Name the columns: {where}.text_column, or {where}.prompt_column and {where}.completion_column, or {where}.messages_column."
    return RowError(row.origin, f"no column '{missing[0]}' (there are: {there})", remedy, "missing column")


def find_files(path: str | None, suffixes: tuple[str, ...], where: str) -> list[Path]:
    """The files that a path, folder or glob names, sorted. A folder gives those with these suffixes, at any depth.

    Raises:
        DataError: there are none.
    """
    assert path is not None
    found = Path(path).expanduser()
    if found.is_file():
        return [found]
    if found.is_dir():
        files = sorted(file for file in found.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        what = f"no {', '.join(suffixes)} file in the folder '{path}'"
    else:
        files = sorted(Path(name) for name in glob.glob(str(found), recursive=True) if Path(name).is_file())
        what = f"no file matches '{path}'"
    if not files:
        raise DataError(where, what, "Name a file, a folder or a glob such as 'corpus/**/*.txt'.")
    return files


class HubDataset:
    """A data set on the hub, or a folder that `Dataset.save_to_disk` wrote; `streaming` reads it row by row over the network.

    Without a pinned revision, a streamed data set that has changed on the hub is not noticed: its rows are kept once tokenised.
    `name` and `revision` belong to `path`, not to an `eval_path`.
    """

    def __init__(self, config: DataConfig, held_out: bool, where: str) -> None:
        other = held_out and config.eval_path is not None
        self.path = str(config.eval_path if other else config.path)
        self.split = config.eval_split if held_out and config.eval_split else config.split
        self.name, self.revision = (None, None) if other else (config.name, config.revision)
        self.streaming, self.where = config.streaming, f"{where}.{'eval_path' if other else 'path'}"
        self.data = self._load()
        self.total = None if self.streaming else len(self.data)

    def rows(self) -> Iterator[Row]:
        """Every row of the split."""
        number = -1
        try:
            for number, columns in enumerate(self.data):
                yield Row(f"{self.path}[{self.split}][{number}]", dict(columns))
        except Exception as error:  # network and file formats: the library's many
            raise DataError(
                f"{self.path}[{self.split}][{number + 1}]",
                f"cannot be read ({_first_line(error)})",
                "Try again; what was read is not kept.",
            ) from error

    def fingerprint(self) -> dict[str, Any]:
        """What was named, and what the library says about its content."""
        content = None if self.streaming else getattr(self.data, "_fingerprint", None)
        return {"kind": "hub", "path": self.path, "name": self.name, "revision": self.revision, "split": self.split, "content": content}

    def _load(self) -> Any:
        import datasets

        folder = Path(self.path).expanduser()
        try:
            if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(str(folder))
                return loaded[self.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=self.streaming)
        except Exception as error:  # the library's many; all are about what the user named
            remedy = "Check the name and the split, log in for a gated one (hf auth login), or without network give a folder written by save_to_disk, or local files with data=jsonl."
            raise DataError(
                self.where, f"cannot load the data set '{self.path}', split '{self.split}' ({_first_line(error)})", remedy
            ) from error


def _first_line(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


def _user_source(config: DataConfig, where: str) -> Source:
    module, _, name = config.source.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is the user's own, and may raise anything
        raise DataError(
            f"{where}.source", f"cannot import '{config.source}' ({_first_line(error)})", "Give package.module.Class."
        ) from error
    if not isinstance(kind, type):
        raise DataError(f"{where}.source", f"'{config.source}' is a {type(kind).__name__}, expected a class", "Give package.module.Class.")
    try:
        source: Source = kind(config)
    except MiniDistillError:
        raise
    except Exception as error:  # as above
        what = f"{config.source} cannot be made ({_first_line(error)})"
        raise DataError(f"{where}.source", what, "With debug=true its traceback is shown.") from error
    for method in ("rows", "fingerprint"):
        if not callable(getattr(source, method, None)):
            raise DataError(
                f"{where}.source", f"{config.source} has no method {method}()", "See the protocol Source in mini_distill/data/sources.py."
            )
    return source
