"""Tokenised rows on disk: one flat array of tokens, each stretch of which is checked when it is read."""

from __future__ import annotations

import os
import weakref
import zlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..storage import write_array
from .row import Rendered

TOKENS_AT_ONCE = 2**24
"""Tokens that a pass over the arrays holds in memory."""
STRETCH = 1024
"""Tokens of a row that share a checksum: a piece of a long row is checked without reading all of it."""


class TokenRows:
    """The token rows of one side (training or held out) of a prepared source.

    The folder was verified when it was opened. But a run lasts for days, and reads on: what changes on disk in the meantime must not
    be trained on, so `read` looks at a checksum each time; and it reads instead of mapping, as a mapped file that is cut short kills
    the process.

    Pickled for a data worker it is its file names, so that a spawned worker opens the same files instead of getting a copy.

    Attributes:
        tokens: `(tokens,)` all rows one after the other, mapped, with the fields `input_ids`, `num_bytes` (of text that each token
            stands for) and `supervised`; for passes over all of it, right after the folder was verified.
        offset: `(rows + 1,)` row i is `offset[i]:offset[i + 1]`.
    """

    def __init__(self, folder: Path, side: str) -> None:
        self.folder, self.side = folder, side
        self.tokens: Any = np.load(_file(folder, side, "tokens"), mmap_mode="r", allow_pickle=False)
        self.offset, self._checksums = self._load("offset"), self._load("checksums")
        self._first_stretch = np.concatenate([[0], np.cumsum(_num_stretches(self.lengths))])
        self._origins = np.load(_file(folder, side, "origins"), mmap_mode="r", allow_pickle=False)
        self._origin_offset = self._load("origin_offset")
        self._descriptor = os.open(_file(folder, side, "tokens"), os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenRows, (self.folder, self.side)

    @property
    def lengths(self) -> np.ndarray:
        """`(rows,)` tokens."""
        return np.diff(self.offset)

    def __len__(self) -> int:
        return len(self.offset) - 1

    def read(self, row: int, start: int, length: int) -> np.ndarray:
        """Tokens `start:start + length` of a row, with the fields of `tokens`.

        Raises:
            DataError: they are not what was written.
        """
        first, last = start // STRETCH, -(-(start + length) // STRETCH)
        begin, end = int(self.offset[row]) + first * STRETCH, min(int(self.offset[row]) + last * STRETCH, int(self.offset[row + 1]))
        size = self.tokens.itemsize
        content = os.pread(self._descriptor, (end - begin) * size, self.tokens.offset + begin * size)
        found = [zlib.crc32(content[at : at + STRETCH * size]) for at in range(0, len(content), STRETCH * size)]
        stretches = slice(int(self._first_stretch[row]) + first, int(self._first_stretch[row]) + last)
        if len(content) != (end - begin) * size or found != self._checksums[stretches].tolist():
            what = f"the tokens of {self.origin(row)} are no longer what was written: the file was changed while it was in use"
            remedy = "Run the same command again: it makes the file anew, and goes on from its last checkpoint."
            raise DataError(str(_file(self.folder, self.side, "tokens")), what, remedy)
        return np.frombuffer(content, self.tokens.dtype)[start - first * STRETCH :][:length]

    def origin(self, row: int) -> str:
        """Where a row stands in its source."""
        return self._origins[self._origin_offset[row] : self._origin_offset[row + 1]].tobytes().decode("utf-8", "surrogateescape")

    def count_supervised(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """`(ranges,)` supervised tokens in each range `begin:end` of the tokens; the ranges ascend and do not overlap."""
        counts = np.zeros(len(begin), dtype=np.int64)
        at = 0
        while at < len(begin):
            until = max(at + 1, int(np.searchsorted(end, begin[at] + TOKENS_AT_ONCE, side="right")))
            supervised = self.tokens["supervised"][begin[at] : end[until - 1]]
            so_far = np.concatenate([[0], np.cumsum(supervised, dtype=np.int64)])
            counts[at:until] = so_far[end[at:until] - begin[at]] - so_far[begin[at:until] - begin[at]]
            at = until
        return counts

    def _load(self, name: str) -> np.ndarray:
        return np.load(_file(self.folder, self.side, name), allow_pickle=False)


class TokenRowsWriter:
    """Appends rows to the files that `TokenRows` reads; `close` completes them.

    Args:
        folder: Where the files go.
        side: The first part of their names.
        num_ids: One more than the highest token id.
    """

    def __init__(self, folder: Path, side: str, num_ids: int) -> None:
        ids = np.uint16 if num_ids <= 2**16 else np.uint32
        self.folder, self.side = folder, side
        self.tokens = _FlatArray(_file(folder, side, "tokens"), [("input_ids", ids), ("num_bytes", np.uint32), ("supervised", np.bool_)])
        self.origins = _FlatArray(_file(folder, side, "origins"), np.uint8)
        self.lengths, self.origin_lengths, self.checksums = array("q"), array("q"), array("I")

    def add(self, origin: str, row: Rendered) -> None:
        """One more row."""
        tokens = np.empty(len(row.input_ids), dtype=self.tokens.dtype)
        tokens["input_ids"], tokens["num_bytes"], tokens["supervised"] = row.input_ids, row.num_bytes, row.supervised
        self.checksums.extend(zlib.crc32(tokens[at : at + STRETCH].tobytes()) for at in range(0, len(tokens), STRETCH))
        self.tokens.append(tokens)
        self.lengths.append(len(tokens))
        name = np.frombuffer(origin.encode("utf-8", "surrogateescape"), dtype=np.uint8)
        self.origins.append(name)
        self.origin_lengths.append(len(name))

    def close(self) -> None:
        """Complete the files."""
        self.tokens.close()
        self.origins.close()
        write_array(_file(self.folder, self.side, "checksums"), np.array(self.checksums, dtype=np.uint32))
        for name, lengths in (("offset", self.lengths), ("origin_offset", self.origin_lengths)):
            write_array(_file(self.folder, self.side, name), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))


class _FlatArray:
    """An .npy file that grows: its header, which holds the length, is written last, in place."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self.file = open(path, "w+b")  # noqa: SIM115
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        self.file.write(values.tobytes())
        self.length += len(values)

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.close()

    def _write_header(self) -> None:
        """Numpy leaves room for the length to grow, so that the header keeps its size."""
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)


def _num_stretches(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths // STRETCH)


def _file(folder: Path, side: str, name: str) -> Path:
    return folder / f"{side}.{name}.npy"
