"""What is wrong with the usual cache, for comparison: the k most likely tokens, renormalised as if there were no others.

    objective.divergence=scripts.renormalised_top_k.renormalised_top_k objective.divergence_options={k: 8}

The student is told that everything else is impossible, and believes it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import log_softmax


def renormalised_top_k(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, k: int = 8) -> Tensor:
    """KL(p' ‖ q) with p' the teacher's k most likely tokens, renormalised: `(…, vocab)` -> `(…)`."""
    log_q = log_softmax(student_logits / temperature, dim=-1)
    top, ids = (teacher_logits.detach() / temperature).topk(min(k, teacher_logits.shape[-1]), dim=-1)
    log_p = log_softmax(top, dim=-1)
    return (log_p.exp() * (log_p - log_q.gather(-1, ids))).sum(dim=-1)
