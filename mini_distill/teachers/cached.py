"""A teacher that was asked before: its targets come from a cache on disk."""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ..config import CacheConfig
from ..data.batch import Batch
from ..errors import CacheError
from ..losses.linear import TeacherRows
from ..losses.reduction import loss_mask
from ..losses.sparse import SampledRows, TopKRows
from ..models.head import OutputHead
from ..storage import verify_folder
from .cache_files import Reading, Shard, Side, to_tensor
from .cache_identity import check_same, digest, read_description
from .cache_kinds import KINDS, Full, Hidden, Kind, Sampled

REBUILD = "Build it again with the same command: only what is missing or damaged is made anew."
ABOUT_TEACHER = ("target_log_prob", "top_log_prob", "top_id", "exact_entropy")
"""What is kept of the teacher itself at each held-out token, besides its targets."""

OTHER = "Build a cache for this run in another folder, or give the run what the cache was built from."


class CachedTeacher:
    """Gives the targets of the sequences in a batch, found by their numbers.

    Args:
        folder: The cache.
        wanted: The identity that the run expects, of which groups may be left out: a run without a live teacher does not know
            its weights.
        side: `train` or `held_out`.
        look_through: Finds the shards that cannot be used: by itself, or together with other processes.

    Raises:
        CacheError: there is no whole cache, it is damaged, or it is one of something else.
    """

    def __init__(
        self,
        folder: Path,
        wanted: dict[str, Any],
        side: str = "train",
        look_through: Callable[[Side], dict[int, str]] = Side.damaged,
    ) -> None:
        self.folder, self.description = folder, read_description(folder)
        check_same(self.description["identity"], wanted, folder, OTHER)
        self.side = open_side(folder, self.description, side)
        if damaged := look_through(self.side):
            number, problem = next(iter(damaged.items()))
            also = f" (and {len(damaged) - 1} more shards)" if len(damaged) > 1 else ""
            raise CacheError(str(self.side.folder(number)), f"{problem}{also}", REBUILD)
        self.kind = open_kind(folder, self.description, side)
        self.side.check = self._check
        self._asked: deque[Batch] = deque()
        self._thread: ThreadPoolExecutor | None = None
        self._being_read: tuple[Batch, Future[TeacherRows]] | None = None

    def __call__(self, batch: Batch) -> TeacherRows:
        """The targets at the supervised positions of `batch`, on its device.

        Raises:
            CacheError: a sequence is not the one that was scored, or its targets are none.
        """
        if self._being_read is None or self._being_read[0] is not batch:
            return self._read(batch)
        _, targets = self._being_read
        self._read_next()
        return targets.result()

    def ask(self, batch: Batch) -> None:
        """Begin to read the targets of a batch in a thread; of several batches one at a time, each when the one before is called for.

        So at most two batches' targets are in memory, however many there are in a step.
        """
        self._asked.append(batch)
        if self._being_read is None:
            self._read_next()

    def give_up(self) -> None:
        """Forget what was asked, and leave no thread."""
        self._asked.clear()
        self._being_read = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def about_teacher(self, batch: Batch) -> dict[str, Tensor] | None:
        """What the teacher itself makes of held-out tokens, `(supervised,)` each; None where the targets tell it all.

        `target_log_prob`, `top_log_prob` and `exact_entropy` in nats, `top_id` its first choice.
        """
        if self.is_dense:
            return None
        reading = self._reading(batch)
        return {name: to_tensor(self._about(reading, name)).to(batch.labels.device) for name in ABOUT_TEACHER}

    @property
    def is_dense(self) -> bool:
        """Whether the targets are logits of the whole vocabulary."""
        return isinstance(self.kind, Full | Hidden)

    def nothing(self) -> SampledRows | TopKRows:
        """Targets of no token at all."""
        none = torch.zeros(0)
        if isinstance(self.kind, Sampled):
            return SampledRows(torch.zeros(1, dtype=torch.int64), none.long(), none, none)
        return TopKRows(none.long().view(0, 1), none.view(0, 1), none, spread=True)

    def _check(self, shard: Shard) -> None:
        self.kind.check(shard)
        if self.side.name == "held_out":
            for name in ABOUT_TEACHER:
                shard.check_rows(name, np.int32 if name == "top_id" else np.float32)

    def _about(self, reading: Reading, name: str) -> np.ndarray:
        """One of the columns of ABOUT_TEACHER; it can be what its name says."""
        column, vocab_size = reading.rows(name), self.description["vocab_size"]
        low, high = (0, vocab_size - 1) if name == "top_id" else (0, np.inf) if name == "exact_entropy" else (-np.inf, 0)
        good = (column >= low) & (column <= high) & np.isfinite(column)
        reading.check(good, name, lambda _: "holds a number out of range")
        return column

    def _read_next(self) -> None:
        self._being_read = None
        if self._asked:
            self._thread = self._thread or ThreadPoolExecutor(1, "targets")
            batch = self._asked.popleft()
            self._being_read = batch, self._thread.submit(self._read, batch)

    def _read(self, batch: Batch) -> TeacherRows:
        return self.kind.decode(self._reading(batch), batch.labels.device)

    def _reading(self, batch: Batch) -> Reading:
        """What there is of the sequences of a batch; they are the ones that were scored."""
        numbers = batch.row_ids.tolist()
        reading = Reading([self.side.locate(number) for number in numbers])
        for checksum, (shard, place), number in zip(checksums(batch), reading.places, numbers, strict=True):
            if checksum != shard.checksums[place]:
                raise CacheError(str(shard.folder), f"sequence {number} is not the one that was scored", OTHER)
        return reading

    @property
    def facts(self) -> dict[str, Any]:
        """About the teacher: its name, `parameters`, `embedding_rows` and `positions`."""
        return self.description["teacher"]


