from __future__ import annotations

import json
import random

import numpy as np
import torch

from mini_distill.training.randomness import rng_state, seed_everything, seed_step, set_rng_state


def draw() -> list[float]:
    """Numbers of every generator, with a Gaussian each: Python's and NumPy's keep a second one for the next call."""
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), *torch.randn(3).tolist()]


def test_a_state_that_went_through_json_goes_on_with_the_same_numbers() -> None:
    seed_everything(3)
    draw()
    state = json.loads(json.dumps(rng_state()))
    expected = [draw() for _ in range(3)]
    seed_everything(4)
    set_rng_state(state)
    assert [draw() for _ in range(3)] == expected


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    numbers = []
    for seed in (0, 0, 1, 2**32 - 1):
        seed_everything(seed)
        numbers.append(draw())
    assert numbers[0] == numbers[1]
    assert all(a != b for a, b in zip(numbers[1], numbers[2], strict=True)) and numbers[3] != numbers[2]


def test_ranks_seeds_and_steps_never_share_numbers() -> None:
    """With seed + rank as the seed, rank 1 of seed 0 drew the dropout masks of rank 0 of seed 1."""
    drawn = set()
    for seed in range(3):
        for rank in range(3):
            seed_everything(seed, rank)
            drawn.add(tuple(draw()))
            for step in range(3):
                seed_step(seed, step, rank)
                drawn.add(tuple(draw()))
    assert len(drawn) == 3 * 3 * 4


def test_the_numbers_of_a_step_do_not_depend_on_what_came_before() -> None:
    seed_step(7, 41)
    draw()
    seed_step(7, 42)
    expected = draw()
    seed_everything(99)
    seed_step(7, 42)
    assert draw() == expected
