"""How a teacher's targets lie on disk: shards of sequences, each a folder of flat arrays that are mapped into memory.

    <cache.dir>/
      cache.json            what it is: kind, teacher, data, tokenizer, sizes
      tokenizer/  head/     what a run needs besides
      train/shard-00000/    tokens.npy, ids.npy, …, MANIFEST.json with checksums
      held_out/shard-00000/

Arrays are addressed by the number of a sequence and the place of a token among its supervised ones; nothing depends on batches.

Axes: T supervised tokens of a shard, k entries of a token, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError
from ..storage import verify_folder

Columns = dict[str, np.ndarray]
SEQUENCE_STARTS = "starts"
CHECKSUMS = "checksums"
"""Columns that every shard has: `(sequences + 1,)` int64, where each one's tokens begin; `(sequences,)` uint32, of its tokens."""


def shard_folder(cache: Path, side: str, number: int) -> Path:
    """Where a shard lies."""
    return cache / side / f"shard-{number:05d}"


def write_columns(folder: Path, columns: Columns) -> None:
    """One file a column."""
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)


class Shard:
    """One shard, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts = self._load(SEQUENCE_STARTS)[:]
        self.checksums = self._load(CHECKSUMS)[:]
        self._columns: Columns = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self._load(name)
        return self._columns[name]

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.npy").exists()

    def tokens(self, sequence: int) -> slice:
        """The tokens of a sequence, by its number within the shard."""
        return slice(int(self.starts[sequence]), int(self.starts[sequence + 1]))

    def _load(self, name: str) -> np.ndarray:
        file = self.folder / f"{name}.npy"
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CacheError(str(file), f"cannot be read ({error})", "Build the cache again: only what is damaged is made anew.") from error


@dataclass
class Side:
    """The shards of the training or of the held-out sequences.

    Args:
        cache: The folder of the cache.
        name: `train` or `held_out`.
        num_sequences: Of the side.
        shard_sequences: Of each shard but the last.
    """

    cache: Path
    name: str
    num_sequences: int
    shard_sequences: int

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

    def damaged(self) -> dict[int, str]:
        """Shard -> what is wrong with it, for those that cannot be used."""
        problems = {}
        for number in range(self.num_shards):
            if found := (verify_folder(self.folder(number)) if self.folder(number).exists() else ["missing"]):
                problems[number] = found[0]
        return problems

    def locate(self, sequence: int) -> tuple[Shard, int]:
        """The shard of a sequence, and its number there."""
        number, place = divmod(sequence, self.shard_sequences)
        if number not in self._shards:
            self._shards[number] = Shard(self.folder(number))
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
