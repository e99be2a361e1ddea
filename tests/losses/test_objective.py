"""The objective: sums of named terms, to be divided once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_distill.losses.divergences import forward_kl, jsd
from mini_distill.losses.objective import DivergenceTerm, Objective
from mini_distill.models.head import OutputHead

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


@pytest.mark.parametrize("weights", [{"kl_weight": 1.0, "ce_weight": 0.0}, {"kl_weight": 0.0, "ce_weight": 1.0}, {}])
def test_sums_are_not_divided_by_tokens_or_vocabulary(weights: dict[str, float]) -> None:
    """Divided by tokens and then by tokens again (torchtune), or by sequence × vocabulary (trl#4105): equal logits of n tokens
    give n times the value of one."""
    student, teacher, targets = batch(tokens=1)
    objective = Objective(forward_kl, "forward_kl", **weights)
    one = objective(student, teacher, targets)
    many = objective(student.repeat(7, 1), teacher.repeat(7, 1), targets.repeat(7))
    torch.testing.assert_close(many.loss, 7 * one.loss)
    assert {name: value.item() for name, value in many.terms.items()} == pytest.approx({k: 7 * v.item() for k, v in one.terms.items()})


def test_a_value_by_hand() -> None:
    """p = (½, ½), q = (0.9, 0.1), the data says the second token; T = 2 turns q into (0.75, 0.25) and leaves p."""
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    result = Objective(forward_kl, "forward_kl", temperature=2.0, kl_weight=3.0, ce_weight=0.1)(student, teacher, torch.tensor([1]))
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert result.loss.item() == pytest.approx(3 * 2**2 * divergence + 0.1 * -math.log(0.1), rel=1e-5)
    assert {name: value.item() for name, value in result.terms.items()} == pytest.approx(
        {"forward_kl": divergence, "ce": -math.log(0.1)}, rel=1e-5
    )


def test_the_logged_terms_are_detached() -> None:
    """A term that keeps its graph keeps every activation of every micro-batch."""
    result = Objective(forward_kl, "forward_kl")(*batch())
    assert result.loss.requires_grad and not any(term.requires_grad for term in result.terms.values())


def test_the_divergence_alone_reaches_the_student() -> None:
    """Teacher targets fetched and then dropped: a run that distils nothing (atropos#456)."""
    student, teacher, targets = batch()
    result = Objective(forward_kl, "forward_kl", kl_weight=1.0, ce_weight=0.0)(student, teacher, targets)
    (gradient,) = torch.autograd.grad(result.loss, student)
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    torch.testing.assert_close(gradient, q - p)
    assert list(result.terms) == ["forward_kl"]


def test_no_supervised_token_gives_exactly_zero_and_a_graph() -> None:
    """An empty completion gave 0/0 (trl#5885); a rank without a supervised token hung or divided by zero (trl#6698)."""
    _, teacher, targets = batch(tokens=0)
    head = torch.nn.Linear(3, VOCAB).double()
    result = Objective(forward_kl, "forward_kl")(head(torch.zeros(0, 3, dtype=torch.float64)), teacher, targets)
    result.loss.backward()
    assert result.loss.item() == 0 and {name: value.item() for name, value in result.terms.items()} == {"forward_kl": 0, "ce": 0}
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_an_empty_batch_adds_nothing_even_where_weights_are_not_finite() -> None:
    student, teacher, targets = batch(tokens=2)
    spoilt = torch.full_like(student, math.nan, requires_grad=True)
    result = Objective(forward_kl, "forward_kl")(spoilt[:0], teacher[:0], targets[:0])
    result.loss.backward()
    assert result.loss.item() == 0 and spoilt.grad is not None and not spoilt.grad.any()


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


def test_vocabularies_of_unexplained_widths_are_not_cut_to_fit() -> None:
    """Filled up with the other model's logits (ms-swift), or cut to the narrower one: only the tokenizer says what is padding."""
    student, teacher, targets = batch()
    with pytest.raises(ValueError, match="expected one shape"):
        Objective(forward_kl, "forward_kl")(student, torch.cat([teacher, teacher[:, :2]], 1), targets)


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


def test_double_precision_stays() -> None:
    result = Objective(forward_kl, "forward_kl")(*batch(dtype=torch.float64))
    assert result.loss.dtype == torch.float64 and all(term.dtype == torch.float64 for term in result.terms.values())


@pytest.mark.parametrize("rows", [1, 6])
def test_padding_columns_get_no_probability_and_take_no_gradient(rows: int) -> None:
    """Zero logits of padding take probability away (Liger): a softmax over the real columns is what the objective sees."""
    student, teacher, targets = batch(tokens=rows, vocab=VOCAB + 3)
    objective = Objective(forward_kl, "forward_kl", vocab_size=VOCAB, kl_weight=0.0, ce_weight=1.0)
    result = objective(student, teacher, targets)
    torch.testing.assert_close(result.loss, -student[:, :VOCAB].log_softmax(-1).gather(1, targets[:, None]).sum())
    (gradient,) = torch.autograd.grad(result.loss, student)
    assert not gradient[:, VOCAB:].any() and gradient[:, :VOCAB].all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_padding_columns_may_hold_anything(bad: float) -> None:
    student, teacher, targets = batch(vocab=VOCAB + 3)
    objective = Objective(jsd, "jsd", vocab_size=VOCAB)
    expected = objective(student, teacher, targets).loss.item()
    with torch.no_grad():
        student[:, VOCAB:], teacher[:, VOCAB:] = bad, bad
    loss = objective(student, teacher, targets).loss
    loss.backward()
    assert loss.item() == expected and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "0.5 · forward_kl + 0.5 · ce"),
        ({"temperature": 2.0}, "0.5 · 2² · forward_kl(T=2) + 0.5 · ce"),
        ({"temperature": 2.0, "scale_by_temperature_squared": False}, "0.5 · forward_kl(T=2) + 0.5 · ce"),
        ({"kl_weight": 1.0, "ce_weight": 0.0, "options": {"skew": 0.1}}, "1 · forward_kl(skew=0.1)"),
        ({"kl_weight": 0.0, "ce_weight": 1.0}, "1 · ce"),
    ],
)
def test_the_formula_can_be_read(options: dict[str, Any], text: str) -> None:
    assert Objective(forward_kl, "forward_kl", **options).formula() == text


