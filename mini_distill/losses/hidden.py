"""How far the student's hidden states are from the teacher's: a value per token.

Every public function takes `(student_hidden, teacher_hidden)`, both `(…, hidden)` and of the same width: taking one to the width of
the other is the caller's. It returns `(…)`, in float32 or wider, and is zero where both are equal; gradients flow into the student
alone. Its keyword arguments become the term's `options`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reduction import at_least_float32

NORM_EPSILON = 1e-6
"""Added to the variance of a token's channels before it is divided by."""


def hidden_mse(student_hidden: Tensor, teacher_hidden: Tensor, *, normalise: bool = False) -> Tensor:
    """The mean over channels of the squared difference (TinyBERT, Jiao et al. 2020, arXiv 1909.10351, equation 8).

    The residual stream of a trained LLM has a few channels that are hundreds of times larger than the others: without
    `normalise` they alone are matched, and the loss has their size.

    Args:
        student_hidden: `(…, hidden)`.
        teacher_hidden: `(…, hidden)`.
        normalise: Take each token of both to mean 0 and variance 1 over its channels first (a layer norm without weights); the
            value is then at most 4.

    Returns:
        `(…)` float32 or wider.

    Raises:
        ValueError: the shapes differ.
    """
    student, teacher = _pair(student_hidden, teacher_hidden)
    if normalise:
        student, teacher = _standardised(student), _standardised(teacher)
    return (student - teacher).square().mean(dim=-1)


def hidden_cosine(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """1 − cosine of the angle between the two (DistilBERT, Sanh et al. 2019, arXiv 1910.01108): from 0 to 2, blind to length.

    Computed as ½ · |x̂ − ŷ|², which is the same and stays exact, and never negative, where the two are nearly equal. A vector of
    zeros has no direction and counts as orthogonal to any: 1.

    Args:
        student_hidden: `(…, hidden)`.
        teacher_hidden: `(…, hidden)`.

    Returns:
        `(…)` float32 or wider.

    Raises:
        ValueError: the shapes differ.
    """
    student, teacher = _pair(student_hidden, teacher_hidden)
    (ours, we_are_zero), (theirs, they_are_zero) = _direction(student), _direction(teacher)
    half_for_each_zero = (we_are_zero.to(ours) + they_are_zero.to(ours)) / 2
    return (ours - theirs).square().sum(dim=-1) / 2 + half_for_each_zero


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or wider, the teacher's cut off from its graph."""
    if student.shape != teacher.shape:  # broadcasting would compare each token with all others, and say nothing
        what = f"student_hidden has shape {tuple(student.shape)} and teacher_hidden {tuple(teacher.shape)}"
        raise ValueError(f"{what}, expected the same: project the one to the width of the other first")
    return at_least_float32(student), at_least_float32(teacher.detach())


def _standardised(hidden: Tensor) -> Tensor:
    """Each token to mean 0 and variance 1 over its channels."""
    centred = hidden - hidden.mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + NORM_EPSILON)


def _direction(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vectors `(…, hidden)`, and where there is none `(…)`: zeros stay zeros, with a gradient of ordinary size."""
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    is_zero = length == 0
    return hidden / length.masked_fill(is_zero, 1.0), is_zero.squeeze(-1)
