"""Does a model know when it is right? The expected calibration error of its most probable token."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BINS = 15


def calibration_gaps(confidence: Tensor, correct: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Sum of `correct - confidence` in each bin of confidence.

    The sums of several batches or processes add up; `expected_calibration_error` makes the number of their total.

    Args:
        confidence: `(tokens,)`, probability of the most probable token, in [0, 1].
        correct: `(tokens,)` bool, whether that token is the target.
        num_bins: Bins of equal width; bin i holds [i / num_bins, (i + 1) / num_bins), the last one 1 as well.

    Returns:
        `(num_bins,)` in the dtype of `confidence`.
    """
    bins = (confidence * num_bins).long().clamp(0, num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=confidence.dtype, device=confidence.device)
    return gaps.index_add(0, bins, correct.to(confidence.dtype) - confidence)


def expected_calibration_error(gaps: Tensor, num_tokens: float) -> float:
    """Mean over tokens of |accuracy - mean confidence| of the token's bin (Guo et al. 2017, equation 3).

    A bin weighs as much as its tokens, so its weighted gap is the absolute sum of its differences over `num_tokens`.

    Args:
        gaps: `(bins,)`, totals of `calibration_gaps`.
        num_tokens: Tokens in all bins together.
    """
    return gaps.abs().sum().item() / num_tokens


def reliability_sums(confidence: Tensor, correct: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """What a reliability diagram is made of: tokens, sum of confidence and number correct in each bin; sums add up.

    Returns:
        `(num_bins, 3)` float64, with the bins of `calibration_gaps`.
    """
    bins = (confidence * num_bins).long().clamp(0, num_bins - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, correct.to(confidence.dtype)], dim=1).double()
    return torch.zeros(num_bins, 3, dtype=torch.float64, device=confidence.device).index_add(0, bins, values)


def reliability_bins(sums: Tensor) -> list[dict[str, float]]:
    """The bins of a reliability diagram, from the totals of `reliability_sums`; empty bins are left out."""
    width, found = 1 / len(sums), []
    for i, (tokens, confidence, correct) in enumerate(sums.tolist()):
        if tokens:
            bounds = {"low": i * width, "high": (i + 1) * width}
            found.append({**bounds, "tokens": tokens, "confidence": confidence / tokens, "accuracy": correct / tokens})
    return found
