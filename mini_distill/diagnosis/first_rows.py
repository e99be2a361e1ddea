"""The first rows of a source, for who has a minute: neither all rows are read, nor all of a text that fills a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from ..config import DataConfig
from ..data.row import Row, RowError
from ..data.sources import Source, open_source

MOST_ROWS = 200
"""Enough for shares in per cent."""
MOST_CHARACTERS = 1_000_000
"""Of all rows together, which a tokenizer cuts in a second or two."""


class FirstRows:
    """A source of its own: the first `MOST_ROWS` rows of another, with no more than `MOST_CHARACTERS` of text.

    The row that goes beyond that ends there where it is plain text; a prompt or a conversation is left out unless it is the first.

    Args:
        source: Read at once, as far as it is needed.
        config: Its settings.

    Attributes:
        was_cut: Whether anything was left out.
    """

    def __init__(self, source: Source, config: DataConfig) -> None:
        self.config, self.was_cut = config, False
        self._rows = list(self._read(source))

    def rows(self) -> Iterator[Row | RowError]:
        """Those that were read."""
        return iter(self._rows)

    def fingerprint(self) -> dict[str, Any]:
        """Of these rows alone: a hash over all of a large source would take longer than the rest."""
        content = [[row.origin, row.columns] if isinstance(row, Row) else str(row) for row in self._rows]
        return {"kind": "first rows", "sha256": hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()}

    def _read(self, source: Source) -> Iterator[Row | RowError]:
        left, is_text = MOST_CHARACTERS, self.config.prompt_column is None and self.config.messages_column is None
        for number, row in enumerate(source.rows()):
            size = sum(len(str(value)) for value in row.columns.values()) if isinstance(row, Row) else 0
            if number == MOST_ROWS or left == 0 or (size > left and number and not is_text):
                self.was_cut = True
                return
            if isinstance(row, Row) and size > left and is_text:
                self.was_cut = True
                row = Row(row.origin, {name: value[:left] if isinstance(value, str) else value for name, value in row.columns.items()})
            yield row
            left -= min(size, left)


def first_rows(opened: dict[str, FirstRows]) -> Callable[..., Source]:
    """What opens sources in place of `open_source`, and keeps them in `opened` by the path of their settings."""

    def opening(config: DataConfig, where: str = "data", held_out: bool = False) -> Source:
        opened[where] = FirstRows(open_source(config, where, held_out), config)
        return opened[where]

    return opening
