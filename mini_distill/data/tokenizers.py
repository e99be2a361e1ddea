"""What a tokenizer is, and whether two are the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ModelError


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that decides the tokens: token→id map, merges, normaliser, pre-tokeniser, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map}
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        content["pipeline"] = {key: value for key, value in pipeline.items() if key not in ("padding", "truncation")}  # set per call
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id plus one: the real columns of the logits. Vocabularies may have holes, so it is not their length."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, where: str = "student.path") -> None:
    """Teacher and student must give every token the same id; sizes prove nothing, neither equal nor different ones.

    Raises:
        ModelError: names the first tokens that differ.
    """
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    if ours == theirs:
        return
    moved = sorted((token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]), key=ours.__getitem__)
    only_teacher = sorted(ours.keys() - theirs.keys(), key=ours.__getitem__)
    only_student = sorted(theirs.keys() - ours.keys(), key=theirs.__getitem__)
    details = [f"{len(moved)} tokens have other ids, such as {moved[0]!r}: {ours[moved[0]]} and {theirs[moved[0]]}"] if moved else []
    for only, name in ((only_teacher, "teacher"), (only_student, "student")):
        details += [f"{len(only)} tokens such as {only[0]!r} only in the {name}'s"] if only else []
    raise ModelError(
        where,
        f"teacher and student have different tokenizers ({'; '.join(details)})",
        "Logits compare only token by token: choose a student of the teacher's family, or one from scratch (student=mini_2m).",
    )
