"""What users bring by import path: divergences and an evaluation hook."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mini_distill.losses.divergences import forward_kl

calls = 0
on_this_rank: Callable[..., Tensor]  # set by a test


def twice_forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float, factor: float = 2.0) -> Tensor:
    """`factor` times the forward KL."""
    return factor * forward_kl(student_logits, teacher_logits, temperature)


def nan_from_third_step(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """NaN for the last token of the third batch, and of any later one of a single row."""
    global calls
    calls += student_logits.shape[-1] != 1024  # not when it is tried out before the run
    values = forward_kl(student_logits, teacher_logits, temperature)
    return torch.cat([values[:-1], values[-1:] * float("nan")]) if calls >= 3 else values


def parameter_sum(context: Any) -> dict[str, float]:
    """A hook: the sum of the student's weights, and the step."""
    return {"parameter_sum": sum(p.double().sum().item() for p in context.student.parameters()), "custom/step": context.step}


def raises_on_rank_1(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """A bug that only one process meets, in its third step."""
    global calls
    calls += student_logits.shape[-1] != 1024  # not when it is tried out before the run
    if os.environ.get("RANK") == "1" and calls >= 3:
        raise ValueError("a bug of the user's")
    return forward_kl(student_logits, teacher_logits, temperature)


def raises_what_leaks(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """As a library does that names in its error what it was given."""
    global calls
    calls += student_logits.shape[-1] != 1024  # not when it is tried out before the run
    if calls >= 3:
        raise ValueError(f"could not connect: {os.environ['LEAK']}")
    return forward_kl(student_logits, teacher_logits, temperature)


def waits_for_ever_from_third_step(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """A step that does not end."""
    global calls
    calls += student_logits.shape[-1] != 1024  # not when it is tried out before the run
    if calls >= 3:
        time.sleep(1000)
    return forward_kl(student_logits, teacher_logits, temperature)
