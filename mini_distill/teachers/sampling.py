"""A teacher's distribution as a few weighted tokens whose expectation is the whole of it.

Axes: n tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LEVELS = 256


@dataclass
class Entries:
    """Some tokens of the vocabulary for each of n positions, in two streams.

    Attributes:
        head_counts: `(n,)` int64: entries with a weight of their own.
        head_ids: `(sum of head_counts,)` int64, position after position.
        head_weights: `(sum of head_counts,)` float32.
        tail_counts: `(n,)` int64: entries that share what the head leaves of the mass, in equal parts.
        tail_ids: `(sum of tail_counts,)` int64.
    """

    head_counts: Tensor
    head_ids: Tensor
    head_weights: Tensor
    tail_counts: Tensor
    tail_ids: Tensor

    def token_by_token(self) -> tuple[Tensor, Tensor]:
        """`(n, 2)` counts of heads and tails; and the token numbers of each position, those of its head first."""
        position = torch.arange(len(self.head_counts), device=self.head_ids.device)
        of_each = torch.cat([position.repeat_interleave(counts) for counts in (self.head_counts, self.tail_counts)])
        order = of_each.argsort(stable=True)
        return torch.stack([self.head_counts, self.tail_counts], -1), torch.cat([self.head_ids, self.tail_ids])[order]


def threshold_sample(probs: Tensor, k: int, generator: torch.Generator) -> Entries:
    """Every token of probability 1/k or more exactly, and a few of the others that stand for all of them. At most k + 1 entries.

    The tail is sampled systematically: m = ⌈k · tail mass⌉ equidistant points on its cumulative sum, with one random shift, so that a
    token is drawn with its share of the tail, and every draw weighs tail mass / m. So the weights of a position sum to 1 exactly,
    their expectation is p, and the error is that of the tail alone. Among unbiased choices of as many tokens, keeping what is
    above a threshold and drawing from the rest has the least variance (Barnes et al. 2024, "Efficient unbiased sparsification",
    arXiv 2402.14925); independent draws waste most of theirs on the few likely tokens.

    Args:
        probs: `(n, V)`, rows that sum to 1.
        k: One over the threshold.
        generator: Decides the shifts.
    """
    head = probs >= 1 / k
    places = head.nonzero()  # (entries, 2): position, token
    counts = torch.bincount(places[:, 0], minlength=len(probs))
    tail = _Cumulative(probs.masked_fill(head, 0.0))
    tail_counts = torch.ceil(tail.total * k * (1 - 1e-6) - 1e-9).long().clamp(max=k)  # the sum of float32 may be a little too much
    shift = torch.rand(len(probs), generator=generator, dtype=torch.float64).to(probs.device)
    points, wanted = _equidistant(shift, tail_counts)
    return Entries(counts, places[:, 1], probs[places[:, 0], places[:, 1]].float(), tail_counts, tail.find(points, wanted))


class _Cumulative:
    """The cumulative sum of each row, found in two steps: over blocks of columns, then within one block.

    So that nearly all of a row is only added up, which is several times quicker than a cumulative sum of all of it.

    Args:
        values: `(n, V)`, not negative.
    """

    def __init__(self, values: Tensor) -> None:
        self.size = min(64, 2 ** (values.shape[-1].bit_length() // 2))  # of a block; nearly √V where V is small
        padding = -values.shape[-1] % self.size
        self.blocks = (pad(values, (0, padding)) if padding else values).unflatten(-1, (-1, self.size))  # (n, blocks, size)
        self.of_blocks = self.blocks.sum(-1).double()
        self.up_to = self.of_blocks.cumsum(-1)

    @property
    def total(self) -> Tensor:
        """`(n,)` float64."""
        return self.up_to[:, -1]

    def find(self, points: Tensor, wanted: Tensor) -> Tensor:
        """For some points of each row, as shares of its total, the columns in which the cumulative sum passes them, row by row.

        Args:
            points: `(n, most)` in [0, 1).
            wanted: `(n, most)` bool: those that are asked for. Their rows have a total above 0.
        """
        points = points * self.total[:, None]
        block = torch.searchsorted(self.up_to, points, right=True)[wanted]  # (m,)
        row = wanted.nonzero()[:, 0]
        mass = self.of_blocks[row, block]
        share = (points[wanted] - (self.up_to[row, block] - mass)) / mass
        inside = self.blocks[row, block].cumsum(-1, dtype=torch.float64)  # (m, size)
        left = share.clamp(0, 1 - 1e-12) * inside[:, -1]  # of a block that float32 has added up, and float64 here
        first = torch.searchsorted(inside, left[:, None], right=True)[:, 0]  # that passes: never an impossible one
        return block * self.size + first


def _equidistant(shift: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`counts` equidistant points in [0, 1) for each row, and which places of the result hold one."""
    index = torch.arange(max(1, int(counts.max().item()) if len(counts) else 1), device=counts.device)
    points = (shift[:, None] + index) / counts.clamp(min=1)[:, None]
    wanted = index < counts[:, None]
    return points.clamp(max=1 - 1e-12), wanted


def draw(probs: Tensor, num_draws: int, proposal: float, generator: torch.Generator) -> Entries:
    """`num_draws` independent draws with replacement from p^proposal, as in sparse logit sampling (arXiv 2503.16870).

    An entry weighs count / draws · p / proposal's probability, so that the expectation is p; the weights of a position sum to 1 only
    for proposal 1.
    """
    wide = probs.double()
    tempered = wide if proposal == 1 else (wide**proposal) / (wide**proposal).sum(-1, keepdim=True)
    uniform = torch.rand(len(probs), num_draws, generator=generator, dtype=torch.float64).to(probs.device)
    cumulative = tempered.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=probs.shape[-1] - 1)
    drawn = drawn.sort(-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    run = first.flatten().cumsum(0) - 1
    ids = drawn[first]
    counts = torch.bincount(run, minlength=len(ids)).double()
    token = torch.arange(len(probs), device=probs.device)[:, None].expand_as(drawn)[first]
    weights = counts / num_draws * (wide[token, ids] / tempered[token, ids])
    nothing = torch.zeros(len(probs), dtype=torch.int64, device=probs.device)
    return Entries(first.sum(-1), ids, weights.float(), nothing, nothing[:0])


# ------------------------------------------------------------------------------------------------------ weights in one byte each


def level_table(smallest: float, largest: float = 1.0) -> Tensor:
    """`(256,)` float64: weights from `smallest` to `largest` in equal ratios."""
    return smallest * (largest / smallest) ** torch.linspace(0, 1, LEVELS, dtype=torch.float64)


def to_levels(weights: Tensor, table: Tensor, generator: torch.Generator) -> Tensor:
    """Each weight as one of the two nearest levels, at random so that its expectation stays: uint8.

    Weights outside the table become its first or last level.
    """
    weights = weights.double().clamp(table[0].item(), table[-1].item())
    upper = torch.searchsorted(table, weights).clamp(1, LEVELS - 1)
    low, high = table[upper - 1], table[upper]
    uniform = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
    return torch.where(uniform < (weights - low) / (high - low), upper, upper - 1).to(torch.uint8)


def entropy(probs: Tensor) -> Tensor:
    """−Σ p log p in nats, `(n,)`."""
    return torch.special.entr(probs.double()).sum(-1)
