"""The objective: weighted, named terms, as sums over supervised tokens.

    loss = kl_weight · T² · divergence(student, teacher; T)  +  ce_weight · cross-entropy(student, data)

Sums, never means: the one division, by the supervised tokens of the whole optimizer step, belongs to the training loop, which
alone knows their number over all micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from .reduction import at_least_float32


@dataclass(frozen=True)
class ObjectiveSums:
    """What a batch contributes.

    Attributes:
        loss: Scalar with a graph: the weighted sum over tokens that is optimised.
        terms: Each term's unweighted sum over tokens in nats, detached, by name (`forward_kl`, `ce`).
    """

    loss: Tensor
    terms: dict[str, Tensor]


class Objective:
    """`kl_weight · T² · divergence + ce_weight · CE` of a batch's supervised tokens.

    Args:
        divergence: `(student_logits, teacher_logits, temperature, **options) -> (tokens,)`, or None if `kl_weight` is 0.
        name: The divergence's name in the metrics.
        options: Further arguments of the divergence.
        vocab_size: Tokens of the tokenizer. Columns of the logits beyond it are padding of the embedding: they get no
            probability on either side, so models padded differently compare. None: no padding.
        temperature: Softens both distributions in the divergence. The cross-entropy is always at temperature 1.
        scale_by_temperature_squared: Multiply the divergence by T². The gradient of a divergence at temperature T shrinks as
            1/T², so this keeps its size, and with it the meaning of the weights (Hinton et al. 2015, section 2.1).
        kl_weight: Plain multiplier of the divergence.
        ce_weight: Plain multiplier of the cross-entropy.
    """

    def __init__(
        self,
        divergence: Callable[..., Tensor] | None,
        name: str,
        options: dict[str, Any] | None = None,
        *,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = True,
        kl_weight: float = 0.5,
        ce_weight: float = 0.5,
    ) -> None:
        self.divergence, self.name, self.options = divergence, name, options or {}
        self.vocab_size = vocab_size
        self.temperature, self.kl_weight, self.ce_weight = temperature, kl_weight, ce_weight
        self.divergence_weight = kl_weight * (temperature**2 if scale_by_temperature_squared else 1.0)

    @property
    def needs_teacher(self) -> bool:
        """Whether `teacher_logits` has to be given."""
        return self.kl_weight > 0

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> ObjectiveSums:
        """The sums over a batch's supervised tokens.

        Args:
            student_logits: `(tokens, vocab)` at the supervised positions. No token at all is allowed: the loss is then
                exactly 0, with a graph, so that every process of a group can call backward.
            teacher_logits: `(tokens, vocab)` at the same positions; not looked at when `kl_weight` is 0.
            targets: `(tokens,)` the data's own next tokens.
        """
        student_logits = at_least_float32(student_logits[:, : self.vocab_size])
        loss = student_logits[:0].sum()  # exactly 0, and with a graph even when no token is supervised
        terms = {}
        if self.kl_weight > 0:
            assert self.divergence is not None and teacher_logits is not None
            divergence = self.divergence(student_logits, teacher_logits[:, : self.vocab_size], self.temperature, **self.options).sum()
            loss = loss + self.divergence_weight * divergence
            terms[self.name] = divergence.detach()
        if self.ce_weight > 0:
            ce = cross_entropy(student_logits, targets, reduction="sum")
            loss = loss + self.ce_weight * ce
            terms["ce"] = ce.detach()
        return ObjectiveSums(loss, terms)

    def formula(self) -> str:
        """The loss with its numbers, for people: `0.5 · forward_kl + 0.5 · ce`."""
        parts = []
        if self.kl_weight > 0:
            squared = f" · {self.temperature:g}²" if self.divergence_weight != self.kl_weight else ""
            details = [f"{k}={v}" for k, v in self.options.items()] + ([f"T={self.temperature:g}"] if self.temperature != 1 else [])
            parts.append(f"{self.kl_weight:g}{squared} · {self.name}" + (f"({', '.join(details)})" if details else ""))
        if self.ce_weight > 0:
            parts.append(f"{self.ce_weight:g} · ce")
        return " + ".join(parts)
