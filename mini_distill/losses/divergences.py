"""Divergences between the student's and the teacher's next-token distribution: one function each.

Every function takes `(student_logits, teacher_logits)` of shape `(…, vocab)`, both before temperature, and returns a value per
token of shape `(…)`: in nats, in float32 whatever the inputs' dtype (a log-softmax in bfloat16 costs per cents of the gradient),
unmasked, without the factor T². Zero when the distributions are equal (but for the two cross-entropies at the end, whose floor is
an entropy). Gradients flow into the student alone. A token that is impossible for the teacher (a logit of −∞) adds nothing.

    p  teacher's distribution, softmax(teacher_logits / T)        q  student's, softmax(student_logits / T)

To add one: write the function here and a YAML in configs/objective/. Its keyword arguments after `temperature` become
`objective.divergence_options`. One of single tokens says so with `looks_at`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax, softplus

from .catalogue import looks_at
from .reduction import at_least_float32

LOWEST = -1e30
"""Log-probabilities are kept above this: e to it is 0 in any precision, and the logarithm of an impossible token stays finite."""


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p ‖ q) = Σ p · (log p − log q): mass-covering, the student is punished wherever the teacher has mass and it has none.

    A KL, not a cross-entropy: the teacher's entropy is included, so that equality is 0 (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student_logits: `(…, vocab)`.
        teacher_logits: `(…, vocab)`.
        temperature: Softens both distributions.

    Returns:
        `(…)` float32, nats per token.

    Raises:
        ValueError, TypeError: the two are not tensors of one shape.
    """
    _check_logits(student_logits, teacher_logits)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    return _ForwardKL.apply(_softened(student, temperature), _softened(teacher, temperature))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q ‖ p) = Σ q · (log q − log p): mode-seeking, the student is punished for mass where the teacher has none.

    MiniLLM (Gu et al. 2024, arXiv 2306.08543) argues for it where a small student cannot cover the teacher. Arguments, shapes
    and units as in `forward_kl`.
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return _at_least_zero(_kl(log_q, log_p))


def symmetric_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """½ · (KL(p ‖ q) + KL(q ‖ p)) = ½ · Σ (p − q) · (log p − log q): half of Jeffreys' divergence (Jeffreys 1946).

    Punishes missing and superfluous mass alike. Arguments, shapes and units as in `forward_kl`.
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return _at_least_zero(0.5 * (_kl(log_p, log_q) + _kl(log_q, log_p)))


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
    _check("jsd_beta", jsd_beta, lambda beta: 0 <= beta <= 1, "a number from 0 to 1")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    if jsd_beta == 0:
        return _at_least_zero(_kl(log_p, log_q))
    if jsd_beta == 1:
        return _at_least_zero(_kl(log_q, log_p))
    log_m = _log_mixture(log_p, log_q, jsd_beta)
    return _at_least_zero(jsd_beta * _kl(log_p, log_m) + (1 - jsd_beta) * _kl(log_q, log_m))


def skew_forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, skew: float = 0.1) -> Tensor:
    """KL(p ‖ skew · p + (1 − skew) · q): a forward KL that cannot exceed −log(skew), so that single tokens do not dominate.

    DistiLLM (Ko et al. 2024, arXiv 2402.03898, section 3.1).

    Args:
        student_logits: `(…, vocab)`.
        teacher_logits: `(…, vocab)`.
        temperature: Softens both distributions.
        skew: Share of the teacher in the mixture, in [0, 1); 0 is `forward_kl`.

    Returns:
        `(…)` float32, nats per token.

    Raises:
        ValueError: `skew` is not in [0, 1).
    """
    _check("skew", skew, lambda share: 0 <= share < 1, "a number of at least 0 and below 1")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return _at_least_zero(_kl(log_p, log_q if skew == 0 else _log_mixture(log_p, log_q, skew)))


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, skew: float = 0.1) -> Tensor:
    """KL(q ‖ (1 − skew) · p + skew · q): a reverse KL that cannot exceed −log(skew).

    DistiLLM (Ko et al. 2024, arXiv 2402.03898, section 3.1). `skew` is the share of the student in the mixture, in [0, 1); 0 is
    `reverse_kl`. Other arguments, shapes, units and errors as in `skew_forward_kl`.
    """
    _check("skew", skew, lambda share: 0 <= share < 1, "a number of at least 0 and below 1")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return _at_least_zero(_kl(log_q, log_p if skew == 0 else _log_mixture(log_q, log_p, skew)))


def adaptive_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, head_mass: float = 0.5) -> Tensor:
    """Forward KL where the head of the distribution is wrong, reverse KL where the tail is, token by token.

        w · KL(p ‖ q) + (1 − w) · KL(q ‖ p),    w = gap_head / (gap_head + gap_tail)

    The head are the teacher's most likely tokens up to a cumulative probability of `head_mass`, a gap is Σ |p − q| over them or
    over the rest, and the weights take no gradient; without any gap both are ½. AKL (Wu et al. 2024, arXiv 2404.02657, section 5):
    forward KL fits the head first, reverse KL the tail.

    Args:
        student_logits: `(…, vocab)`.
        teacher_logits: `(…, vocab)`.
        temperature: Softens both distributions.
        head_mass: In (0, 1).

    Returns:
        `(…)` float32, nats per token.

    Raises:
        ValueError: `head_mass` is not in (0, 1).
    """
    _check("head_mass", head_mass, lambda mass: 0 < mass < 1, "a number between 0 and 1")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    p, q = log_p.exp(), log_q.detach().exp()
    ordered, places = p.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # the mass of the more likely ones
    gaps = (p - q).abs().gather(-1, places)
    head = gaps.masked_fill(before >= head_mass, 0.0).sum(dim=-1)
    tail = gaps.sum(dim=-1) - head
    total = head + tail
    weight = torch.where(total > 0, head / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
    return _at_least_zero(weight * _kl(log_p, log_q) + (1 - weight) * _kl(log_q, log_p))


def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """½ · Σ |p − q|: the mass that would have to be moved, in [0, 1].

    Bounded, so that no token dominates, and with a weak gradient while the student is far away (Wen et al. 2023, arXiv
    2307.15190, the TVD of f-distillation). Not in nats; other arguments and shapes as in `forward_kl`.
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def alpha_beta(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, ab_alpha: float = 0.2, ab_beta: float = 0.7
) -> Tensor:
    """α-β divergence: −1/(αβ) · Σ [p^α q^β − α/(α+β) · p^(α+β) − β/(α+β) · q^(α+β)].

    ABKD (Wang et al. 2025, arXiv 2505.04560): α says how much it matters where the teacher's mass is, β where the student's is.
    (1, 0) is the forward KL and (0, 1) the reverse KL, as limits; elsewhere on an edge the limit is taken as well.

    Args:
        student_logits: `(…, vocab)`.
        teacher_logits: `(…, vocab)`.
        temperature: Softens both distributions.
        ab_alpha: At least 0.
        ab_beta: At least 0; not both 0.

    Returns:
        `(…)` float32.

    Raises:
        ValueError: one is negative, or both are 0.
    """
    _check("ab_beta", ab_beta, lambda beta: beta >= 0, "a number of at least 0")
    _check("ab_alpha", ab_alpha, lambda alpha: alpha >= 0 and alpha + ab_beta > 0, "a number of at least 0, not 0 together with ab_beta")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    if ab_beta == 0:
        return _at_least_zero(_generalised_kl(log_p, log_q, ab_alpha))
    if ab_alpha == 0:
        return _at_least_zero(_generalised_kl(log_q, log_p, ab_beta))
    both = ab_alpha + ab_beta
    cross = (ab_alpha * log_p + ab_beta * log_q).exp()
    own = ab_alpha / both * (both * log_p).exp() + ab_beta / both * (both * log_q).exp()
    return _at_least_zero(((own - cross) / (ab_alpha * ab_beta)).sum(dim=-1))


