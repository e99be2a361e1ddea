"""Divergences between the student's and the teacher's next-token distribution: one function each.

Every function takes `(student_logits, teacher_logits)` of shape `(…, vocab)`, both before temperature, and returns a value per
token of shape `(…)`: in nats, in float32 whatever the inputs' dtype (a log-softmax in bfloat16 costs per cents of the gradient),
unmasked, without the factor T². Zero when the distributions are equal. Gradients flow into the student alone.

    p  teacher's distribution, softmax(teacher_logits / T)        q  student's, softmax(student_logits / T)

To add one: write the function here and a YAML in configs/objective/. Its keyword arguments after `temperature` become
`objective.divergence_options`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .reduction import at_least_float32


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p ‖ q) = Σ p · (log p − log q): mass-covering, the student is punished wherever the teacher has mass and it has none.

    A KL, not a cross-entropy: the teacher's entropy is included, so that equality is 0 (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student_logits: `(…, vocab)`.
        teacher_logits: `(…, vocab)`.
        temperature: Softens both distributions.

    Returns:
        `(…)` float32, nats per token.
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q ‖ p) = Σ q · (log q − log p): mode-seeking, the student is punished for mass where the teacher has none.

    MiniLLM (Gu et al. 2024, arXiv 2306.08543) argues for it where a small student cannot cover the teacher. Arguments, shapes
    and units as in `forward_kl`.
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


def jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, jsd_beta: float = 0.5) -> Tensor:
    """Generalised Jensen–Shannon divergence: β · KL(p ‖ m) + (1 − β) · KL(q ‖ m) with m = β·p + (1 − β)·q.

    Equation 1 of GKD (Agarwal et al. 2024, arXiv 2306.13649). Bounded by log 2 at β = ½. As β → 0 the formula vanishes while
    its direction becomes that of the forward KL, and as β → 1 that of the reverse KL; the ends are therefore *defined* as
    those: `jsd_beta=0` is `forward_kl`, `jsd_beta=1` is `reverse_kl`. Some frameworks have the ends the other way round.

    Args:
        student_logits: `(…, vocab)`.
        teacher_logits: `(…, vocab)`.
        temperature: Softens both distributions.
        jsd_beta: Weight of the teacher in the mixture, in [0, 1].

    Returns:
        `(…)` float32, nats per token.

    Raises:
        ValueError: `jsd_beta` is not in [0, 1].
    """
    if not 0 <= jsd_beta <= 1:
        raise ValueError(f"jsd_beta: got {jsd_beta}, expected a number from 0 to 1")
    if jsd_beta == 0:
        return forward_kl(student_logits, teacher_logits, temperature)
    if jsd_beta == 1:
        return reverse_kl(student_logits, teacher_logits, temperature)
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    log_m = torch.logaddexp(log_p + math.log(jsd_beta), log_q + math.log1p(-jsd_beta))
    kl_teacher = (log_p.exp() * (log_p - log_m)).sum(dim=-1)
    kl_student = (log_q.exp() * (log_q - log_m)).sum(dim=-1)
    return jsd_beta * kl_teacher + (1 - jsd_beta) * kl_student


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log q, log p) in float32, the teacher's cut off from the graph."""
    log_q = log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    log_p = log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    return log_q, log_p
