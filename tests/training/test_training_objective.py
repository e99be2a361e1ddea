"""The loss of a configuration, put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mini_distill.config import ObjectiveConfig, TrainerConfig
from mini_distill.training import objective as module
from mini_distill.training.objective import build_objective, warn_of_growing_gradients

OWN = {"divergence": "user_functions.twice_forward_kl"}


@pytest.mark.parametrize(
    ("settings", "student_compiled", "on_gpu", "expected"),
    [
        ({}, False, False, False),
        ({}, True, False, True),
        ({}, False, True, True),
        ({"compile": False}, True, True, False),
        ({"compile": True}, False, False, True),
        (OWN, True, True, False),
        (OWN | {"compile": True}, False, False, True),
        (OWN | {"kl_weight": 0.0}, False, True, True),
        ({"terms": {"mine": {"kind": OWN["divergence"]}}}, False, True, False),
    ],
)
def test_the_terms_are_compiled_as_told_or_where_it_pays(
    settings: dict[str, Any], student_compiled: bool, on_gpu: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nothing could turn it off, and functions of the user's own, which may do anything, were compiled too."""
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    monkeypatch.setattr(module, "_has_triton", lambda: True)
    build_objective(ObjectiveConfig(**settings), TrainerConfig(compile=student_compiled), on_gpu)
    assert bool(compiled) is expected


@pytest.mark.parametrize(
    ("settings", "growing"),
    [
        ({"divergence": "total_variation", "temperature": 4.0}, "total_variation (T=4)"),
        ({"temperature": 4.0, "terms": {"hard": {"kind": "teacher_argmax_ce"}}}, "hard (T=4)"),
        ({"divergence": "ranking_hinge", "terms": {"teacher_sample_ce": {"temperature": 0.5}}}, "teacher_sample_ce (T=0.5)"),
        ({"divergence": "total_variation", "temperature": 4.0, "scale_by_temperature_squared": False}, None),
        ({"divergence": "total_variation", "temperature": 4.0, "kl_weight": 0.0}, None),
        ({"divergence": "total_variation"}, None),
        ({"temperature": 4.0, "terms": {"jsd": {}, "hidden_mse": {}, "mine": {"kind": "user_functions.twice_forward_kl"}}}, None),
    ],
)
def test_a_gradient_that_the_factor_of_temperature_makes_grow_is_named(
    settings: dict[str, Any], growing: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_growing_gradients(ObjectiveConfig(**settings))
    lines = [record.getMessage() for record in caplog.records]
    assert [f"with T² the gradient of {growing} grows as T" in line for line in lines] == ([True] if growing else [])
