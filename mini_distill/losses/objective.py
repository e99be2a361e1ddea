"""The objective: weighted, named terms, as sums over supervised tokens.

    loss = kl_weight · T² · divergence(student, teacher; T)  +  ce_weight · cross-entropy(student, data)  +  Σ further terms

Sums, never means: the one division, by the supervised tokens of the whole optimizer step, belongs to the training loop, which
alone knows their number over all micro-batches and processes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss

from .linear import Head, Scratch, TeacherRows, linear_terms
from .reduction import at_least_float32
from .schedule import Schedule, multiplier
from .sparse import SampledRows, SparseRows, TopKRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ObjectiveSums:
    """What a batch contributes.

    Attributes:
        loss: Scalar with a graph: the weighted sum over tokens that is optimised.
        terms: Each term's unweighted sum over tokens in nats, detached, by name (`forward_kl`, `ce`).
    """

    loss: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class DivergenceTerm:
    """weight · T² · divergence(student, teacher; T).

    Attributes:
        name: In metrics and schedules.
        divergence: `(student_logits, teacher_logits, temperature, **options) -> (tokens,)`.
        weight: Plain multiplier.
        temperature: Softens both distributions.
        options: Further arguments of the divergence.
        scale_by_temperature_squared: Multiply by T². The gradient of a divergence at temperature T shrinks as 1/T², so this
            keeps its size, and with it the meaning of the weights (Hinton et al. 2015, section 2.1); those of which this does not
            hold are in `catalogue.FALL_AS_ONE_OVER_T`.
    """

    name: str
    divergence: Callable[..., Tensor]
    weight: float
    temperature: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    scale_by_temperature_squared: bool = True

    @property
    def factor(self) -> float:
        """What the sum over tokens is multiplied by: the weight, with T² where it belongs to it."""
        return self.weight * (self.temperature**2 if self.scale_by_temperature_squared else 1.0)

    def sum(self, student_logits: Tensor, teacher: Tensor | SparseRows, log_probs: Callable[[float], Tensor]) -> Tensor:
        """Over tokens, unweighted; `log_probs` gives the student's at a temperature."""
        if isinstance(teacher, Tensor):
            return self.divergence(student_logits, teacher, self.temperature, **self.options).sum()
        name = self.divergence.__name__
        return teacher.compare(name, self.divergence, log_probs(self.temperature), self.options).sum()

    def formula(self) -> str:
        """For people: `0.5 · 2² · forward_kl(T=2)`."""
        squared = f" · {self.temperature:g}²" if self.factor != self.weight else ""
        details = [f"{k}={v}" for k, v in self.options.items()] + ([f"T={self.temperature:g}"] if self.temperature != 1 else [])
        return f"{self.weight:g}{squared} · {self.name}" + (f"({', '.join(details)})" if details else "")


class InnerMatching(Protocol):
    """Terms that compare what lies within the models (`teachers/matching.py`)."""

    def weights(self) -> dict[str, float]:
        """Each term's, by name."""

    def watching(self) -> AbstractContextManager[None]:
        """Forward passes within are watched."""

    def sums(self, batch: Any) -> dict[str, Tensor]:
        """Each term over a batch's supervised positions, unweighted, with its graph."""


