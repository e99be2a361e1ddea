"""The order of the sequences, a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import count

import numpy as np

from .batch import Batch
from .order import Stream
from .read_ahead import read_ahead

EVALUATION_SEED = 0  # the held-out sample is the same in every run


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
        """For ever: the micro-batches of `first_step`, of the step after it, and so on.

        Raises:
            DistributedError: a data worker died, hangs or raised.
        """
        batches = self._read(index for step in count(first_step) for index in self._of_step(step))
        while True:
            yield [next(batches) for _ in range(self.grad_accum_steps)]

    def _of_step(self, step: int) -> Iterator[list[int]]:
        return (self.indices(step, micro_step) for micro_step in range(self.grad_accum_steps))

    def _read(self, indices: Iterator[list[int]]) -> Iterator[Batch]:
        here = self.num_workers == 0
        batches = map(self.sequences.batch, indices) if here else read_ahead(self.sequences, indices, self.num_workers)
        return map(_pin, batches) if self.pin_memory else batches


def _pin(batch: Batch) -> Batch:
    return Batch(**{f.name: getattr(batch, f.name).pin_memory() for f in fields(batch)})


def evaluation_batches(sequences: Stream, batch_size: int, max_batches: int | None, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Batches of held-out sequences, the same in every run, each sequence at most once.

    The order is a fixed permutation, so that the first `max_batches` batches (over all processes) are a fair sample.
    """
    order = np.random.default_rng(EVALUATION_SEED).permutation(len(sequences))
    batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)][:max_batches]
    return map(sequences.batch, batches[rank::world_size])
