"""Tokenised rows on disk: flat arrays that numpy maps into memory."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np

from ..storage import write_array
from .row import Rendered

TOKENS_AT_ONCE = 2**24
"""Tokens that a pass over the arrays holds in memory."""


class TokenRows:
    """The token rows of one side (training or held out) of a prepared source.

    Pickled for a data worker it is its file names, so that a spawned worker maps the same files instead of getting a copy.

    Attributes:
        input_ids: `(tokens,)` all rows one after the other.
        supervised: `(tokens,)` bool.
        num_bytes: `(tokens,)` bytes of text that each token stands for.
        offset: `(rows + 1,)` row i is `offset[i]:offset[i + 1]`.
    """

    def __init__(self, folder: Path, side: str) -> None:
        self.folder, self.side = folder, side
        self.input_ids, self.supervised, self.num_bytes = self._load("input_ids"), self._load("supervised"), self._load("num_bytes")
        self.offset = self._load("offset")
        self._origins, self._origin_offset = self._load("origins"), self._load("origin_offset")

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenRows, (self.folder, self.side)

    @property
    def lengths(self) -> np.ndarray:
        """`(rows,)` tokens."""
        return np.diff(self.offset)

    def __len__(self) -> int:
        return len(self.offset) - 1

    def origin(self, row: int) -> str:
        """Where a row stands in its source."""
        return self._origins[self._origin_offset[row] : self._origin_offset[row + 1]].tobytes().decode("utf-8", "surrogateescape")

    def count_supervised(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """`(ranges,)` supervised tokens in each range `begin:end` of the tokens; the ranges ascend and do not overlap."""
        counts = np.zeros(len(begin), dtype=np.int64)
        at = 0
        while at < len(begin):
            until = max(at + 1, int(np.searchsorted(end, begin[at] + TOKENS_AT_ONCE, side="right")))
            supervised = self.supervised[begin[at] : end[until - 1]]
            so_far = np.concatenate([[0], np.cumsum(supervised, dtype=np.int64)])
            counts[at:until] = so_far[end[at:until] - begin[at]] - so_far[begin[at:until] - begin[at]]
            at = until
        return counts

    def _load(self, name: str) -> np.ndarray:
        return np.load(_file(self.folder, self.side, name), mmap_mode="r", allow_pickle=False)


class TokenRowsWriter:
    """Appends rows to the files that `TokenRows` reads; `close` completes them.

    Args:
        folder: Where the files go.
        side: The first part of their names.
        num_ids: One more than the highest token id.
    """

    def __init__(self, folder: Path, side: str, num_ids: int) -> None:
        ids = np.uint16 if num_ids <= 2**16 else np.uint32
        self.columns = {
            name: _FlatArray(_file(folder, side, name), dtype)
            for name, dtype in {"input_ids": ids, "supervised": np.bool_, "num_bytes": np.uint32, "origins": np.uint8}.items()
        }
        self.folder, self.side = folder, side
        self.lengths, self.origin_lengths = array("q"), array("q")  # eight bytes a row

    def add(self, origin: str, row: Rendered) -> None:
        """One more row."""
        name = np.frombuffer(origin.encode("utf-8", "surrogateescape"), dtype=np.uint8)
        values = {"input_ids": row.input_ids, "supervised": row.supervised, "num_bytes": row.num_bytes, "origins": name}
        for column, value in values.items():
            self.columns[column].append(value)
        self.lengths.append(len(row.input_ids))
        self.origin_lengths.append(len(name))

    def close(self) -> None:
        """Complete the files."""
        for column in self.columns.values():
            column.close()
        for name, lengths in (("offset", self.lengths), ("origin_offset", self.origin_lengths)):
            write_array(_file(self.folder, self.side, name), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))


class _FlatArray:
    """An .npy file that grows: its header, which holds the length, is written last, in place."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self.file = open(path, "w+b")  # noqa: SIM115
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        self.file.write(values.astype(self.dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.close()

    def _write_header(self) -> None:
        """Numpy leaves room for the length to grow, so that the header keeps its size."""
        np.lib.format.write_array_header_1_0(self.file, {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)})


def _file(folder: Path, side: str, name: str) -> Path:
    return folder / f"{side}.{name}.npy"
