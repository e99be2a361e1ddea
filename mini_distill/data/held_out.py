"""Which rows are held out: by a hash of each row, by a source of their own, or the end of a text that is the only one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain, islice

from ..config import DataConfig
from .row import Row, RowError
from .sources import Source, checked_rows, columns_of

TRAIN, HELD_OUT = "train", "held_out"
OVERLAP = "held-out row is in the training data too"

SidedRow = tuple[str, Row | RowError]
"""The side of a row, and the row or what is wrong with it."""


def split_rows(config: DataConfig, source: Source, held_out: Source | None, where: str = "data") -> Iterator[SidedRow]:
    """Every row of the source (its first `max_rows`) with its side.

    With a source of its own for what is held out, that one's rows follow the training rows. Those that were among the training
    rows come as errors: no measurement is on text that was trained on.
    """
    rows = islice(checked_rows(source, config, where), config.max_rows)
    return _by_source(rows, config, held_out, where) if held_out is not None else _by_hash(rows, config, source)


def _by_hash(rows: Iterator[Row | RowError], config: DataConfig, source: Source) -> Iterator[SidedRow]:
    """A row's side depends on its content alone, so that duplicates stay together and more rows move none."""
    first_two = list(islice(rows, 2))
    if len(first_two) == 1 and isinstance(first_two[0], Row) and (halves := _cut(first_two[0], config)):
        yield from halves
        return
    key = getattr(source, "split_key", None)
    for row in chain(first_two, rows):
        if isinstance(row, Row):
            digest = _digest(key(row) if key is not None else row_content(row, config))
            yield (HELD_OUT if int.from_bytes(digest[:8], "big") / 2**64 < config.eval_fraction else TRAIN), row
        else:
            yield TRAIN, row


def _cut(row: Row, config: DataConfig) -> list[SidedRow]:
    """A text that is alone, cut at a line break so that its end is held out; empty where it cannot be."""
    column = columns_of(config)[-1]
    text = row.columns[column]
    if config.prompt_column or config.messages_column or config.eval_fraction in (0, 1) or not isinstance(text, str):
        return []
    at = text.find("\n", round(len(text) * (1 - config.eval_fraction))) + 1
    if not text[:at].strip() or not text[at:].strip():
        return []
    return [(TRAIN, Row(row.origin, {column: text[:at]})), (HELD_OUT, Row(f"{row.origin} (its end)", {column: text[at:]}))]


def _by_source(rows: Iterator[Row | RowError], config: DataConfig, held_out: Source, where: str) -> Iterator[SidedRow]:
    """The held-out rows are read twice: their hashes are kept in memory, and not those of the many training rows."""
    candidates = {_digest(row_content(row, config)) for row in checked_rows(held_out, config, where) if isinstance(row, Row)}
    trained_on = set()
    for row in rows:
        if isinstance(row, Row) and (digest := _digest(row_content(row, config))) in candidates:
            trained_on.add(digest)
        yield TRAIN, row
    for row in checked_rows(held_out, config, where):
        overlaps = isinstance(row, Row) and _digest(row_content(row, config)) in trained_on
        yield HELD_OUT, RowError(row.origin, OVERLAP, reason=OVERLAP) if overlaps and isinstance(row, Row) else row


def row_content(row: Row, config: DataConfig) -> str:
    """What of a row becomes tokens, as JSON text: rows that differ in an id alone are the same."""
    names = [*columns_of(config), *([config.tools_column] if config.tools_column in row.columns else [])]
    return json.dumps({name: row.columns[name] for name in names}, sort_keys=True, default=str)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()  # a file's name may hold lone surrogates
