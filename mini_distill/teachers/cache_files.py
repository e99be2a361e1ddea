"""How a teacher's targets lie on disk: shards of sequences, each a folder of flat arrays that are mapped into memory.

    <cache.dir>/
      cache.json            what it is: kind, teacher, data, tokenizer, sizes
      tokenizer/  head/     what a run needs besides
      train/shard-00000/    starts.npy, ids.npy, …, MANIFEST.json with checksums
      held_out/shard-00000/

Arrays are addressed by the number of a sequence and the place of a token among its supervised ones; nothing depends on batches. Some
columns have a row for each token; in others numbers are packed (`bit_packing.py`), and every sequence begins at a byte.

Axes: T supervised tokens of a shard, k entries of a token, V vocabulary, H hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError
from ..storage import verify_folder, write_array
from .bit_packing import packed_bytes, unpack

Columns = dict[str, np.ndarray]
SEQUENCE_STARTS = "starts"
CHECKSUMS = "checksums"
MARK = "mark"
"""Columns that every shard has: `(sequences + 1,)` int64, where each one's tokens begin; `(sequences,)` uint32, of its tokens;
`(32,)` uint8, SHA-256 of which shard of which cache it is."""


Place = tuple["Shard", int]
"""A sequence: its shard, and its number there."""


def shard_folder(cache: Path, side: str, number: int) -> Path:
    """Where a shard lies."""
    return cache / side / f"shard-{number:05d}"


def write_columns(folder: Path, columns: Columns) -> None:
    """One file a column."""
    for name, values in columns.items():
        write_array(folder / f"{name}.npy", values)


class Shard:
    """One shard, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._columns: Columns = {}
        self._starts: dict[str, list[int]] = {}
        self.starts, self.checksums = self[SEQUENCE_STARTS], self[CHECKSUMS]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self._load(name)
        return self._columns[name]

    @property
    def num_tokens(self) -> int:
        """Supervised ones."""
        return int(self.starts[-1])

    @property
    def tokens_of_each(self) -> np.ndarray:
        """`(sequences,)` int64."""
        return np.diff(self.starts)

    def part(self, name: str, sequence: int) -> np.ndarray:
        """What a column that was checked holds of a sequence, by its number within the shard: a row for each token, or bytes."""
        starts = self._starts[name]
        return self._columns[name][starts[sequence] : starts[sequence + 1]]

    # ------------------------------------------------------------------------------------------- whether the columns fit together

    def check_counts(self, sequences: int) -> None:
        """Whether every sequence has its place.

        Raises:
            CacheError: it has not.
        """
        self.check_column(CHECKSUMS, (sequences,), np.uint32)
        starts = self.check_column(SEQUENCE_STARTS, (sequences + 1,), np.int64)
        if starts[0] != 0 or (np.diff(starts) < 0).any():
            raise self.wrong(SEQUENCE_STARTS, "does not begin at 0 and rise")

    def check_rows(self, name: str, dtype: type, width: int | None = None) -> None:
        """A column with a number for each token, or with `width` of them."""
        self.check_column(name, (self.num_tokens,) if width is None else (self.num_tokens, width), dtype)
        self._starts[name] = self.starts.tolist()

    def check_packed(self, name: str, counts: np.ndarray, width: int) -> None:
        """A column with `counts` packed numbers of each sequence."""
        starts = [0, *np.cumsum(packed_bytes(counts, width)).tolist()]
        self.check_column(name, (starts[-1],), np.uint8)
        self._starts[name] = starts

    def check_column(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """A column that has to look like this.

        Raises:
            CacheError: it does not.
        """
        column = self[name]
        if column.shape != shape or column.dtype != dtype:
            raise self.wrong(name, f"has shape {column.shape} of {column.dtype}, expected {shape} of {np.dtype(dtype)}")
        return column

    def wrong(self, name: str, what: str) -> CacheError:
        """A column that holds what no builder writes, under a checksum that fits."""
        return CacheError(str(self.folder), f"{name} {what}", "Delete this folder and build the cache again: only it is made anew.")

    def _load(self, name: str) -> np.ndarray:
        file = self.folder / f"{name}.npy"
        try:
            return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))  # a slice of a memmap takes three times as long
        except Exception as error:  # NumPy reads a header as Python's own text, and fails in as many ways
            raise CacheError(str(file), f"cannot be read ({error})", "Build the cache again: only what is damaged is made anew.") from error


