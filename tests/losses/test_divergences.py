"""One table of properties that every divergence passes; a new one is picked up by its name."""

from __future__ import annotations

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


def softmax_of(row: list[float], temperature: float) -> list[float]:
    top = max(row)
    exps = [math.exp((value - top) / temperature) for value in row]
    return [e / sum(exps) for e in exps]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def reference(name: str, options: dict[str, Any], student: list[float], teacher: list[float], temperature: float) -> float:
    """The definitions, token by token and word by word."""
    q, p = softmax_of(student, temperature), softmax_of(teacher, temperature)
    if name == "jsd":
        beta = options.get("jsd_beta", 0.5)
        if 0 < beta < 1:
            m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        name = "forward_kl" if beta == 0 else "reverse_kl"
    return {"forward_kl": lambda: kl(p, q), "reverse_kl": lambda: kl(q, p)}[name]()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_values_equal_a_reference_loop(case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor], temperature: float) -> None:
    student, teacher = logits(5, 7), logits(5, 7, seed=1)
    expected = [reference(*case, s, t, temperature) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    torch.testing.assert_close(divergence(student, teacher, temperature), torch.tensor(expected, dtype=torch.float64))


def test_gradients_equal_the_finite_differences_of_the_reference_loop(
    case: tuple[str, dict[str, Any]], divergence: Callable[..., Tensor]
) -> None:
    student, teacher = logits(1, 5).requires_grad_(), logits(1, 5, seed=1)
    divergence(student, teacher, 2.0).sum().backward()
    step, row, target = 1e-5, student.detach()[0].tolist(), teacher[0].tolist()
    for i in range(5):
        up, down = row.copy(), row.copy()
        up[i] += step
        down[i] -= step
        slope = (reference(*case, up, target, 2.0) - reference(*case, down, target, 2.0)) / (2 * step)
        assert student.grad is not None and student.grad[0, i].item() == pytest.approx(slope, abs=1e-8)


def test_gradcheck(divergence: Callable[..., Tensor]) -> None:
    teacher = logits(3, 6, seed=1)
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, 1.5), (logits(3, 6).requires_grad_(),))


def test_zero_exactly_when_the_distributions_are_equal(divergence: Callable[..., Tensor]) -> None:
    same = logits(4, 9, dtype=torch.float32)
    assert divergence(same, same.clone()).abs().max() < 1e-7
    assert divergence(same, logits(4, 9, seed=1, dtype=torch.float32)).min() > 1e-3


def test_never_negative(divergence: Callable[..., Tensor]) -> None:
    near = logits(200, 11, dtype=torch.float32)
    for noise in (1e-4, 1e-2, 1.0, 10.0):
        assert divergence(near + noise * torch.randn_like(near), near).min() > -1e-6


def test_a_constant_added_to_the_logits_changes_nothing(divergence: Callable[..., Tensor]) -> None:
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    torch.testing.assert_close(divergence(student + 7, teacher - 3), divergence(student, teacher))


def test_no_gradient_reaches_the_teacher(divergence: Callable[..., Tensor]) -> None:
    student, teacher = logits(4, 9).requires_grad_(), logits(4, 9, seed=1).requires_grad_()
    divergence(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


def test_bfloat16_logits_are_computed_in_float32(divergence: Callable[..., Tensor]) -> None:
    """A log-softmax in bfloat16 made gradients 3–31 % wrong (speculators#788) and KL negative (EasyDeL#267)."""
    student, teacher = logits(4, 99, dtype=torch.bfloat16), logits(4, 99, seed=1, dtype=torch.bfloat16)
    value = divergence(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, divergence(student.float(), teacher.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-2, 1.0, 1e4])
def test_extreme_logits_stay_finite_in_value_and_gradient(divergence: Callable[..., Tensor], dtype: torch.dtype, temperature: float) -> None:
    """Reverse KL and JSD with a finite value had a NaN gradient when probabilities underflowed (Soup#719)."""
    student = torch.tensor([[80.0, -80, 0, 0], [-80, 80, 0, 0], [0, 0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-80.0, 80, 0, 0], [-80, 80, 0, 0], [80, -80, -80, -80]], dtype=dtype)
    value = divergence(student, teacher, temperature)
    value.sum().backward()
    assert student.grad is not None and value.isfinite().all() and student.grad.isfinite().all()


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
    expected = 0.1 * kl([0.5, 0.5], m) + 0.9 * kl([0.9, 0.1], m)
    assert divergences.jsd(student, teacher, jsd_beta=0.1).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="jsd_beta"):
        divergences.jsd(student, teacher, jsd_beta=1.1)


def test_with_temperature_squared_the_gradient_keeps_its_size(divergence: Callable[..., Tensor]) -> None:
    """A temperature that was accepted and never used, or used without T², changes the size (TRL's GKD, several others)."""
    sizes = []
    for temperature in (1.0, 4.0, 16.0):
        student = logits(50, 9, scale=0.05).requires_grad_()
        (temperature**2 * divergence(student, logits(50, 9, seed=1, scale=0.05), temperature)).sum().backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert max(sizes) / min(sizes) < 1.05


def test_jsd_equals_that_of_trl() -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed")
    student, teacher = logits(2, 3, 7, dtype=torch.float32), logits(2, 3, 7, seed=1, dtype=torch.float32)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.3, reduction="sum")
    torch.testing.assert_close(divergences.jsd(student, teacher, jsd_beta=0.3).sum(), theirs)
