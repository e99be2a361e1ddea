"""Several sources in one stream of sequences, in given shares."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from .batch import Batch
from .order import Draws, Stream

GOLDEN_RATIO = (5**0.5 - 1) / 2


class Mixture:
    """Parts with weights: the weight is the share of the sequences that are drawn from the part.

    Every part runs through its own epochs, so a small part with a large weight is repeated more often than the others.

    Args:
        parts: Sequences by name; all have the same length.
        weights: Share of each part, not necessarily summing to 1.
    """

    def __init__(self, parts: Mapping[str, Stream], weights: Mapping[str, float]) -> None:
        self.names, self.parts = list(parts), list[Stream](parts.values())
        shares = np.array([weights[name] for name in parts], dtype=np.float64)
        self.shares = shares / shares.sum()
        self.first = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])]).tolist()  # numbers stay unique
        self.num_supervised = sum(part.num_supervised for part in self.parts)

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, index: int) -> Batch:
        """One sequence; its fields have shape `(seq,)`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.batch([index]).row(0)

    def beginnings(self, count: int, length: int) -> list[list[int]]:
        """The first `length` tokens of up to `count` documents, from the parts in turn."""
        of_parts = [part.beginnings(count, length) for part in self.parts]
        in_turn = [beginning for round_ in zip_longest(*of_parts) for beginning in round_ if beginning is not None]
        return in_turn[:count]

    def fullest(self, count: int) -> list[tuple[int, int]]:
        """The sequences with the most tokens to predict, of all parts: (tokens, index)."""
        found = [(tokens, first + i) for first, part in zip(self.first, self.parts, strict=False) for tokens, i in part.fullest(count)]
        return sorted(found, reverse=True)[:count]

    def order(self, seed: int) -> Draws:
        """The k-th draw, with the shares kept at every moment."""
        return _MixedDraws(self, seed)

    def batch(self, indices: list[int]) -> Batch:
        """The sequences with these numbers, in this order."""
        rows = []
        for index in indices:
            part, number = self._locate(index)
            row = part.batch([number])
            row.row_ids.fill_(index)
            rows.append(row)
        return Batch.concatenate(rows)

    def origins(self, index: int) -> list[str]:
        """Where the documents of a sequence stand in their source."""
        part, number = self._locate(index)
        return part.origins(number)

    def part_of(self, index: int) -> str:
        """The name of the part that a sequence belongs to."""
        return self.names[bisect_right(self.first, index) - 1]

    def _locate(self, index: int) -> tuple[Stream, int]:
        part = bisect_right(self.first, index) - 1
        return self.parts[part], index - self.first[part]


@dataclass
class _MixedDraws:
    """The k-th draw of a mixture: a golden-ratio sequence picks the part, so that shares hold over any stretch.

    The additive recurrence k · φ mod 1 is a low-discrepancy sequence: after n draws each part's count differs from its share
    by O(log n), and the k-th draw is known without the ones before.
    """

    mixture: Mixture
    seed: int

    def __post_init__(self) -> None:
        self._bounds = np.cumsum(self.mixture.shares)[:-1]
        self._of_part = [part.order(self.seed) for part in self.mixture.parts]
        self._at, self._drawn = 0, np.zeros(len(self.mixture.parts), dtype=np.int64)

    def __call__(self, k: int) -> int:
        if k < self._at:
            self._at, self._drawn = 0, np.zeros_like(self._drawn)
        while self._at < k:  # count what each part gave before draw k
            stop = min(k, self._at + 2**20)
            self._drawn += np.bincount(self._part(np.arange(self._at, stop)), minlength=len(self._drawn))
            self._at = stop
        part = int(self._part(np.array([k]))[0])
        return int(self.mixture.first[part]) + self._of_part[part](int(self._drawn[part]))

    def _part(self, k: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._bounds, (k + 0.5) * GOLDEN_RATIO % 1.0, side="right")