class Reading:
    """What is read of some sequences, which may lie in several shards: each column put together once for all of them.

    Args:
        places: The sequences, in the order in which their tokens follow each other.
    """

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        self.tokens_of_each = np.array([shard.starts[number + 1] - shard.starts[number] for shard, number in places], dtype=np.int64)
        self.num_tokens = int(self.tokens_of_each.sum())

    def rows(self, name: str) -> np.ndarray:
        """A column with a row for each token, as a copy."""
        return np.concatenate([shard.part(name, number) for shard, number in self.places])

    def packed(self, name: str, counts: np.ndarray, width: int) -> np.ndarray:
        """A column with `counts` packed numbers of each sequence: unsigned."""
        return unpack([shard.part(name, number) for shard, number in self.places], counts, width)

    def of_sequences(self, name: str) -> np.ndarray:
        """A column with a row for each sequence: int64."""
        return np.array([shard[name][number] for shard, number in self.places], dtype=np.int64)

    def check(self, good: np.ndarray, name: str, what: Callable[[int], str]) -> None:
        """Whether what was read of every token is `good`; targets that are not are never given out.

        Raises:
            CacheError: it is not; `what` describes the first such token.
        """
        if not good.all():
            token = int(np.argmin(good))
            raise self.shard_of(token).wrong(name, what(token))

    def check_sequences(self, good: np.ndarray, name: str, what: str) -> None:
        """The same for what was read of every sequence."""
        if not good.all():
            raise self.places[int(np.argmin(good))][0].wrong(name, what)

    def shard_of(self, token: int) -> Shard:
        """Where one of the tokens lies."""
        return self.places[int(np.searchsorted(np.cumsum(self.tokens_of_each), token, side="right"))][0]


@dataclass
class Side:
    """The shards of the training or of the held-out sequences.

    Args:
        cache: The folder of the cache.
        name: `train` or `held_out`.
        num_sequences: Of the side.
        shard_sequences: Of each shard but the last.
        identity: Digest of what the cache is of.
        check: Called with each shard that is opened; raises when its columns are not those of the kind.
    """

    cache: Path
    name: str
    num_sequences: int
    shard_sequences: int
    identity: str
    check: Callable[[Shard], None] = lambda shard: None

    def __post_init__(self) -> None:
        self._shards: dict[int, Shard] = {}

    @property
    def num_shards(self) -> int:
        """Of this side."""
        return -(-self.num_sequences // self.shard_sequences)

    def sequences_of(self, shard: int) -> range:
        """The numbers of the sequences that a shard holds."""
        first = shard * self.shard_sequences
        return range(first, min(first + self.shard_sequences, self.num_sequences))

    def folder(self, shard: int) -> Path:
        """Where it lies."""
        return shard_folder(self.cache, self.name, shard)

    def mark(self, shard: int) -> np.ndarray:
        """Which shard of which cache it is: a folder moved here from elsewhere is not taken for ours."""
        sequences = self.sequences_of(shard)
        text = f"{self.identity} {self.name} {sequences.start} {sequences.stop}"
        return np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint8)

    def damaged(self, shards: Iterable[int] | None = None) -> dict[int, str]:
        """Shard -> what is wrong with it, for those that cannot be used: of all shards, or of these; every byte is read."""
        problems = {}
        for number in range(self.num_shards) if shards is None else shards:
            folder = self.folder(number)
            if found := (verify_folder(folder) if folder.exists() else ["missing"]):
                problems[number] = found[0]
            elif not self._is_ours(number):
                problems[number] = "of another cache, or of other sequences"
        return problems

    def _is_ours(self, shard: int) -> bool:
        try:
            return np.array_equal(np.load(self.folder(shard) / f"{MARK}.npy", allow_pickle=False), self.mark(shard))
        except Exception:  # as in Shard._load
            return False

    def locate(self, sequence: int) -> Place:
        """The shard of a sequence, and its number there."""
        number, place = divmod(sequence, self.shard_sequences)
        if number not in self._shards:
            shard = Shard(self.folder(number))
            shard.check_counts(len(self.sequences_of(number)))
            self.check(shard)
            self._shards[number] = shard
        return self._shards[number], place


# ----------------------------------------------------------------------------------------------------------- tensors of any dtype


def to_array(tensor: Tensor) -> np.ndarray:
    """The bits of a tensor; numpy has no bfloat16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def to_tensor(array: np.ndarray) -> Tensor:
    """What `to_array` took; shares its memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def join(parts: list[Columns]) -> Columns:
    """The same columns of consecutive sequences, one after the other."""
    names: Mapping[str, np.ndarray] = parts[0] if parts else {}
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
