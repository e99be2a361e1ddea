"""Processes that read batches ahead of the training process."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError, DistributedError, Problem
from .batch import Batch
from .order import Stream

WORKER_TIMEOUT = 120.0
"""Seconds without a batch after which a worker is taken to hang."""
LOOK_EVERY = 2.0
"""Seconds after which a missing batch makes us look whether its worker still lives."""
REMEDY = "Lower data.num_workers; 0 reads in the training process."


def read_ahead(sequences: Stream, indices: Iterator[list[int]], num_workers: int) -> Iterator[Batch]:
    """The batches of these sequences, in this order, read by `num_workers` processes.

    Raises:
        DistributedError: a worker died, hangs or raised; names the documents that it was reading.
        DataError: what a worker read is not what was written.
    """
    awaited: deque[list[int]] = deque()
    batches = _start(sequences, _noting(indices, awaited), num_workers)
    # Python's own way of ending would wait for ever for workers that do not listen to SIGTERM.
    stop = Finalize(None, _kill, (batches._workers,), exitpriority=10)
    try:
        while True:
            batch = _wait_for(batches, sequences, awaited)
            awaited.popleft()
            yield batch
    finally:
        stop()


def _kill(workers: list[Any]) -> None:
    """They only read: there is nothing to clean up."""
    for worker in workers:
        worker.kill()


def _noting(indices: Iterator[list[int]], awaited: deque[list[int]]) -> Iterator[list[int]]:
    for some in indices:
        awaited.append(some)
        yield some


def _start(sequences: Stream, indices: Iterator[list[int]], num_workers: int) -> Any:
    handler = signal.getsignal(signal.SIGCHLD)
    loader = DataLoader(
        _Batches(sequences),
        sampler=indices,
        batch_size=None,  # a sample is a batch already
        collate_fn=_as_it_is,
        num_workers=num_workers,
        timeout=LOOK_EVERY,
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),  # torch's own would lose a random number, and training with workers differ from without
    )
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)  # torch's would raise in the midst of whatever the main thread is doing
    return batches


def _as_it_is(sample: Any) -> Any:
    return sample


def _leave_signals_to_parent(_: int) -> None:
    """Ctrl-C, a closed terminal and a cluster's SIGTERM reach every process; the training process needs its workers to finish the step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _wait_for(batches: Any, sequences: Stream, awaited: deque[list[int]]) -> Batch:
    waited = 0.0
    while True:
        try:
            arrays = next(batches)
            break
        except (RuntimeError, OSError, EOFError) as error:
            waited += LOOK_EVERY
            if "timed out" in str(error) and waited < WORKER_TIMEOUT:
                continue
            what = "hangs" if "timed out" in str(error) else "died"
            raise DistributedError("data.num_workers", f"a data worker {what} (reading {_named(sequences, awaited)})", REMEDY) from error
    if isinstance(arrays, _Failure):
        if arrays.of_data:
            raise DataError.from_problems(arrays.of_data)
        raise DistributedError("data.num_workers", f"a data worker failed (reading {_named(sequences, awaited)}: {arrays.what})", REMEDY)
    return Batch(*map(torch.from_numpy, arrays))


def _named(sequences: Stream, awaited: deque[list[int]]) -> str:
    first, *others = [origin for index in awaited[0] for origin in sequences.origins(index)]
    return f"{first} and {len(others)} others" if others else first


@dataclass
class _Failure:
    """What a worker gives instead of a batch that it could not read: an exception would lose its type on the way.

    Attributes:
        what: The exception.
        of_data: Its problems, where it is the data that is at fault and not the worker.
    """

    what: str
    of_data: list[Problem]


class _Batches(Dataset[Any]):
    """What a worker does: read the tokens of a batch, and check them.

    It sends arrays: torch would send its tensors through shared memory, of which containers have little, and which a batch
    needs a living worker to hand over.
    """

    def __init__(self, sequences: Stream) -> None:
        self.sequences = sequences

    def __getitem__(self, indices: list[int]) -> list[np.ndarray] | _Failure:
        try:
            batch = self.sequences.batch(indices)
            return [getattr(batch, f.name).numpy() for f in fields(batch)]
        except Exception as error:
            return _Failure(f"{type(error).__name__}: {error}", error.problems if isinstance(error, DataError) else [])
