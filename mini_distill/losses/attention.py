"""How far the student's attention is from the teacher's: a value per query position.

`relation_kl` compares what attention is made of and needs no attention probabilities, nor the same number of heads or width;
`attention_mse` and `attention_kl` compare the probabilities, which only eager attention hands out. All return `(batch, seq)`, in
float32 or wider, zero where both are equal; gradients flow into the student alone. Keyword arguments become the term's `options`.

Axes: B batch, S sequence (queries, then keys), R relation heads, D channels of one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from .reduction import at_least_float32


def relation_kl(student_states: Tensor, teacher_states: Tensor, position_ids: Tensor, *, num_relation_heads: int = 16) -> Tensor:
    """KL(teacher ‖ student) between how positions relate to one another, per query (MiniLMv2, Wang et al. 2021, arXiv 2012.15828).

    The channels are cut into relation heads, whatever the model's own heads are; in each, the relation of a query to the positions
    x that it can see is softmax(x xᵀ / √D), between queries and queries, keys and keys, or values and values. Unlike in the paper,
    whose encoders see all positions, a query here sees itself and what comes before it in its own document (a narrower window
    that a model may have is not looked at).

    The relations of one sequence at a time exist, R · S · S numbers, in forward and again in backward.

    Args:
        student_states: `(batch, seq, width)`, the queries, keys or values of one layer.
        teacher_states: `(batch, seq, width)`, the same of the teacher; its width may be another.
        position_ids: `(batch, seq)`; a document begins where they do not count on by one. What a position cannot see changes
            neither its value nor a gradient, even if it is not a number.
        num_relation_heads: R; divides both widths. The paper takes 48 or 64, with 16 channels each.

    Returns:
        `(batch, seq)` float32 or wider, nats, averaged over relation heads. NaN where a position sees what is not finite.

    Raises:
        ValueError: the shapes do not belong together, or `num_relation_heads` does not divide the widths.
    """
    _check_states(student_states, teacher_states, position_ids, num_relation_heads)
    visible = _visible(position_ids)
    with torch.autocast(student_states.device.type, enabled=False):  # it would round the products
        rows = [
            checkpoint(_relation_kl, *row, num_relation_heads, use_reentrant=False, preserve_rng_state=False)
            for row in zip(student_states, teacher_states.detach(), visible, strict=True)
        ]
    return torch.stack(rows)


def attention_mse(student_attention: Tensor, teacher_attention: Tensor) -> Tensor:
    """The squared difference of the attention probabilities, summed over keys and averaged over heads.

    After TinyBERT (Jiao et al. 2020, arXiv 1909.10351, equation 7), which differs in two ways: it compares the scores before the
    softmax, which models do not hand out (its authors found them to converge faster than probabilities), and takes the mean over
    keys, which would shrink with every position of padding or of another document. Heads are compared one to one; where their
    numbers differ, the mean over the student's heads is compared with the mean over the teacher's.

    Args:
        student_attention: `(batch, heads, seq, seq)` probabilities of one layer.
        teacher_attention: `(batch, heads, seq, seq)`, of any number of heads.

    Returns:
        `(batch, seq)` float32 or wider, from 0 to 2.

    Raises:
        ValueError: the shapes do not belong together.
    """
    student, teacher = _same_heads(student_attention, teacher_attention)  # (B, heads or 1, S, S)
    return (student - teacher).square().sum(dim=-1).mean(dim=1)


def attention_kl(student_attention: Tensor, teacher_attention: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the attention probabilities, averaged over heads.

    Computed as Σ (p · log(p / q) − p + q), which is the same for probabilities that sum to 1 and is never negative for those that
    do so only up to the rounding of bfloat16. Heads are compared one to one; where their numbers differ, the mean over the
    student's heads is compared with the mean over the teacher's.

    Args:
        student_attention: `(batch, heads, seq, seq)` probabilities of one layer.
        teacher_attention: `(batch, heads, seq, seq)`, of any number of heads.

    Returns:
        `(batch, seq)` float32 or wider, nats; finite where the student has no mass and the teacher has.

    Raises:
        ValueError: the shapes do not belong together.
    """
    q, p = _same_heads(student_attention, teacher_attention)  # (B, heads or 1, S, S)
    smallest = torch.finfo(student_attention.dtype).tiny  # the gradient p / q can still be written in the student's dtype
    terms = torch.xlogy(p, p) - p * q.clamp(min=smallest).log() - p + q
    return terms.sum(dim=-1).mean(dim=1)


def _relation_kl(student: Tensor, teacher: Tensor, visible: Tensor, num_heads: int) -> Tensor:
    """Of one sequence: states `(S, width)` and `(S, width)`, visible `(S, S)` -> `(S,)`."""
    finite = student.isfinite().all(dim=-1) & teacher.isfinite().all(dim=-1)
    log_q = _log_relations(student, finite, visible, num_heads)  # (R, S, S)
    log_p = _log_relations(teacher, finite, visible, num_heads)
    ratio = (log_p - log_q).masked_fill(~visible, 0.0)  # where both are −∞
    value = (log_p.exp() * ratio).sum(dim=-1).mean(dim=0)
    return value.masked_fill((visible & ~finite).any(dim=-1), torch.nan)


def _log_relations(states: Tensor, finite: Tensor, visible: Tensor, num_heads: int) -> Tensor:
    """log softmax(x xᵀ / √D) over the visible positions, −∞ elsewhere: `(S, width)` -> `(R, S, S)`.

    States that are not finite are taken out before the product, whose backward would multiply them by the zeros of the mask: NaN.
    """
    states = at_least_float32(states).masked_fill(~finite[:, None], 0.0)
    heads = states.unflatten(-1, (num_heads, -1)).transpose(0, 1)  # (R, S, D)
    scores = heads @ heads.mT / heads.shape[-1] ** 0.5
    return log_softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)


def _visible(position_ids: Tensor) -> Tensor:
    """Which keys a query sees: itself and what comes before it in its document, `(B, S)` -> `(B, S, S)` bool.

    Documents are told apart as transformers does for its own masks.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    document = begins.cumsum(dim=-1)
    return (document[:, :, None] == document[:, None, :]).tril()


def _check_states(student: Tensor, teacher: Tensor, position_ids: Tensor, num_heads: int) -> None:
    shapes = tuple(student.shape), tuple(teacher.shape), tuple(position_ids.shape)
    if student.dim() != 3 or teacher.dim() != 3 or not shapes[0][:2] == shapes[1][:2] == shapes[2]:
        what = f"student_states, teacher_states and position_ids have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}"
        raise ValueError(f"{what}, expected (batch, seq, width) twice and (batch, seq)")
    if num_heads < 1 or shapes[0][2] % num_heads or shapes[1][2] % num_heads:
        what = f"got {num_heads}, expected a number that divides both widths, the student's {shapes[0][2]} and the teacher's {shapes[1][2]}"
        raise ValueError(f"num_relation_heads: {what}")


def _same_heads(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or wider and with equally many heads, the teacher's cut off from its graph."""
    ours, theirs = tuple(student.shape), tuple(teacher.shape)
    if len(ours) != 4 or len(theirs) != 4 or ours[0] != theirs[0] or ours[2:] != theirs[2:]:
        what = f"student_attention and teacher_attention have shapes {ours} and {theirs}"
        raise ValueError(f"{what}, expected (batch, heads, seq, seq) twice, the same but for heads")
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if ours[1] != theirs[1]:
        return student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    return student, teacher
