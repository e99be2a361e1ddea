"""Every file operation of a save, of retention, of the export, of tokenising and of a cache build goes wrong once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import checkpoint_steps, forks, run, status, train_module

from faults.operations import WORK, Plan, Point, build_injector, sweep
from faults.record import record
from faults.twins import Twins
from mini_distill.errors import StorageError

SHORT = ["trainer.max_steps=4", "trainer.save_every=1", "evaluation.max_batches=1", "evaluation.num_samples=0"]
KEPT = {"retention": "trainer.keep_checkpoints=1"}


def swept(work: str, tiny_command: list[str], folder: Path, points: int | None, timeout: float) -> None:
    """Sweep, note what came of it, and expect every point to be as promised."""
    command = [*tiny_command, *SHORT, KEPT.get(work, "trainer.keep_checkpoints=2")]
    found = sweep(Plan(work, command, str(folder), points), timeout)
    note(work, found)
    assert found and not [point for point in found if not point.good]


def note(work: str, found: list[Point]) -> None:
    """One line of the report for each way of going wrong."""
    for mode in sorted({point.mode for point in found}):
        of_mode = [point for point in found if point.mode == mode]
        record(
            f"file operations of {work}: {mode}",
            injected=len(of_mode),
            fired=sum(point.fired for point in of_mode),
            exact=sum(point.outcome == "exact" for point in of_mode),
            torn=sum(bool(point.torn) for point in of_mode),
            stuck=sum(point.outcome.startswith("stuck") for point in of_mode),
        )


@forks
def test_some_file_operations_of_a_save_may_go_wrong(tiny_command: list[str], tmp_path: Path) -> None:
    swept("save", tiny_command, tmp_path, points=1, timeout=250)


@forks
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("work", WORK)
def test_every_file_operation_may_go_wrong(work: str, tiny_command: list[str], tmp_path: Path) -> None:
    swept(work, tiny_command, tmp_path, points=None, timeout=3500)


OPERATIONS = """
import ctypes, errno, os, sys
from pathlib import Path

library, libc = ctypes.CDLL(os.environ["LD_PRELOAD"]), ctypes.CDLL(None, use_errno=True)
root, folder = Path(sys.argv[1]), Path(sys.argv[1]) / "watched"
folder.mkdir()
for place in (root, folder):
    (place / "file").write_bytes(b"content")
source, into = os.open(root / "file", os.O_RDONLY), os.open(folder / "file", os.O_RDWR)
text, here = lambda name: str(folder / name).encode(), -100  # AT_FDCWD
CALLS = {
    "open": lambda: libc.open(text("made"), os.O_CREAT | os.O_WRONLY, 0o644),
    "openat": lambda: libc.openat(here, text("made too"), os.O_CREAT | os.O_WRONLY, 0o644),
    "write": lambda: libc.write(into, b"x", 1),
    "pwrite64": lambda: libc.pwrite64(into, b"x", 1, ctypes.c_long(0)),
    "copy_file_range": lambda: libc.copy_file_range(source, None, into, None, 2, 0),
    "sendfile64": lambda: libc.sendfile64(into, source, None, 2),
    "fsync": lambda: libc.fsync(into),
    "fdatasync": lambda: libc.fdatasync(into),
    "ftruncate64": lambda: libc.ftruncate64(into, ctypes.c_long(3)),
    "link": lambda: libc.link(text("file"), text("linked")),
    "linkat": lambda: libc.linkat(here, text("file"), here, text("linked too"), 0),
    "rename": lambda: libc.rename(text("linked"), text("renamed")),
    "renameat": lambda: libc.renameat(here, text("renamed"), here, text("renamed again")),
    "renameat2": lambda: libc.renameat2(here, text("renamed again"), here, text("renamed at last"), 0),
    "mkdir": lambda: libc.mkdir(text("folder"), 0o755),
    "mkdirat": lambda: libc.mkdirat(here, text("folder too"), 0o755),
    "chmod": lambda: libc.chmod(text("file"), 0o600),
    "unlink": lambda: libc.unlink(text("renamed at last")),
    "unlinkat": lambda: libc.unlinkat(here, text("linked too"), 0),
    "rmdir": lambda: libc.rmdir(text("folder")),
}
for name, call in CALLS.items():
    library.faults_watch(str(folder).encode(), 4, ctypes.c_long(0))
    failed = call(), ctypes.get_errno(), library.faults_count(), library.faults_fired()
    assert failed == (-1, errno.EIO, 1, 1), (name, failed)
    library.faults_watch(str(folder).encode(), 4, ctypes.c_long(9))
    done = call() >= 0, library.faults_count(), library.faults_fired()
    assert done == (True, 1, 0), (name, done, os.strerror(ctypes.get_errno()))
print(len(CALLS))
"""


def test_the_injector_meets_every_way_to_change_a_file(tmp_path: Path) -> None:
    """One that it does not know would never fail, and nobody would notice."""
    environment = {**os.environ, "LD_PRELOAD": str(build_injector())}
    done = subprocess.run([sys.executable, "-c", OPERATIONS, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr


def test_a_disk_that_is_too_small_is_found_before_the_first_step(twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 MB of free space, and checkpoints that need more."""
    free = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(train_module, "optimizer_step", lambda *_, **__: pytest.fail("a step was done"))
    with pytest.raises(StorageError, match=r"1 MB of free space, expected at least .*keep_checkpoints"):
        run(twins.command("plain"), tmp_path / "run")
    assert status(tmp_path / "run")["exit_code"] == 6 and not checkpoint_steps(tmp_path / "run")
    record("a disk of 1 MB", injected=1, fired=1, refused=1)
