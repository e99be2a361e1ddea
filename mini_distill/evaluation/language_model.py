"""What held-out text says about a student and its teacher: a pure core on logits, in sums that add up.

Nothing is divided before the end: batches and processes add their sums, and `metrics` divides once by the global number of
supervised tokens. Logits are softened by nothing here (temperature 1), whatever the objective of the training was.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..losses.divergences import forward_kl
from ..losses.sparse import SampledRows, SparseRows
from ..teachers.cached import ABOUT_TEACHER
from .calibration import calibration_gaps, expected_calibration_error

BETWEEN = ("forward_kl", "reverse_kl", "top1_agreement", "topk_agreement", "rank_correlation")
"""What is measured between student and teacher; the last two in a closer look only."""

Sums = dict[str, Tensor]
"""Float64 totals over supervised tokens, by name; scalars, and `(bins,)` for calibration."""


def measure(student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, num_bytes: Tensor) -> Sums:
    """The sums of one chunk of supervised positions.

    The log-softmax is taken in float32, whatever the logits came in: bfloat16 can make a divergence negative.

    Args:
        student_logits: `(tokens, vocab)`, real columns only: no column that merely pads the embedding.
        teacher_logits: The same of the teacher, or None.
        targets: `(tokens,)` int64, the token that each position predicts.
        num_bytes: `(tokens,)`, bytes of UTF-8 text that each target stands for.

    Returns:
        `tokens`, `bytes` and, for each model, `*_nll` (nats) and `*_calibration`; with a teacher also `forward_kl` =
        KL(teacher‖student), `reverse_kl` = KL(student‖teacher), both in nats, and `top1_agreement` (tokens).
    """
    return totals(per_token(student_logits, teacher_logits, targets), num_bytes)


def per_token(student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> dict[str, Tensor]:
    """What `measure` sums, token by token: each `(tokens,)`, in float64 but for the ids.

    Returns:
        For each model `*_nll` (nats), `*_confidence` (probability of its most probable token), `*_top` (that token's id), `*_correct`
        (whether it is the target); with a teacher also `teacher_entropy`, `forward_kl`, `reverse_kl` (nats) and `top1_agreement`.
    """
    student = student_logits.float().log_softmax(-1)
    values = _of_one("student", student, targets)
    if teacher_logits is None:
        return values
    teacher = teacher_logits.float().log_softmax(-1)
    values |= _of_one("teacher", teacher, targets)
    return values | {
        "teacher_entropy": -_wide(torch.where(teacher == -math.inf, 0.0, teacher.exp() * teacher).sum(-1)),
        "forward_kl": _wide(_kl(teacher, student)),
        "reverse_kl": _wide(_kl(student, teacher)),
        "top1_agreement": _wide(values["student_top"] == values["teacher_top"]),
    }


def totals(values: dict[str, Tensor], num_bytes: Tensor) -> Sums:
    """The sums of what `per_token` gives, and of what else is named in `BETWEEN`."""
    nll = values["student_nll"]
    sums = {"tokens": torch.tensor(float(len(nll)), dtype=torch.float64, device=nll.device), "bytes": _wide(num_bytes).sum()}
    for name in ("student", "teacher"):
        if f"{name}_nll" in values:
            sums[f"{name}_nll"] = values[f"{name}_nll"].sum()
            sums[f"{name}_calibration"] = calibration_gaps(values[f"{name}_confidence"], values[f"{name}_correct"])
    return sums | {name: values[name].sum() for name in BETWEEN if name in values}


def measure_cached(student_logits: Tensor, rows: SparseRows, about_teacher: dict[str, Tensor], targets: Tensor, num_bytes: Tensor) -> Sums:
    """The same against a teacher of whom a cache keeps, or a server gives, a few entries of each token, and the rest in numbers.

    The forward KL is there for sampled rows, whose estimate of it is unbiased, and the reverse KL never.

    Args:
        student_logits: `(tokens, vocab)`, real columns only.
        rows: The teacher's entries.
        about_teacher: `target_log_prob`, `top_log_prob`, `top_id`, `exact_entropy`, `(tokens,)` each.
        targets: `(tokens,)`.
        num_bytes: `(tokens,)`.
    """
    student = student_logits.float().log_softmax(-1)
    top_id = about_teacher["top_id"].to(targets)
    gaps = calibration_gaps(_wide(about_teacher["top_log_prob"]).exp(), _wide(top_id == targets))
    sums = measure(student_logits, None, targets, num_bytes) | {
        "teacher_nll": -_wide(about_teacher["target_log_prob"]).sum(),
        "teacher_calibration": gaps,
        "top1_agreement": _wide(student.argmax(-1) == top_id).sum(),
    }
    if isinstance(rows, SampledRows):
        estimate = rows.compare("forward_kl", forward_kl, student, {}) + rows.entropy.to(student)  # the exact entropy is known here
        sums["forward_kl"] = (_wide(estimate) - _wide(about_teacher["exact_entropy"])).sum()
    return sums


def _of_one(name: str, log_probs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    nll = -log_probs.gather(-1, targets[:, None])[:, 0]  # (tokens,)
    top_log_prob, top = log_probs.max(-1)
    confidence, correct = _wide(top_log_prob).exp(), _wide(top == targets)
    return {f"{name}_nll": _wide(nll), f"{name}_confidence": confidence, f"{name}_top": top, f"{name}_correct": correct}


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) of log-probabilities, per token. A token impossible under p adds nothing, also where q has it at -inf too."""
    difference = torch.where(p == -math.inf, 0.0, p - q)
    return (p.exp() * difference).sum(-1)


def _wide(values: Tensor) -> Tensor:
    """In float64; Apple's GPUs have none, so there on the CPU."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def nothing(with_teacher: bool, device: torch.device | str = "cpu") -> Sums:
    """The sums over no token at all, in the layout that every process shares."""
    none, logits = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, 1, device=device)
    return measure(logits, logits if with_teacher else None, none, none)


def nothing_cached(rows: SparseRows, device: torch.device | str = "cpu") -> Sums:
    """The same in the layout of `measure_cached`; `rows` holds none."""
    none, logits = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, 1, device=device)
    return measure_cached(logits, rows, dict.fromkeys(ABOUT_TEACHER, none.float()), none, none)


def add(total: Sums, more: Sums) -> Sums:
    """Both together, name by name."""
    return {name: total[name] + more[name] for name in total}


def over_all_processes(sums: Sums, gather_sum: Callable[[Tensor], Tensor]) -> Sums:
    """The totals of all processes, in one exchange.

    Args:
        sums: This process's totals, in the same layout everywhere.
        gather_sum: Sums a float64 vector over the processes.
    """
    total = gather_sum(torch.cat([value.flatten() for value in sums.values()]))
    parts = total.split([value.numel() for value in sums.values()])
    return {name: part.view_as(value) for (name, value), part in zip(sums.items(), parts, strict=True)}


def metrics(sums: Sums) -> dict[str, float]:
    """The means, perplexities and calibration errors of global totals.

    Args:
        sums: Totals over all batches and processes, with at least one token.

    Returns:
        `tokens`, and for each model `*_perplexity`, `*_nll` (nats per token), `*_bits_per_byte` (left out where no token
        stands for text), `*_ece`; with a teacher `forward_kl`, `reverse_kl` (nats per token), `top1_agreement` (share).
    """
    num_tokens, num_bytes = sums["tokens"].item(), sums["bytes"].item()
    found = {"tokens": num_tokens}
    for name in ("student", "teacher"):
        if f"{name}_nll" in sums:
            nll = sums[f"{name}_nll"].item()
            found[f"{name}_perplexity"] = perplexity(nll / num_tokens)
            found[f"{name}_nll"] = nll / num_tokens
            if num_bytes:
                found[f"{name}_bits_per_byte"] = nll / math.log(2) / num_bytes
            found[f"{name}_ece"] = expected_calibration_error(sums[f"{name}_calibration"], num_tokens)
    for name in BETWEEN:
        if name in sums:
            found[name] = sums[name].item() / num_tokens
    return found


def perplexity(nll: float) -> float:
    """exp(nats per token), infinite where a float64 cannot hold it."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
