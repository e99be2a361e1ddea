"""Batches of a step, with and without workers, from the start and from the middle."""

from __future__ import annotations

import json
import os
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_distill.config import DataConfig
from mini_distill.data.batch import Batch
from mini_distill.data.loader import TrainingBatches, evaluation_batches
from mini_distill.data.order import ShuffledEpochs
from mini_distill.data.prepare import prepare_data
from mini_distill.errors import MiniDistillError


@pytest.fixture
def sequences(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    """21 sequences of one document each."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(21)))
    config = DataConfig(source="jsonl", path=str(file), eval_fraction=0.0, seq_len=10, packing=False, cache_dir=str(tmp_path / "cache"))
    return prepare_data(config, tiny_tokenizer, show_progress=False).train


def read(sequences: Any, steps: int, first_step: int = 1, **settings: Any) -> list[Batch]:
    """All micro-batches of some steps."""
    batches = TrainingBatches(sequences, **{"seed": 0, "micro_batch_size": 2, "grad_accum_steps": 2, **settings})
    return [batch for step in islice(batches.steps(first_step), steps) for batch in step]


def ids(batches: list[Batch]) -> list[list[int]]:
    return [batch.row_ids.tolist() for batch in batches]


def test_two_workers_give_what_none_gives(sequences: Any) -> None:
    alone, helped = read(sequences, 7), read(sequences, 7, num_workers=2)
    assert ids(alone) == ids(helped)
    assert all(torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels) for a, b in zip(alone, helped, strict=True))


def test_workers_leave_the_random_numbers_of_training_alone(sequences: Any) -> None:
    """A DataLoader draws its workers' seed from torch's own generator, so that dropout differed with num_workers and after a restart."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    read(sequences, 1, num_workers=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restart_continues_the_stream(sequences: Any, num_workers: int) -> None:
    whole = ids(read(sequences, 12))
    for done in (1, 5, 6, 11):
        assert ids(read(sequences, 12 - done, first_step=done + 1, num_workers=num_workers if done == 5 else 0)) == whole[2 * done :]


def test_two_processes_together_read_what_one_reads(sequences: Any) -> None:
    one = ids(read(sequences, 6, micro_batch_size=4, grad_accum_steps=2))
    two = [ids(read(sequences, 6, micro_batch_size=2, grad_accum_steps=2, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_fewer_sequences_than_a_batch_are_repeated(sequences: Any) -> None:
    batch = read(sequences, 1, micro_batch_size=50, grad_accum_steps=1)[0]
    assert sorted(batch.row_ids[:21].tolist()) == list(range(21))
    assert len(batch) == 50


def test_epochs_are_counted_over_all_processes(sequences: Any) -> None:
    assert TrainingBatches(sequences, seed=0, micro_batch_size=7, grad_accum_steps=3, world_size=2).epoch(1) == 2.0


def test_evaluation_reads_each_sequence_once_over_all_processes(sequences: Any) -> None:
    one = ids(list(evaluation_batches(sequences, 4, None)))
    assert sorted(chain(*one)) == list(range(21))
    two = [ids(list(evaluation_batches(sequences, 4, None, rank, 2))) for rank in (0, 1)]
    assert sorted(chain(*two[0], *two[1])) == list(range(21))
    assert ids(list(evaluation_batches(sequences, 4, 2))) == one[:2]


class Failing:
    """Raises, or ends its process, at the sequence with this number."""

    def __init__(self, sequences: Any, dies: bool) -> None:
        self.sequences, self.dies = sequences, dies

    def __len__(self) -> int:
        return 21

    def order(self, seed: int) -> ShuffledEpochs:
        return ShuffledEpochs(21, seed)

    def origins(self, index: int) -> list[str]:
        return self.sequences.origins(index)

    def batch(self, indices: list[int]) -> Batch:
        if 13 in indices:
            if self.dies:
                os._exit(9)
            raise ValueError("the disk says no")
        return self.sequences.batch(indices)


@pytest.mark.parametrize("dies", [True, False])
def test_a_worker_that_fails_is_one_clear_error(sequences: Any, dies: bool) -> None:
    with pytest.raises(MiniDistillError) as caught:
        read(Failing(sequences, dies), 8, num_workers=1)
    message = str(caught.value)
    assert caught.value.exit_code == 8
    assert "\n" not in message and "worker" in message and "data.num_workers" in message
    if not dies:
        assert "the disk says no" in message and "Traceback" not in message
