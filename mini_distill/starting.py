"""The first moments of a command, in which modules are imported: a signal ends it in one line, as it does later."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

_process = 0
_told: int | None = None


def answer_signals() -> None:
    """To be called before anything that takes time is imported: Ctrl-C there is a traceback from the midst of some module otherwise.

    Raising an exception would do no better, as a module that is being imported may make anything of it.
    """
    global _process
    _process = os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background
            signal.signal(number, _end)


def begin_work() -> None:
    """Everything is imported: Ctrl-C raises KeyboardInterrupt again, so that what is open is closed."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def told(exit_code: int) -> None:
    """Why this process ends has been said. That torchrun then sends SIGTERM to it, since another has ended first, adds nothing."""
    global _told
    _told = exit_code


def _end(number: int, frame: FrameType | None) -> None:
    """Straight to the descriptor and out: whatever was interrupted has nothing to lose yet."""
    if os.getpid() != _process:  # forked, and somebody else's affair
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _told is not None and "RANK" in os.environ:
        os._exit(_told)
    how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    if "RANK" in os.environ:  # torchrun sends SIGTERM to the others where a process has died
        how = f"rank {os.environ['RANK']}, step 0 (loading): {how} before the run began"
    with suppress(OSError):  # a terminal that is gone
        os.write(2, f"error: {how}. The same command goes on from what was saved, if there is anything.\n".encode())
    os._exit(130 if number == signal.SIGINT else 143)
