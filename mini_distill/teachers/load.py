"""The teacher and its tokenizer, from its settings."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import TeacherConfig
from ..models.loading import embedded_path, load_causal_lm, load_tokenizer


def load_teacher(teacher: TeacherConfig, device: torch.device) -> PreTrainedModel | None:
    """The teacher on its device, in its dtype; None for `teacher=none`, `teacher=cached` and `teacher=server`."""
    if teacher.kind in ("none", "cached", "server"):
        return None
    dtype = teacher.dtype if teacher.dtype != "auto" else ("float32" if device.type == "cpu" else "bfloat16")
    model = load_causal_lm(
        teacher_path(teacher),
        revision=teacher.revision,
        dtype=dtype,
        attn_implementation=teacher.attn_implementation,
        trust_remote_code=teacher.trust_remote_code,
        gated=teacher.gated,
        where="teacher.path",
    )
    model.to(torch.device(device if teacher.device == "auto" else teacher.device))  # type: ignore[arg-type]
    return model


def teacher_path(teacher: TeacherConfig) -> str:
    """Folder or hub id of a teacher that there is."""
    path = str(embedded_path()) if teacher.kind == "embedded" else teacher.path
    assert path is not None
    return path


def load_teacher_tokenizer(teacher: TeacherConfig) -> PreTrainedTokenizerBase:
    """That of a teacher that there is, or of its cache."""
    if teacher.kind == "cached":
        return load_tokenizer(str(Path(str(teacher.cache_dir)).expanduser() / "tokenizer"), where="teacher.cache_dir")
    path, where = teacher_path(teacher), "teacher.path"
    return load_tokenizer(path, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code, where=where)
