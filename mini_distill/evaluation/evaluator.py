"""Student and teacher on the same held-out text: how good each is, how far apart, how well it knows when it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import EvaluationConfig, FullEvaluationConfig
from ..data.batch import Batch
from ..errors import DataError, NumericsError
from ..losses.linear import TeacherRows
from ..models.head import LanguageModel
from ..onlooker import bar
from ..out_of_memory import memory_errors
from ..teachers.cached import CachedTeacher
from ..teachers.server import ServerTeacher
from .hooks import EvaluationContext, load_hooks, run_hooks
from .isolation import without_side_effects
from .language_model import Sums, add, measure, measure_cached, metrics, nothing, nothing_cached, over_all_processes
from .logit_chunks import logit_chunks, real_vocabulary
from .samples import Sample, side_by_side


class _CutShort(Exception):
    """The run was asked to stop."""


class Evaluator:
    """Measures a student against its teacher; to be called as often as wished, without any effect on the training.

    Args:
        config: What is measured.
        held_out: The held-out sequences, for the prompts of the samples.
        batches: Makes a fresh iterator over this process's evaluation batches.
        teacher: The teacher, or None.
        cached: Its targets of the held-out sequences, where there is a cache or a server instead of a teacher.
        tokenizer: The tokenizer of both models. Its length is the number of real tokens: columns beyond it pad an embedding
            and get no probability.
        device: Where the student is.
        autocast: Makes the context of the forward passes (mixed precision, or nothing).
        gather_sum: Sums a float64 tensor over all processes; the identity on one.
        show_progress: Whether to draw a progress bar.
        output_dir: The folder of the run, for hooks that write something.
        stop: Whether this process was asked to stop; then an evaluation ends, on all processes, without a result.

    Raises:
        ConfigError: a hook cannot be imported.
        ModelError: the teacher's logits are not its head applied to its hidden states.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        *,
        held_out: Any,
        batches: Callable[[], Iterable[Batch]],
        teacher: PreTrainedModel | None,
        tokenizer: Any,
        device: torch.device | str,
        autocast: Callable[[], AbstractContextManager[Any]],
        gather_sum: Callable[[Tensor], Tensor],
        show_progress: bool,
        output_dir: Path | None = None,
        cached: CachedTeacher | ServerTeacher | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.held_out, self.batches = config, held_out, batches
        self.teacher, self.tokenizer, self.device = teacher, tokenizer, torch.device(device)
        self.autocast, self.gather_sum, self.show_progress, self.output_dir = autocast, gather_sum, show_progress, output_dir
        self.cached, self.stop = cached, stop
        self.hooks = load_hooks(config.hooks)

    def __call__(self, student: PreTrainedModel, step: int) -> dict[str, float]:
        """All metrics of `student` after `step` optimizer steps, the same on every process, and those of the hooks.

        Returns:
            `eval/student_perplexity`, `eval/student_nll` (nats per token), `eval/student_bits_per_byte`, `eval/student_ece`,
            with a teacher the same of it, `eval/forward_kl`, `eval/reverse_kl` (nats per token, temperature 1) and
            `eval/top1_agreement` (share of tokens); `eval/tokens`, the supervised tokens measured. Nothing where any process was
            asked to stop on the way: the batch, or the hook, that is under way is the last.

        Raises:
            DataError: nothing in the held-out text is supervised.
            ConfigError: a hook fails, or returns something that is no metric.
            NumericsError: the logits of one of the models are not finite.
            OutOfMemory: memory ran out.
        """
        remedies = [smaller_batches(self.config), "set teacher.dtype=bfloat16"]
        size = f"with {self.config.batch_size} sequences"
        with without_side_effects(student, self.teacher), memory_errors("evaluation.batch_size", size, remedies):
            try:
                return self._measured(student, step)
            except _CutShort:
                return {}

    def _measured(self, student: PreTrainedModel, step: int) -> dict[str, float]:
        sums = self._sums(student)
        sums["stop"] = torch.full_like(sums["tokens"], self.stop())  # on any process, told in the same exchange
        sums = over_all_processes(sums, self.gather_sum)
        if sums.pop("stop"):
            raise _CutShort
        if not sums["tokens"]:
            raise DataError("data.eval_path", "no token of the held-out text is supervised", "Hold out more rows, or check their format.")
        measured = {f"eval/{name}": value for name, value in metrics(sums).items()}
        _check_finite(measured, step)
        return measured | run_hooks(self.hooks, self._context(student, step), taken=measured, before_each=self._check_stop)

    def _check_stop(self) -> None:
        """All processes go on, or none does: a hook may exchange with the others."""
        if self.gather_sum(torch.tensor(float(self.stop()), device=self.device)):
            raise _CutShort

    def samples(self, models: Mapping[str, PreTrainedModel | None], seed: int) -> list[Sample]:
        """What each model writes after the same prompts; `models` by the name to print."""
        return side_by_side(self.config, self.tokenizer, models, self.held_out, seed)

    def _sums(self, student: PreTrainedModel) -> Sums:
        """This process's totals over its batches."""
        student_lm = LanguageModel(student, "student")
        teacher_lm = None if self.teacher is None else LanguageModel(self.teacher, "teacher")
        total = self._nothing()
        with self.autocast():
            for batch in self._progress(islice(self.batches(), self.config.max_batches)):
                if self.stop():
                    break
                for sums in self._measure(student_lm, teacher_lm, batch.to(self.device)):
                    total = add(total, sums)
        return total

    def _measure(self, student: LanguageModel, teacher: LanguageModel | None, batch: Batch) -> Iterator[Sums]:
        """The sums of a batch, a bounded number of supervised positions at a time."""
        vocab = real_vocabulary(self.tokenizer, student, teacher)
        cached: TeacherRows | None = None if self.cached is None else self.cached(batch)
        about_teacher = None if self.cached is None else self.cached.about_teacher(batch)
        for chunk in logit_chunks(student, teacher, batch, vocab):
            if about_teacher is not None:
                assert cached is not None
                about = {name: values[chunk.rows] for name, values in about_teacher.items()}
                yield measure_cached(chunk.student_logits, cached.rows(chunk.rows, vocab), about, chunk.targets, chunk.num_bytes)
                continue
            teacher_logits = chunk.teacher_logits if cached is None else cached.rows(chunk.rows, vocab)
            yield measure(chunk.student_logits, teacher_logits, chunk.targets, chunk.num_bytes)

    def _nothing(self) -> Sums:
        """The sums over no token at all, in the layout that every process shares."""
        if self.cached is not None and not self.cached.is_dense:
            return nothing_cached(self.cached.nothing(), self.device)
        return nothing(self.teacher is not None or self.cached is not None, self.device)

    def _progress(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        return bar(batches, desc="evaluating", unit="batch", total=self.config.max_batches, leave=False, show=self.show_progress)

    def _context(self, student: PreTrainedModel, step: int) -> EvaluationContext:
        return EvaluationContext(student, self.teacher, self.tokenizer, step, self.batches, self.device, self.output_dir, self.gather_sum)


def smaller_batches(config: EvaluationConfig | FullEvaluationConfig) -> str:
    """What to do where a batch does not fit."""
    if config.max_batches is None:
        return "lower evaluation.batch_size, which changes no result"
    return f"halve evaluation.batch_size and double evaluation.max_batches (now {config.max_batches}), which changes no result"


def _check_finite(measured: Mapping[str, float], step: int) -> None:
    """A cross-entropy that is no number comes from logits that are none; a perplexity may overflow without."""
    for who, remedy in (
        ("teacher", "Load it with teacher.dtype=float32 and trainer.precision=fp32."),
        ("student", "Lower trainer.learning_rate, or use trainer.precision=fp32."),
    ):
        if not isfinite(measured.get(f"eval/{who}_nll", 0.0)):
            raise NumericsError(f"evaluation after step {step}", f"the {who}'s logits not finite on held-out text", remedy)
