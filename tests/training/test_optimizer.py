"""Learning rates at points computed by hand, and which weights are decayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from mini_distill.config import TrainerConfig
from mini_distill.training.optimizer import build_optimizer, learning_rate, set_learning_rate

Build = Callable[..., LlamaForCausalLM]
FALLING = ("cosine", "linear", "wsd")


def trainer(schedule: str = "cosine", **settings: float) -> TrainerConfig:
    """110 steps of which 10 warm up; peak 2, end 0.5."""
    return TrainerConfig(
        **{"schedule": schedule, "max_steps": 110, "warmup_steps": 10, "learning_rate": 2.0, "min_lr_ratio": 0.25, **settings}
    )


# ------------------------------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize("schedule", [*FALLING, "constant"])
@pytest.mark.parametrize(("step", "expected"), [(1, 0.2), (5, 1.0), (9, 1.8), (10, 2.0)])
def test_warm_up_rises_linearly_from_zero(schedule: str, step: int, expected: float) -> None:
    assert learning_rate(step, trainer(schedule)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 35, 0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way: cos(π/4)
        ("cosine", 60, 0.5 + 1.5 / 2),
        ("cosine", 85, 0.5 + 1.5 * (1 - math.sqrt(0.5)) / 2),
        ("cosine", 110, 0.5),
        ("linear", 35, 1.625),
        ("linear", 60, 1.25),
        ("linear", 110, 0.5),
        ("wsd", 11, 2.0),
        ("wsd", 88, 2.0),  # the last fifth of 110 steps: 22
        ("wsd", 99, 1.25),
        ("wsd", 110, 0.5),
        ("constant", 11, 2.0),
        ("constant", 110, 2.0),
    ],
)
def test_after_the_warm_up(schedule: str, step: int, expected: float) -> None:
    assert learning_rate(step, trainer(schedule)) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", FALLING)
def test_it_never_rises_after_the_warm_up_and_ends_at_the_floor(schedule: str) -> None:
    for settings in ({}, {"warmup_steps": 0}, {"max_steps": 11}, {"decay_fraction": 1.0}, {"decay_fraction": 0.01}):
        config = trainer(schedule, **settings)
        rates = [learning_rate(step, config) for step in range(max(1, config.warmup_steps), config.max_steps + 1)]
        assert all(later <= earlier for earlier, later in pairwise(rates)), settings
        assert rates[-1] == pytest.approx(0.5), settings


def test_wsd_decays_after_the_warm_up_also_when_that_is_long() -> None:
    assert [learning_rate(step, trainer("wsd", warmup_steps=100)) for step in (100, 105, 110)] == pytest.approx([2.0, 1.25, 0.5])


def test_no_step_is_wasted_at_zero() -> None:
    """A schedule counted from 0 makes the first step with learning rate 0."""
    for schedule in (*FALLING, "constant"):
        for warmup in (0, 1, 10):
            config = trainer(schedule, warmup_steps=warmup, min_lr_ratio=0.0)
            assert all(learning_rate(step, config) > 0 for step in range(1, 110)), (schedule, warmup)
    assert learning_rate(110, trainer(min_lr_ratio=0.0)) == pytest.approx(0.0)


def test_a_run_of_one_step_has_a_learning_rate() -> None:
    for schedule in (*FALLING, "constant"):
        assert 0.5 <= learning_rate(1, trainer(schedule, max_steps=1, warmup_steps=0)) <= 2.0


def test_steps_beyond_the_last_stay_at_the_floor() -> None:
    for schedule in FALLING:
        assert learning_rate(500, trainer(schedule)) == pytest.approx(0.5)


def test_every_group_gets_the_learning_rate(tiny_llama: Build) -> None:
    optimizer = build_optimizer(tiny_llama(), trainer())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


# ----------------------------------------------------------------------------------------------------------------- optimizer


def decay_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Parameter name -> its weight decay; a parameter in two groups fails."""
    by_id = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(by_id) == len(dict(by_id))
    return {name: dict(by_id)[id(p)] for name, p in model.named_parameters() if id(p) in dict(by_id)}


def test_matrices_are_decayed_and_norms_are_not(tiny_llama: Build) -> None:
    model = tiny_llama()
    decay = decay_of(model, build_optimizer(model, trainer(weight_decay=0.3)))
    assert set(decay) == {name for name, _ in model.named_parameters()}
    assert {name for name, value in decay.items() if value == 0.0} == {name for name in decay if "norm" in name}
    assert set(decay.values()) == {0.0, 0.3}


def test_biases_are_not_decayed() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2))
    decay = decay_of(model, build_optimizer(model, trainer()))
    assert {name for name, value in decay.items() if value == 0.0} == {n for n in decay if n.endswith(".bias") or ".ln_" in n}


def test_tied_weights_are_updated_once(tiny_llama: Build) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    parameters = [p for group in build_optimizer(model, trainer()).param_groups for p in group["params"]]
    assert sum(p is model.lm_head.weight for p in parameters) == 1
    assert len(parameters) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out(tiny_llama: Build) -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    decay = decay_of(model, build_optimizer(model, trainer()))
    assert not [name for name in decay if "embed_tokens" in name] and len(decay) == len(list(model.parameters())) - 1


def test_it_is_adamw_with_the_settings_of_the_trainer() -> None:
    """One step by hand: decay first, then the bias-corrected update, which at the first step is the sign of the gradient."""
    layer = nn.Linear(2, 1)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    config = trainer(learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.7)
    optimizer = build_optimizer(layer, config)
    assert isinstance(optimizer, torch.optim.AdamW) and all(group["betas"] == (0.8, 0.7) for group in optimizer.param_groups)
    layer(torch.tensor([[1.0, -3.0]])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), weight * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(layer.bias.detach(), bias - 0.1)


def test_a_model_of_matrices_alone_needs_no_second_group() -> None:
    assert len(build_optimizer(nn.Linear(2, 2, bias=False), trainer()).param_groups) == 1