class Objective:
    """The weighted sum of divergences from the teacher and the cross-entropy with the data, over a batch's supervised tokens.

    Args:
        divergence: That of the first term, see `DivergenceTerm`; None if `kl_weight` is 0.
        name: Its name in the metrics.
        options: Further arguments of the divergence.
        vocab_size: Tokens of the tokenizer. Columns of the logits beyond it are padding of the embedding: they get no
            probability on either side, so models padded differently compare. None: no padding.
        temperature: Softens both distributions in the divergence. The cross-entropy is always at temperature 1.
        scale_by_temperature_squared: See `DivergenceTerm`.
        kl_weight: Plain multiplier of the divergence.
        ce_weight: Plain multiplier of the cross-entropy.
        further: More divergences.
        schedules: Term name -> factor on its weight over the optimizer steps.
        memory_mib: Budget for the logits of a chunk, see `linear_terms`.
        compile: Compile the terms with torch.compile: one kernel instead of a dozen passes over a chunk's logits. Those against
            sparse rows, whose number of entries differs from chunk to chunk, stay as they are; so do all where the compiler fails.
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
        further: Sequence[DivergenceTerm] = (),
        schedules: Mapping[str, Schedule] | None = None,
        memory_mib: float | None = None,
        compile: bool = False,
    ) -> None:
        self.divergences = list(further)
        if kl_weight > 0:
            assert divergence is not None
            first = DivergenceTerm(name, divergence, kl_weight, temperature, options or {}, scale_by_temperature_squared)
            self.divergences.insert(0, first)
        self.ce_weight, self.vocab_size, self.memory_mib = ce_weight, vocab_size, memory_mib
        self.schedules, self.step = schedules or {}, 1
        self.scratch = Scratch()
        self.matching: InnerMatching | None = None  # once the models are there
        self._dense_sums: Callable[..., Tensor] = _compiled(self._term_sums) if compile else self._term_sums

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has to be asked."""
        return bool(self.divergences) or self.matching is not None

    @property
    def names(self) -> list[str]:
        """The terms, in the order of their sums."""
        return [term.name for term in self.divergences] + (["ce"] if self.ce_weight > 0 else [])

    def at_step(self, step: int) -> Objective:
        """The objective with the weights of optimizer step `step`."""
        now = copy.copy(self)
        now.step = step
        return now

    def factors(self) -> list[float]:
        """What each term's sum is multiplied by at this step: weight, T² and schedule."""
        plain = [term.factor for term in self.divergences] + ([self.ce_weight] if self.ce_weight > 0 else [])
        return [factor * multiplier(self.schedules.get(name), self.step) for name, factor in zip(self.names, plain, strict=True)]

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> ObjectiveSums:
        """The sums over a batch's supervised tokens, from whole logits: the definition, and what `fused` must equal.

        Args:
            student_logits: `(tokens, vocab)` at the supervised positions. No token at all is allowed: the loss is then
                exactly 0, with a graph, so that every process of a group can call backward.
            teacher_logits: `(tokens, vocab)` at the same positions; not looked at without a divergence.
            targets: `(tokens,)` the data's own next tokens.
        """
        columns = slice(self.vocab_size)
        teacher_logits = None if teacher_logits is None else teacher_logits[:, columns]
        sums = self._sums(student_logits[:, columns], teacher_logits, targets)
        loss = student_logits[:0].sum() + (sums * sums.new_tensor(self.factors())).sum()
        return ObjectiveSums(loss, dict(zip(self.names, sums.detach(), strict=True)))

    def fused(self, student_hidden: Tensor, student_head: Head, teacher: TeacherRows | None, targets: Tensor) -> ObjectiveSums:
        """The same from the input of the output heads; the logits of a few tokens exist at a time (`losses/linear.py`).

        Args:
            student_hidden: `(tokens, hidden)` at the supervised positions; no token at all is allowed.
            student_head: The student's output head.
            teacher: Its targets at the same positions; not looked at without a divergence.
            targets: `(tokens,)` the data's own next tokens.
        """
        if not self.names:  # inner states alone: every parameter still gets a gradient, of zero
            unused = [p.flatten()[:0].sum() for p in student_head.module.parameters() if p.requires_grad]
            return ObjectiveSums(sum(unused, start=student_hidden[:0].sum()).float(), {})
        teacher = teacher if self.divergences else None
        loss, sums = linear_terms(
            student_hidden,
            student_head,
            teacher,
            targets,
            self._sums,
            self.factors(),
            vocab_size=self.vocab_size,
            memory_mib=self.memory_mib,
            scratch=Scratch.on(student_hidden.device, self.scratch),
        )
        return ObjectiveSums(loss, dict(zip(self.names, sums, strict=True)))

    def watching(self) -> AbstractContextManager[None]:
        """The forward passes of both models within are watched, where inner states are matched."""
        return self.matching.watching() if self.matching is not None else nullcontext()

    def with_matching(self, sums: ObjectiveSums, batch: Any) -> ObjectiveSums:
        """Add the terms that compare inner states, of the passes that were just watched."""
        if self.matching is None:
            return sums
        matched, weights = self.matching.sums(batch), self.matching.weights()
        factors = {name: weights[name] * multiplier(self.schedules.get(name), self.step) for name in matched}
        loss = sum((factors[name] * value for name, value in matched.items()), start=sums.loss)
        return ObjectiveSums(loss, sums.terms | {name: value.detach() for name, value in matched.items()})

    def _sums(self, student_logits: Tensor, teacher: Tensor | SparseRows | None, targets: Tensor) -> Tensor:
        """`_term_sums`, compiled where that is asked for."""
        sums = self._term_sums if isinstance(teacher, SampledRows | TopKRows) else self._dense_sums
        return sums(student_logits, teacher, targets)

    def _term_sums(self, student_logits: Tensor, teacher: Tensor | SparseRows | None, targets: Tensor) -> Tensor:
        """The sum of each term over some tokens, `(terms,)`."""
        student_logits = at_least_float32(student_logits)
        known: dict[float, Tensor] = {}

        def log_probs(temperature: float) -> Tensor:
            """The student's, once for all terms that ask for them."""
            if temperature not in known:
                known[temperature] = log_softmax(student_logits / temperature if temperature != 1 else student_logits, dim=-1)
            return known[temperature]

        sums = []
        for term in self.divergences:
            assert teacher is not None
            sums.append(term.sum(student_logits, teacher, log_probs))
        if self.ce_weight > 0:
            sums.append(nll_loss(log_probs(1.0), targets, reduction="sum"))
        return torch.stack(sums)

    def formula(self) -> str:
        """The loss with its numbers, for people: `0.5 · forward_kl + 0.5 · ce`."""
        parts = [term.formula() for term in self.divergences] + ([f"{self.ce_weight:g} · ce"] if self.ce_weight > 0 else [])
        matched = self.matching.weights() if self.matching is not None else {}
        parts += [f"{weight:g} · {name}" for name, weight in matched.items()]
        scheduled = [" (on a schedule)" if name in self.schedules else "" for name in [*self.names, *matched]]
        return " + ".join(part + mark for part, mark in zip(parts, scheduled, strict=True))


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, compiled at its first call; on a machine that cannot (no C compiler), as it is, with a line that says so."""
    fast = torch.compile(function, dynamic=True)

    def call(*arguments: Any) -> Tensor:
        nonlocal fast
        try:
            return fast(*arguments)
        except Exception as error:  # a compiler's many; the function's own it raises again
            value = function(*arguments)
            why = " ".join(str(error).partition("\n\n")[0].split())  # advice on how to report a bug follows
            logger.warning("objective.compile: the loss cannot be compiled here, and runs as it is (%s)", why)
            fast = function
            return value

    return call
