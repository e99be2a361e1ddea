from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from faults.injection import in_child, killed_before_operation

from mini_distill import folder_lock
from mini_distill.errors import StorageError
from mini_distill.folder_lock import LOCK, FolderLock, is_abandoned
from mini_distill.processes import this_host
from mini_distill.storage import remove_stale_temporaries


def take(folder: Path) -> None:
    with FolderLock(folder):
        pass


def write_owner(folder: Path, **owner: object) -> None:
    (folder / LOCK).write_text(json.dumps({"pid": 1, "host": this_host(), "started": "then", "process_start": "", **owner}))


def test_a_folder_is_released_and_can_be_taken_again(tmp_path: Path) -> None:
    take(tmp_path)
    take(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_living_process_is_refused_by_number_host_and_remedy(tmp_path: Path) -> None:
    code = f"from mini_distill.folder_lock import FolderLock\nwith FolderLock({str(tmp_path)!r}): print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        with pytest.raises(StorageError, match=rf"in use by process {holder.pid} on host {this_host()} since .*\. Wait for it, stop it"):
            take(tmp_path)
        holder.communicate(b"\n")
    take(tmp_path)


def test_one_process_cannot_take_a_folder_twice(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        with pytest.raises(StorageError, match=f"in use by process {os.getpid()}"):
            take(tmp_path)
        assert (tmp_path / LOCK).exists() and not is_abandoned(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def die_holding() -> None:
        FolderLock(tmp_path).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die_holding) == -signal.SIGKILL
    assert (tmp_path / LOCK).exists() and is_abandoned(tmp_path)
    take(tmp_path)
    assert not is_abandoned(tmp_path)
    assert "taken over from process" in caplog.text


def test_a_killed_process_whose_parent_has_not_looked_yet_is_dead(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        FolderLock(tmp_path).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    while "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.01)
    take(tmp_path)
    os.waitpid(child, 0)


def test_killed_anywhere_in_locking_the_next_process_gets_the_folder(tmp_path: Path) -> None:
    for number in range(10):
        if killed_before_operation(number, lambda: take(tmp_path)) == 0:
            break
        take(tmp_path)
    assert number >= 3


def test_a_torn_lock_file_is_nobodys(tmp_path: Path) -> None:
    for text in ("", '{"pid": 12', "[]", '{"pid": "x"}', "\0\0"):
        (tmp_path / LOCK).write_text(text)
        take(tmp_path)


def test_a_process_number_that_was_given_to_another_process_is_not_the_owner(tmp_path: Path) -> None:
    write_owner(tmp_path, pid=os.getppid(), process_start="another boot:17")
    take(tmp_path)


def no_locks(*_: object) -> None:
    """As flock on a file system that has none, or none that reach another host."""
    raise OSError(errno.ENOLCK, "No locks available")


@contextmanager
def holder_on_another_host(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[int]:
    """A living process with the lock of the folder, which says that it is on node7."""
    patch.setattr(folder_lock, "SECONDS_BETWEEN_SIGNS", 0.1)
    patch.setattr(folder_lock, "SECONDS_OF_SILENCE", 1.0)
    patch.setattr(fcntl, "flock", no_locks)
    child = os.fork()
    if child == 0:
        folder_lock.this_host = lambda: "node7"
        FolderLock(folder).__enter__()
        time.sleep(60)
        os._exit(0)
    while "node7" not in ((folder / LOCK).read_text() if (folder / LOCK).exists() else ""):
        time.sleep(0.01)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_another_hosts_lock_is_left_alone_while_its_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder_on_another_host(tmp_path, monkeypatch) as child:
        before = (tmp_path / LOCK).read_text()
        with pytest.raises(StorageError, match=rf"in use by process {child} on host node7 .* if it is gone, delete {tmp_path}/{LOCK}"):
            take(tmp_path)
        assert (tmp_path / LOCK).read_text() == before


def test_a_silent_lock_of_another_host_is_taken_over_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pod that was killed and came back under another name was refused for ever, naming a host that was no more."""
    with holder_on_another_host(tmp_path, monkeypatch) as child:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        started = time.monotonic()
        take(tmp_path)
        assert time.monotonic() - started >= 1
    assert f"taken over from process {child} on host node7, which gave no sign of life for 1 seconds" in caplog.text
    assert capsys.readouterr().err.startswith(f"waiting: {tmp_path} is taken over from process {child} on host node7, unless")
    assert os.listdir(tmp_path) == []


def test_what_the_gone_process_of_another_host_left_half_written_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [tmp_path / f".tmp-step-00000004-{pid}@node7-0a" for pid in (4242, 4243)]
    for folder in left:
        folder.mkdir()
    monkeypatch.setattr(folder_lock, "SECONDS_OF_SILENCE", 0.2)
    write_owner(tmp_path, pid=4242, host="node7")
    remove_stale_temporaries(tmp_path)
    assert all(folder.exists() for folder in left)
    take(tmp_path)
    remove_stale_temporaries(tmp_path)
    assert [folder.exists() for folder in left] == [False, True]  # the other one may be alive


def test_an_owner_that_lets_go_while_it_is_watched_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder_on_another_host(tmp_path, monkeypatch) as child:
        os.kill(child, signal.SIGSTOP)
        threading.Timer(0.3, (tmp_path / LOCK).unlink).start()
        with pytest.raises(StorageError, match="in use by"):
            take(tmp_path)
        take(tmp_path)


def test_the_signs_end_with_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "SECONDS_BETWEEN_SIGNS", 0.01)
    with FolderLock(tmp_path):
        first = (tmp_path / LOCK).stat().st_mtime_ns
        time.sleep(0.2)
        assert (tmp_path / LOCK).stat().st_mtime_ns > first
        assert "lock" in [thread.name for thread in threading.enumerate()]
    assert "lock" not in [thread.name for thread in threading.enumerate()]


def test_without_locks_in_the_file_system_the_owners_number_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    write_owner(tmp_path, pid=os.getppid())
    with pytest.raises(StorageError, match=f"in use by process {os.getppid()}"):
        take(tmp_path)
    write_owner(tmp_path, pid=4_000_000)
    take(tmp_path)


def test_a_forked_worker_that_outlives_its_parent_does_not_keep_the_folder(tmp_path: Path) -> None:
    """Locks of open files are inherited: the data workers of a killed run kept it locked for the seconds they lived on."""
    read, write = os.pipe()

    def run() -> None:
        FolderLock(tmp_path).__enter__()
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        os.write(write, str(worker).encode())
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(run) == -signal.SIGKILL
    worker = int(os.read(read, 20))
    try:
        time.sleep(0.05)  # the worker's first instructions
        take(tmp_path)
        os.kill(worker, 0)  # it still lives
    finally:
        os.kill(worker, signal.SIGKILL)


def test_of_many_processes_at_once_exactly_one_gets_the_folder(tmp_path: Path) -> None:
    def contend(done: Path) -> int:
        try:
            with FolderLock(tmp_path):
                while not done.exists():
                    time.sleep(0.01)
        except StorageError:
            return 6
        return 0

    for round in range(5):
        done = tmp_path / f"done-{round}"
        children = []
        for _ in range(8):
            if (child := os.fork()) == 0:
                os._exit(contend(done))
            children.append(child)
        lost = [os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) for _ in range(7)]
        done.touch()
        assert lost == [6] * 7
        assert os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) == 0
