"""One table of properties that every divergence passes; a new one is picked up by its name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_distill.losses import divergences
from mini_distill.losses.catalogue import divergence_parameters

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in divergence_parameters()),
    *(("jsd", {"jsd_beta": beta}) for beta in (0.0, 0.1, 0.9, 1.0)),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}{''.join(f'-{v}' for v in case[1].values())}")
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param


@pytest.fixture
def divergence(case: tuple[str, dict[str, Any]]) -> Callable[..., Tensor]:
    name, options = case
    function = getattr(divergences, name)
    return lambda student, teacher, temperature=1.0: function(student, teacher, temperature, **options)


def logits(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def log_softmax_of(row: list[float], temperature: float) -> list[float]:
    scaled = [value / temperature for value in row]
    normaliser = max(scaled) + math.log(sum(math.exp(value - max(scaled)) for value in scaled))
    return [value - normaliser for value in scaled]


def kl(log_p: list[float], log_q: list[float]) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def log_mixture(weight: float, log_p: list[float], log_q: list[float]) -> list[float]:
    """log(weight · p + (1 − weight) · q), also where both underflow."""
    rows = zip(log_p, log_q, strict=True)
    return [max(a, b) + math.log(weight * math.exp(a - max(a, b)) + (1 - weight) * math.exp(b - max(a, b))) for a, b in rows]


def reference(name: str, options: dict[str, Any], student: list[float], teacher: list[float], temperature: float) -> float:
    """The definitions for one token, in Python's float64, word by word of the vocabulary."""
    log_q, log_p = log_softmax_of(student, temperature), log_softmax_of(teacher, temperature)
    if name == "jsd":
        beta = options.get("jsd_beta", 0.5)
        if 0 < beta < 1:
            log_m = log_mixture(beta, log_p, log_q)
            return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        name = "forward_kl" if beta == 0 else "reverse_kl"
    definitions = {"forward_kl": lambda: kl(log_p, log_q), "reverse_kl": lambda: kl(log_q, log_p)}
    assert name in definitions, f"write the definition of {name} here, as a loop"
    return definitions[name]()


