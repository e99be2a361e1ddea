"""What a cache keeps of the teacher's distribution at a token, one class for each kind: written as flat columns, read as targets.

    sampled   a few weighted tokens whose expectation is the whole distribution: small, and unbiased for the forward KL
    topk      the most likely tokens, and the mass of the rest: exact about what is listed
    full      the log-probabilities of the whole vocabulary in bfloat16: for small vocabularies
    hidden    the input of the output head, and the head: exact, small where the teacher is narrow

Axes: T supervised tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import CacheConfig
from ..errors import ConfigError
from ..losses.linear import TeacherRows
from ..losses.sparse import SampledRows, TopKRows
from ..models.head import OutputHead
from .cache_files import Columns, Shard, pack_ids, to_array, to_tensor, unpack_ids
from .sampling import draw, level_table, threshold_sample, to_levels
from .targets import DenseTargets

SMALLEST_SAMPLED = 1e-6  # weight of a single draw that importance weights can make
Place = tuple[Shard, int]
"""A sequence: its shard, and its number there."""

ENTRIES = ("head", "tail")  # streams whose number of entries differs from token to token


class Kind(ABC):
    """One way of keeping a distribution."""

    def __init__(self, config: CacheConfig, vocab_size: int) -> None:
        self.config, self.vocab_size = config, vocab_size

    @abstractmethod
    def encode(self, logits: Tensor, hidden: Tensor, generator: torch.Generator) -> Columns:
        """Columns of some tokens.

        Args:
            logits: `(T, V)` float32, of real tokens of the vocabulary only.
            hidden: `(T, H)`, what they were made from.
            generator: Decides what is drawn.
        """

    @abstractmethod
    def decode(self, parts: list[Place], device: torch.device) -> TeacherRows:
        """The targets of some sequences, one after the other."""

    @abstractmethod
    def check(self, shard: Shard) -> None:
        """Look at the whole content of a shard, once: whatever wrote it, what cannot be a distribution is not trained on.

        Raises:
            CacheError: counts that do not match, token numbers beyond the vocabulary, numbers that are not finite, mass above 1.
        """

    def captured_mass(self, probs: Tensor) -> Tensor:
        """`(T,)`: the share of the distribution whose tokens are certain to be listed."""
        return torch.ones(len(probs))


@dataclass
class SparseTargets:
    """Sparse rows of some tokens, on the student's device."""

    all_rows: SampledRows | TopKRows

    def rows(self, rows: slice, vocab_size: int | None = None) -> SampledRows | TopKRows:
        """Some tokens; there is nothing beyond the vocabulary."""
        return self.all_rows[rows]


@dataclass
class LogProbTargets:
    """Log-probabilities of the whole vocabulary at a temperature."""

    log_probs: Tensor
    temperature: float = 1.0

    def rows(self, rows: slice, vocab_size: int | None = None) -> Tensor:
        """Those of some tokens, as logits before temperature `(n, V)` in float32."""
        return self.log_probs[rows, :vocab_size].float() * self.temperature


