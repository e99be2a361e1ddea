"""Cases for the objective from hidden states: its inputs, what comes out, and the same from whole logits in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mini_distill.losses import divergences
from mini_distill.losses.catalogue import divergence_parameters
from mini_distill.losses.objective import Objective
from mini_distill.models.head import OutputHead
from mini_distill.teachers.targets import DenseTargets

STOCHASTIC = {"teacher_sample_ce"}
NAMES = sorted(divergence_parameters())
EXACT = [name for name in NAMES if name not in STOCHASTIC]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-3}
"""Of gradients; a single rounding to bfloat16 is up to 3.9e-3, and 1.7e-3 on average over many."""

VOCAB = 17


def objective_of(name: str = "forward_kl", temperature: float = 2.0, **settings: Any) -> Objective:
    """Every factor of the loss differs from one."""
    return Objective(getattr(divergences, name), name, **{"temperature": temperature, "kl_weight": 0.7, "ce_weight": 0.3, **settings})


def rows_mib(rows: int, vocab: int = VOCAB) -> float:
    """The budget that holds so many rows of student and teacher in float32."""
    return (rows + 0.5) * 2 * 4 * vocab / 2**20


@dataclass
class Case:
    """Everything that `Objective.fused` takes."""

    hidden: Tensor
    head: OutputHead
    teacher: DenseTargets
    targets: Tensor

    def wide(self) -> Case:
        """The same numbers in float64."""
        return self.to(torch.float64)

    def to(self, target: torch.dtype | str) -> Case:
        """The same numbers in another dtype, or on another device."""
        said = self.teacher.hidden.to(target)
        hidden = self.hidden.detach().to(target).requires_grad_(self.hidden.requires_grad)
        device = torch.device(target) if isinstance(target, str) else self.targets.device
        return Case(
            hidden, head_to(self.head, target), DenseTargets(said, head_to(self.teacher.head, target), device), self.targets.to(device)
        )


def head_to(head: OutputHead, target: torch.dtype | str) -> OutputHead:
    return OutputHead(copy.deepcopy(head.module).to(target), head.scale, head.softcap)


def wide_head(head: OutputHead) -> OutputHead:
    return head_to(head, torch.float64)


def case(
    tokens: int = 7,
    vocab: int = VOCAB,
    hidden: int = 6,
    teacher_hidden: int = 5,
    dtype: torch.dtype = torch.float64,
    teacher_dtype: torch.dtype | None = None,
    bias: bool = False,
    std: float = 2.0,
    scale: float = 1.0,
    softcap: float | None = None,
    teacher_vocab: int | None = None,
    student_vocab: int | None = None,
) -> Case:
    """Logits of standard deviation `std`; the teacher's parameters ask for gradients, which must not come."""
    draw = torch.Generator().manual_seed(0)

    def linear(width: int, rows: int, dtype: torch.dtype) -> nn.Linear:
        module = nn.Linear(width, rows, bias=bias, dtype=dtype)
        with torch.no_grad():
            module.weight.copy_(torch.randn(rows, width, generator=draw, dtype=torch.float64) * std / width**0.5)
            if bias:
                module.bias.copy_(torch.randn(rows, generator=draw, dtype=torch.float64))
        return module

    student = OutputHead(linear(hidden, student_vocab or vocab, dtype), scale, softcap)
    teacher_dtype = teacher_dtype or dtype
    teacher = OutputHead(linear(teacher_hidden, teacher_vocab or vocab, teacher_dtype), scale, softcap)
    student_hidden = torch.randn(tokens, hidden, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    said = torch.randn(tokens, teacher_hidden, generator=draw, dtype=torch.float64).to(teacher_dtype)
    return Case(student_hidden, student, DenseTargets(said, teacher, said.device), torch.randint(vocab, (tokens,), generator=draw))


@dataclass
class Found:
    """What came out."""

    loss: Tensor
    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]


def fused(case: Case, objective: Objective, factor: float = 1.0) -> Found:
    return found(case, objective.fused(case.hidden, case.head, case.teacher, case.targets), factor)


def plain(case: Case, objective: Objective, factor: float = 1.0) -> Found:
    """From whole logits, in float64."""
    wide = case.wide()
    return found(wide, objective(wide.head.logits(wide.hidden), wide.teacher.logits(), wide.targets), factor)


def found(case: Case, result: Any, factor: float) -> Found:
    leaves = {"hidden": case.hidden, **dict(case.head.module.named_parameters())}
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    for leaf in asked.values():
        leaf.grad = None
    if asked:
        (result.loss * factor).backward()
    assert all(parameter.grad is None for parameter in case.teacher.head.module.parameters())
    gradients = {name: leaf.grad.clone() for name, leaf in asked.items() if leaf.grad is not None}
    return Found(result.loss.detach(), result.terms, gradients)


def distance(one: Tensor, other: Tensor) -> float:
    """Relative, in norm, to `other`."""
    return ((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)).item()


def assert_near(one: Found, other: Found, tolerance: float) -> None:
    assert one.terms.keys() == other.terms.keys() and one.gradients.keys() == other.gradients.keys()
    value = min(tolerance, 2e-5)  # values are summed in float32 even where gradients are handed out in bfloat16
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=value)
    for name, term in one.terms.items():
        assert term.item() == pytest.approx(other.terms[name].item(), rel=value), name
    for name, gradient in one.gradients.items():
        assert gradient.isfinite().all() and distance(gradient, other.gradients[name]) <= tolerance, name
