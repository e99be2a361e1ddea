"""Shift, mask, count and precision: the one place where each is done.

Axes: B batch, S sequence, V vocabulary, N supervised positions of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position whose prediction nobody supervises (the Hugging Face convention)."""


def shift_labels(labels: Tensor) -> Tensor:
    """Labels moved to the position that predicts them.

    The logits at position t predict the token at t + 1, so `labels[:, t + 1]` belongs to position t; the last position
    predicts nothing.

    Args:
        labels: `(batch, seq)`, unshifted, `IGNORE_INDEX` where nothing is supervised.

    Returns:
        `(batch, seq)`: the target of each position's prediction, `IGNORE_INDEX` where there is none.
    """
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


def loss_mask(labels: Tensor) -> Tensor:
    """`(batch, seq)` bool, already shifted: True where this position's *prediction* counts."""
    return shift_labels(labels) != IGNORE_INDEX


def supervised_targets(labels: Tensor) -> Tensor:
    """The target tokens of the supervised positions, in row-major order: `(supervised,)`."""
    shifted = shift_labels(labels)
    return shifted[shifted != IGNORE_INDEX]


def count_valid_tokens(labels: Tensor) -> Tensor:
    """Supervised tokens of a batch, as an int64 scalar tensor (on the labels' device, so that nothing waits for it)."""
    return loss_mask(labels).sum()


def at_least_float32(logits: Tensor) -> Tensor:
    """float32 for anything narrower; float64 stays, so that references can be computed with the same code."""
    return logits if logits.dtype == torch.float64 else logits.float()
