"""Data workers and trackers that die, hang or raise: everything ends soon, with a line that says what and where."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs import before_step, fork, forks, run, send, wait

from faults.record import record
from faults.twins import Twins
from mini_distill.data import read_ahead
from mini_distill.data.sequences import Sequences
from mini_distill.digest import digest_run
from mini_distill.training import tracking

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SECONDS = 10.0
"""Within which all processes are gone after a fault."""


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@contextmanager
def from_batch(number: int, action: Callable[[], object]) -> Iterator[None]:
    """Whoever reads training batch `number` or a later one does this first; batches of one sequence are the evaluation's."""
    original, seen = Sequences.batch, 0

    def watched(self: Sequences, indices: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen >= number and multiprocessing.parent_process() is not None:
            action()
        return original(self, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sequences, "batch", watched)
        yield


def fail() -> None:
    raise ValueError("a bad sector")


WORKERS: dict[str, tuple[Callable[[], object], str]] = {
    "dead": (send(signal.SIGKILL), "a data worker died (reading "),
    "hanging": (lambda: time.sleep(1000), "a data worker hangs (reading "),
    "raising": (fail, "a data worker failed (reading "),
}


@forks
@pytest.mark.parametrize("how", WORKERS)
def test_a_bad_data_worker_ends_the_run_with_the_row_and_the_run_goes_on(
    how: str, twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(read_ahead, "WORKER_TIMEOUT", 1.0)
    monkeypatch.setattr(read_ahead, "LOOK_EVERY", 0.5)
    action, words = WORKERS[how]
    command, started = twins.command("workers"), time.monotonic()
    with from_batch(2, action):
        assert wait(fork(lambda: run(command, tmp_path / "run"))) == 8
    assert time.monotonic() - started < 60
    (line,) = error_lines(capfd.readouterr().err)
    assert words in line and "corpus.jsonl:" in line and "data.num_workers" in line
    run(command, tmp_path / "run")
    exact = digest_run(tmp_path / "run") == twins.digest("workers")
    record("data workers dead, hanging, raising", injected=1, fired=1, exact=int(exact))
    assert exact


# ---------------------------------------------------------------------------------------------------------------------- trackers


class BadSink(tracking.Sink):
    """A tracker with one method that raises or hangs."""

    name = "bad"

    def __init__(self, where: str, hangs: bool) -> None:
        self.where, self.hangs = where, hangs

    def _do(self, name: str) -> None:
        if name != self.where:
            return
        if self.hangs:
            time.sleep(1000)
        raise ConnectionError("no route to host")

    def open(self) -> None:
        self._do("open")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._do("log")

    def close(self) -> None:
        self._do("close")


@pytest.mark.parametrize("hangs", [False, True], ids=["raising", "hanging"])
@pytest.mark.parametrize("where", ["log", pytest.param("open", marks=pytest.mark.slow), pytest.param("close", marks=pytest.mark.slow)])
def test_a_run_with_a_bad_tracker_ends_as_without(
    where: str, hangs: bool, twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "SECONDS_TO_CLOSE", 0.3)
    monkeypatch.setattr("mini_distill.distillation.open_tracker", lambda *_: tracking.BackgroundTracker(BadSink(where, hangs)))
    with caplog.at_level(logging.WARNING):
        run(twins.command("plain"), tmp_path / "run")
    exact = digest_run(tmp_path / "run") == twins.digest("plain")
    record("trackers raising, hanging", injected=1, fired=1, exact=int(exact))
    assert exact and "tracking: bad" in caplog.text


# ------------------------------------------------------------------------------------------------------------- one run, one folder


@forks
def test_of_two_runs_in_one_folder_the_second_is_refused_and_the_first_goes_on(
    twins: Twins, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command, codes = twins.command("plain"), []
    with before_step(3, lambda: codes.append(wait(fork(lambda: run(command, tmp_path / "run"))))):
        run(command, tmp_path / "run")
    (line,) = error_lines(capfd.readouterr().err)
    assert codes == [6] and f"in use by process {os.getpid()}" in line
    assert digest_run(tmp_path / "run") == twins.digest("plain")
    record("two runs in one folder", injected=1, fired=1, refused=1, exact=1)


@forks
def test_a_clock_that_is_set_back_changes_nothing(twins: Twins, tmp_path: Path) -> None:
    command = twins.command("plain")

    def body() -> None:
        real = time.time
        with before_step(3, lambda: setattr(time, "time", lambda: real() - 10**8)), before_step(5, send(signal.SIGKILL)):
            run(command, tmp_path / "run")

    assert wait(fork(body)) == -signal.SIGKILL
    for file in (tmp_path / "run").rglob("*"):
        os.utime(file, (0, 0))  # as if all had been written before the clock was set
    run(command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == twins.digest("plain")
    record("clock set back", injected=1, fired=1, exact=1)


ODD = ["ünïcödé-模型 with space", "semi;colon&'quotes'", "-dash", "per%cent {braces}", "dots..", "new\nline"]


@pytest.mark.parametrize("name", [ODD[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ODD[1:])])
def test_odd_names_of_the_output_folder_are_names_like_others(name: str, twins: Twins, tmp_path: Path) -> None:
    run(twins.command("plain"), tmp_path / name)
    assert digest_run(tmp_path / name) == twins.digest("plain")
    record("odd names of the output folder", injected=1, fired=1, exact=1)
