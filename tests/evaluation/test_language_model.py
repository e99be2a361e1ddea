"""The pure core: sums on logits, and the numbers they become."""

from __future__ import annotations

import math

import pytest
import torch

from mini_distill.evaluation.language_model import add, measure, metrics, nothing, over_all_processes, perplexity


def logits(seed: int, tokens: int = 20, vocab: int = 7) -> torch.Tensor:
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed)) * 3


TARGETS = torch.arange(20) % 7
BYTES = torch.full((20,), 2)


def test_perplexity_is_that_of_a_reference_loop_in_float64() -> None:
    student = logits(0)
    total = 0.0
    for row, target in zip(student.double().tolist(), TARGETS.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(value) for value in row))
        total += normaliser - row[target]
    found = metrics(measure(student, None, TARGETS, BYTES))
    assert found["student_perplexity"] == pytest.approx(math.exp(total / 20), rel=1e-6)
    assert found["student_nll"] == pytest.approx(total / 20, rel=1e-6)


def test_kl_is_exactly_zero_between_a_model_and_itself() -> None:
    found = metrics(measure(logits(0), logits(0), TARGETS, BYTES))
    assert found["forward_kl"] == found["reverse_kl"] == 0.0
    assert found["top1_agreement"] == 1.0


def test_forward_kl_is_of_the_teacher_from_the_student_and_reverse_kl_the_other_way_round() -> None:
    """Forward and reverse were swapped in frameworks that tested with symmetric inputs only."""
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    found = metrics(measure(student, teacher, torch.tensor([0]), torch.tensor([1])))
    assert found["forward_kl"] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6)
    assert found["reverse_kl"] == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-6)


def test_bits_per_byte_divides_the_code_length_by_the_bytes_of_text() -> None:
    student = torch.zeros(3, 8)  # uniform over 8 tokens: 3 bits each, 9 bits for 4 bytes (the end-of-sequence token has none)
    found = metrics(measure(student, None, torch.tensor([0, 1, 2]), torch.tensor([1, 3, 0])))
    assert found["student_bits_per_byte"] == pytest.approx(9 / 4)


def test_bits_per_byte_is_left_out_where_no_token_stands_for_text() -> None:
    found = metrics(measure(logits(0), None, TARGETS, BYTES * 0))
    assert "student_bits_per_byte" not in found and math.isfinite(found["student_nll"])


def test_top1_agreement_is_the_share_of_tokens_with_the_same_most_probable_token() -> None:
    student, teacher = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    assert metrics(measure(student, teacher, torch.zeros(4, dtype=torch.int64), torch.ones(4)))["top1_agreement"] == 0.5


def test_an_impossible_token_on_both_sides_adds_nothing_to_either_divergence() -> None:
    student, teacher = logits(0), logits(1)
    student[:, 6] = teacher[:, 6] = -math.inf
    found = metrics(measure(student, teacher, TARGETS % 6, BYTES))
    expected = metrics(measure(student[:, :6], teacher[:, :6], TARGETS % 6, BYTES))
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_token_that_only_the_teacher_allows_makes_forward_kl_infinite_and_not_nan() -> None:
    student = logits(0)
    student[:, 6] = -math.inf
    found = metrics(measure(student, logits(1), TARGETS % 6, BYTES))
    assert found["forward_kl"] == math.inf and math.isfinite(found["reverse_kl"])


def test_bfloat16_logits_give_no_negative_divergence() -> None:
    """A log-softmax in bfloat16 made a KL negative (EasyDeL#267)."""
    base = logits(0, tokens=200, vocab=500).bfloat16()
    near = (base.float() + 0.02 * logits(1, tokens=200, vocab=500)).bfloat16()
    targets = torch.zeros(200, dtype=torch.int64)
    for i in range(0, 200, 10):
        chunk = slice(i, i + 10)
        sums = measure(near[chunk], base[chunk], targets[chunk], targets[chunk])
        assert sums["forward_kl"] > 0 and sums["reverse_kl"] > 0


def test_chunks_add_up_to_the_whole() -> None:
    student, teacher = logits(0), logits(1)
    whole = metrics(measure(student, teacher, TARGETS, BYTES))
    total = nothing(with_teacher=True)
    for part in (slice(0, 3), slice(3, 3), slice(3, 20)):
        total = add(total, measure(student[part], teacher[part], TARGETS[part], BYTES[part]))
    assert metrics(total) == pytest.approx(whole, rel=1e-6)


def test_one_exchange_carries_every_sum_with_its_shape() -> None:
    sums = measure(logits(0), logits(1), TARGETS, BYTES)
    calls: list[torch.Tensor] = []
    doubled = over_all_processes(sums, lambda value: calls.append(value) or 2 * value)
    assert len(calls) == 1 and calls[0].dtype == torch.float64
    assert all(torch.equal(doubled[name], 2 * sums[name]) for name in sums)


def test_the_layout_of_nothing_is_that_of_any_chunk() -> None:
    """Processes exchange one vector: a process without a batch must send one of the same length."""
    for teacher in (None, logits(1)):
        sums, empty = measure(logits(0), teacher, TARGETS, BYTES), nothing(with_teacher=teacher is not None)
        assert [(name, value.shape) for name, value in sums.items()] == [(name, value.shape) for name, value in empty.items()]
        assert all(value.abs().sum() == 0 for value in empty.values())


def test_perplexity_of_a_diverged_model_is_infinite_and_no_error() -> None:
    assert perplexity(1e4) == math.inf
