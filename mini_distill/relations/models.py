"""Which teacher goes with which student, and paths that have to be there."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..config import StudentConfig, TeacherConfig
from ..contract import shown
from ..errors import Problem
from ..storage import near_path


def check_models(teacher: TeacherConfig, student: StudentConfig) -> Iterator[Problem]:
    """Teacher and student, each alone and together."""
    yield from check_model("teacher", teacher)
    yield from check_server(teacher)
    yield from check_model("student", student)
    if teacher.kind == "none" and student.kind == "from_teacher":
        yield Problem("student.kind", "from_teacher, and there is no teacher", "Choose a teacher, or student=mini_2m.")
    if teacher.kind == "cached" and student.kind == "from_teacher":
        remedy = "Choose student=mini_2m, or name the teacher itself besides teacher.cache_dir."
        yield Problem("student.kind", "from_teacher, and a cache has no layers", remedy)
    if teacher.kind == "server" and student.kind == "from_teacher":
        yield Problem("student.kind", "from_teacher, and a server gives no layers", "Choose student=mini_2m, or student=hf student.path=….")
    if teacher.kind == "cached" and teacher.cache_dir is None:
        yield Problem(
            "teacher.cache_dir", "missing, and teacher.kind is cached", "Give the folder that python -m mini_distill.cache wrote."
        )
    if teacher.kind == "none" and teacher.cache_dir is not None:
        yield Problem("teacher.cache_dir", "given, and teacher.kind is none", "Choose teacher=cached.")
    if teacher.kind in ("none", "cached") and teacher.cache_kind is not None:
        yield Problem("teacher.cache_kind", f"given, and teacher.kind is {teacher.kind}: nobody to ask", "Leave it out.")
    if teacher.cache_k is not None and teacher.cache_kind not in ("sampled", "topk"):
        what = f"given, and teacher.cache_kind is {shown(teacher.cache_kind)}"
        yield Problem("teacher.cache_k", what, "It belongs to sampled and topk.")
    if teacher.cache_dir is not None and teacher.cache_kind is None:
        yield from check_local_path("teacher.cache_dir", teacher.cache_dir, is_local=True)
    if teacher.kind == "none" and student.kind == "scratch" and student.tokenizer is None:
        yield Problem("student.tokenizer", "missing, and there is no teacher to take one from", "Give the folder or hub id of a tokenizer.")
    if teacher.kind != "none" and student.tokenizer is not None:
        yield Problem("student.tokenizer", "given, and the student uses the teacher's", "Leave it out, or set teacher=none.")


def check_model(where: str, part: TeacherConfig | StudentConfig) -> Iterator[Problem]:
    """Where one of them comes from; `where` is its group."""
    if part.kind == "hf" and part.path is None:
        yield Problem(f"{where}.path", f"missing, and {where}.kind is hf", "Give a folder or a hub id.")
    elif part.kind == "server" and part.path is None:
        yield Problem(f"{where}.path", "missing, and the tokenizer is taken from there", "Give the folder or hub id of the served model.")
    elif part.path is not None and part.kind in ("hf", "server"):
        yield from check_local_path(f"{where}.path", part.path)
    elif part.path is not None:
        yield Problem(f"{where}.path", f"given, and {where}.kind is {part.kind}", f"Choose {where}=hf.")
    if part.trust_remote_code and part.revision is None and not os.path.isdir(os.path.expanduser(part.path or "")):
        yield Problem(f"{where}.trust_remote_code", "true without a pinned revision", f"Set {where}.revision to a commit you have read.")


def check_server(teacher: TeacherConfig) -> Iterator[Problem]:
    """Settings of a teacher on a server, and of no other."""
    defaults = TeacherConfig()
    if teacher.kind != "server":
        for name in ("url", "model", "top_k", "num_requests", "timeout"):
            if getattr(teacher, name) != getattr(defaults, name):
                yield Problem(f"teacher.{name}", f"given, and teacher.kind is {teacher.kind}", "Choose teacher=server.")
        return
    if teacher.url is None:
        yield Problem("teacher.url", "missing, and teacher.kind is server", "Give its address, such as http://host:8000.")
    elif not re.match(r"https?://[^/]", teacher.url):
        yield Problem("teacher.url", "is no address, expected http://… or https://…")  # not shown: it can hold a password
    for name in ("dtype", "device", "attn_implementation"):
        if getattr(teacher, name) != getattr(defaults, name):
            yield Problem(f"teacher.{name}", "given, and the model runs on a server", "Leave it out, and set it there.")
    if teacher.cache_dir is not None:
        yield Problem("teacher.cache_dir", "given, and teacher.kind is server", "Choose teacher=cached: the cache needs no server.")
    if teacher.cache_kind is not None:
        remedy = "Write it (python -m mini_distill.cache teacher=server …), and train with teacher=cached."
        yield Problem("teacher.cache_kind", "given, and teacher.kind is server", remedy)


def check_local_path(where: str, path: str, is_local: bool = False) -> Iterator[Problem]:
    """A path that is, or can only be, meant locally must exist; `org/name` may be a hub id, unless there is a folder `org` here."""
    parent = Path(os.path.expanduser(path)).parent
    is_local = is_local or path.startswith((".", "/", "~")) or path.count("/") > 1
    if (is_local or ("/" in path and os.path.isdir(parent))) and not exists(path):
        remedy = f"There is a folder '{parent}' here, so it is not looked for on the hub." if not is_local else ""
        yield Problem(where, f"no such file or folder (got {shown(path)})", near_path(Path(os.path.expanduser(path))) or remedy)


def exists(path: str) -> bool:
    """Also for what cannot be a path: the functions of `os.path` answer where those of `Path` raise (too long, ~nobody)."""
    return os.path.exists(os.path.expanduser(path))


def check_heads(student: StudentConfig) -> Iterator[Problem]:
    """The shape of a student from scratch, which no other has."""
    if student.kind != "scratch":
        own = [f.name for f in dataclasses.fields(student) if "(scratch)" in f.metadata["help"]]
        given = [name for name in own if getattr(student, name) is not None]
        if student.kind == "hf" and student.num_layers is not None:
            given.append("num_layers")
        for name in given:
            yield Problem(
                f"student.{name}",
                f"given, and a student of kind {student.kind} is shaped elsewhere",
                "Choose student=mini_2m or another scratch preset.",
            )
        return
    for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size"):
        if getattr(student, name) is None:
            yield Problem(f"student.{name}", "missing for a student from scratch", "Choose a preset such as student=mini_2m, or give it.")
    hidden, heads, kv_heads = student.hidden_size, student.num_heads, student.num_kv_heads
    if hidden and heads and hidden % (2 * heads):
        yield Problem(
            "student.hidden_size",
            f"got {hidden}, expected an even multiple of student.num_heads={heads}",
            "Rotary positions need heads of even width.",
        )
    if heads and kv_heads and heads % kv_heads:
        yield Problem("student.num_kv_heads", f"got {kv_heads}, expected a divisor of student.num_heads={heads}")