# --------------------------------------------------------------------------------------------- further terms, and the fused path


def further() -> list[DivergenceTerm]:
    return [
        DivergenceTerm("jsd", jsd, 0.3, temperature=3.0, options={"jsd_beta": 0.2}),
        DivergenceTerm("forward_kl_hot", forward_kl, 0.2, temperature=4.0, scale_by_temperature_squared=False),
    ]


def test_further_terms_are_added_each_with_its_own_temperature() -> None:
    student, teacher, targets = batch()
    result = Objective(forward_kl, "forward_kl", temperature=2.0, kl_weight=0.7, ce_weight=0.2, further=further())(
        student, teacher, targets
    )
    terms = {name: value.item() for name, value in result.terms.items()}
    assert list(terms) == ["forward_kl", "jsd", "forward_kl_hot", "ce"]
    assert terms["jsd"] == pytest.approx(jsd(student, teacher, 3.0, jsd_beta=0.2).sum().item())
    assert terms["forward_kl_hot"] == pytest.approx(forward_kl(student, teacher, 4.0).sum().item())
    expected = 0.7 * 4 * terms["forward_kl"] + 0.3 * 9 * terms["jsd"] + 0.2 * terms["forward_kl_hot"] + 0.2 * terms["ce"]
    assert result.loss.item() == pytest.approx(expected)


def test_further_terms_alone_need_the_teacher() -> None:
    student, teacher, targets = batch()
    objective = Objective(None, "forward_kl", kl_weight=0.0, ce_weight=0.0, further=further()[:1])
    assert objective.needs_teacher and list(objective(student, teacher, targets).terms) == ["jsd"]
    assert objective(student, teacher, targets).loss.item() == pytest.approx(
        0.3 * 9 * jsd(student, teacher, 3.0, jsd_beta=0.2).sum().item()
    )


def test_the_formula_names_every_term_and_what_changes() -> None:
    objective = Objective(forward_kl, "forward_kl", further=further()[:1], schedules={"ce": {1: 0.0, 9: 1.0}})
    assert objective.formula() == "0.5 · forward_kl + 0.3 · 3² · jsd(jsd_beta=0.2, T=3) + 0.5 · ce (on a schedule)"


class Spoken:
    """What a teacher says, and which rows it was asked for."""

    def __init__(self, logits: Tensor) -> None:
        self.all_logits, self.asked = logits, list[tuple[int, int]]()

    def rows(self, rows: slice, vocab_size: int | None) -> Tensor:
        self.asked.append((rows.start, rows.stop))
        return self.all_logits[rows, :vocab_size]


def identity_head(vocab: int = VOCAB) -> OutputHead:
    """Hidden states that are logits already."""
    module = torch.nn.Linear(vocab, vocab, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.eye(vocab))
    return OutputHead(module)


def test_hidden_states_and_logits_give_the_same() -> None:
    student, teacher, targets = batch()
    objective = Objective(forward_kl, "forward_kl", temperature=2.0, kl_weight=0.7, ce_weight=0.2, further=further())
    expected = objective(student, teacher, targets)
    result = objective.fused(student, identity_head(), Spoken(teacher), targets)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.terms, expected.terms)
    assert list(result.terms) == list(expected.terms) and not any(term.requires_grad for term in result.terms.values())


def test_every_row_of_the_teacher_is_asked_for_once_in_order() -> None:
    student, teacher, targets = batch()
    spoken = Spoken(teacher)
    Objective(forward_kl, "forward_kl", memory_mib=4 * 2 * 4 * VOCAB / 2**20).fused(student, identity_head(), spoken, targets)
    assert [at for start, stop in spoken.asked for at in range(start, stop)] == list(range(6)) and len(spoken.asked) == 2


def test_with_cross_entropy_alone_the_fused_path_asks_no_teacher() -> None:
    class Never:
        def rows(self, rows: slice, vocab_size: int | None) -> Any:
            raise AssertionError("the teacher was asked")

    student, _, targets = batch()
    objective = Objective(None, "forward_kl", kl_weight=0.0, ce_weight=1.0)
    for teacher in (Never(), None):
        result = objective.fused(student, identity_head(), teacher, targets)
        assert list(result.terms) == ["ce"]
        torch.testing.assert_close(result.loss, objective(student, None, targets).loss)