def reference_values(case: tuple[str, dict[str, Any]], student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    return torch.tensor([reference(*case, s, t, temperature) for s, t in rows], dtype=torch.float64)


def reference_slopes(case: tuple[str, dict[str, Any]], student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The gradient of the sum of `reference_values`, by central differences of fourth order."""
    slopes, step = torch.zeros(student.shape, dtype=torch.float64), 1e-3 * temperature
    for token, word in itertools.product(*map(range, student.shape)):
        row = student[token].tolist()

        def moved(steps: int, row: list[float] = row, token: int = token, word: int = word) -> float:
            there = [*row[:word], row[word] + steps * step, *row[word + 1 :]]
            return reference(*case, there, teacher[token].tolist(), temperature)

        slopes[token, word] = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
    return slopes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient_equal_a_reference_loop(
    case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor], temperature: float, dtype: torch.dtype
) -> None:
    """Divided by the vocabulary (trl#4105), without the teacher's entropy (torchtune), or 100 times too small (easydistill#34)."""
    student, teacher = logits(5, 7, dtype=dtype).requires_grad_(), logits(5, 7, seed=1, dtype=dtype)
    value = divergence(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.dtype == gradient.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(value.double(), reference_values(case, student, teacher, temperature), **tolerance)
    torch.testing.assert_close(gradient.double(), reference_slopes(case, student, teacher, temperature), **tolerance)


def test_gradcheck(divergence: Callable[..., Tensor]) -> None:
    teacher = logits(3, 6, seed=1)
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, 1.5), (logits(3, 6).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_exactly_when_the_distributions_are_equal(divergence: Callable[..., Tensor], dtype: torch.dtype) -> None:
    same = logits(4, 9, dtype=dtype).requires_grad_()
    value = divergence(same, same.detach() + 5, 2.0)
    value.sum().backward()
    smallest = torch.finfo(dtype).eps * 10
    assert value.abs().max() < smallest and same.grad is not None and same.grad.abs().max() < smallest
    assert divergence(same, logits(4, 9, seed=1, dtype=dtype)).min() > 1e-3


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 1.0, 10.0])
def test_never_negative(divergence: Callable[..., Tensor], noise: float) -> None:
    student, teacher = logits(200, 1000, dtype=torch.float32), logits(200, 1000, dtype=torch.float32)
    student += noise * logits(200, 1000, seed=1, dtype=torch.float32)
    assert divergence(student, teacher).min() > -1e-6  # the rounding of float32
    assert divergence(student.double(), teacher.double()).min() > 0


def test_the_gradient_near_equality_is_not_clamped_away(divergence: Callable[..., Tensor]) -> None:
    """A value that rounding makes negative, clamped to 0, loses its gradient (verl#7856)."""
    teacher = logits(50, 100, dtype=torch.float32)
    student = (teacher + 1e-4 * logits(50, 100, seed=1, dtype=torch.float32)).requires_grad_()
    exact = student.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(student, teacher).sum(), student)
    (expected,) = torch.autograd.grad(divergence(exact, teacher.double()).sum(), exact)
    assert ((gradient - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.05


def test_a_constant_added_to_the_logits_changes_nothing(divergence: Callable[..., Tensor]) -> None:
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    torch.testing.assert_close(divergence(student + 7, teacher - 3), divergence(student, teacher))


def test_no_gradient_reaches_the_teacher(divergence: Callable[..., Tensor]) -> None:
    student, teacher = logits(4, 9).requires_grad_(), logits(4, 9, seed=1).requires_grad_()
    divergence(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_in_float32(divergence: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """A log-softmax in bfloat16 made gradients 3–31 % wrong (speculators#788) and KL negative (EasyDeL#267)."""
    student, teacher = logits(4, 99, dtype=dtype).requires_grad_(), logits(4, 99, seed=1, dtype=dtype)
    wide = student.detach().float().requires_grad_()
    value, expected = divergence(student, teacher, 2.0), divergence(wide, teacher.float(), 2.0)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    value.sum().backward()
    expected.sum().backward()
    assert student.grad is not None and wide.grad is not None and torch.equal(student.grad, wide.grad.to(dtype))


def test_autocast_does_not_narrow_the_computation(divergence: Callable[..., Tensor]) -> None:
    student, teacher = logits(4, 99, dtype=torch.float32), logits(4, 99, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = divergence(student, teacher)
    assert torch.equal(value, divergence(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e4])
def test_extreme_logits_stay_right_in_value_and_finite_in_gradient(
    case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor], dtype: torch.dtype, temperature: float
) -> None:
    """Reverse KL and JSD with a finite value had a NaN gradient when probabilities underflowed (Soup#719)."""
    one_hot, other, flat, steep = [80.0, -80, -80, -80], [-80.0, 80, -80, -80], [0.0, 0, 0, 0], [1e4, 0.0, -1e4, 0]
    pairs = list(itertools.product([one_hot, other, flat, steep], repeat=2))
    student = torch.tensor([s for s, _ in pairs], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([t for _, t in pairs], dtype=dtype)
    value = divergence(student, teacher, temperature)
    value.sum().backward()
    torch.testing.assert_close(value.double(), reference_values(case, student, teacher, temperature), rtol=1e-5, atol=1e-6)
    assert student.grad is not None and student.grad.isfinite().all()


def test_the_vocabulary_is_the_last_axis_whatever_stands_before(divergence: Callable[..., Tensor]) -> None:
    """With dim=1 hard-coded, (N, C) is right and (batch, seq, vocab) wrong (torchdistill)."""
    student, teacher = logits(2, 3, 5), logits(2, 3, 5, seed=1)
    value = divergence(student, teacher)
    assert value.shape == (2, 3)
    torch.testing.assert_close(value.flatten(), divergence(student.flatten(0, 1), teacher.flatten(0, 1)))
    torch.testing.assert_close(value[1, 2], divergence(student[1, 2], teacher[1, 2]))


def test_forward_and_reverse_are_not_swapped() -> None:
    """Peers had them swapped in code or documents (ms-swift#6334). p = (½, ½), q = (0.9, 0.1)."""
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert divergences.forward_kl(student, teacher).item() == pytest.approx(forward)
    assert divergences.reverse_kl(student, teacher).item() == pytest.approx(reverse)
    assert divergences.jsd(student, teacher, jsd_beta=0.0).item() == pytest.approx(forward)
    assert divergences.jsd(student, teacher, jsd_beta=1.0).item() == pytest.approx(reverse)


def test_the_mixture_of_jsd_gives_beta_to_the_teacher() -> None:
    """A reversed mixture agrees at one half and nowhere else (trl#3043)."""
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    m = [0.1 * 0.5 + 0.9 * 0.9, 0.1 * 0.5 + 0.9 * 0.1]
    to_teacher = 0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    to_student = 0.9 * math.log(0.9 / m[0]) + 0.1 * math.log(0.1 / m[1])
    expected = 0.1 * to_teacher + 0.9 * to_student
    assert divergences.jsd(student, teacher, jsd_beta=0.1).item() == pytest.approx(expected)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_a_mixture_outside_zero_to_one_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="jsd_beta"):
        divergences.jsd(logits(2, 3), logits(2, 3, seed=1), jsd_beta=beta)


def test_with_temperature_squared_the_gradient_keeps_its_size(divergence: Callable[..., Tensor]) -> None:
    """A temperature that was accepted and never used, or used without T², changes the size (TRL's GKD, several others)."""
    sizes = []
    for temperature in (1.0, 4.0, 16.0):
        student = logits(50, 9, scale=0.05).requires_grad_()
        (temperature**2 * divergence(student, logits(50, 9, seed=1, scale=0.05), temperature)).sum().backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert max(sizes) / min(sizes) < 1.05


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_equals_that_of_trl(beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed")
    student, teacher = logits(2, 3, 7, dtype=torch.float32), logits(2, 3, 7, seed=1, dtype=torch.float32)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=2.0, reduction="sum")
    torch.testing.assert_close(divergences.jsd(student, teacher, 2.0, jsd_beta=beta).sum(), theirs)
