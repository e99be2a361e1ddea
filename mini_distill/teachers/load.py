"""The teacher and its tokenizer, from the settings."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config, TeacherConfig
from ..data.prepare import PreparedData
from ..data.tokenizers import check_same_tokenizer, tokenizer_fingerprint, vocabulary_size
from ..errors import ModelError
from ..models.head import embedding_rows
from ..models.loading import embedded_path, load_causal_lm, load_tokenizer
from .cache_files import Side
from .cached import CachedTeacher
from .online import OnlineTeacher
from .server import ServerTeacher, open_server
from .targets import Teacher


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


def open_teacher(
    config: Config,
    model: PreTrainedModel | None,
    who: dict[str, Any] | None,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> tuple[Teacher | None, CachedTeacher | ServerTeacher | None]:
    """Where the training's targets come from, and those of the held-out text where no teacher in this process gives them.

    `who` is what `model` is, to be compared with the cache.

    Raises:
        CacheError: the cache is damaged, incomplete, or of something else.
        ModelError: a server does not answer, or not as it has to.
    """
    if (server := open_server(config.teacher, tokenizer)) is not None:
        server.check_length(config.data.seq_len)
        return server, server
    if config.teacher.cache_dir is None:
        return (OnlineTeacher(model) if model is not None else None), None
    wanted: dict[str, Any] = {"data": data.fingerprint_parts, "tokenizer": tokenizer_fingerprint(tokenizer)}
    if who is not None:
        wanted["teacher"] = who
    folder = Path(config.teacher.cache_dir).expanduser()
    look_through = partial(look_through_together, accelerator)
    held_out = CachedTeacher(folder, wanted, "held_out", look_through) if model is None and data.held_out is not None else None
    return CachedTeacher(folder, wanted, "train", look_through), held_out


def look_through_together(accelerator: Accelerator, side: Side) -> dict[int, str]:
    """The damaged shards of a side. The processes of a machine, which read the same files, look at a share each; all learn of all."""
    on_this_machine = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), accelerator.num_processes)
    found = side.damaged(range(accelerator.local_process_index % on_this_machine, side.num_shards, on_this_machine))
    return dict(sorted(shard for part in gather_object([found]) for shard in part.items()))


def load_shared_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The one tokenizer of teacher and student.

    Raises:
        ModelError: an hf student brings another tokenizer than the teacher's.
    """
    teacher, student = config.teacher, config.student
    own = None
    if student.kind == "hf":
        assert student.path is not None
        own = load_tokenizer(student.path, revision=student.revision, trust_remote_code=student.trust_remote_code, where="student.path")
    if teacher.kind == "none":
        return own if own is not None else load_tokenizer(str(student.tokenizer), where="student.tokenizer")
    tokenizer = load_teacher_tokenizer(teacher)
    if own is not None:
        check_same_tokenizer(tokenizer, own, where="student.path")
    return tokenizer


def check_vocabulary(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Every token of the tokenizer needs an embedding; more embeddings than tokens (padding) are fine."""
    size = vocabulary_size(tokenizer)
    if model is not None and (rows := embedding_rows(model)) < size:
        raise ModelError(
            f"{where}.path", f"the tokenizer has ids up to {size - 1}, the model embeds {rows}", "Use the model's own tokenizer."
        )
