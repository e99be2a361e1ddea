"""Real faults for tests: processes killed between two file operations, disks that are full."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from typing import Any

import pytest

OPERATIONS = ("open", "mkdir", "chmod", "fsync", "rename", "replace", "unlink", "rmdir", "write", "ftruncate")


def in_child(body: Callable[[], object]) -> int:
    """Run `body` in a forked process and give how it ended: an exit status (1: it raised), or minus a signal."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_before_operation(number: int, body: Callable[[], object]) -> int:
    """As `in_child`, with a kill -9 before the file operation `number` (from 0) of `body`."""

    def faulty() -> None:
        count_operations(lambda seen: os.kill(os.getpid(), signal.SIGKILL) if seen == number else None)
        body()

    return in_child(faulty)


def with_file_size_limit(limit: int, body: Callable[[], object]) -> int:
    """As `in_child`, where no file may grow beyond `limit` bytes: the kernel refuses the write that would, as on a full disk."""

    def faulty() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        body()

    return in_child(faulty)


def count_operations(before: Callable[[int], object], patch: pytest.MonkeyPatch | None = None) -> None:
    """Call `before(number of operations so far)` ahead of every file operation made through `os`."""
    seen = 0

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            before(seen)
            seen += 1
            return original(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        (patch or pytest.MonkeyPatch()).setattr(os, name, watched(getattr(os, name)))
