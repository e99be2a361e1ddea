"""Batches and an evaluator over tiny models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mini_distill.config import EvaluationConfig
from mini_distill.data.batch import Batch
from mini_distill.evaluation.evaluator import Evaluator


def random_batch(seed: int, rows: int = 3, seq: int = 16, vocab: int = 62, prompt: int = 4) -> Batch:
    """Random tokens; the first `prompt` of each row are not supervised; each token stands for 1 to 3 bytes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab, (rows, seq), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    positions = torch.arange(seq).expand(rows, -1).contiguous()
    return Batch(ids, labels, positions, torch.arange(rows), torch.randint(1, 4, (rows, seq), generator=generator))


@pytest.fixture
def make_evaluator(tiny_tokenizer: Any) -> Callable[..., Evaluator]:
    """`make_evaluator(batches, teacher, **settings)` on one process, on the CPU."""

    def build(batches: list[Batch], teacher: Any = None, gather_sum: Any = lambda value: value, **settings: Any) -> Evaluator:
        return Evaluator(
            EvaluationConfig(**{"max_batches": None, **settings}),
            held_out=[],
            batches=lambda: iter(batches),
            teacher=teacher,
            tokenizer=tiny_tokenizer,
            device="cpu",
            autocast=nullcontext,
            gather_sum=gather_sum,
            show_progress=False,
        )

    return build


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """`make_batch(seed, rows=3, seq=16)`."""
    return random_batch


@pytest.fixture
def batches() -> list[Batch]:
    """Two batches with ragged supervision."""
    second = random_batch(1, rows=2)
    second.labels[0, 9:] = -100
    return [random_batch(0), second]
