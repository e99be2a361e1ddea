"""The lock of a folder: one run, one folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import StorageError
from .processes import is_alive, process_start_of, this_host
from .storage import mark_as_gone, open_regular, storage_errors

LOCK = ".lock"
SECONDS_TO_CLOSE = 5.0
SECONDS_BETWEEN_SIGNS = 10.0
SECONDS_OF_SILENCE = 60.0
"""After which a process on another host is taken to be dead."""

logger = logging.getLogger(__name__)


class InUse(StorageError):
    """Another process has the folder."""


class FolderLock:
    """`with FolderLock(folder): …`: the folder is this process's alone. The lock of a dead process is taken over.

    The file `.lock` in the folder names process, host and start, for people and for file systems without locks; while the
    process lives, the kernel's own lock on that file (flock) makes creation and take-over free of races and indifferent to a
    process number that has been given to another process.

    Of a process on another host, or of this one under another name, nobody here can tell whether it lives; and some network file
    systems keep flock to each host. So whoever has the folder touches the file every ten seconds, and a lock of another host is taken
    over once it has been watched for a minute in which nobody did.

    Args:
        folder: That is there.
        while_waiting: Called every second for as long as another process has the folder, and may raise; None: it is not waited for.

    Raises:
        StorageError: another process, named with its host, has the folder; or the lock cannot be written.
    """

    def __init__(self, folder: Path | str, while_waiting: Callable[[], None] | None = None) -> None:
        self.file = Path(folder) / LOCK
        self._while_waiting = while_waiting
        self._descriptor = -1
        self._released, self._signs = threading.Event(), threading.Thread()

    def __enter__(self) -> FolderLock:
        told = ""
        while True:
            try:
                return self._enter()
            except InUse as error:
                if self._while_waiting is None:
                    raise
                if str(error) != told:
                    told = str(error)
                    print(f"waiting: {told}", file=sys.stderr, flush=True)
                self._while_waiting()
            time.sleep(1)

    def _enter(self) -> FolderLock:
        with storage_errors(self.file, "lock the folder"):
            self._descriptor = self._open_and_lock()
            try:
                self._take_over(_read_owner(self._descriptor))
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, json.dumps(_identity()).encode(), 0)
            except BaseException:
                self._close()
                raise
        self._released.clear()
        self._signs = threading.Thread(target=self._give_signs, name="lock", daemon=True)
        self._signs.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor in _held:  # not in a forked child
            self._released.set()
            self._signs.join()
            with contextlib.suppress(OSError):
                self.file.unlink()
            self._close()

    def _open_and_lock(self) -> int:
        until = time.monotonic() + SECONDS_TO_CLOSE
        while True:
            descriptor = open_regular(self.file, os.O_RDWR | os.O_CREAT)
            _held.add(descriptor)
            if not _lock(descriptor):
                owner = _read_owner(descriptor)
                _release(descriptor)
                if owner is None or time.monotonic() > until or not _is_gone(owner):
                    raise self._in_use(owner or {"pid": "?", "host": "?", "started": "?"})
                time.sleep(0.02)  # it was killed a moment ago, and the kernel is still closing its files
                continue
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.file)):
                    return descriptor
            _release(descriptor)  # its owner deleted it between our opening and locking

    def _take_over(self, owner: dict[str, Any] | None) -> None:
        if owner is None:
            return
        is_here = owner["host"] == this_host()
        if not _is_gone(owner) if is_here else self._gives_signs(owner):
            raise self._in_use(owner)
        whose = f"process {owner['pid']}" if is_here else f"process {owner['pid']} on host {owner['host']}"
        why = "is gone" if is_here else f"gave no sign of life for {SECONDS_OF_SILENCE:.0f} seconds"
        logger.warning("%s: taken over from %s, which %s", self.file, whose, why)
        mark_as_gone(owner["pid"], owner["host"])

    def _give_signs(self) -> None:
        """Touch the lock, in a thread: loading a model or a step may take longer than anybody would wait."""
        while not self._released.wait(SECONDS_BETWEEN_SIGNS):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def _gives_signs(self, owner: dict[str, Any]) -> bool:
        """Whether somebody touches the lock, or lets go of it, while it is watched."""
        who = f"process {owner['pid']} on host {owner['host']}"
        print(
            f"waiting: {self.file.parent} is taken over from {who}, unless that gives a sign of life within {SECONDS_OF_SILENCE:.0f} seconds",
            file=sys.stderr,
            flush=True,
        )
        last, until = self._last_sign(), time.monotonic() + SECONDS_OF_SILENCE
        while time.monotonic() < until:
            if self._while_waiting is not None:
                self._while_waiting()
            time.sleep(min(1.0, SECONDS_OF_SILENCE / 10))
            if self._last_sign() != last:
                return True
        return False

    def _last_sign(self) -> tuple[int, int] | None:
        """Which file the lock is, and when it was touched; opened each time, as network file systems ask their server only then."""
        try:
            descriptor = open_regular(self.file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        return status.st_ino, status.st_mtime_ns

    def _in_use(self, owner: dict[str, Any]) -> InUse:
        what = f"in use by process {owner['pid']} on host {owner['host']} since {owner['started']}"
        remedy = "Wait for it, stop it, or choose another folder."
        if owner["host"] != this_host():
            remedy = f"Wait for it, stop it, or choose another folder; if it is gone, delete {self.file}."
        return InUse(str(self.file.parent), what, remedy)

    def _close(self) -> None:
        _release(self._descriptor)
        self._descriptor = -1


def is_abandoned(folder: Path | str) -> bool:
    """Whether the process that locked the folder is gone and left its lock, as one that was killed does; known on its own host alone.

    Takes no lock itself: who only looks at a folder is never in the way of a run that begins there.
    """
    try:
        descriptor = os.open(Path(folder) / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        owner = _read_owner(descriptor)
    finally:
        os.close(descriptor)
    return owner is not None and owner["host"] == this_host() and not is_alive(owner["pid"], owner.get("process_start", ""))


_held: set[int] = set()


def _release(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _release_in_child() -> None:
    """A forked data worker that outlives its parent must not keep the parent's lock."""
    for descriptor in list(_held):
        _release(descriptor)


os.register_at_fork(after_in_child=_release_in_child)


def _lock(descriptor: int) -> bool:
    """Whether the file is now ours; on a file system without locks always, and the text in the file decides."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True


def _read_owner(descriptor: int) -> dict[str, Any] | None:
    """Who wrote the lock file; None if it is new, or its writer was killed while writing."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    whole = isinstance(owner, dict) and isinstance(owner.get("pid"), int) and {"host", "started"} <= set(owner)
    return owner if whole else None


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this host, and is dead."""
    return owner["host"] == this_host() and not is_alive(owner["pid"], owner.get("process_start", ""))


def _identity() -> dict[str, Any]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": this_host(), "started": started, "process_start": process_start_of(os.getpid()) or ""}
