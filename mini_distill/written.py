"""Reading back what a run wrote: each file is whole, or one line says which place in it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import StorageError
from .storage import read_regular


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object (summary.json, status.json, details.json); empty where there is no such file.

    Raises:
        StorageError: it is damaged.
    """
    return _parsed(file, _text(file), 1) if file.exists() else {}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl by step; a last line that was cut short by a kill does not count.

    Raises:
        StorageError: a line before it is damaged, or has no step.
    """
    lines = _text(file).split("\n")[:-1] if file.exists() else []
    rows = [(number, _parsed(file, line, number)) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, row in rows:
        if not isinstance(row.get("step"), int):
            raise StorageError(f"{file}:{number}", "a row without a step", remedy_for(file))
    return sorted((row for _, row in rows), key=lambda row: row["step"])


def read_settings(file: Path) -> dict[str, Any]:
    """config.yaml as plain values: no tag makes an object, and `${…}` stays text. Empty where there is no such file.

    Raises:
        StorageError: it is damaged.
    """
    import yaml

    if not file.exists():
        return {}
    try:
        found = yaml.load(_text(file), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise StorageError(where, f"not YAML: {getattr(error, 'problem', error)}", remedy_for(file)) from error
    if not isinstance(found, dict):
        raise StorageError(f"{file}:1", f"got a {type(found).__name__}, expected settings", remedy_for(file))
    return found


def remedy_for(file: Path) -> str:
    """What to do about a damaged one."""
    return "Delete this line." if file.suffix == ".jsonl" else "Delete the file and run the command that wrote it again."


def _parsed(file: Path, text: str, line: int) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        at = line + getattr(error, "lineno", 1) - 1
        raise StorageError(f"{file}:{at}", f"not JSON: {getattr(error, 'msg', 'too deep')}", remedy_for(file)) from error
    if not isinstance(found, dict):
        raise StorageError(f"{file}:{line}", f"got a {type(found).__name__}, expected a JSON object", remedy_for(file))
    return found


def _text(file: Path) -> str:
    try:
        return read_regular(file).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise StorageError(f"{file}:{line}", "not UTF-8 text", remedy_for(file)) from error
    except OSError as error:
        raise StorageError(str(file), f"cannot be read: {error.strerror}") from error
