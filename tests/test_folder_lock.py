from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.injection import in_child, killed_before_operation

from mini_distill.errors import StorageError
from mini_distill.folder_lock import LOCK, FolderLock, is_abandoned
from mini_distill.processes import this_host


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


def test_another_hosts_lock_is_left_alone_and_the_message_says_what_to_delete(tmp_path: Path) -> None:
    write_owner(tmp_path, pid=os.getpid(), host="node7")
    with pytest.raises(StorageError, match=rf"on host node7 .* if that process is gone, delete {tmp_path}/{LOCK}"):
        take(tmp_path)


def test_without_locks_in_the_file_system_the_owners_number_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
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
