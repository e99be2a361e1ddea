"""kill -9 at random moments: the next run goes on, and ends to the bit as the one that nothing disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import before_step, checked, checkpoint_steps, fork, forks, rows, run, send, steps_of, wait

from faults.record import record
from faults.twins import KINDS, Twins
from mini_distill import folder_lock, storage
from mini_distill.cli import config_dir
from mini_distill.digest import digest_run

KILLS_OF_A_KIND = 8
"""Of fourteen kinds: 112 kills."""
OBJECTIVES = sorted(file.stem for file in (config_dir() / "objective").glob("*.yaml"))
"""Every preset."""


@forks
@pytest.mark.parametrize("kind", ["plain", "cached"])
def test_killed_at_random_moments_it_ends_as_undisturbed(kind: str, twins: Twins, tmp_path: Path) -> None:
    killed_again_and_again(kind, 3, twins, tmp_path / "run")


@forks
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_kind_killed_at_random_moments_end_as_undisturbed(kind: str, twins: Twins, tmp_path: Path) -> None:
    killed_again_and_again(kind, KILLS_OF_A_KIND, twins, tmp_path / "run", seed=1 + list(KINDS).index(kind))


@forks
@pytest.mark.parametrize("objective", [pytest.param(name, marks=[] if name == "attention_kl" else pytest.mark.slow) for name in OBJECTIVES])
def test_a_run_with_any_objective_killed_at_a_random_moment_ends_as_undisturbed(
    objective: str, tiny_command: list[str], tmp_path: Path
) -> None:
    command = [*tiny_command, f"objective={objective}"]
    run(command, tmp_path / "twin")
    killed(command, digest_run(tmp_path / "twin"), 2, tmp_path / "run", seed=OBJECTIVES.index(objective))


@forks
def test_a_killed_run_goes_on_on_another_host(
    twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a pod that was killed and came back under another name, the lock was refused for ever."""
    command, folder = twins.command("plain"), tmp_path / "run"

    def killed_on_node7() -> None:
        for module in (folder_lock, storage):
            module.this_host = lambda: "node7"  # type: ignore[attr-defined]
        with before_step(4, send(signal.SIGKILL)):
            run(command, folder)

    assert wait(fork(killed_on_node7)) == -signal.SIGKILL
    assert json.loads((folder / folder_lock.LOCK).read_text())["host"] == "node7"
    monkeypatch.setattr(folder_lock, "SECONDS_OF_SILENCE", 0.5)
    run(command, folder)
    assert "on host node7, which gave no sign of life" in caplog.text and digest_run(folder) == twins.digest("plain")
    record("killed, and gone on with on another host", injected=1, fired=1, exact=1)


def killed_again_and_again(kind: str, kills: int, twins: Twins, folder: Path, seed: int = 0) -> None:
    """The same with a run of one of the kinds."""
    killed(twins.command(kind), twins.digest(kind), kills, folder, seed)


def killed(command: list[str], wanted: str, kills: int, folder: Path, seed: int) -> None:
    """A run gets `kills` kill -9 at random moments of its length, is left alone in the end, and has then become its twin."""
    save_every = checked(tuple(command)).trainer.save_every or 6
    length = seconds_of(command, folder.with_name("timed"))
    draw, fired, done_again = random.Random(seed), 0, 0
    while fired < kills:
        child = fork(lambda: run(command, folder))
        time.sleep(draw.uniform(0.2, 1.0) * length)
        os.kill(child, signal.SIGKILL)  # until it is waited for, the number is the child's
        if wait(child) == -signal.SIGKILL:
            fired += 1
            done_again = max(done_again, steps_to_do_again(folder))
        elif (folder / "student").exists():
            shutil.rmtree(folder)  # there is nothing left of it to kill
    run(command, folder)
    assert steps_of(folder) == sorted(set(steps_of(folder)))
    exact = digest_run(folder) == wanted
    record("kill -9 at random moments", injected=kills, fired=fired, exact=fired * exact)
    assert exact and done_again <= save_every, (done_again, save_every)


def seconds_of(command: list[str], folder: Path) -> float:
    """How long an undisturbed run takes in a forked process."""
    started = time.monotonic()
    assert wait(fork(lambda: run(command, folder))) == 0
    shutil.rmtree(folder)
    return time.monotonic() - started


def steps_to_do_again(folder: Path) -> int:
    """Of a run that was killed: from its newest checkpoint to the last step that it had logged."""
    logged = [row["step"] for row in rows(folder)] if (folder / "metrics.jsonl").exists() else []
    return max([0, *logged]) - max([0, *checkpoint_steps(folder)])
