"""How a teacher's targets lie on disk: shards of sequences, each a folder of flat arrays that are mapped into memory.

    <cache.dir>/
      cache.json            what it is: kind, teacher, data, tokenizer, sizes
      tokenizer/  head/     what a run needs besides
      train/shard-00000/    starts.npy, head_ids.npy, …, MANIFEST.json with checksums
      held_out/shard-00000/

Arrays are addressed by the number of a sequence and the place of a token among its supervised ones; nothing depends on batches.

Axes: T supervised tokens of a shard, k entries of a token, V vocabulary, H hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError
from ..storage import verify_folder, write_array

Columns = dict[str, np.ndarray]
SEQUENCE_STARTS = "starts"
CHECKSUMS = "checksums"
MARK = "mark"
"""Columns that every shard has: `(sequences + 1,)` int64, where each one's tokens begin; `(sequences,)` uint32, of its tokens;
`(32,)` uint8, SHA-256 of which shard of which cache it is."""

TOKENS_AT_ONCE = 2**18
"""Tokens that are looked through at a time when a shard is opened."""


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
        self.starts, self.checksums = self[SEQUENCE_STARTS], self[CHECKSUMS]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self._load(name)
        return self._columns[name]

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.npy").exists()

    def tokens(self, sequence: int) -> slice:
        """The tokens of a sequence, by its number within the shard."""
        return slice(int(self.starts[sequence]), int(self.starts[sequence + 1]))

    def check_counts(self, sequences: int) -> None:
        """Whether every sequence has its place.

        Raises:
            CacheError: it has not.
        """
        self.check_column(CHECKSUMS, (sequences,), np.uint32)
        self.check_starts(SEQUENCE_STARTS, sequences)

    def check_starts(self, name: str, sequences: int) -> int:
        """The same for a column that says where something begins; gives the end of the last."""
        self.check_column(name, (sequences + 1,), np.int64)
        starts = self[name]
        if starts[0] != 0 or (np.diff(starts) < 0).any():
            raise self.wrong(name, "does not begin at 0 and rise")
        return int(starts[-1])

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

    def blocks(self) -> Iterator[slice]:
        """Runs of sequences of about TOKENS_AT_ONCE tokens."""
        cuts = [0, *np.flatnonzero(np.diff(self.starts[:-1] // TOKENS_AT_ONCE)) + 1, len(self.checksums)]
        return (slice(int(start), int(stop)) for start, stop in pairwise(cuts))

    def _load(self, name: str) -> np.ndarray:
        file = self.folder / f"{name}.npy"
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy reads a header as Python's own text, and fails in as many ways
            raise CacheError(str(file), f"cannot be read ({error})", "Build the cache again: only what is damaged is made anew.") from error


@dataclass
class Side:
    """The shards of the training or of the held-out sequences.

    Args:
        cache: The folder of the cache.
        name: `train` or `held_out`.
        num_sequences: Of the side.
        shard_sequences: Of each shard but the last.
        identity: Digest of what the cache is of.
        check: Called with each shard that is opened; raises when its content is impossible.
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

    def locate(self, sequence: int) -> tuple[Shard, int]:
        """The shard of a sequence, and its number there."""
        number, place = divmod(sequence, self.shard_sequences)
        if number not in self._shards:
            shard = Shard(self.folder(number))
            shard.check_counts(len(self.sequences_of(number)))
            self.check(shard)
            self._shards[number] = shard
        return self._shards[number], place


# ---------------------------------------------------------------------------------------------------------------- token numbers


def pack_ids(name: str, ids: Tensor, vocab_size: int) -> Columns:
    """Token numbers in two bytes each, and a third where the vocabulary needs it."""
    values = ids.cpu().numpy()
    columns = {name: (values & 0xFFFF).astype(np.uint16)}
    if vocab_size > 2**16:
        columns[f"{name}_high"] = (values >> 16).astype(np.uint8)
    return columns


def unpack_ids(shard: Shard, name: str, entries: slice) -> Tensor:
    """What `pack_ids` took: int64."""
    values = shard[name][entries].astype(np.int64)
    if f"{name}_high" in shard:
        values |= shard[f"{name}_high"][entries].astype(np.int64) << 16
    return torch.from_numpy(values)


# ----------------------------------------------------------------------------------------------------------- tensors of any dtype


def to_array(tensor: Tensor) -> np.ndarray:
    """The bits of a tensor; numpy has no bfloat16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def to_tensor(array: np.ndarray) -> Tensor:
    """What `to_array` took, copied out of the file."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def join(parts: list[Columns]) -> Columns:
    """The same columns of consecutive sequences, one after the other."""
    names: Mapping[str, np.ndarray] = parts[0] if parts else {}
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
