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
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import CacheConfig
from ..errors import ConfigError
from ..losses.linear import Scratch, TeacherRows
from ..losses.sparse import SampledRows, TopKRows
from ..models.head import OutputHead
from .bit_packing import bits_for, pack, pack_rising, rising_bytes, unpack_rising
from .cache_files import Columns, Reading, Shard, to_array, to_tensor
from .sampling import draw, level_table, threshold_sample, to_levels
from .targets import DenseTargets

SMALLEST_SAMPLED = 1e-6  # weight of a single draw that importance weights can make
LEAST = -50.0
"""What is less likely in a list is taken for that likely: it would swamp the rest, whose levels lie between the two ends."""

FLOATS = (np.uint16, np.float16, np.float32, np.float64)  # types of hidden states, bfloat16 first


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

    def pack(self, columns: Columns) -> Columns:
        """The columns of a whole sequence as they are written: numbers in as few bits as they need."""
        return columns

    @abstractmethod
    def check(self, shard: Shard) -> None:
        """Whether a shard has the columns of this kind; what they hold is looked at when it is read.

        Raises:
            CacheError: a column that is missing, or of another length or type.
        """

    @abstractmethod
    def decode(self, reading: Reading, device: torch.device) -> TeacherRows:
        """The targets of some sequences, one after the other. Whatever wrote them, what cannot be a distribution is not given out.

        In numpy, which computes in the thread that asks; torch would start as many threads again as the training has.

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
        threshold, importance = config.sampling == "threshold", config.proposal != 1
        largest = vocab_size ** abs(1 - config.proposal)  # of importance weights: p^(1-a) · Σ p^a
        if threshold or importance:
            self.table = level_table(1 / config.k) if threshold else level_table(SMALLEST_SAMPLED, largest)
            rounding = (self.table[-1] / self.table[-2]).item()  # each weight is one of the two nearest
        else:
            self.table, rounding = torch.arange(config.k + 1, dtype=torch.float64) / config.k, 1.0  # whole counts of draws
        self.most = self.table[-1].item() * rounding + 1e-3  # of the mass of a head
        self.entropy_table = torch.linspace(0, math.log(vocab_size), 256, dtype=torch.float64)
        self.streams = 2 if threshold else 1  # head and tail, or no tail
        self.count_bits = bits_for(config.k)
        self.id_bits, self.level_bits = bits_for(vocab_size - 1), bits_for(len(self.table) - 1)
        self.weights = np.full(2**self.level_bits, np.inf)  # by level; of those that no builder writes the mass is impossible
        self.weights[: len(self.table)] = self.table.numpy()
        self.entropies = self.entropy_table.float().numpy()

    def encode(self, logits: Tensor, hidden: Tensor, generator: torch.Generator) -> Columns:
        """Token by token how many entries it has in head and tail, their numbers, and weights and entropy as places in their tables."""
        log_probs = torch.log_softmax(logits if self.config.temperature == 1 else logits / self.config.temperature, -1)
        probs = log_probs.exp()
        entropies = -log_probs.clamp_(min=-1e30).mul_(probs).sum(-1)  # in float32: it is kept in a byte
        if self.config.sampling == "threshold":
            entries = threshold_sample(probs, self.config.k, generator)
        else:
            entries = draw(probs, self.config.k, self.config.proposal, generator)
        counts, ids = entries.token_by_token()
        return {
            "counts": to_array(counts[:, : self.streams]),
            "ids": to_array(ids),
            "head_levels": to_array(to_levels(entries.head_weights.cpu(), self.table, generator)),
            "entropy": to_array(to_levels(entropies.cpu(), self.entropy_table, generator)),
        }

    def pack(self, columns: Columns) -> Columns:
        """All but the entropy; and how many entries there are."""
        return columns | {
            "entries": columns["counts"].sum(0, keepdims=True).astype(np.uint32),
            "counts": pack(columns["counts"].reshape(-1), self.count_bits),
            "ids": pack(columns["ids"], self.id_bits),
            "head_levels": pack(columns["head_levels"], self.level_bits),
        }

    def check(self, shard: Shard) -> None:
        """A byte for each token, and packed numbers of tokens and of entries."""
        shard.check_rows("entropy", np.uint8)
        entries = shard.check_column("entries", (len(shard.checksums), self.streams), np.uint32)
        shard.check_packed("counts", shard.tokens_of_each * self.streams, self.count_bits)
        shard.check_packed("ids", entries.sum(1), self.id_bits)
        shard.check_packed("head_levels", entries[:, 0], self.level_bits)

    def decode(self, reading: Reading, device: torch.device) -> SparseTargets:
        """Of each token the entries of its head, then those of its tail, which share what the head leaves."""
        entries = reading.of_sequences("entries")
        heads, tails = self._counts(reading, entries)
        counts = heads + tails
        reading.check(counts > 0, "counts", lambda _: "are 0 for some token")
        in_head = np.repeat(np.arange(reading.num_tokens), heads)  # the token of each entry of a head
        head_weights = self.weights[reading.packed("head_levels", entries[:, 0], self.level_bits)]
        mass = np.bincount(in_head, head_weights, reading.num_tokens)
        reading.check(
            mass <= self.most, "head_levels", lambda token: f"give a token a mass of {mass[token]:.4g}, expected at most {self.most:.4g}"
        )
        shares = (1 - mass) / np.maximum(tails, 1)  # seldom a little below 0, which keeps their mean right
        weights = np.repeat(shares.astype(np.float32), counts)
        tails_before = np.cumsum(tails) - tails
        weights[np.arange(len(in_head)) + tails_before[in_head]] = head_weights

        ends = np.cumsum(counts)
        ids = reading.packed("ids", entries.sum(1), self.id_bits)
        check_ids(reading, "ids", ids, self.vocab_size, lambda place: int(np.searchsorted(ends, place, side="right")))
        offsets, entropies = np.append(0, ends), self.entropies[reading.rows("entropy")]
        return SparseTargets(SampledRows(*map(torch.from_numpy, (offsets, ids.astype(np.int64), weights, entropies))).to(device))

    def _counts(self, reading: Reading, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries of each token in its head and in its tail: int64; they are those of the sequence."""
        packed = reading.packed("counts", reading.tokens_of_each * self.streams, self.count_bits)
        counts = packed.reshape(-1, self.streams).astype(np.int64)
        up_to = np.concatenate([np.zeros_like(counts[:1]), np.cumsum(counts, axis=0)])
        of_each = np.diff(up_to[np.append(0, np.cumsum(reading.tokens_of_each))], axis=0)
        reading.check_sequences((of_each == entries).all(1), "counts", "do not match the entries of each sequence")
        return counts[:, 0], counts[:, 1] if self.streams == 2 else np.zeros_like(counts[:, 0])

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
        self.id_bits = bits_for(vocab_size - 1)

    def encode(self, logits: Tensor, hidden: Tensor, generator: torch.Generator) -> Columns:
        """See `encode_rows`."""
        log_probs = torch.log_softmax(logits if self.config.temperature == 1 else logits / self.config.temperature, -1)
        top, ids = log_probs.topk(self.config.k, -1)
        tail = log_probs.exp_().scatter_(-1, ids, 0.0).sum(-1)
        return self.encode_rows(TopKRows(ids, top, tail, spread=False))

    def encode_rows(self, rows: TopKRows) -> Columns:
        """Of at least k tokens, the most likely first: numbers, levels, the two ends of the levels and the mass of the tail."""
        top, ids = rows.log_probs[:, : self.config.k].clamp(min=LEAST), rows.ids[:, : self.config.k]
        tail = rows.tail + rows.log_probs[:, self.config.k :].exp().sum(-1)
        ends = top[:, [0, -1]].half()
        first, last = ends.float().unbind(-1)
        levels = ((first[:, None] - top) / (first - last).clamp(min=1e-6)[:, None] * 255).round().clamp(0, 255)  # from 0 on, rising
        return {
            "ids": to_array(ids),
            "levels": pack_rising(to_array(levels.to(torch.uint8))),
            "ends": to_array(ends),
            "log_tail": to_array(tail.clamp(max=1.0).log().half()),  # its logarithm is what a tiny tail matters by; -inf: no tail
        }

    def pack(self, columns: Columns) -> Columns:
        """The token numbers."""
        return columns | {"ids": pack(columns["ids"].reshape(-1), self.id_bits)}

    def check(self, shard: Shard) -> None:
        """k packed numbers of each token, and what else there is of it in a row each."""
        shard.check_packed("ids", shard.tokens_of_each * self.config.k, self.id_bits)
        shard.check_rows("levels", np.uint8, rising_bytes(self.config.k))
        shard.check_rows("ends", np.float16, 2)
        shard.check_rows("log_tail", np.float16)

    def decode(self, reading: Reading, device: torch.device) -> SparseTargets:
        """Ids, log-probabilities and tails."""
        ids = reading.packed("ids", reading.tokens_of_each * self.config.k, self.id_bits).reshape(-1, self.config.k)
        check_ids(reading, "ids", ids, self.vocab_size, lambda place: place // self.config.k)
        first, last = reading.rows("ends").astype(np.float32).T
        log_tail = reading.rows("log_tail").astype(np.float32)
        finite = np.isfinite(first) & np.isfinite(last) & ~np.isnan(log_tail)
        reading.check(finite, "ends", lambda _: "or log_tail holds numbers that are not finite")
        descending = (first <= 0) & (last <= first) & (log_tail <= 0)
        reading.check(descending, "ends", lambda _: "or log_tail are not those of probabilities in descending order")
        log_probs = self._levels(reading).astype(np.float32)
        log_probs *= ((last - first) / 255)[:, None]
        log_probs += first[:, None]
        tail = np.exp(log_tail)
        mass = np.einsum("tk->t", np.exp(log_probs)) + tail  # a sum of short rows, quicker than sum
        most = np.exp((first - last) / 510 - last * 2**-10) + 1e-3  # half a level, and the rounding of the ends
        reading.check(mass <= most, "levels", lambda token: f"give a token a mass of {mass[token]:.4g}")
        listed, values, rest = map(torch.from_numpy, (ids.astype(np.int64), log_probs, tail))
        return SparseTargets(TopKRows(listed, values, rest, self.config.tail == "spread").to(device))

    def _levels(self, reading: Reading) -> np.ndarray:
        """`(T, k)` uint8."""
        try:
            return unpack_rising(reading.rows("levels"), self.config.k)
        except ValueError as error:
            raise reading.shard_of(error.args[0]).wrong("levels", f"are not {self.config.k} of a token") from error

    def captured_mass(self, probs: Tensor) -> Tensor:
        """Of the k most likely."""
        return probs.topk(self.config.k, -1).values.sum(-1)


class Full(Kind):
    """Every token's log-probability in bfloat16: 2 bytes × vocabulary."""

    def encode(self, logits: Tensor, hidden: Tensor, generator: torch.Generator) -> Columns:
        """One column."""
        return {"log_probs": to_array(torch.log_softmax(logits / self.config.temperature, -1).bfloat16())}

    def check(self, shard: Shard) -> None:
        """One column."""
        shard.check_rows("log_probs", np.uint16, self.vocab_size)

    def decode(self, reading: Reading, device: torch.device) -> LogProbTargets:
        """As logits, which log-probabilities are; their mass is 1 but for rounding."""
        rows = reading.rows("log_probs")
        mass = np.concatenate([_mass(part) for part in np.array_split(rows, 1 + rows.size // 2**20)])
        reading.check(np.abs(mass - 1) < 0.05, "log_probs", lambda token: f"give a token a mass of {mass[token]:.4g}, expected 1")
        return LogProbTargets(to_tensor(rows).to(device), self.config.temperature)


class Hidden(Kind):
    """The teacher's last hidden states, as they are; the head makes their logits when they are wanted."""

    head: OutputHead | None = None

    def __init__(self, config: CacheConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.scratch = Scratch()

    def encode(self, logits: Tensor, hidden: Tensor, generator: torch.Generator) -> Columns:
        """One column, in the dtype that the teacher gave."""
        return {"hidden": to_array(hidden)}

    def check(self, shard: Shard) -> None:
        """Floating-point numbers, as many as the head takes."""
        assert self.head is not None and isinstance(self.head.module, torch.nn.Linear)
        dtype = shard["hidden"].dtype
        shard.check_rows("hidden", dtype.type if dtype in FLOATS else np.float32, self.head.module.in_features)

    def decode(self, reading: Reading, device: torch.device) -> DenseTargets:
        """The same targets that the teacher itself gives."""
        assert self.head is not None
        self.head.module.to(device)
        rows = reading.rows("hidden")
        reading.check(np.isfinite(_wide(rows)).all(1), "hidden", lambda _: "holds numbers that are not finite")
        return DenseTargets(to_tensor(rows).to(device), self.head, device, Scratch.on(device, self.scratch))


KINDS: dict[str, type[Kind]] = {"sampled": Sampled, "topk": TopK, "full": Full, "hidden": Hidden}


def check_ids(reading: Reading, name: str, ids: np.ndarray, vocab_size: int, token_of: Callable[[int], int]) -> None:
    """Token numbers that were read are those of the vocabulary; `token_of` says at which token of the reading one of them stands."""
    if ids.size and ids.max() >= vocab_size:
        raise reading.shard_of(token_of(int(ids.argmax()))).wrong(name, f"hold token {ids.max()}, and the vocabulary has {vocab_size}")


def _wide(rows: np.ndarray) -> np.ndarray:
    """Numbers as numpy knows them: those of bfloat16 widened."""
    return (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows


def _mass(log_probs: np.ndarray) -> np.ndarray:
    """Of each token."""
    return np.exp(_wide(log_probs)).sum(1)
