"""Shift, mask and count, by hand."""

from __future__ import annotations

import torch

from mini_distill.losses.reduction import IGNORE_INDEX, at_least_float32, count_valid_tokens, loss_mask, shift_labels, supervised_targets

X = IGNORE_INDEX
LABELS = torch.tensor([[X, X, 7, 8], [3, 4, X, X]])


def test_a_position_is_supervised_by_the_label_after_it() -> None:
    """An unshifted mask is one position late (DistillKit), logits and labels both unshifted compare the wrong tokens (ms-swift#8436)."""
    assert shift_labels(LABELS).tolist() == [[X, 7, 8, X], [4, X, X, X]]
    assert loss_mask(LABELS).tolist() == [[False, True, True, False], [True, False, False, False]]


def test_targets_come_in_the_order_of_the_mask() -> None:
    assert supervised_targets(LABELS).tolist() == [7, 8, 4]
    assert count_valid_tokens(LABELS).item() == 3


def test_the_label_of_the_first_position_counts_for_nothing() -> None:
    assert count_valid_tokens(torch.tensor([[5, X, X]])).item() == 0
    assert supervised_targets(torch.tensor([[5, X, X]])).shape == (0,)


def test_the_mask_has_a_true_for_each_target_and_none_at_the_end() -> None:
    labels = torch.randint(0, 5, (6, 9), generator=torch.Generator().manual_seed(0)) - 1
    labels[labels < 0] = X
    mask = loss_mask(labels)
    expected = [(row, at) for row in range(6) for at in range(8) if labels[row, at + 1] != X]
    assert mask.nonzero().tolist() == [list(pair) for pair in expected]
    assert supervised_targets(labels).tolist() == [int(labels[row, at + 1]) for row, at in expected]
    assert count_valid_tokens(labels).item() == len(expected) and count_valid_tokens(labels).dtype == torch.int64


def test_token_zero_is_a_target_like_any_other() -> None:
    assert supervised_targets(torch.tensor([[X, 0, X, 0]])).tolist() == [0, 0]


def test_labels_stay_as_they_were() -> None:
    """A count taken in the wrong order changed the labels (trl#5653)."""
    labels = LABELS.clone()
    for function in (shift_labels, loss_mask, supervised_targets, count_valid_tokens):
        function(labels)
    assert torch.equal(labels, LABELS)


def test_only_narrow_numbers_are_widened() -> None:
    assert at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
