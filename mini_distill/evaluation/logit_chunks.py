"""Both models' logits at the supervised positions of a batch, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.tokenizers import vocabulary_size
from ..losses.reduction import loss_mask, supervised_targets
from ..models.head import LanguageModel

MAX_CHUNK_TOKENS = 1024
MAX_CHUNK_LOGITS = 2**24
"""Logits that exist at once for each model: 64 MB in float32, so 1024 tokens of a vocabulary of 16k and 128 of one of 128k."""


@dataclass(frozen=True)
class LogitChunk:
    """Some of the supervised positions of a batch.

    Attributes:
        rows: Which of them, in row-major order.
        student_logits: `(tokens, vocab)`, real columns only: none that merely pads the embedding.
        teacher_logits: The same of the teacher, or None.
        targets: `(tokens,)` int64, the token that each position predicts.
        num_bytes: `(tokens,)`, bytes of UTF-8 text that each target stands for.
    """

    rows: slice
    student_logits: Tensor
    teacher_logits: Tensor | None
    targets: Tensor
    num_bytes: Tensor


def logit_chunks(student: LanguageModel, teacher: LanguageModel | None, batch: Batch, vocab_size: int) -> Iterator[LogitChunk]:
    """Each trunk runs once; the heads run chunk by chunk, so that no tensor of tokens × vocabulary outlives its chunk.

    Args:
        student: The model that is measured.
        teacher: Beside it, on whatever device; or None.
        batch: On the student's device.
        vocab_size: Columns that are tokens, see `real_vocabulary`.
    """
    size = max(1, min(MAX_CHUNK_TOKENS, MAX_CHUNK_LOGITS // vocab_size))
    targets = supervised_targets(batch.labels)
    # position t predicts token t + 1, so the bytes that count are those of token t + 1
    num_bytes = batch.num_bytes.roll(-1, dims=1)[loss_mask(batch.labels)]
    student_hidden = student.hidden(batch)
    teacher_hidden = None if teacher is None else teacher.hidden(batch.to(_device(teacher)))
    for begin in range(0, len(targets), size):
        rows = slice(begin, min(begin + size, len(targets)))
        teacher_logits = None
        if teacher is not None and teacher_hidden is not None:
            teacher_logits = teacher.head.logits(teacher_hidden[rows])[:, :vocab_size].to(targets.device)
        yield LogitChunk(rows, student.head.logits(student_hidden[rows])[:, :vocab_size], teacher_logits, targets[rows], num_bytes[rows])


def real_vocabulary(tokenizer: Any, *models: LanguageModel | None) -> int:
    """Columns of the logits that are tokens for everybody: the rest pads an embedding to a round size."""
    sizes = [model.model.config.get_text_config().vocab_size for model in models if model is not None]
    return min(vocabulary_size(tokenizer), *sizes)


def _device(model: LanguageModel) -> torch.device:
    return next(model.parameters()).device
