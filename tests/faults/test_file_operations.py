"""Every file operation of a save, of retention, of the export, of tokenising and of a cache build goes wrong once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs import checkpoint_steps, forks, run, status, train_module

from faults.operations import WORK, Plan, Point, sweep
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


def test_a_disk_that_is_too_small_is_found_before_the_first_step(twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 MB of free space, and checkpoints that need more."""
    free = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(train_module, "optimizer_step", lambda *_, **__: pytest.fail("a step was done"))
    with pytest.raises(StorageError, match=r"1 MB of free space, expected at least .*keep_checkpoints"):
        run(twins.command("plain"), tmp_path / "run")
    assert status(tmp_path / "run")["exit_code"] == 6 and not checkpoint_steps(tmp_path / "run")
    record("a disk of 1 MB", injected=1, fired=1, refused=1)
