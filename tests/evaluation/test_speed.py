"""Sizes and speeds for the final table."""

from __future__ import annotations

from typing import Any

import torch

from mini_distill.evaluation.speed import MAX_ROUNDS, MIN_ROUNDS, forward_tokens_per_second, num_parameters


def test_a_tied_output_head_counts_once(tiny_llama: Any) -> None:
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=False)
    assert num_parameters(untied) - num_parameters(tied) == 64 * 32


def test_models_take_turns_on_the_same_batch(tiny_llama: Any, make_batch: Any) -> None:
    order: list[str] = []
    models = {"teacher": tiny_llama(num_hidden_layers=3), "student": tiny_llama(num_hidden_layers=1).train()}
    for name, model in models.items():
        model.model.norm.register_forward_hook(lambda *args, name=name: order.append(name))
    found = forward_tokens_per_second(models, make_batch(0, rows=8, seq=64), seconds=0.0)
    timed = order[-2 * MIN_ROUNDS :]
    assert timed == ["teacher", "student"] * MIN_ROUNDS
    assert found["teacher"] > 0 and found["student"] > 0
    assert models["student"].training


def test_measuring_speed_draws_no_random_numbers(tiny_llama: Any, make_batch: Any) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    forward_tokens_per_second({"student": tiny_llama()}, make_batch(0), seconds=0.0)
    assert torch.equal(torch.rand(3), expected)


def test_fifty_rounds_are_enough(tiny_llama: Any, make_batch: Any) -> None:
    model = tiny_llama(num_hidden_layers=1)
    rounds: list[None] = []
    model.model.norm.register_forward_hook(lambda *_: rounds.append(None))
    forward_tokens_per_second({"student": model}, make_batch(0), seconds=1e9)
    assert MAX_ROUNDS < len(rounds) < MAX_ROUNDS + 10  # a warm-up, and the head is tried out first