@looks_at("likeliest")
def ranking_hinge(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, top_k: int = 16, margin: float = 1.0
) -> Tensor:
    """Mean over pairs of the teacher's `top_k` tokens of max(0, min(margin, tᵢ − tⱼ) − (sᵢ − sⱼ)), with tᵢ > tⱼ.

    The student has to put the teacher's favourites in the teacher's order and apart by the teacher's own distance, but by no more
    than `margin` (a pairwise hinge as in ranking SVMs, Joachims 2002). It looks at ranks among few tokens alone: 0 does not mean
    that the distributions are equal, so it belongs beside another term. Temperature divides the logits of both.

    Args:
        student_logits: `(…, vocab)`.
        teacher_logits: `(…, vocab)`.
        temperature: Divides both.
        top_k: Tokens that are ranked, at least 2; all, where the vocabulary is smaller.
        margin: In units of logits, above 0.

    Returns:
        `(…)` float32.

    Raises:
        ValueError: `top_k` is no whole number of at least 2, or `margin` not above 0.
    """
    _check("margin", margin, lambda distance: distance > 0, "a number above 0")
    student, teacher = _top_pairs(student_logits, teacher_logits, temperature, top_k)
    too_close = (teacher.clamp(max=margin) - student).clamp(min=0)
    return torch.where(teacher > 0, too_close, 0.0).mean(dim=-1)  # a tie has no order to keep


@looks_at("likeliest")
def ranking_logistic(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, top_k: int = 16) -> Tensor:
    """Mean over pairs of the teacher's `top_k` tokens of KL(Bernoulli σ(tᵢ − tⱼ) ‖ Bernoulli σ(sᵢ − sⱼ)).

    RankNet (Burges et al. 2005) with the teacher's own odds as the target, less their entropy. What is said of `ranking_hinge`
    holds here too.
    """
    student, teacher = _top_pairs(student_logits, teacher_logits, temperature, top_k)
    odds = torch.sigmoid(teacher)
    cross = odds * softplus(-student) + (1 - odds) * softplus(student)
    entropy = odds * softplus(-teacher) + (1 - odds) * softplus(teacher)
    return _at_least_zero((cross - entropy).mean(dim=-1))