def checksums(batch: Batch) -> list[int]:
    """Of each row's tokens, their supervision and their positions: CRC-32, quick enough for every batch."""
    rows = np.stack([tensor.cpu().numpy() for tensor in (batch.input_ids, batch.labels, batch.position_ids)], axis=1)
    last = (loss_mask(batch.labels).cpu().numpy() * np.arange(1, rows.shape[-1] + 1)).max(-1)  # what comes later is not scored
    return [zlib.crc32(row[:, : length + 1].astype("<i8").tobytes()) for row, length in zip(rows, last.tolist(), strict=True)]


def open_side(folder: Path, description: dict[str, Any], side: str) -> Side:
    """The shards of a side.

    Raises:
        CacheError: the cache has no such side.
    """
    if side not in description["sides"]:
        raise CacheError(str(folder), f"no {side} side", OTHER)
    sizes = description["sides"][side]
    return Side(folder, side, sizes["sequences"], sizes["shard_sequences"], digest(description["identity"]))


def damaged_parts(folder: Path, description: dict[str, Any]) -> dict[Path, str]:
    """Folder -> what is wrong with it, for whatever of a cache cannot be used."""
    sides = [open_side(folder, description, side) for side in description["sides"]]
    problems = {side.folder(number): problem for side in sides for number, problem in side.damaged().items()}
    besides = [folder / "tokenizer", *([folder / "head"] if description["cache"]["kind"] == "hidden" else [])]
    return problems | {part: found[0] for part in besides if (found := verify_folder(part))}


def kind_of_side(config: CacheConfig, side: str, vocab_size: int) -> Kind:
    """How the targets of a side are kept: those of held-out sequences are for the evaluation, which is at temperature 1."""
    return KINDS[config.kind](replace(config, temperature=1.0) if side == "held_out" else config, vocab_size)


def open_kind(folder: Path, description: dict[str, Any], side: str) -> Kind:
    """The kind that a cache is of, with the head that hidden states need."""
    kind = kind_of_side(CacheConfig(**description["cache"]), side, description["vocab_size"])
    if isinstance(kind, Hidden):
        kind.head = load_head(folder / "head")
    return kind


def save_head(folder: Path, head: OutputHead) -> None:
    """A plain head, with its scale and soft-capping."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in head.module.state_dict().items()}
    numbers = json.dumps({"scale": head.scale, "softcap": head.softcap})  # in one entry: safetensors writes several in any order
    safetensors.torch.save_file(tensors, folder / "head.safetensors", metadata={"head": numbers})


def load_head(folder: Path) -> OutputHead:
    """What `save_head` wrote.

    Raises:
        CacheError: it is damaged.
    """
    if problems := verify_folder(folder):
        raise CacheError(str(folder), problems[0], REBUILD)
    file = folder / "head.safetensors"
    try:
        tensors = safetensors.torch.load_file(file)
        with safetensors.safe_open(file, "pt") as opened:
            numbers = json.loads(opened.metadata()["head"])
        weight = tensors["weight"]
        module = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors, dtype=weight.dtype)
        module.load_state_dict(tensors)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("not every number is finite")
        return OutputHead(module.requires_grad_(False), numbers["scale"], numbers["softcap"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CacheError(str(file), f"cannot be read ({error})", REBUILD) from error
