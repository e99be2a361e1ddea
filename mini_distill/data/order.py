"""Which sequence comes when: shuffled epochs without a seam."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .batch import Batch


class Draws(Protocol):
    """Which sequence is the k-th of an endless stream."""

    def __call__(self, k: int) -> int: ...


class Stream(Protocol):
    """Sequences that can be drawn for ever: `Sequences`, or a `Mixture` of several."""

    @property
    def num_supervised(self) -> int:
        """Tokens to be predicted."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch:
        """One sequence; its fields have shape `(seq,)`."""
        ...

    def batch(self, indices: list[int]) -> Batch:
        """The sequences with these numbers, in this order: fields of shape `(len(indices), seq_len)`."""
        ...

    def origins(self, index: int) -> list[str]:
        """Where the documents of a sequence stand in their source."""
        ...

    def beginnings(self, count: int, length: int) -> list[list[int]]:
        """The first `length` tokens of up to `count` documents that are longer."""
        ...

    def fullest(self, count: int) -> list[tuple[int, int]]:
        """The sequences with the most tokens to predict, with their number, the fullest first: (tokens, index)."""
        ...

    def order(self, seed: int) -> Draws:
        """Which sequence is the k-th of training."""
        ...


class ShuffledEpochs:
    """The k-th draw from `num` sequences that run in epochs, each a permutation drawn from (seed, epoch).

    The stream runs across the end of an epoch without dropping or repeating a sequence.
    """

    def __init__(self, num: int, seed: int) -> None:
        self.num, self.seed = num, seed
        self._permutations: dict[int, np.ndarray] = {}

    def __call__(self, k: int) -> int:
        epoch, position = divmod(k, self.num)
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}  # a step may span two epochs
            self._permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.num)
        return int(self._permutations[epoch][position])