@looks_at("likeliest")
def teacher_argmax_ce(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """−log q[argmax p]: the teacher's first choice as a hard label, at the token level (Kim & Rush 2016, arXiv 1606.07947).

    A cross-entropy, not a divergence: at equality it is −log max p. Arguments, shapes and units as in `forward_kl`.
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return -log_q.gather(-1, log_p.argmax(dim=-1, keepdim=True)).squeeze(-1)


@looks_at("any")
def teacher_sample_ce(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, num_samples: int = 1) -> Tensor:
    """Mean of −log q[x] over draws x ~ p: the teacher's samples as hard labels, at the token level (Kim & Rush 2016).

    Its expectation is `forward_kl` plus the teacher's entropy, so it is no divergence, and noisier. Drawn from torch's global
    generator, which every step seeds.

    Args:
        student_logits: `(…, vocab)`.
        teacher_logits: `(…, vocab)`.
        temperature: Softens both distributions.
        num_samples: Draws with replacement for each token.

    Returns:
        `(…)` float32, nats per token.

    Raises:
        ValueError: `num_samples` is no whole number of at least 1.
    """
    _check("num_samples", num_samples, lambda count: isinstance(count, int) and count >= 1, "a whole number of at least 1")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    flat = log_p.exp().flatten(0, -2)
    drawn = torch.multinomial(flat, num_samples, replacement=True) if len(flat) else flat.new_zeros(0, num_samples, dtype=torch.int64)
    return -log_q.gather(-1, drawn.view(*log_q.shape[:-1], num_samples)).mean(dim=-1)


# --------------------------------------------------------------------------------------------------------------------- ingredients


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log q, log p) in float32, the teacher's cut off from the graph; finite, so that 0 · log 0 is 0 and has a gradient of 0."""
    _check_logits(student_logits, teacher_logits)
    log_q = log_softmax(_softened(at_least_float32(student_logits), temperature), dim=-1)
    log_p = log_softmax(_softened(at_least_float32(teacher_logits.detach()), temperature), dim=-1)
    return log_q.clamp(min=LOWEST), log_p.clamp_(min=LOWEST)


def _softened(logits: Tensor, temperature: float) -> Tensor:
    """A division by 1 would cost as much as any other."""
    return logits if temperature == 1 else logits / temperature


class _ForwardKL(torch.autograd.Function):
    """KL(p ‖ q) with its gradient in closed form, q − p: the most used one, with half of the passes over memory.

    With t and s the logits, each less its maximum: Σ p · (t − s) + log max p − log max q. Two softmaxes and no other exponential.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        p, q = softmax(teacher, dim=-1), softmax(student, dim=-1)
        difference = (teacher - student).sub_(teacher.amax(-1, keepdim=True) - student.amax(-1, keepdim=True))
        difference.nan_to_num_(nan=0.0, posinf=-LOWEST, neginf=LOWEST)  # tokens that are impossible under one of them, or both
        value = difference.mul_(p).sum(dim=-1) + (p.amax(-1) / q.amax(-1)).log()
        ctx.save_for_backward(q.sub_(p))
        return value.clamp_(min=0.0)  # rounding alone makes it less

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # with create_graph=True
            raise RuntimeError("the gradient of forward_kl is in closed form, without a graph: there is no second derivative")
        (difference,) = ctx.saved_tensors
        return difference * gradient.unsqueeze(-1), None


def _at_least_zero(value: Tensor) -> Tensor:
    """What rounding alone made negative, as 0; the gradient stays, which a clamp would cut off."""
    return value + (value.detach().clamp(min=0.0) - value.detach())


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a ‖ b)."""
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share · a + (1 − share) · b), share in (0, 1)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _generalised_kl(log_a: Tensor, log_b: Tensor, power: float) -> Tensor:
    """1/power² · Σ [a^power · power · (log a − log b) − a^power + b^power]: the α-β divergence on an edge; the KL at power 1."""
    a, b = (power * log_a).exp(), (power * log_b).exp()
    return ((a * power * (log_a - log_b) - a + b) / power**2).sum(dim=-1)


def _top_pairs(student_logits: Tensor, teacher_logits: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """sᵢ − sⱼ and tᵢ − tⱼ ≥ 0 for all pairs i < j of the teacher's top tokens, `(…, pairs)`."""
    _check("top_k", top_k, lambda k: isinstance(k, int) and k >= 2, "a whole number of at least 2")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    top, ids = log_p.topk(min(top_k, log_p.shape[-1]), dim=-1)
    own = log_q.gather(-1, ids)
    i, j = torch.triu_indices(top.shape[-1], top.shape[-1], offset=1, device=top.device)
    return own[..., i] - own[..., j], top[..., i] - top[..., j]


def _check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name}: got {type(logits).__name__}, expected a tensor of shape (…, vocab)")
    if student_logits.shape != teacher_logits.shape:
        student, teacher = list(student_logits.shape), list(teacher_logits.shape)
        raise ValueError(f"student_logits {student} and teacher_logits {teacher}: expected one shape (…, vocab), over the same tokens")


def _check(option: str, value: float, good: Callable[[float], bool], expected: str) -> None:
    """An option comes from a configuration, and may be of any type."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
        raise ValueError(f"{option}: got {value}, expected {expected}")
