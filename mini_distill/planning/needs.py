"""What a run needs of a device: bytes, operations, seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..config import PlanCommand
from ..losses.linear import MEMORY_MIB, TILE
from ..training.objective import build_objective
from .machine import COLD_BYTES, Rates, Stopwatch, given_rates, seconds_of
from .models import Models
from .step import PHASES, is_asked, trace_evaluation, trace_step
from .trace import Trace

PROCESS_BYTES = 50_000_000
"""Of a process on a CPU besides: libraries that are imported late, the tokenizer, the tokenised data (docs/plan.md)."""
HEAP_OF_STEP, HEAP_OF_EVALUATION, HEAP_KEPT = 0.2, 0.1, 0.95
"""What the heap of a process holds on a CPU beyond the small blocks that are alive, as shares of them: in a step, in an evaluation, and
of the step's while there is an evaluation after it (docs/plan.md)."""
PASSES = 12
"""Over the logits of both models, for the terms of an objective and their gradient, where they are not timed."""


@dataclass
class Needs:
    """Of one micro-batch size, on one device.

    Args:
        models: Without their weights.
        config: Settings of the run.
        batch_size: Sequences of the micro-batch.
        supervised_share: Supervised tokens over all positions.
        vocab_size: Tokens of the tokenizer.
        on_gpu: Whether the device is an accelerator.
    """

    models: Models
    config: PlanCommand
    batch_size: int
    supervised_share: float
    vocab_size: int
    on_gpu: bool

    @property
    def tokens(self) -> int:
        """Supervised ones of the micro-batch."""
        return max(1, round(self.batch_size * self.config.data.seq_len * self.supervised_share))

    @cached_property
    def step(self) -> Trace:
        """A micro-batch and the update after it."""
        return trace_step(self.models, self.config, self.batch_size, self.tokens, self.vocab_size, self.on_gpu)

    @cached_property
    def evaluation(self) -> Trace:
        """A batch of held-out text."""
        tokens = max(1, round(self.config.evaluation.batch_size * self.config.data.seq_len * self.supervised_share))
        return trace_evaluation(self.models, self.config, tokens, self.vocab_size)

    def resized(self, batch_size: int) -> Needs:
        """The same with another micro-batch."""
        other = replace(self, batch_size=batch_size)
        other.__dict__["evaluation"] = self.evaluation  # which has a size of its own
        return other

    # ------------------------------------------------------------------------------------------------------------------ memory

    def memory(self) -> dict[str, int]:
        """Bytes of a device by what they are for; `total` is the most at a time, in a step or in an evaluation, `alive` without gaps."""
        teacher, student = self.models.teacher, self.models.student
        trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
        on_device = self.config.teacher.device == "auto"  # else the teacher's weights are elsewhere
        held = {
            "teacher_weights": _weights(teacher) if teacher is not None and on_device else 0,
            "student_weights": _weights(student),
            "moments": 2 * gradients,
            "exchange": gradients if self.config.plan.num_devices > 1 else 0,  # the buckets that DDP sends
            "process": 0 if self.on_gpu else PROCESS_BYTES,
        }
        step = max(self._peak(phase) for phase in PHASES[:-1])
        evaluation = self.evaluation.peaks["evaluation"] + self._kept()
        alive = sum(held.values()) + max(step, evaluation)
        gaps = 0 if self.on_gpu else self._gaps(step, evaluation)
        parts = {
            **held,
            "gradients": gradients,
            "activations": self.step.after["student"],
            "logits": self._logits(),
            "step": step,
            "evaluation": evaluation,
            "gaps": gaps,
        }
        return parts | {"alive": alive, "total": alive + gaps}

    def _peak(self, phase: str) -> int:
        """Bytes of a phase; on a GPU with the terms' gradient, which is of a chunk at a time there; on a CPU with the logits' memory."""
        terms = self._logits() // 2 if self.on_gpu else 0
        return self.step.peaks.get(phase, 0) + (terms if phase == "loss" else self._kept())

    def _kept(self) -> int:
        """Bytes of the logits of the last chunk, whose memory waits for the next (`losses/linear.Scratch`)."""
        if self.on_gpu:
            return 0
        return self._logits() if self.models.teacher is not None and is_asked(self.config) else self._logits() // 2

    def _gaps(self, step: int, evaluation: int) -> int:
        """What the heap holds and nobody uses, when it is largest."""
        of_step = max(self.step.small_peaks.get(phase, 0) for phase in PHASES[:-1])
        in_step = step + HEAP_OF_STEP * of_step
        in_evaluation = evaluation + HEAP_OF_EVALUATION * self.evaluation.small_peaks["evaluation"] + HEAP_KEPT * of_step
        return round(max(in_step, in_evaluation)) - max(step, evaluation)

    def _logits(self) -> int:
        """Bytes of the logits that exist at once, student's and teacher's."""
        budget = (self.config.objective.logits_memory_mib or MEMORY_MIB["cuda" if self.on_gpu else "cpu"]) * 2**20
        return int(min(budget, 2 * 4 * self.vocab_size * self.tokens))

    # -------------------------------------------------------------------------------------------------------------- operations

    def flops(self) -> dict[str, float]:
        """Of a micro-batch by phase: matrix products and attention."""
        return {phase: self.step.flops(phase) for phase in PHASES if self.step.flops(phase)}

    def seconds(self, device: torch.device) -> dict[str, float]:
        """Of a micro-batch by phase, of the update, and of one batch of evaluation."""
        plan = self.config.plan
        clock: Rates | Stopwatch
        if plan.matmul_tflops is not None and plan.memory_gb_per_second is not None:
            clock = given_rates(plan.matmul_tflops, plan.memory_gb_per_second)
            terms = PASSES * 4 * self.tokens * self.vocab_size / clock.bytes
        else:
            clock, terms = Stopwatch(device), self._seconds_of_terms(device)
        spent = {phase: _sum(clock, self.step, phase) for phase in PHASES}
        spent["loss"] += terms
        return spent | {"evaluation": _sum(clock, self.evaluation, "evaluation")}

    def _seconds_of_terms(self, device: torch.device) -> float:
        """The terms of the objective and their gradient on made-up logits, as `losses/linear.py` goes over a chunk.

        Of each tile the passes run in a cache, and nothing of it lies there before: one tile again and again would take half as long.
        """
        objective = build_objective(self.config.objective, self.config.trainer, on_gpu=False)
        if self.models.teacher is None or not is_asked(self.config):
            objective.divergences = []  # against sparse targets they cost little
        if not objective.names:
            return 0.0
        rows = min(self.tokens, max(1, torch.get_num_threads(), TILE // self.vocab_size))
        tiles = min(-(-self.tokens // rows), max(1, COLD_BYTES // (2 * 4 * rows * self.vocab_size)))
        student, teacher = (torch.randn(tiles, rows, self.vocab_size, device=device) for _ in range(2))
        targets = torch.zeros(rows, dtype=torch.long, device=device)

        def call() -> None:
            for of_student, of_teacher in zip(student, teacher, strict=True):
                with torch.enable_grad():
                    leaf = of_student.detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(objective(leaf, of_teacher, targets).loss, leaf)
                of_student.copy_(gradient)  # in the place of the logits

        return self.tokens / (tiles * rows) * seconds_of(call, device)


def _weights(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _sum(clock: Rates | Stopwatch, trace: Trace, phase: str) -> float:
    return sum(operation.count * clock.seconds(operation) for operation in trace.operations(phase))


def largest_micro_batch(needs: Needs, available: int, most: int = 2**14) -> tuple[int, int]:
    """The largest micro-batch whose memory fits, to three parts in a hundred, and its bytes; 0 where not even one sequence does.

    Memory grows in straight pieces, so that a line through two sizes leads near the limit.
    """
    known = {needs.batch_size: needs.memory()["total"]}
    guess = 2 * needs.batch_size if known[needs.batch_size] <= available else 1
    for _ in range(8):
        known[guess] = needs.resized(guess).memory()["total"]
        if known[min(known)] > available:
            return 0, known[min(known)]
        low = max(size for size in known if known[size] <= available)
        high = min((size for size in known if known[size] > available), default=None)
        if low == most or (high is not None and high - low <= max(1, low // 32)):
            break
        first, second = (low, high) if high is not None else sorted(known)[-2:]
        slope = max(1.0, (known[second] - known[first]) / (second - first))
        reached = low + (available - known[low]) / slope
        if high is not None and reached - low < max(1, low // 32):
            break  # the line says that what lies between is not worth another look
        guess = min(max(int(reached), low + 1), most if high is None else high - 1)
    return low, known[low]
