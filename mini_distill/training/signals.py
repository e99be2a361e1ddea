"""SIGTERM, SIGHUP and Ctrl-C: finish the step, save, and only then stop."""

from __future__ import annotations

import errno
import os
import signal
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..errors import Preempted

SAME_PRESS = 0.3  # seconds; a terminal and torchrun both pass on one Ctrl-C


def _end_forked(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def to_answer() -> list[signal.Signals]:
    """SIGTERM, Ctrl-C, and SIGHUP, which a terminal sends that is closed, unless it is ignored as by nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


def leave_closed_terminal() -> None:
    """Let what is printed go nowhere from now on, where it went to a terminal that is gone: it would be an error in the midst of saving."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:  # ENOTTY for a file or a pipe
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


class StopRequest:
    """`with StopRequest() as stop: …` turns SIGTERM, SIGHUP and Ctrl-C into `stop.requested`, to be looked at between steps.

    A second Ctrl-C stops at once with KeyboardInterrupt. The handlers that were there are put back on leaving. Where one stands within
    another, what was requested before or meanwhile is requested of both. Outside the main thread, where Python allows no handlers,
    nothing is installed and nothing is ever requested.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._since = 0.0
        self._at_once = False
        self._process = os.getpid()
        self._old: dict[signal.Signals, Any] = {}
        self._around: StopRequest | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

    @property
    def signal_name(self) -> str | None:
        """SIGTERM, SIGHUP or SIGINT; None as long as none has come."""
        return self._signal.name if self._signal is not None else None

    @property
    def exit_code(self) -> int | None:
        """143 for SIGTERM and SIGHUP, 130 for Ctrl-C; None as long as none has come."""
        if self._signal is None:
            return None
        return 130 if self._signal == signal.SIGINT else 143

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In here, where there is nothing to save yet, a signal ends the run where it stands.

        Raises:
            Preempted: one has come, in here or before.
        """
        self._at_once = True
        try:
            if not self.requested:
                yield
        except Preempted:
            raise
        except BaseException:  # the interrupt, or what a library has made of it
            if not self.requested:
                raise
        finally:
            self._at_once = False
        if self.requested:
            raise self.preempted(step=0)

    def preempted(self, step: int) -> Preempted:
        """The exception that ends a run which has saved `step`, unless it is 0. Where another process got the signal, SIGTERM is assumed."""
        name, code = self.signal_name or "SIGTERM", self.exit_code or 143
        if step == 0:
            rank = f"rank {os.environ['RANK']}, " if "RANK" in os.environ else ""  # to which torchrun may have sent it, since another died
            return Preempted(f"{rank}step 0", f"stopped by {name} before a step was done", "The same command begins again.", code)
        return Preempted(f"step {step}", f"stopped by {name} and saved", "The same command goes on from here.", code)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in to_answer()}
            around = getattr(self._old[signal.SIGTERM], "__self__", None)
            if isinstance(around, StopRequest):
                self._around, self._signal, self._since = around, around._signal, around._since
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: installed by C code

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._handle_in_worker(number)
            return
        now = time.monotonic()
        if number == signal.SIGHUP:
            leave_closed_terminal()
        if self._signal is None:
            self._note(signal.Signals(number), now)
            if self._at_once:
                raise KeyboardInterrupt
            self._tell()
        elif number == signal.SIGINT and now - self._since > SAME_PRESS:
            raise KeyboardInterrupt

    def _note(self, number: signal.Signals, now: float) -> None:
        self._signal, self._since = number, now
        if self._around is not None:
            self._around._note(number, now)

    def _handle_in_worker(self, number: int) -> None:
        """A forked data worker: Ctrl-C is the main process's affair, SIGTERM and SIGHUP end it."""
        if number != signal.SIGINT:
            _end_forked(number)

    def _tell(self) -> None:
        """Straight to the descriptor: the handler may have interrupted a print, whose lock and buffer must be left alone."""
        again = " (Ctrl-C again stops at once)" if self._signal == signal.SIGINT else ""
        os.write(2, f"\n{self.signal_name}: finishing what is under way, then saving …{again}\n".encode())
