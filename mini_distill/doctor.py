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
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .config import Config, DataConfig
from .data.batch import Batch
from .data.prepare import PreparedData, prepare_data
from .data.row import Row
from .data.tokenizers import vocabulary_size
from .diagnosis.finding import DOUBTFUL, GOOD, WRONG, Finding
from .diagnosis.first_rows import FirstRows, first_rows
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
from .diagnosis.template import check_template
from .errors import ConfigError, ModelError
from .evaluation.samples import printable
from .models.head import LanguageModel
from .models.loading import load_tokenizer
from .models.packed_documents import check_documents_kept_apart
from .run import called, checked
from .students.build import build_student
from .teachers.load import load_shared_tokenizer, load_teacher
from .teachers.online import OnlineTeacher
from .train import distill_step
from .training.objective import build_objective
from .training.process_group import start_processes

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
    opened: dict[str, FirstRows] = {}
    few = dataclasses.replace(config, data=_for_training_alone(config.data))
    data = prepare_data(few.data, tokenizer, opening=first_rows(opened))
    yield from check_rows(few, data, tokenizer)
    yield check_epochs(config, data, rows_limited=any(source.was_cut for source in opened.values()))
    for where, source in opened.items():
        rows = [row for row in source.rows() if isinstance(row, Row)]
        yield from check_template(source.config, rows, tokenizer, _with_templates(config, tokenizer), where)
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


def _for_training_alone(data: DataConfig) -> DataConfig:
    """The same with training rows only, those of the parts of a mixture too; bad rows are counted."""
    alone: dict[str, Any] = {"eval_path": None, "eval_split": None, "eval_fraction": 0.0, "on_bad_row": "skip"}
    parts = {name: {**part, **alone} for name, part in data.mixture.items()}
    return dataclasses.replace(data, mixture=parts, **alone)


def _with_templates(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers that belong to teacher and student, whose vocabularies are known to be the same."""
    found = {"teacher" if config.teacher.kind != "none" else "student": tokenizer}
    student = config.student
    if student.kind == "hf":
        where = {"revision": student.revision, "trust_remote_code": student.trust_remote_code}
        found["student"] = load_tokenizer(str(student.path), **where, where="student.path")  # type: ignore[arg-type]
    return found


def _batch(data: PreparedData, seq_len: int) -> Batch:
    """A few sequences, evenly spread."""
    count = max(2, min(len(data.train), MOST_TOKENS // seq_len))
    chosen = [i * len(data.train) // count for i in range(min(count, len(data.train)))]
    return data.train.batch(sorted(set(chosen)))


class CallableDoctor(ModuleType):
    """`mini_distill.doctor([...])`, with overrides as on the command line."""

    def __call__(self, config: Config | Sequence[str] = ()) -> list[Finding]:
        """The findings; nothing is raised for what they find."""
        found: list[Finding] = called(lambda settings: list(examine(settings)), checked(config, "train", Config))
        return found


sys.modules[__name__].__class__ = CallableDoctor
