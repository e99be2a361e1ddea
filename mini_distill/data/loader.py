"""The order of the sequences, a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..errors import DistributedError
from .batch import Batch
from .order import Draws

EVALUATION_SEED = 0  # the held-out sample is the same in every run
WORKER_TIMEOUT = 120  # seconds


class Stream(Protocol):
    """Sequences that can be drawn for ever: `Sequences`, or a `Mixture` of several."""

    def __len__(self) -> int: ...
    def batch(self, indices: list[int]) -> Batch: ...
    def origins(self, index: int) -> list[str]: ...
    def order(self, seed: int) -> Draws: ...


class TrainingBatches:
    """The micro-batches of each optimizer step, for one process.

    Step s takes the s-th `micro × accumulation × processes` sequences of the stream; micro-step m of process r takes
    `micro` of them from `(m · processes + r) · micro` on. Workers, the cut into micro-batches and a resumption cannot change
    the order, and the position in the data is the step.

    Args:
        sequences: Where the sequences come from.
        seed: Decides the order.
        micro_batch_size: Sequences per process and pass.
        grad_accum_steps: Passes per optimizer step.
        rank: This process.
        world_size: All processes.
        num_workers: Processes that read batches ahead; 0: none.
        pin_memory: Copy batches into page-locked memory, for a faster way to a GPU.
    """

    def __init__(
        self,
        sequences: Stream,
        *,
        seed: int,
        micro_batch_size: int,
        grad_accum_steps: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.sequences, self.draw = sequences, sequences.order(seed)
        self.micro_batch_size, self.grad_accum_steps = micro_batch_size, grad_accum_steps
        self.rank, self.world_size = rank, world_size
        self.num_workers, self.pin_memory = num_workers, pin_memory

    @property
    def global_batch_size(self) -> int:
        """Sequences of an optimizer step, over all passes and processes."""
        return self.micro_batch_size * self.grad_accum_steps * self.world_size

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` optimizer steps."""
        return step * self.global_batch_size / len(self.sequences)

    def indices(self, step: int, micro_step: int) -> list[int]:
        """The sequences of this process in a micro-step of `step` (the first step is 1)."""
        begin = (step - 1) * self.global_batch_size + (micro_step * self.world_size + self.rank) * self.micro_batch_size
        return [self.draw(k) for k in range(begin, begin + self.micro_batch_size)]

    def steps(self, first_step: int = 1) -> Iterator[list[Batch]]:
        """For ever: the micro-batches of `first_step`, of the step after it, and so on."""
        batches = self._read(index for step in count(first_step) for index in self._of_step(step))
        while True:
            yield [next(batches) for _ in range(self.grad_accum_steps)]

    def _of_step(self, step: int) -> Iterator[list[int]]:
        return (self.indices(step, micro_step) for micro_step in range(self.grad_accum_steps))

    def _read(self, indices: Iterator[list[int]]) -> Iterator[Batch]:
        if self.num_workers == 0:
            return map(self.sequences.batch, indices)
        loader = DataLoader(
            _Batches(self.sequences),
            sampler=indices,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            timeout=WORKER_TIMEOUT,
        )
        return _name_worker_errors(iter(loader))


class _Batches(Dataset[Batch]):
    """What a worker does: slice the memory map."""

    def __init__(self, sequences: Stream) -> None:
        self.sequences = sequences

    def __getitem__(self, indices: list[int]) -> Batch:
        return self.sequences.batch(indices)


def _name_worker_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise DistributedError("data.num_workers", f"a data worker died or hangs ({first})", "Lower data.num_workers; 0 reads in the training process.") from error


def evaluation_batches(sequences: Stream, batch_size: int, max_batches: int | None, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Batches of held-out sequences, the same in every run, each sequence at most once.

    The order is a fixed permutation, so that the first `max_batches` batches (over all processes) are a fair sample.
    """
    order = np.random.default_rng(EVALUATION_SEED).permutation(len(sequences))
    batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)][:max_batches]
    return map(sequences.batch, batches[rank::world_size])
