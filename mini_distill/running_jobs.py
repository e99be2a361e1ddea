"""The jobs of a sweep that run on this machine, whichever process of the launcher has started them, and how all of them are stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from .processes import is_alive, process_start_of
from .training.signals import leave_closed_terminal, to_answer

OF_SWEEP = "MINI_DISTILL_SWEEP"
"""Tells a job the process whose end is its own too: number and start."""
LOOK_EVERY = 1.0
_here: set[int] = set()
"""The jobs that this process waits for."""
_looks = False


@dataclass(frozen=True)
class RunningJobs:
    """Known to the sweep's first process and to those that a launcher such as joblib starts: they get a copy.

    Attributes:
        folder: A file for each running job, named for its process; and what the sweep was asked, once it was.
        parent: The sweep's first process, which alone answers signals.
        parent_start: When that started.
    """

    folder: Path
    parent: int
    parent_start: str

    @property
    def asked(self) -> int | None:
        """The signal that the sweep was stopped with; no job begins after it."""
        try:
            return int((self.folder / "asked").read_text())
        except (OSError, ValueError):
            return None

    @property
    def exit_code(self) -> int | None:
        """Of a sweep that was stopped: 130 for Ctrl-C, else 143."""
        return None if self.asked is None else 130 if self.asked == signal.SIGINT else 143

    @property
    def have_run_here(self) -> bool:
        """Whether any job has: a cluster's do not."""
        return (self.folder / "here").exists()

    def environment(self) -> dict[str, str]:
        """What a job is told. On a cluster it does not end with the process that has submitted it."""
        return {OF_SWEEP: f"{self.parent} {self.parent_start}"} if self.parent in (os.getpid(), os.getppid()) else {}

    def end_with_parent(self) -> None:
        """In a process of the launcher, when the sweep's first one is gone: joblib's would wait for work for ever."""
        global _looks
        if _looks or os.getppid() != self.parent:
            return
        _looks = True

        def look() -> None:
            while os.getppid() == self.parent or _here:
                time.sleep(LOOK_EVERY)
            time.sleep(LOOK_EVERY)  # how the job ended is noted
            os._exit(1)

        threading.Thread(target=look, name="sweep", daemon=True).start()

    @contextmanager
    def running(self, job: subprocess.Popen[bytes]) -> Iterator[None]:
        """While a job runs, which this process has started. Of several processes the first one answers Ctrl-C, for all."""
        if os.getpid() != self.parent and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda number, frame: job.send_signal(number))  # a cluster's, or to the whole group
        file = self.folder / str(job.pid)
        with contextlib.suppress(OSError):  # on another machine there is no such folder, and nobody to look
            (self.folder / "here").touch()
            file.touch()
        _here.add(job.pid)
        try:
            if (number := self.asked) is not None:  # whoever stops all and whoever starts one may not have seen each other
                job.send_signal(number)
            yield
        finally:
            file.unlink(missing_ok=True)
            _here.discard(job.pid)

    def stop(self, number: int) -> int:
        """Pass a signal on to every job, and let no further one begin. Gives how many there were."""
        temporary = self.folder / "asked.tmp"
        temporary.write_text(str(int(number)))
        temporary.rename(self.folder / "asked")
        pids = [int(file.name) for file in self.folder.iterdir() if file.name.isdecimal()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return len(pids)


@contextmanager
def passing_on_signals() -> Iterator[RunningJobs]:
    """In the sweep's first process: SIGTERM, SIGHUP and Ctrl-C reach every running job, which saves, and end the sweep after that.

    Each press of Ctrl-C is passed on: a second one stops the jobs at once. Where no job has run on this machine, the signal does what
    it did before: a cluster's jobs are the cluster's to stop.
    """
    with tempfile.TemporaryDirectory(prefix="mini_distill-", ignore_cleanup_errors=True) as folder:
        jobs = RunningJobs(Path(folder), os.getpid(), process_start_of(os.getpid()) or "")
        before: dict[int, Any] = {number: signal.getsignal(number) for number in to_answer()}

        def pass_on(number: int, frame: FrameType | None) -> None:
            if os.getpid() != jobs.parent:
                return
            if number == signal.SIGHUP:
                leave_closed_terminal()
            if not jobs.have_run_here and callable(before[number]):
                before[number](number, frame)
            os.write(2, f"\n{signal.Signals(number).name}: {jobs.stop(number)} jobs save and stop; no further one begins\n".encode())

        for number in before:
            signal.signal(number, pass_on)
        try:
            yield jobs
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def end_with_the_sweep() -> None:
    """In a job: SIGTERM to itself when the sweep's first process is no more, as after kill -9."""
    if (told := os.environ.pop(OF_SWEEP, None)) is None:
        return
    pid, _, start = told.partition(" ")

    def look() -> None:
        while is_alive(int(pid), start):
            time.sleep(LOOK_EVERY)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="sweep", daemon=True).start()
