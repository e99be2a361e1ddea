"""Data workers that hang, are killed, get signals, or are left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_distill.data import read_ahead
from mini_distill.data.batch import Batch
from mini_distill.errors import DistributedError
from mini_distill.processes import is_alive

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Slow:
    """Sequence 5 takes `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def origins(self, index: int) -> list[str]:
        return [f"file:{index}"]

    def batch(self, indices: list[int]) -> Batch:
        if 5 in indices:
            time.sleep(self.seconds)
        fields = torch.tensor(indices)[:, None]
        return Batch(fields, fields, fields, torch.tensor(indices), fields)


def start(sequences: Any, num_workers: int = 2) -> Iterator[Batch]:
    return read_ahead.read_ahead(sequences, ([index] for index in count()), num_workers)


def numbers(batches: Iterator[Batch], some: int) -> list[int]:
    return [int(next(batches).row_ids) for _ in range(some)]


def test_a_worker_that_hangs_ends_the_reading_and_names_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "WORKER_TIMEOUT", 0.6)
    monkeypatch.setattr(read_ahead, "LOOK_EVERY", 0.2)
    batches = start(Slow(seconds=1000))
    assert numbers(batches, 5) == [0, 1, 2, 3, 4]
    began = time.monotonic()
    with pytest.raises(DistributedError, match=r"data\.num_workers: a data worker hangs \(reading file:5\)"):
        next(batches)
    assert time.monotonic() - began < 10 and not multiprocessing.active_children()


def test_a_worker_that_is_slow_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "LOOK_EVERY", 0.2)
    assert numbers(start(Slow(seconds=0.7)), 8) == list(range(8))


def test_a_killed_worker_is_noticed_in_seconds_and_nowhere_else() -> None:
    """torch's handler of SIGCHLD raised in the midst of the training step, as a RuntimeError with a traceback."""
    batches = start(Slow(), num_workers=1)
    numbers(batches, 2)
    multiprocessing.active_children()[0].kill()
    time.sleep(0.3)  # where the training step would be
    with pytest.raises(DistributedError, match=r"a data worker died \(reading file:\d+\)"):
        numbers(batches, 20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_leave_signals_to_the_training_process(number: signal.Signals) -> None:
    """A cluster sends SIGTERM to every process of a job: the workers died first, and the step could not be finished and saved."""
    batches = start(Slow())
    numbers(batches, 3)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, number)
    assert numbers(batches, 30) == list(range(3, 33))


def test_workers_end_with_the_reading() -> None:
    batches = start(Slow())
    numbers(batches, 3)
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_program_that_ends_in_the_midst_of_reading_ends(tmp_path: Path) -> None:
    """Python waited for ever for daemons that do not listen to SIGTERM."""
    script = "from test_read_ahead import *; batches = start(Slow(), 1); print(numbers(batches, 2))"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "[0, 1]\n" and "Exception" not in done.stderr


def _read_and_die(pids: Any) -> None:
    batches = start(Slow())
    numbers(batches, 3)
    pids.put([worker.pid for worker in multiprocessing.active_children()])
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_do_not_outlive_a_killed_training_process() -> None:
    context = multiprocessing.get_context("fork")
    pids = context.SimpleQueue()
    process = context.Process(target=_read_and_die, args=(pids,))
    process.start()
    process.join(30)
    workers, until = pids.get(), time.monotonic() + 20
    while any(is_alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert workers and not [pid for pid in workers if is_alive(pid)]
