"""Whether a cache is what its live teacher says today, of sequences that are scored again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..data.batch import Batch
from ..errors import CacheError, Problem
from ..losses.divergences import forward_kl
from ..losses.linear import TeacherRows
from ..losses.reduction import loss_mask
from ..losses.sparse import SMALLEST_TAIL, SampledRows, TopKRows
from .cached import CachedTeacher
from .online import OnlineTeacher
from .server import ServerTeacher

EXACT, ROUNDED = (1e-3, 0.01), (0.01, 0.5)
"""Nats that the live teacher may be away, on average and in one sequence: in float32, where only what is kept is rounded; and where
the teacher itself is, which rounds otherwise in batches of another shape, or on a server."""

SEQUENCE_ERRORS, MEAN_ERRORS = 20, 4
"""Standard errors that samples may be away besides, in one sequence (of the worst of many, with heavy tails) and on average."""


@dataclass
class ScoredAgain:
    """A sequence that was scored again.

    Attributes:
        shard: The folder it lies in.
        number: Its own.
        differences: `(supervised,)`: how far the live teacher is from what was written of each token, in nats.
    """

    shard: Path
    number: int
    differences: Tensor


def how_far(teacher: OnlineTeacher | ServerTeacher, cached: CachedTeacher, batch: Batch, vocab_size: int, temperature: float) -> Tensor:
    """How far the live teacher is from what was written of a sequence, `(supervised,)` in nats."""
    tokens = slice(0, int(loss_mask(batch.labels).sum()))
    with torch.no_grad():
        live: TeacherRows = teacher(batch)
        logits, rows = live.rows(tokens, vocab_size), cached(batch).rows(tokens, vocab_size)
        if isinstance(logits, TopKRows):  # of a server, of which the cache lists no more
            logits = _spread(logits, vocab_size)
        if isinstance(rows, TopKRows):
            rows = replace(rows, spread=False)  # a spread tail is far from the teacher's, and meant to be
        if isinstance(rows, SampledRows | TopKRows):
            return rows.compare("forward_kl", forward_kl, (logits / temperature).log_softmax(-1), {}).cpu()
        return forward_kl(logits, rows, temperature).cpu()


def figures(scored: list[ScoredAgain]) -> dict[str, float]:
    """Over all tokens."""
    differences = torch.cat([sequence.differences for sequence in scored])
    return {
        "verify/sequences": float(len(scored)),
        "verify/tokens": float(len(differences)),
        "verify/mean_kl": differences.mean().item(),
        "verify/worst_kl": differences.abs().max().item(),
        "verify/standard_error": (differences.std() / len(differences) ** 0.5).item(),
    }


def refuse_what_is_far(folder: Path, scored: list[ScoredAgain], limits: tuple[float, float], is_sampled: bool) -> None:
    """Look at the average, and at each sequence, of which a few hardly show in the average.

    Args:
        folder: The cache.
        scored: What was compared.
        limits: EXACT or ROUNDED.
        is_sampled: Whether a token's difference is an estimate, that says nothing alone: sequences are then looked at on average.

    Raises:
        CacheError: the live teacher is far from the cache, or from sequences in some shards, one problem for each.
    """
    differences = torch.cat([sequence.differences for sequence in scored])
    deviation, mean = differences.std().item() if is_sampled else 0.0, differences.mean().item()
    far: dict[Path, list[tuple[float, int]]] = {}
    for sequence in scored:
        tokens = max(1, len(sequence.differences))
        distance = abs(sequence.differences.sum().item() / tokens) if is_sampled else _largest(sequence.differences)
        if not distance <= limits[1] + SEQUENCE_ERRORS * deviation / tokens**0.5:
            far.setdefault(sequence.shard, []).append((distance, sequence.number))
    tolerance = limits[0] + MEAN_ERRORS * deviation / len(differences) ** 0.5
    if 2 * sum(map(len, far.values())) > len(scored) or not (far or abs(mean) <= tolerance):
        what = f"the live teacher is {mean:.3g} nats per token away from what was written (expected at most {tolerance:.2g})"
        raise CacheError(str(folder), what, "Build the cache again in another folder.")
    if far:
        remedy = "Delete this folder and build the cache again: only it is made anew."
        raise CacheError.from_problems(Problem(str(shard), _in_words(sequences), remedy) for shard, sequences in far.items())


def _largest(differences: Tensor) -> float:
    return differences.abs().max().item() if len(differences) else 0.0


def _in_words(sequences: list[tuple[float, int]]) -> str:
    distance, number = max(sequences)
    more = f" (and {len(sequences) - 1} more)" if len(sequences) > 1 else ""
    return f"the live teacher is {distance:.3g} nats away from what was written of sequence {number}{more}"


def _spread(rows: TopKRows, vocab_size: int) -> Tensor:
    """Log-probabilities of the whole vocabulary, those that are not listed alike."""
    rest = (rows.tail.clamp(min=SMALLEST_TAIL) / max(1, vocab_size - rows.ids.shape[1])).log()[:, None]
    return rest.repeat(1, vocab_size).scatter(-1, rows.ids, rows.log_probs)
