"""Hidden states against references written as loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_distill.losses.catalogue import matching_parameters
from mini_distill.losses.hidden import hidden_cosine, hidden_mse

Matching = Callable[[Tensor, Tensor], Tensor]
CASES: dict[str, Matching] = {"mse": hidden_mse, "mse-normalise": partial(hidden_mse, normalise=True), "cosine": hidden_cosine}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def states(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def standardised(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / len(row)
    return [(x - mean) / math.sqrt(variance + 1e-6) for x in row]


def reference(case: str, student: list[float], teacher: list[float]) -> float:
    """The definitions for one token."""
    if case == "cosine":
        dot = sum(s * t for s, t in zip(student, teacher, strict=True))
        return 1 - dot / math.sqrt(sum(s * s for s in student) * sum(t * t for t in teacher))
    if case == "mse-normalise":
        student, teacher = standardised(student), standardised(teacher)
    return sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student)


def reference_slope(case: str, student: list[float], teacher: list[float], channel: int, step: float = 1e-3) -> float:
    """By central differences of fourth order."""

    def moved(steps: int) -> float:
        return reference(case, [x + steps * step * (i == channel) for i, x in enumerate(student)], teacher)

    return (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_equal_a_reference_loop(case: str, dtype: torch.dtype) -> None:
    student, teacher = states(5, 7, dtype=dtype).requires_grad_(), states(5, 7, seed=1, dtype=dtype)
    value = CASES[case](student, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))
    expected = torch.tensor([reference(case, s, t) for s, t in rows], dtype=torch.float64)
    slopes = torch.tensor([[reference_slope(case, s, t, i) for i in range(7)] for s, t in rows], dtype=torch.float64)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}
    assert value.dtype == gradient.dtype == dtype and value.shape == (5,)
    torch.testing.assert_close(value.double(), expected, **tolerance)
    torch.testing.assert_close(gradient.double(), slopes, **tolerance)


def test_gradcheck(case: str) -> None:
    teacher = states(3, 6, seed=1)
    assert torch.autograd.gradcheck(lambda s: CASES[case](s, teacher), (states(3, 6).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_zero_at_equality_and_positive_elsewhere(case: str, dtype: torch.dtype) -> None:
    same = states(4, 9, dtype=dtype).requires_grad_()
    value = CASES[case](same, same.detach())
    value.sum().backward()
    assert torch.equal(value, torch.zeros(4)) and same.grad is not None and same.grad.abs().max() < 1e-6
    assert CASES[case](same, states(4, 9, seed=1, dtype=dtype)).min() > 1e-3


@pytest.mark.parametrize("noise", [1e-5, 1e-3, 1.0])
def test_never_negative_and_exact_where_the_two_are_nearly_equal(case: str, noise: float) -> None:
    """1 − cosine rounds to a multiple of 1e-7, below zero too."""
    teacher = states(100, 64, dtype=torch.float32)
    student = teacher + noise * states(100, 64, seed=1, dtype=torch.float32)
    value, exact = CASES[case](student, teacher), CASES[case](student.double(), teacher.double())
    assert value.min() >= 0
    assert ((value - exact).abs() / exact).max() < 0.05


def test_no_gradient_reaches_the_teacher(case: str) -> None:
    student, teacher = states(4, 9).requires_grad_(), states(4, 9, seed=1).requires_grad_()
    CASES[case](student, teacher).sum().backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_states_are_computed_in_float32(case: str, dtype: torch.dtype) -> None:
    student, teacher = states(4, 99, dtype=dtype).requires_grad_(), states(4, 99, seed=1, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = CASES[case](student, teacher)
    assert value.dtype == torch.float32 and torch.equal(value, CASES[case](student.float(), teacher.float()))
    value.sum().backward()
    assert student.grad is not None and student.grad.dtype == dtype and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_finite_in_value_and_gradient(case: str, dtype: torch.dtype) -> None:
    zero, other = torch.zeros(6), states(6)
    student = torch.stack([zero, zero, other]).to(dtype).requires_grad_()
    value = CASES[case](student, torch.stack([zero, other, zero]).to(dtype))
    value.sum().backward()
    assert value.isfinite().all() and student.grad is not None
    assert student.grad.isfinite().all() and student.grad.abs().max() < 2e3  # not 1e8, which would be one step's whole gradient
    if case == "cosine":
        assert value.tolist() == pytest.approx([1, 1, 1])


def test_the_huge_channels_of_trained_models_stay_finite(case: str) -> None:
    student, teacher = states(4, 64, dtype=torch.bfloat16), states(4, 64, seed=1, dtype=torch.bfloat16)
    student[:, 3], teacher[:, 3] = 2000.0, 3000.0
    student.requires_grad_()
    value = CASES[case](student, teacher)
    value.sum().backward()
    assert value.isfinite().all() and student.grad is not None and student.grad.isfinite().all()
    assert case == "mse" or value.max() < 4


def test_normalised_is_blind_to_scale_and_shift_and_cosine_to_scale() -> None:
    student, teacher = states(4, 64), states(4, 64, seed=1)
    normalised = hidden_mse(3 * student + 5, teacher, normalise=True)
    torch.testing.assert_close(normalised, hidden_mse(student, teacher, normalise=True), rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden_cosine(3 * student, teacher), hidden_cosine(student, teacher))


def test_channels_are_the_last_axis_whatever_stands_before(case: str) -> None:
    student, teacher = states(2, 3, 5), states(2, 3, 5, seed=1)
    value = CASES[case](student, teacher)
    assert value.shape == (2, 3)
    torch.testing.assert_close(value.flatten(), CASES[case](student.flatten(0, 1), teacher.flatten(0, 1)))


def test_no_token_at_all_is_a_sum_of_zero_with_a_graph(case: str) -> None:
    student = states(0, 5).requires_grad_()
    total = CASES[case](student, states(0, 5)).sum()
    total.backward()
    assert total.item() == 0 and student.grad is not None


@pytest.mark.parametrize("shape", [(4, 8), (1, 6), (6,)])
def test_other_shapes_are_refused_not_broadcast(case: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="project"):
        CASES[case](states(4, 6), states(*shape))


def test_the_catalogue_offers_these_with_their_options() -> None:
    offered = matching_parameters()
    assert offered["hidden_mse"] == ("normalise",) and offered["hidden_cosine"] == ()
    assert set(offered) == {"hidden_mse", "hidden_cosine", "relation_kl", "attention_mse", "attention_kl"}
