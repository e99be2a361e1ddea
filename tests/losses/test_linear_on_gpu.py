"""The objective from hidden states on a GPU: on one where there is one, and with its rounding emulated on a CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_gpu import emulated_gpu
from fused_cases import EXACT, Case, Found, assert_near, case, distance, found, objective_of, plain, rows_mib
from runs import rows, run

from mini_distill.losses import divergences
from mini_distill.losses.objective import DivergenceTerm, Objective

BF16 = torch.bfloat16
WAYS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (BF16, None),
    "autocast": (torch.float32, BF16),
}
"""What student and head are stored in, and what autocast rounds factors to."""

TOLERANCE = {"float32": 5e-5, "bfloat16": 6e-3, "autocast": 4e-3}
"""Of the gradients of a few tokens: in bfloat16 those of the logits are rounded, and those that are handed out again."""


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def on_gpu(device: str, given: Case, objective: Objective, autocast: torch.dtype | None = None) -> Found:
    """What `fused` gives there."""
    if device == "cuda":
        given = given.to("cuda")
        with torch.autocast("cuda", autocast or BF16, enabled=autocast is not None):
            result = objective.fused(given.hidden, given.head, given.teacher, given.targets)
    else:
        with emulated_gpu(autocast):
            result = objective.fused(given.hidden, given.head, given.teacher, given.targets)
    there = found(given, result, 1.0)
    terms, gradients = ({name: value.cpu() for name, value in values.items()} for values in (there.terms, there.gradients))
    return Found(there.loss.cpu(), terms, gradients)


def numbers_of_bfloat16(dtype: torch.dtype, **settings: Any) -> Case:
    """Stored in another dtype, so that autocast rounds nothing that float64 has."""
    return case(dtype=BF16, **settings).to(dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EXACT)
def test_value_and_gradient_are_those_of_whole_logits(name: str, way: str, device: str) -> None:
    dtype, autocast = WAYS[way]
    given = numbers_of_bfloat16(dtype, tokens=23, bias=True)
    there = on_gpu(device, given, objective_of(name, memory_mib=rows_mib(5)), autocast)
    assert_near(there, plain(given, objective_of(name)), TOLERANCE[way])
    assert {gradient.dtype for gradient in there.gradients.values()} == {dtype} and there.loss.dtype == torch.float32


@pytest.mark.parametrize(("way", "bound"), [("bfloat16", 2.5e-3), ("autocast", 2e-3)])
@pytest.mark.parametrize("std", [2.0, 8.0])
def test_the_error_of_the_gradient_is_that_of_its_roundings(std: float, way: str, bound: float, device: str) -> None:
    """Once for the tensor cores, and again where weights in bfloat16 get theirs in bfloat16; one rounding is 0.17 %."""
    dtype, autocast = WAYS[way]
    given = numbers_of_bfloat16(dtype, tokens=192, vocab=4096, hidden=64, teacher_hidden=48, std=std)
    objective = objective_of(temperature=1.0, kl_weight=1.0, ce_weight=0.0)
    errors = {
        name: distance(gradient, plain(given, objective).gradients[name])
        for name, gradient in on_gpu(device, given, objective, autocast).gradients.items()
    }
    assert 2e-4 < max(errors.values()) < bound, errors


def test_a_teacher_in_bfloat16_beside_a_student_in_float32(device: str) -> None:
    given = case(tokens=23, dtype=torch.float32, teacher_dtype=BF16, bias=True)
    assert_near(on_gpu(device, given, objective_of(memory_mib=rows_mib(5))), plain(given, objective_of()), TOLERANCE["float32"])


@pytest.mark.parametrize("way", WAYS)
def test_no_token_at_all_is_zero(way: str, device: str) -> None:
    dtype, autocast = WAYS[way]
    there = on_gpu(device, numbers_of_bfloat16(dtype, tokens=0, bias=True), objective_of(), autocast)
    assert there.loss.item() == 0 and not any(gradient.any() for gradient in there.gradients.values())


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("way", WAYS)
def test_compiled_terms_are_the_same(way: str) -> None:
    dtype, autocast = WAYS[way]
    further = [DivergenceTerm(name, getattr(divergences, name), 0.3, 2.0) for name in EXACT if name != "forward_kl"]
    given, settings = numbers_of_bfloat16(dtype, tokens=300, vocab=512, bias=True), {"further": further, "memory_mib": rows_mib(130, 512)}
    there = on_gpu("cuda", given, objective_of(compile=True, **settings), autocast)
    assert_near(there, plain(given, objective_of(**settings)), TOLERANCE[way])


@pytest.mark.gpu
def test_a_run_in_bfloat16_goes_the_way_of_one_in_float32(tiny_command: list[str], tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        run(tiny_command, tmp_path / precision, f"trainer.precision={precision}")
    narrow, wide = ([row["train/loss"] for row in rows(tmp_path / name) if "train/loss" in row] for name in ("bf16", "fp32"))
    assert len(narrow) == 6 and narrow == pytest.approx(wide, rel=0.02)
