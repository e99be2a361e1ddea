"""The models of a run without their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config
from ..models.loading import weightless_causal_lm
from ..students.build import TeacherSizes, build_student
from ..teachers.load import teacher_path


@dataclass(frozen=True)
class Models:
    """What meets in a step.

    Attributes:
        teacher: On the meta device, in its dtype; None where no live teacher answers.
        student: On the meta device, float32.
    """

    teacher: PreTrainedModel | None
    student: PreTrainedModel


def weightless_models(config: Config, tokenizer: PreTrainedTokenizerBase, sizes: TeacherSizes | None, on_gpu: bool) -> Models:
    """Teacher and student as `prepare` of a training makes them, from their configurations alone.

    Args:
        config: Of the training.
        tokenizer: Shared by both.
        sizes: Those of a teacher that is in a cache only.
        on_gpu: Whether the run is on an accelerator, which decides the teacher's dtype.

    Raises:
        ModelError: a configuration is not there, or transformers cannot make a model of it.
        ConfigError: the student cannot be made from the teacher, or for this length.
    """
    teacher = _teacher(config, on_gpu)
    student = config.student
    if student.kind == "hf":
        assert student.path is not None
        made = weightless_causal_lm(
            student.path,
            revision=student.revision,
            attn_implementation=student.attn_implementation,
            trust_remote_code=student.trust_remote_code,
            where="student.path",
        )
        return Models(teacher, made)
    with torch.device("meta"):
        made = build_student(student, teacher=teacher, tokenizer=tokenizer, seq_len=config.data.seq_len, seed=config.seed, sizes=sizes)
    return Models(teacher, made)


def _teacher(config: Config, on_gpu: bool) -> PreTrainedModel | None:
    teacher = config.teacher
    if teacher.kind in ("none", "cached", "server"):
        return None
    return weightless_causal_lm(
        teacher_path(teacher),
        revision=teacher.revision,
        dtype=teacher.dtype if teacher.dtype != "auto" else ("bfloat16" if on_gpu else "float32"),
        attn_implementation=teacher.attn_implementation,
        trust_remote_code=teacher.trust_remote_code,
        gated=teacher.gated,
        where="teacher.path",
    )
