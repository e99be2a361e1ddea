"""Score a corpus with the teacher, once."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..config import CacheConfig
from ..data.batch import Batch
from ..data.order import Stream
from ..errors import NumericsError, StorageError
from ..losses.reduction import loss_mask, supervised_targets
from ..losses.sparse import SparseRows, TopKRows
from ..onlooker import bar
from ..out_of_memory import memory_errors
from ..storage import atomic_folder, check_writable, remove_stale_temporaries, size_text, verify_folder
from .cache_files import CHECKSUMS, MARK, SEQUENCE_STARTS, Columns, Side, join, write_columns
from .cache_identity import DESCRIPTION, check_same, read_description, write_description
from .cache_kinds import TopK
from .cached import checksums, kind_of_side, save_head
from .online import OnlineTeacher
from .sampling import entropy
from .server import ServerTeacher
from .targets import DenseTargets

CHUNK_LOGITS = 2**24
"""Logits that exist at once. A constant, since the draws of a sequence follow its chunks."""

SHARD_BYTES = 2**26
logger = logging.getLogger(__name__)


@dataclass
class CacheBuilder:
    """Writes the shards of this process.

    Attributes:
        folder: The cache.
        config: What is kept.
        teacher: Who is asked.
        streams: `train` and, where there are held-out sequences, `held_out`.
        vocab_size: Tokens of the tokenizer; columns of the logits beyond it are padding.
        rank: This process.
        world_size: All processes.
        autocast: The context of the teacher's forward pass.
        check_stop: Called between batches; raises when the process was asked to stop.
    """

    folder: Path
    config: CacheConfig
    teacher: OnlineTeacher | ServerTeacher
    streams: dict[str, Stream]
    vocab_size: int
    check_stop: Callable[[], None]
    autocast: Callable[[], Any]
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.kinds = {side: kind_of_side(self.config, side, self.vocab_size) for side in self.streams}

    # ---------------------------------------------------------------------------------------------------------- before scoring

    def describe(self, identity: dict[str, Any], facts: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
        """Write down what the folder is, or find that it is that already; with what a run needs besides targets.

        What killed builders left half written is cleared away.

        Raises:
            CacheError: it holds a cache of something else.
        """
        for parent in (self.folder, *(self.folder / side for side in self.streams)):
            remove_stale_temporaries(parent)
        description = {
            "identity": identity,
            "cache": asdict(self.config),
            "vocab_size": self.vocab_size,
            "teacher": facts,
            "sides": {
                name: {"sequences": len(stream), "shard_sequences": self._shard_sequences(stream)} for name, stream in self.streams.items()
            },
            "complete": False,
        }
        if (self.folder / DESCRIPTION).exists():
            found = read_description(self.folder)
            check_same(found["identity"], identity, self.folder, "Choose another cache.dir, or delete this cache.")
        if verify_folder(self.folder / "tokenizer"):
            with atomic_folder(self.folder / "tokenizer") as temporary:
                tokenizer.save_pretrained(temporary)
        if self.config.kind == "hidden" and verify_folder(self.folder / "head"):
            assert isinstance(self.teacher, OnlineTeacher)  # a server gives no hidden states: refused with the settings
            with atomic_folder(self.folder / "head") as temporary:
                save_head(temporary, self.teacher.language_model.head)
        if not (self.folder / DESCRIPTION).exists():
            write_description(self.folder, description)

    def _shard_sequences(self, stream: Stream) -> int:
        """So that a shard is neither a crumb nor a loss when it has to be made again."""
        if self.config.shard_sequences is not None:
            return self.config.shard_sequences
        width = self.teacher.model.config.get_text_config().hidden_size if isinstance(self.teacher, OnlineTeacher) else 0
        of_token = {"sampled": self.config.k, "topk": 3 * self.config.k, "full": 2 * self.vocab_size, "hidden": 4 * width}[self.config.kind]
        tokens = max(1, stream.num_supervised // max(1, len(stream)))
        return int(np.clip(SHARD_BYTES // (of_token * tokens), 16, 4096))

    def predict(self, sides: dict[str, Side]) -> dict[str, float]:
        """Score one batch, and from it foretell size, time and what the targets hold of the distribution."""
        side = sides["train"]
        numbers = list(side.sequences_of(0))[: self.config.batch_size]
        self._score(self.streams["train"].batch(numbers[:1]), "train")  # warm
        started = time.perf_counter()
        columns, _ = self._score(self.streams["train"].batch(numbers), "train")
        seconds = time.perf_counter() - started
        _, masses = self._score(self.streams["train"].batch(numbers), "train", with_mass=True)
        tokens = sum(len(part) for part in masses)
        total = sum(stream.num_supervised for stream in self.streams.values())
        of_token = sum(array.nbytes for part in columns.values() for array in part.values()) / max(1, tokens)
        return {
            "cache/tokens": total,
            "cache/predicted_bytes_per_token": of_token,
            "cache/predicted_bytes": of_token * total,
            "cache/predicted_seconds": seconds / max(1, tokens) * total / self.world_size,
            "cache/captured_mass": float(torch.cat(masses).mean()) if tokens else 1.0,
        }

    def check_space(self, needed: float) -> None:
        """Before hours of scoring.

        Raises:
            StorageError: there is too little.
        """
        check_writable(self.folder)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            what = f"{size_text(free)} of free space, expected at least {size_text(needed)} for what is still to be written"
            raise StorageError(str(self.folder), what, "Free some space, choose another cache.dir, or a smaller cache.k or cache.kind.")

    # ----------------------------------------------------------------------------------------------------------------- scoring

    def build(self, sides: dict[str, Side], show_progress: bool) -> int:
        """Make every shard that is missing or damaged, of those that fall to this process.

        Returns:
            How many sequences were scored.

        Raises:
            Preempted: the process was asked to stop; whole shards stay.
        """
        mine = [
            (side, number, problem)
            for side in sides.values()
            for number, problem in side.damaged().items()
            if number % self.world_size == self.rank  # by number: what is still missing changes while others work
        ]
        for side, number, problem in mine:
            if problem != "missing":
                logger.warning("%s: %s; it is made again", side.folder(number), problem)
        total = sum(len(side.sequences_of(number)) for side, number, _ in mine)
        with (
            ThreadPoolExecutor(1) as writer,
            bar(total=total, desc="scoring", unit=" sequences", show=show_progress) as progress,
        ):
            written: Future[None] | None = None
            for side, number, _ in mine:
                columns = self._shard(side, number, progress)
                if written is not None:
                    written.result()
                written = writer.submit(_write_shard, side.folder(number), columns)  # while the next one is scored
            if written is not None:
                written.result()
        return total

    def _shard(self, side: Side, number: int, progress: tqdm[Any]) -> Columns:
        """The columns of one shard."""
        stream = self.streams[side.name]
        found: dict[int, Columns] = {}
        sums: dict[int, int] = {}
        for batch in self._batches(stream, side.sequences_of(number)):
            self.check_stop()
            found |= self._score(batch, side.name)[0]
            sums.update(zip(batch.row_ids.tolist(), checksums(batch), strict=True))
            progress.update(len(batch))
        ordered = [found[i] for i in side.sequences_of(number)]
        counts = [len(part["_tokens"]) for part in ordered]
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        columns = join(ordered)
        del columns["_tokens"]
        found_sums = np.array([sums[i] for i in side.sequences_of(number)], dtype=np.uint32)
        own: Columns = {SEQUENCE_STARTS: starts, CHECKSUMS: found_sums, MARK: side.mark(number)}
        return columns | own

    def _batches(self, stream: Stream, numbers: range) -> Iterator[Batch]:
        """The sequences of a shard, those of like length together and cut to the longest, so that little padding is scored."""
        whole = [stream.batch([number]) for number in numbers]
        lengths = [_length(row) for row in whole]
        order = sorted(range(len(whole)), key=lambda i: (lengths[i], i))
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            yield _cut(Batch.concatenate([whole[i] for i in chosen]), lengths[chosen[-1]])

    @torch.no_grad()
    def _score(self, batch: Batch, side: str, with_mass: bool = False) -> tuple[dict[int, Columns], list[Tensor]]:
        """Sequence number -> its columns; and, if wished, the captured mass of each token."""
        batch, kind, held_out = batch.to(self.teacher.device), self.kinds[side], side == "held_out"
        size = f"with {len(batch)} sequences of {batch.input_ids.shape[1]} tokens"
        remedies = ["lower cache.batch_size", "set teacher.dtype=bfloat16", "shorten data.seq_len"]
        with memory_errors("cache.batch_size", size, remedies), self.autocast():
            targets = self.teacher(batch)
            if not isinstance(targets, DenseTargets):
                return self._score_listed(batch, targets.rows(slice(None)), side)
            counts = loss_mask(batch.labels).sum(-1).tolist()
            next_tokens = supervised_targets(batch.labels)
            found, masses, at = {}, [], 0
            for number, count in zip(batch.row_ids.tolist(), counts, strict=True):
                generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + number * 2 + held_out) % 2**63)
                parts = []
                for rows in _chunks(at, at + count, self.vocab_size):
                    logits = targets.rows(rows, self.vocab_size)
                    if not torch.isfinite(logits.logsumexp(-1)).all():
                        rows_of_source = ", ".join(self.streams[side].origins(number)[:2])
                        what = f"the teacher's logits not finite (rows {rows_of_source})"
                        raise NumericsError(f"sequence {number}", what, "Load it with teacher.dtype=float32, or leave these rows out.")
                    if with_mass:
                        masses.append(kind.captured_mass(torch.softmax(logits / kind.config.temperature, -1)).cpu())
                    columns = kind.encode(logits, targets.hidden[rows], generator)
                    columns["_tokens"] = np.zeros(len(logits), dtype=np.uint8)
                    parts.append(columns | (_for_evaluation(logits, next_tokens[rows]) if held_out else {}))
                at += count
                found[number] = kind.pack(join(parts) if parts else self._nothing(targets.hidden, side))
        return found, masses

    def _score_listed(self, batch: Batch, rows: SparseRows, side: str) -> tuple[dict[int, Columns], list[Tensor]]:
        """The same where the teacher itself gives the most likely tokens only, which is a server."""
        kind = self.kinds[side]
        assert isinstance(self.teacher, ServerTeacher) and isinstance(rows, TopKRows) and isinstance(kind, TopK)
        columns = kind.encode_rows(rows) | {"_tokens": np.zeros(len(rows), dtype=np.uint8)}
        if side == "held_out":
            outcomes = torch.cat([rows.log_probs.exp(), rows.tail[:, None]], -1)
            about = self.teacher.about_teacher(batch) | {
                "exact_entropy": entropy(outcomes).float()
            }  # a lower bound; topk has no use for it
            columns |= {name: (values.int() if name == "top_id" else values).cpu().numpy() for name, values in about.items()}
        ends = np.cumsum(loss_mask(batch.labels).sum(-1).tolist())
        parts = {name: np.split(column, ends[:-1]) for name, column in columns.items()}
        found = {number: kind.pack({name: part[i] for name, part in parts.items()}) for i, number in enumerate(batch.row_ids.tolist())}
        return found, [rows.log_probs[:, : kind.config.k].exp().sum(-1).cpu()]

    def _nothing(self, hidden: Tensor, side: str) -> Columns:
        """The columns of a sequence in which nothing is supervised."""
        logits = torch.zeros(0, self.vocab_size)
        columns = self.kinds[side].encode(logits, hidden[:0], torch.Generator())
        columns["_tokens"] = np.zeros(0, dtype=np.uint8)
        return columns | (_for_evaluation(logits, torch.zeros(0, dtype=torch.int64)) if side == "held_out" else {})


def _for_evaluation(logits: Tensor, targets: Tensor) -> Columns:
    """What the evaluation says about the teacher itself, exactly: it cannot be had from a few entries."""
    log_probs = torch.log_softmax(logits.float(), -1)
    top, top_id = log_probs.max(-1) if len(logits) else (log_probs.new_zeros(0), targets.new_zeros(0))
    columns = {
        "target_log_prob": log_probs.gather(-1, targets.to(logits.device)[:, None])[:, 0],
        "top_log_prob": top,
        "top_id": top_id.int(),
        "exact_entropy": entropy(log_probs.exp()).float(),
    }
    return {name: values.cpu().numpy() for name, values in columns.items()}


def _write_shard(folder: Path, columns: Columns) -> None:
    remove_stale_temporaries(folder.parent)
    with atomic_folder(folder) as temporary:
        write_columns(temporary, columns)


def _chunks(begin: int, end: int, vocab_size: int) -> list[slice]:
    rows = max(1, CHUNK_LOGITS // vocab_size)
    return [slice(start, min(start + rows, end)) for start in range(begin, end, rows)]


def _length(batch: Batch) -> int:
    """Up to the last supervised token: what comes after it predicts nothing."""
    supervised = (batch.labels[0] != -100).nonzero()
    return int(supervised[-1].item()) + 1 if len(supervised) else 1


def _cut(batch: Batch, length: int) -> Batch:
    return Batch(**{f.name: getattr(batch, f.name)[..., :length] if f.name != "row_ids" else batch.row_ids for f in fields(batch)})
