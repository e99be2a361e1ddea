"""Every sequence once per epoch, in an order that depends on the seed alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mini_distill.data.loader import TrainingBatches
from mini_distill.data.order import ShuffledEpochs


class Numbers:
    """Sequences of which only the number matters."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def order(self, seed: int) -> ShuffledEpochs:
        return ShuffledEpochs(self.num, seed)


def stream(num: int, world: int, micro: int, accumulation: int, steps: int, seed: int = 3) -> list[int]:
    """What all processes together draw, in the order of the micro-steps."""
    settings: dict[str, Any] = {"seed": seed, "micro_batch_size": micro, "grad_accum_steps": accumulation, "world_size": world}
    ranks = [TrainingBatches(Numbers(num), rank=rank, **settings) for rank in range(world)]  # type: ignore[arg-type]
    where = itertools.product(range(1, steps + 1), range(accumulation), ranks)
    return [index for step, micro_step, rank in where for index in rank.indices(step, micro_step)]


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 1, 1), (1, 4, 2), (2, 3, 1), (3, 2, 4), (4, 1, 5)])
@pytest.mark.parametrize("num", [1, 3, 24, 37])
def test_every_sequence_comes_once_per_epoch_whatever_the_cut(num: int, world: int, micro: int, accumulation: int) -> None:
    steps = -(-3 * num // (world * micro * accumulation))
    drawn = stream(num, world, micro, accumulation, steps)
    for epoch in range(3):
        assert sorted(drawn[epoch * num : (epoch + 1) * num]) == list(range(num))


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 12, 1), (2, 3, 2), (3, 4, 1), (4, 1, 3), (12, 1, 1)])
def test_the_order_is_the_same_for_every_cut_of_the_same_batch(world: int, micro: int, accumulation: int) -> None:
    assert stream(37, world, micro, accumulation, steps=8) == stream(37, 1, 1, 12, steps=8)


def test_epochs_and_seeds_have_different_orders() -> None:
    drawn = stream(40, 1, 40, 1, steps=2)
    assert drawn[:40] != drawn[40:]
    assert drawn != stream(40, 1, 40, 1, steps=2, seed=4)


def test_any_draw_is_known_without_the_ones_before() -> None:
    whole = [ShuffledEpochs(7, 5)(k) for k in range(50)]
    backwards = ShuffledEpochs(7, 5)
    assert [backwards(k) for k in reversed(range(50))] == whole[::-1]
