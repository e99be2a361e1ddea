"""Which sequence comes when: shuffled epochs without a seam."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Draws(Protocol):
    """Which sequence is the k-th of an endless stream."""

    def __call__(self, k: int) -> int: ...


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
