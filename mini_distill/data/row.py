"""A row of a source, before and after it has become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError


@dataclass(frozen=True)
class Row:
    """What a source yields.

    Attributes:
        origin: Where it stands, for messages: `train.jsonl:17`, or a file's path relative to the source.
        columns: Its content by column name. Plain text is `{"text": …}`.
    """

    origin: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A row as tokens.

    Attributes:
        input_ids: `(tokens,)` int64, special tokens included.
        supervised: `(tokens,)` bool: this token is to be predicted (completion, assistant turn, all of a text, and their EOS).
        num_bytes: `(tokens,)` int64: bytes of UTF-8 source text that the token stands for; 0 for tokens that the rendering added.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    num_bytes: np.ndarray


class RowError(DataError):
    """A row that cannot be used, with the reason under which it is counted when bad rows are skipped."""

    def __init__(self, where: str, what: str, remedy: str = "", reason: str = "malformed") -> None:
        super().__init__(where, what, remedy)
        self.reason = reason