class Sampled(Kind):
    """Unbiased samples; see `sampling.py`."""

    def __init__(self, config: CacheConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        threshold = config.sampling == "threshold"
        largest = vocab_size ** abs(1 - config.proposal)  # of importance weights: p^(1-a) · Σ p^a
        self.table = level_table(1 / config.k) if threshold else level_table(SMALLEST_SAMPLED, largest)
        if not threshold and config.proposal == 1:  # whole counts of draws need no rounding
            self.table = torch.arange(256, dtype=torch.float64) / config.k
        self.entropy_table = torch.linspace(0, math.log(vocab_size), 256, dtype=torch.float64)

    def encode(self, logits: Tensor, hidden: Tensor, generator: torch.Generator) -> Columns:
        """Token numbers, weights in a byte each, and the entropy in a byte."""
        log_probs = torch.log_softmax(logits if self.config.temperature == 1 else logits / self.config.temperature, -1)
        probs = log_probs.exp()
        entropies = -(probs * log_probs.clamp(min=-1e30)).sum(-1)  # in float32: it is kept in a byte
        if self.config.sampling == "threshold":
            entries = threshold_sample(probs, self.config.k, generator)
        else:
            entries = draw(probs, self.config.k, self.config.proposal, generator)
        return {
            "head_counts": _bytes(entries.head_counts),
            "tail_counts": _bytes(entries.tail_counts),
            **pack_ids("head_ids", entries.head_ids, self.vocab_size),
            **pack_ids("tail_ids", entries.tail_ids, self.vocab_size),
            "head_levels": to_levels(entries.head_weights.cpu(), self.table, generator).numpy(),
            "entropy": to_levels(entropies.cpu(), self.entropy_table, generator).numpy(),
        }

    def decode(self, parts: list[Place], device: torch.device) -> SparseTargets:
        """Head and tail entries, put together token by token."""
        each = [self._decode(shard, sequence) for shard, sequence in parts]
        counts = torch.cat([part[0] for part in each])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        ids, weights, entropies = (torch.cat([part[i] for part in each]) for i in (1, 2, 3))
        return SparseTargets(SampledRows(offsets, ids, weights, entropies).to(device))

    def _decode(self, shard: Shard, sequence: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Entries per token, ids, weights and entropies of one sequence."""
        tokens = shard.tokens(sequence)
        head_counts, tail_counts = (torch.from_numpy(shard[f"{name}_counts"][tokens].astype(np.int64)) for name in ENTRIES)
        entries = [slice(int(shard[f"{name}_starts"][sequence]), int(shard[f"{name}_starts"][sequence + 1])) for name in ENTRIES]
        head_ids, tail_ids = (unpack_ids(shard, f"{name}_ids", part) for name, part in zip(ENTRIES, entries, strict=True))
        head_weights = self.table[torch.from_numpy(shard["head_levels"][entries[0]].astype(np.int64))]
        number = torch.arange(len(head_counts))
        head_tokens, tail_tokens = number.repeat_interleave(head_counts), number.repeat_interleave(tail_counts)
        left = 1 - head_weights.new_zeros(len(number)).index_add(0, head_tokens, head_weights)
        tail_weights = (left / tail_counts.clamp(min=1))[tail_tokens]  # seldom a little below 0, which keeps their mean right
        order = torch.cat([head_tokens, tail_tokens]).argsort(stable=True)
        ids, weights = torch.cat([head_ids, tail_ids])[order], torch.cat([head_weights, tail_weights])[order]
        entropies = self.entropy_table[torch.from_numpy(shard["entropy"][tokens].astype(np.int64))]
        return head_counts + tail_counts, ids, weights.float(), entropies.float()

    def check(self, shard: Shard) -> None:
        """Every token has entries, and their weights are those of a distribution."""
        sequences, tokens = len(shard.checksums), int(shard.starts[-1])
        shard.check_column("entropy", (tokens,), np.uint8)
        for name in ENTRIES:
            shard.check_column(f"{name}_counts", (tokens,), np.uint8)
            check_ids(shard, f"{name}_ids", (shard.check_starts(f"{name}_starts", sequences),), self.vocab_size)
        shard.check_column("head_levels", shard["head_ids"].shape, np.uint8)
        importance = self.config.sampling == "draws" and self.config.proposal != 1
        most = self.table[-1].item() if importance else 1.0
        most *= (self.table[-1] / self.table[-2]).item() + 1e-3  # each weight was rounded to one of two levels
        for block in shard.blocks():
            at = slice(int(shard.starts[block.start]), int(shard.starts[block.stop]))
            ends = {}
            for name in ENTRIES:
                ends[name] = np.concatenate([[0], np.cumsum(shard[f"{name}_counts"][at], dtype=np.int64)])
                wanted = shard[f"{name}_starts"][block.start : block.stop + 1]
                if not np.array_equal(ends[name][shard.starts[block.start : block.stop + 1] - at.start] + wanted[0], wanted):
                    raise shard.wrong(f"{name}_counts", "do not match where the entries of each sequence begin")
            if (np.diff(ends["head"]) + np.diff(ends["tail"]) == 0).any():
                raise shard.wrong("head_counts", "and tail_counts are 0 for some token")
            first = shard["head_starts"][block.start]
            levels = shard["head_levels"][first : first + ends["head"][-1]]
            mass = np.diff(np.concatenate([[0.0], np.cumsum(self.table.numpy()[levels])])[ends["head"]])
            if (mass > most).any():
                raise shard.wrong("head_levels", f"give a token a mass of {mass.max():.4g}, expected at most {most:.4g}")

    def captured_mass(self, probs: Tensor) -> Tensor:
        """What is above the threshold; of independent draws nothing is certain, so what a draw would miss is left out."""
        if self.config.sampling == "threshold":
            return probs.masked_fill(probs < 1 / self.config.k, 0.0).sum(-1)
        tempered = probs**self.config.proposal
        tempered = tempered / tempered.sum(-1, keepdim=True)
        return (probs * (1 - (1 - tempered) ** self.config.k)).sum(-1)


class TopK(Kind):
    """The most likely tokens; their log-probabilities in a byte each, between the first and the last of the row."""

    def __init__(self, config: CacheConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        if config.k > vocab_size:
            raise ConfigError("cache.k", f"got {config.k}, expected at most the {vocab_size} tokens of the vocabulary")

    def encode(self, logits: Tensor, hidden: Tensor, generator: torch.Generator) -> Columns:
        """See `encode_rows`."""
        log_probs = torch.log_softmax(logits / self.config.temperature, -1)
        top, ids = log_probs.topk(self.config.k, -1)
        return self.encode_rows(TopKRows(ids, top, log_probs.exp().scatter(-1, ids, 0.0).sum(-1), spread=False))

    def encode_rows(self, rows: TopKRows) -> Columns:
        """Token numbers, levels, the two ends of the levels and the mass of the tail, of at least k tokens in descending order."""
        top, ids = rows.log_probs[:, : self.config.k], rows.ids[:, : self.config.k]
        tail = rows.tail + rows.log_probs[:, self.config.k :].exp().sum(-1)
        ends = top[:, [0, -1]].half()
        first, last = ends.float().unbind(-1)
        levels = ((first[:, None] - top) / (first - last).clamp(min=1e-6)[:, None] * 255).round().clamp(0, 255)
        return {
            **pack_ids("ids", ids, self.vocab_size),
            "levels": levels.to(torch.uint8).cpu().numpy(),
            "ends": to_array(ends),
            "tail": to_array(tail.float()),
        }

    def decode(self, parts: list[Place], device: torch.device) -> SparseTargets:
        """Ids, log-probabilities and tails."""
        each = [self._decode(shard, shard.tokens(sequence)) for shard, sequence in parts]
        ids, log_probs, tail = (torch.cat([part[i] for part in each]) for i in range(3))
        return SparseTargets(TopKRows(ids, log_probs, tail, self.config.tail == "spread").to(device))

    def _decode(self, shard: Shard, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        first, last = torch.from_numpy(shard["ends"][tokens].astype(np.float32)).unbind(-1)
        levels = torch.from_numpy(shard["levels"][tokens].astype(np.float32))
        log_probs = first[:, None] - levels / 255 * (first - last)[:, None]
        return unpack_ids(shard, "ids", tokens), log_probs, torch.from_numpy(np.array(shard["tail"][tokens]))

    def check(self, shard: Shard) -> None:
        """Finite, and of no more mass than 1 but for rounding."""
        tokens, k = int(shard.starts[-1]), self.config.k
        check_ids(shard, "ids", (tokens, k), self.vocab_size)
        shard.check_column("levels", (tokens, k), np.uint8)
        shard.check_column("ends", (tokens, 2), np.float16)
        shard.check_column("tail", (tokens,), np.float32)
        for block in shard.blocks():
            at = slice(int(shard.starts[block.start]), int(shard.starts[block.stop]))
            first, last = shard["ends"][at].astype(np.float32).T
            tail = shard["tail"][at]
            if not (np.isfinite(first) & np.isfinite(last) & np.isfinite(tail)).all():
                raise shard.wrong("ends", "or tail holds numbers that are not finite")
            if (first > 0).any() or (last > first).any() or (tail < 0).any():
                raise shard.wrong("ends", "or tail are not those of probabilities in descending order")
            log_probs = first[:, None] - shard["levels"][at].astype(np.float32) / 255 * (first - last)[:, None]
            mass = np.exp(log_probs).sum(-1) + tail
            most = np.exp((first - last) / 510 - last * 2**-10) + 1e-3  # half a level, and the rounding of the ends
            if (mass > most).any():
                raise shard.wrong("levels", f"give a token a mass of {mass[mass > most].max():.4g}")

    def captured_mass(self, probs: Tensor) -> Tensor:
        """Of the k most likely."""
        return probs.topk(self.config.k, -1).values.sum(-1)


class Full(Kind):
    """Every token's log-probability in bfloat16: 2 bytes × vocabulary."""

    def encode(self, logits: Tensor, hidden: Tensor, generator: torch.Generator) -> Columns:
        """One column."""
        return {"log_probs": to_array(torch.log_softmax(logits / self.config.temperature, -1).bfloat16())}

    def decode(self, parts: list[Place], device: torch.device) -> LogProbTargets:
        """As logits, which log-probabilities are."""
        rows = [to_tensor(shard["log_probs"][shard.tokens(sequence)]) for shard, sequence in parts]
        return LogProbTargets(torch.cat(rows).to(device), self.config.temperature)

    def check(self, shard: Shard) -> None:
        """Finite, with a mass of 1 but for rounding."""
        shard.check_column("log_probs", (int(shard.starts[-1]), self.vocab_size), np.uint16)
        rows = max(1, 2**22 // self.vocab_size)
        for start in range(0, int(shard.starts[-1]), rows):
            mass = to_tensor(shard["log_probs"][start : start + rows]).float().exp().sum(-1)
            if not ((mass - 1).abs() < 0.05).all():
                raise shard.wrong("log_probs", f"give a token a mass of {mass[~((mass - 1).abs() < 0.05)][0]:.4g}, expected 1")


class Hidden(Kind):
    """The teacher's last hidden states, as they are; the head makes their logits when they are wanted."""

    head: OutputHead | None = None

    def encode(self, logits: Tensor, hidden: Tensor, generator: torch.Generator) -> Columns:
        """One column, in the dtype that the teacher gave."""
        return {"hidden": to_array(hidden)}

    def decode(self, parts: list[Place], device: torch.device) -> DenseTargets:
        """The same targets that the teacher itself gives."""
        assert self.head is not None
        self.head.module.to(device)
        rows = [to_tensor(shard["hidden"][shard.tokens(sequence)]) for shard, sequence in parts]
        return DenseTargets(torch.cat(rows).to(device), self.head, device)

    def check(self, shard: Shard) -> None:
        """Finite, as wide as the head."""
        assert self.head is not None and isinstance(self.head.module, torch.nn.Linear)
        width, column = self.head.module.in_features, shard["hidden"]
        shard.check_column("hidden", (int(shard.starts[-1]), width), column.dtype.type)
        rows = max(1, 2**22 // width)
        for start in range(0, len(column), rows):
            if not to_tensor(column[start : start + rows]).isfinite().all():
                raise shard.wrong("hidden", "holds numbers that are not finite")


KINDS: dict[str, type[Kind]] = {"sampled": Sampled, "topk": TopK, "full": Full, "hidden": Hidden}


def entry_starts(columns: Columns, starts: np.ndarray) -> Columns:
    """Where the entries of each sequence begin, for kinds whose tokens have different numbers of them."""
    found = {}
    for name in ENTRIES:
        if f"{name}_counts" in columns:
            ends = np.concatenate([[0], np.cumsum(columns[f"{name}_counts"], dtype=np.int64)])
            found[f"{name}_starts"] = ends[starts]
    return found


def check_ids(shard: Shard, name: str, shape: tuple[int, ...], vocab_size: int) -> None:
    """Token numbers that `pack_ids` wrote are those of the vocabulary."""
    shard.check_column(name, shape, np.uint16)
    wide = vocab_size > 2**16
    if wide:
        shard.check_column(f"{name}_high", shape, np.uint8)
    for start in range(0, shape[0], 2**20):
        ids = shard[name][start : start + 2**20].astype(np.int64)
        if wide:
            ids |= shard[f"{name}_high"][start : start + 2**20].astype(np.int64) << 16
        if ids.size and ids.max() >= vocab_size:
            raise shard.wrong(name, f"hold token {ids.max()}, and the vocabulary has {vocab_size}")


def _bytes(counts: Tensor) -> np.ndarray:
    return counts.to(torch.uint8).cpu().numpy()
