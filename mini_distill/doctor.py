"""Does this set-up do what it seems to? A minute with your own models and rows, before you train for days.

python -m mini_distill.doctor teacher=… student=… data=…          the settings of the training
"""

from __future__ import annotations

if __name__ == "__main__":
    from mini_distill.starting import answer_signals

    answer_signals()

    from mini_distill.cli import run_command

    run_command("mini_distill.doctor:doctor")

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from types import ModuleType

import torch

from .cli import load_config
from .config import Config
from .data.batch import Batch
from .data.prepare import PreparedData, prepare_data
from .data.tokenizers import vocabulary_size
from .diagnosis.finding import DOUBTFUL, GOOD, WRONG, Finding
from .diagnosis.models import (
    check_accumulation,
    check_fused,
    check_identity,
    check_mask,
    check_precision,
    check_quality,
    check_shift,
    check_tokens,
)
from .diagnosis.rows import check_epochs, check_rows, learned_text
from .distillation import load_shared_tokenizer, start_processes
from .errors import ConfigError, ModelError
from .evaluation.samples import printable
from .models.head import LanguageModel
from .models.packed_documents import check_documents_kept_apart
from .students.build import build_student
from .teachers.load import load_teacher
from .teachers.online import OnlineTeacher
from .train import distill_step
from .training.objective import build_objective

MOST_ROWS = 200
"""Rows read at most: enough for shares in per cent, and a minute for all checks."""
MOST_TOKENS = 1024
"""Tokens of the batch that models are tried on."""


def doctor(config: Config) -> list[Finding]:
    """Look at rows, models and loss, print a line for each check, and give the findings.

    Nothing is written besides tokenised data, and nothing is trained. `control`, `resume` and `output_dir` are not looked at.

    Raises:
        ConfigError: something is wrong; the lines above say what.
        MiniDistillError: the rows, models or settings cannot even be loaded.
    """
    started, findings = time.perf_counter(), []
    for finding in examine(config):
        print(finding, flush=True)
        findings.append(finding)
    wrong, doubtful = (sum(finding.verdict == verdict for finding in findings) for verdict in (WRONG, DOUBTFUL))
    print(f"\n{len(findings)} checks in {time.perf_counter() - started:.0f} s: {wrong} wrong, {doubtful} doubtful.")
    if wrong:
        raise ConfigError("doctor", f"{wrong} of {len(findings)} checks are wrong", "Each says above what to do.")
    return findings


def examine(config: Config) -> Iterator[Finding]:
    """The checks, the cheap ones first.

    Raises:
        MiniDistillError: the rows, models or settings cannot be loaded.
    """
    accelerator = start_processes("fp32", config.trainer.num_threads)
    tokenizer = load_shared_tokenizer(config)
    few, limited = _few_rows(config)
    data = prepare_data(few.data, tokenizer)
    yield from check_rows(few, data, tokenizer)
    yield check_epochs(config, data, limited)
    batch = _batch(data, config.data.seq_len)
    print(f"  what is learned of a row: {printable(learned_text(batch, tokenizer))}")

    teacher_model = load_teacher(config.teacher, accelerator.device)
    student_model = build_student(
        config.student, teacher=teacher_model, tokenizer=tokenizer, seq_len=config.data.seq_len, seed=config.seed, sizes=None
    )
    student = LanguageModel(student_model.to(accelerator.device)).eval()  # eval: dropout would make every pass another
    teacher = OnlineTeacher(teacher_model) if teacher_model is not None else None
    models = {"teacher": teacher.language_model, "student": student} if teacher is not None else {"student": student}
    batch, vocab_size = batch.to(accelerator.device), vocabulary_size(tokenizer)
    yield from check_tokens(models, tokenizer)
    if config.data.packing:
        yield from _packing(models)
    yield from check_quality(models, [batch], vocab_size)
    if teacher is not None:
        yield check_shift(teacher.language_model, "teacher", batch)
    else:
        yield Finding("teacher", GOOD, f"none in this process ({config.teacher.kind}): shift, identity and quality are not checked")
    yield from _loss(config, student, teacher, batch, vocab_size)


def _loss(config: Config, student: LanguageModel, teacher: OnlineTeacher | None, batch: Batch, vocab_size: int) -> Iterator[Finding]:
    objective = build_objective(config.objective, config.trainer, on_gpu=False)
    objective.vocab_size = vocab_size
    if teacher is None and objective.needs_teacher:
        yield Finding("loss", GOOD, "not checked: its teacher is not in this process")
        return
    if teacher is not None:
        yield from check_identity(objective, teacher, batch, vocab_size)
    if not objective.names:
        yield Finding("loss", GOOD, "only inner states are matched: nothing more to check here")
        return
    yield check_fused(objective, student, teacher, batch)
    yield check_mask(student, teacher, objective, batch, distill_step)
    yield check_accumulation(student, teacher, objective, batch, distill_step)
    autocast = functools.partial(torch.autocast, batch.input_ids.device.type, dtype=torch.bfloat16)
    yield check_precision(student, teacher, objective, batch, distill_step, autocast)


def _packing(models: dict[str, LanguageModel]) -> Iterator[Finding]:
    for name, model in models.items():
        try:
            check_documents_kept_apart(model.model, f"{name}.path")
            yield Finding("packing", GOOD, f"{name}: packed documents do not see one another")
        except ModelError as error:
            yield Finding("packing", WRONG, error.problems[0].what, error.problems[0].remedy)


def _few_rows(config: Config) -> tuple[Config, bool]:
    """The same with no more rows than there is time for, all of them training rows; and whether that left some out."""
    data = config.data
    if data.source == "mixture":
        return config, False
    most = min(MOST_ROWS, data.max_rows or MOST_ROWS)
    own = dataclasses.replace(data, max_rows=most, eval_path=None, eval_split=None, eval_fraction=0.0, on_bad_row="skip")
    return dataclasses.replace(config, data=own), most != data.max_rows


def _batch(data: PreparedData, seq_len: int) -> Batch:
    """A few sequences, evenly spread."""
    count = max(2, min(len(data.train), MOST_TOKENS // seq_len))
    chosen = [i * len(data.train) // count for i in range(min(count, len(data.train)))]
    return data.train.batch(sorted(set(chosen)))


class CallableDoctor(ModuleType):
    """`mini_distill.doctor([...])`, with overrides as on the command line."""

    def __call__(self, overrides: list[str] | Config = ()) -> list[Finding]:  # type: ignore[assignment]
        """The findings; nothing is raised for what they find."""
        config = overrides if isinstance(overrides, Config) else load_config(overrides)
        return list(examine(config))


sys.modules[__name__].__class__ = CallableDoctor
