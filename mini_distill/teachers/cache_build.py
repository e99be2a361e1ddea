"""Score a corpus with the teacher, once."""

from __future__ import annotations

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import groupby, islice
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
from .cache_forecast import Forecast, forecast, spread_over
from .cache_identity import DESCRIPTION, check_same, read_description, write_description
from .cache_kinds import TopK
from .cached import checksums, kind_of_side, save_head
from .online import OnlineTeacher
from .sampling import entropy
from .server import ServerTeacher
from .targets import DenseTargets

CHUNK_LOGITS = 2**24
"""Logits that exist at once."""
TILE_LOGITS = 2**19
"""Of these, as many as are encoded at once on a CPU: the dozen passes over 2 MB then run in its cache, in memory that is used again. Both are
constants, since the draws of a sequence follow them."""

SHARD_BYTES = 2**26

ASKED_AHEAD = 4
"""Documents that a server has not answered yet, for each request at a time: while one answer is waited for, others come."""

Work = tuple[Side, int, Batch]
"""A batch of a shard of a side."""
Scores = tuple[dict[int, Columns], list[Tensor]]
"""Sequence number -> its columns; and masses of tokens."""

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

    def forecast(self, side: Side, shards: list[int]) -> Forecast:
        """Score sequences spread over some shards of a side, and from them foretell size, time and what the targets hold of p."""
        stream, batches = self.streams[side.name], 4 if side.name == "train" else 1
        numbers = spread_over(side, shards, batches * self.config.batch_size)
        next(self._scored([stream.batch(numbers[:1])], side.name))  # warm
        started, found, masses = time.perf_counter(), dict[int, Columns](), list[Tensor]()
        with closing(self._asked_ahead((side, 0, batch) for batch in self._batches(stream, numbers))) as asked:
            for _, columns, listed in self._scored((batch for _, _, batch in asked), side.name):
                found |= columns
                masses += listed
        seconds = time.perf_counter() - started
        if not masses and side.name == "train":  # of which nothing was told by the way; not timed
            masses = [mass for _, _, some in self._scored(self._batches(stream, numbers), side.name, with_mass=True) for mass in some]
        tokens = sum(len(part["_tokens"]) for part in found.values())
        mass = float(torch.cat(masses).mean()) if tokens and masses else 1.0
        return forecast(side, stream.num_supervised, list(found.values()), tokens, seconds, mass)

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

    def build(self, sides: dict[str, Side], left: dict[str, dict[int, str]], show_progress: bool) -> int:
        """Make the shards that are left of each side, of those that fall to this process.

        Args:
            sides: By name.
            left: Of each side, the shards that are missing or damaged, with what is wrong with them.
            show_progress: Whether somebody looks on.

        Returns:
            How many sequences were scored.

        Raises:
            Preempted: the process was asked to stop; whole shards stay.
        """
        mine = [
            (side, number, problem)
            for name, side in sides.items()
            for number, problem in left[name].items()
            if number % self.world_size == self.rank
        ]
        for side, number, problem in mine:
            if problem != "missing":
                logger.warning("%s: %s; it is made again", side.folder(number), problem)
        total = sum(len(side.sequences_of(number)) for side, number, _ in mine)
        work = (
            (side, number, batch) for side, number, _ in mine for batch in self._batches(self.streams[side.name], side.sequences_of(number))
        )
        with (
            ThreadPoolExecutor(1) as writer,
            closing(self._asked_ahead(work)) as asked,
            bar(total=total, desc="scoring", unit=" sequences", show=show_progress) as progress,
        ):
            written: Future[None] | None = None
            for (name, number), of_shard in groupby(asked, lambda item: (item[0].name, item[1])):
                columns = self._shard(sides[name], number, (batch for _, _, batch in of_shard), progress)
                if written is not None:
                    written.result()
                written = writer.submit(_write_shard, sides[name].folder(number), columns)  # while the next one is scored
            if written is not None:
                written.result()
        return total

    def _asked_ahead(self, work: Iterable[Work]) -> Generator[Work, None, None]:
        """The same batches; a server is asked about the next ones meanwhile, so that `teacher.num_requests` requests are under way."""
        teacher, waiting = self.teacher, deque[tuple[Work, list[Future[Any]]]]()
        if not isinstance(teacher, ServerTeacher):
            yield from work
            return
        try:
            for item in work:
                waiting.append((item, teacher.ask(item[-1])))
                while waiting and (_unanswered(islice(waiting, 1)) == 0 or _unanswered(waiting) >= ASKED_AHEAD * teacher.num_requests):
                    yield waiting.popleft()[0]
            while waiting:
                yield waiting.popleft()[0]
        finally:
            teacher.give_up()  # what was asked for nobody, where a build is stopped

    def _shard(self, side: Side, number: int, batches: Iterable[Batch], progress: tqdm[Any]) -> Columns:
        """The columns of one shard."""
        found: dict[int, Columns] = {}
        sums: dict[int, int] = {}
        for batch, columns, _ in self._scored(batches, side.name):
            found |= columns
            sums.update(zip(batch.row_ids.tolist(), checksums(batch), strict=True))
            progress.update(len(batch))
        ordered = [found[i] for i in side.sequences_of(number)]
        counts = [len(part["_tokens"]) for part in ordered]
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        joined = join(ordered)
        del joined["_tokens"]
        found_sums = np.array([sums[i] for i in side.sequences_of(number)], dtype=np.uint32)
        own: Columns = {SEQUENCE_STARTS: starts, CHECKSUMS: found_sums, MARK: side.mark(number)}
        return joined | own

    def _batches(self, stream: Stream, numbers: Sequence[int]) -> Iterator[Batch]:
        """Sequences, those of a shard, say; those of like length together and cut to the longest, so that little padding is scored."""
        whole = [stream.batch([number]) for number in numbers]
        lengths = [_length(row) for row in whole]
        order = sorted(range(len(whole)), key=lambda i: (lengths[i], i))
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            yield _cut(Batch.concatenate([whole[i] for i in chosen]), lengths[chosen[-1]])

    def _scored(
        self, batches: Iterable[Batch], side: str, with_mass: bool = False
    ) -> Iterator[tuple[Batch, dict[int, Columns], list[Tensor]]]:
        """Each batch, the columns of its sequences by number, and, if wished, the captured mass of each of its tokens.

        The columns are made in a thread, while the teacher reads the next batch.
        """
        with ThreadPoolExecutor(1, "columns") as thread:
            waiting = deque[tuple[Batch, Future[Scores]]]()
            for batch in batches:
                self.check_stop()
                waiting.append((batch, self._score(batch, side, with_mass, thread)))
                if len(waiting) > 1:
                    before, scores = waiting.popleft()
                    yield before, *scores.result()
            for before, scores in waiting:
                yield before, *scores.result()

    def _score(self, batch: Batch, side: str, with_mass: bool, thread: ThreadPoolExecutor) -> Future[Scores]:
        """The teacher reads a batch."""
        batch = batch.to(self.teacher.device)
        with self._scoring(batch):
            targets = self.teacher(batch)
            if isinstance(targets, DenseTargets):
                return thread.submit(self._encode, batch, targets, side, with_mass)
            listed = Future[Scores]()
            listed.set_result(self._score_listed(batch, targets.rows(slice(None)), side))
            return listed

    @contextmanager
    def _scoring(self, batch: Batch) -> Iterator[None]:
        """Within, nothing is recorded for a gradient, and what memory is lacking for has its remedies."""
        size = f"with {len(batch)} sequences of {batch.input_ids.shape[1]} tokens"
        remedies = ["lower cache.batch_size", "set teacher.dtype=bfloat16", "shorten data.seq_len"]
        with memory_errors("cache.batch_size", size, remedies), torch.no_grad(), self.autocast():
            yield

    def _encode(self, batch: Batch, targets: DenseTargets, side: str, with_mass: bool) -> Scores:
        """Sequence by sequence."""
        kind, held_out = self.kinds[side], side == "held_out"
        with self._scoring(batch):
            counts = loss_mask(batch.labels).sum(-1).tolist()
            next_tokens = supervised_targets(batch.labels)
            found, masses, at = {}, [], 0
            for number, count in zip(batch.row_ids.tolist(), counts, strict=True):
                generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + number * 2 + held_out) % 2**63)
                parts = []
                for rows in _chunks(at, at + count, CHUNK_LOGITS // self.vocab_size):
                    logits = targets.rows(rows, self.vocab_size)
                    if not torch.isfinite(logits.amax(-1)).all():  # NaN is the largest; of impossible tokens, -inf, there may be some
                        rows_of_source = ", ".join(self.streams[side].origins(number)[:2])
                        what = f"the teacher's logits not finite (rows {rows_of_source})"
                        raise NumericsError(f"sequence {number}", what, "Load it with teacher.dtype=float32, or leave these rows out.")
                    for tile in _chunks(0, len(logits), len(logits) if logits.is_cuda else TILE_LOGITS // self.vocab_size):
                        if with_mass:
                            masses.append(kind.captured_mass(torch.softmax(logits[tile] / kind.config.temperature, -1)).cpu())
                        columns = kind.encode(logits[tile], targets.hidden[rows][tile], generator)
                        columns["_tokens"] = np.zeros(len(logits[tile]), dtype=np.uint8)
                        parts.append(columns | (_for_evaluation(logits[tile], next_tokens[rows][tile]) if held_out else {}))
                at += count
                found[number] = kind.pack(join(parts) if parts else self._nothing(targets.hidden, side))
        return found, masses

    def _score_listed(self, batch: Batch, rows: SparseRows, side: str) -> Scores:
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


def _unanswered(asked: Iterable[tuple[Work, list[Future[Any]]]]) -> int:
    return sum(not future.done() for _, futures in asked for future in futures)


def _write_shard(folder: Path, columns: Columns) -> None:
    remove_stale_temporaries(folder.parent)
    with atomic_folder(folder) as temporary:
        write_columns(temporary, columns)


def _chunks(begin: int, end: int, rows: int) -> list[slice]:
    rows = max(1, rows)
    return [slice(start, min(start + rows, end)) for start in range(begin, end, rows)]


def _length(batch: Batch) -> int:
    """Up to the last supervised token: what comes after it predicts nothing."""
    supervised = (batch.labels[0] != -100).nonzero()
    return int(supervised[-1].item()) + 1 if len(supervised) else 1


def _cut(batch: Batch, length: int) -> Batch:
    return Batch(**{f.name: getattr(batch, f.name)[..., :length] if f.name != "row_ids" else batch.row_ids for f in fields(batch)})
