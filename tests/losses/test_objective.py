"""The objective: sums of named terms, to be divided once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mini_distill.losses.divergences import forward_kl, jsd
from mini_distill.losses.objective import Objective

VOCAB = 11


def batch(tokens: int = 6, vocab: int = VOCAB, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(tokens, vocab, generator=generator, dtype=dtype).requires_grad_()
    teacher = torch.randn(tokens, vocab, generator=generator, dtype=dtype)
    return student, teacher, torch.randint(VOCAB, (tokens,), generator=generator)


def test_the_loss_is_the_weighted_sum_of_the_logged_terms() -> None:
    student, teacher, targets = batch()
    result = Objective(forward_kl, "forward_kl", temperature=2.0, kl_weight=0.7, ce_weight=0.2)(student, teacher, targets)
    assert result.loss.item() == pytest.approx(0.7 * 4 * result.terms["forward_kl"].item() + 0.2 * result.terms["ce"].item())
    assert result.terms["forward_kl"].item() == pytest.approx(forward_kl(student, teacher, 2.0).sum().item())


def test_the_factor_of_the_temperature_can_be_left_out() -> None:
    student, teacher, targets = batch()
    result = Objective(forward_kl, "forward_kl", temperature=2.0, scale_by_temperature_squared=False, kl_weight=1, ce_weight=0)(
        student, teacher, targets
    )
    assert result.loss.item() == pytest.approx(result.terms["forward_kl"].item())


def test_the_cross_entropy_knows_no_temperature() -> None:
    student, teacher, targets = batch()
    soft = Objective(forward_kl, "forward_kl", temperature=5.0)(student, teacher, targets).terms["ce"]
    expected = -student.log_softmax(-1).gather(1, targets[:, None]).sum()
    torch.testing.assert_close(soft, expected.detach())


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    """A mean per micro-batch gave short answers more weight than long ones (trl#4719, ms-swift#10165, axolotl#3271)."""
    student, teacher, targets = batch()
    objective = Objective(jsd, "jsd", {"jsd_beta": 0.3})
    whole = objective(student, teacher, targets).loss
    parts = sum(objective(student[s], teacher[s], targets[s]).loss for s in (slice(0, 1), slice(1, 6)))
    torch.testing.assert_close(whole, parts)


def test_no_supervised_token_gives_exactly_zero_and_a_graph() -> None:
    """An empty completion gave 0/0 (trl#5885); a rank without a supervised token hung or divided by zero (trl#6698)."""
    student, teacher, targets = batch(tokens=0)
    result = Objective(forward_kl, "forward_kl")(student, teacher, targets)
    result.loss.backward()
    assert result.loss.item() == 0 and student.grad is not None and student.grad.shape == (0, VOCAB)
    assert all(value.item() == 0 for value in result.terms.values())


@pytest.mark.parametrize("padded", ["student", "teacher", "both"])
def test_padding_columns_of_a_vocabulary_change_nothing(padded: str) -> None:
    """Qwen pads 151,643 tokens to 151,936 or 152,064 by size: peers crashed (trl#3028), or gave the padding probability."""
    student, teacher, targets = batch()
    objective = Objective(forward_kl, "forward_kl", vocab_size=VOCAB)
    expected = objective(student, teacher, targets).loss
    wide_student = torch.cat([student.detach(), torch.full((6, 5), 50.0)], 1) if padded != "teacher" else student.detach()
    wide_teacher = torch.cat([teacher, torch.full((6, 2), 50.0)], 1) if padded != "student" else teacher
    wide_student.requires_grad_()
    loss = objective(wide_student, wide_teacher, targets).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert wide_student.grad is not None and not wide_student.grad[:, VOCAB:].any()


def test_without_weight_the_teacher_is_not_looked_at() -> None:
    student, _, targets = batch()
    objective = Objective(None, "forward_kl", kl_weight=0.0, ce_weight=1.0)
    assert not objective.needs_teacher
    assert list(objective(student, None, targets).terms) == ["ce"]


def test_a_misspelt_option_is_not_swallowed() -> None:
    """**kwargs in a loss swallowed a misspelt option (KDFlow)."""
    with pytest.raises(TypeError, match="jsd_bata"):
        Objective(jsd, "jsd", {"jsd_bata": 0.1})(*batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, targets = batch(dtype=torch.float32)
    result = Objective(forward_kl, "forward_kl")(student.to(dtype), teacher.to(dtype), targets)
    assert result.loss.dtype == torch.float32 and all(term.dtype == torch.float32 for term in result.terms.values())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "0.5 · forward_kl + 0.5 · ce"),
        ({"temperature": 2.0}, "0.5 · 2² · forward_kl(T=2) + 0.5 · ce"),
        ({"kl_weight": 0.0, "ce_weight": 1.0}, "1 · ce"),
    ],
)
def test_the_formula_can_be_read(options: dict[str, Any], text: str) -> None:
    assert Objective(forward_kl, "forward_kl", **options).formula() == text
