"""The same figures for parts of the held-out text: by position, by the teacher's certainty, by a column of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .language_model import Sums, add, metrics, totals

ENTROPY_EDGES = (0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
SMALLEST_CONTEXT = 8


class Slices:
    """Sums over tokens, by label.

    Args:
        labels: The parts, in the order in which they are shown; more may be added while summing.
    """

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels = list(labels)
        self.sums: dict[int, Sums] = {}

    def number(self, label: str) -> int:
        """The number of a part, which is new if need be."""
        if label not in self.labels:
            self.labels.append(label)
        return self.labels.index(label)

    def add(self, numbers: Tensor, values: dict[str, Tensor]) -> None:
        """Add tokens.

        Args:
            numbers: `(tokens,)` int64, which part each token belongs to.
            values: What `per_token` gives, and `num_bytes`.
        """
        for number in numbers.unique().tolist():
            part = {name: value[numbers == number] for name, value in values.items()}
            sums = totals(part, part["num_bytes"])
            self.sums[number] = add(self.sums[number], sums) if number in self.sums else sums

    def rows(self) -> list[dict[str, str | float]]:
        """The metrics of each part that has tokens, with its `label`."""
        return [{"label": self.labels[number], **metrics(self.sums[number])} for number in sorted(self.sums)]


class PositionSlices(Slices):
    """By the number of tokens that stand before the predicted one, in powers of two."""

    def add_positions(self, context: Tensor, values: dict[str, Tensor]) -> None:
        """`context`: `(tokens,)` int64, at least 1."""
        numbers = torch.log2(context.double() / SMALLEST_CONTEXT).floor().long().clamp(min=-1) + 1
        while len(self.labels) <= int(numbers.max()):
            low = SMALLEST_CONTEXT * 2 ** (len(self.labels) - 1)
            self.labels.append(f"{low}–{2 * low - 1}" if self.labels else f"1–{SMALLEST_CONTEXT - 1}")
        self.add(numbers, values)


class EntropySlices(Slices):
    """By the entropy of the teacher's distribution, in nats."""

    def __init__(self) -> None:
        edges = [f"{edge:g}" for edge in ENTROPY_EDGES]
        between = [f"{low}–{high}" for low, high in pairwise(edges)]
        super().__init__([f"below {edges[0]}", *between, f"{edges[-1]} and more"])

    def add_entropies(self, entropy: Tensor, values: dict[str, Tensor]) -> None:
        """`entropy`: `(tokens,)`."""
        self.add(torch.bucketize(entropy, torch.tensor(ENTROPY_EDGES, dtype=entropy.dtype, device=entropy.device), right=True), values)
