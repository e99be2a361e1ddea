"""A process of several that is killed, raises, hangs or is stuck: everything ends soon, with a line that names rank and step."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from runs import TWO, as_ranks, command_line, fork, forks, in_processes, ranks_of, run, send, status, wait

from faults.places import OF_EVERY_RANK, in_midst
from faults.record import record
from mini_distill.digest import digest_run
from mini_distill.processes import is_alive
from mini_distill.training import process_group

SECONDS = 10.0
"""Within which all processes are gone after a fault."""
PERIODS = ["trainer.eval_every=2", "trainer.save_every=2"]


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def disturbed(place: str, action: Callable[[], object], command: list[str], folder: Path) -> tuple[list[int], float]:
    """How two ranks end of which the second does this in the midst of something, and how long that took, in seconds."""
    moment = folder.with_suffix(".moment")

    def noted() -> None:
        moment.write_text(str(time.time()))
        action()

    def body(rank: int) -> None:
        with in_midst(place, noted) if rank == 1 else nullcontext():
            run(command, folder, *TWO, *PERIODS)

    codes = in_processes(2, body)
    return codes, time.time() - float(moment.read_text())


def assert_failed(folder: Path, line: str) -> None:
    """The status of the run has the line too."""
    found = status(folder)
    assert (found["state"], found["exit_code"]) == ("failed", 8)
    assert found["error"] == line.removeprefix("error: ")


# ------------------------------------------------------------------------------------------------------- killed, stopped, raising


@forks
@pytest.mark.parametrize("place", OF_EVERY_RANK)
def test_a_killed_rank_ends_the_others_with_its_rank_and_step(
    place: str, tiny_command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The line said on which rank it was noticed, not which one was gone, and had no step outside of steps."""
    codes, seconds = disturbed(place, send(signal.SIGKILL), tiny_command, tmp_path / "run")
    assert codes == [8, -signal.SIGKILL] and seconds < SECONDS
    (line,) = error_lines(capfd.readouterr().err)
    assert line.startswith(f"error: rank 1, {place}: gone without a word (process ") and "Rank 0 ends with it." in line
    assert_failed(tmp_path / "run", line)
    record("ranks killed", injected=1, fired=1, ended=1)


@forks
@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=[] if place in ("step 3", "step 2 (saving)") else pytest.mark.slow) for place in OF_EVERY_RANK]
)
def test_a_rank_that_is_stopped_is_noticed_and_ended(
    place: str, tiny_command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """kill -STOP was never noticed within minutes: the others waited for it in an exchange, out of which nothing wakes them."""
    codes, seconds = disturbed(place, send(signal.SIGSTOP), tiny_command, tmp_path / "run")
    assert codes == [8, -signal.SIGKILL] and seconds < SECONDS
    (line,) = error_lines(capfd.readouterr().err)
    assert re.match(rf"error: rank 1, {re.escape(place)}: stopped for \d+ s \(process \d+ on .+\), and now killed\. ", line), line
    assert_failed(tmp_path / "run", line)
    record("ranks hanging (kill -STOP)", injected=1, fired=1, ended=1)


def fail() -> None:
    raise ValueError("a bug of the user's")


@forks
@pytest.mark.parametrize("place", OF_EVERY_RANK)
def test_a_rank_that_raises_ends_the_others_with_its_words(
    place: str, tiny_command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codes, seconds = disturbed(place, fail, tiny_command, tmp_path / "run")
    assert codes == [8, 8] and seconds < SECONDS
    own, other = sorted(error_lines(capfd.readouterr().err), key=lambda line: "Rank 0 ends with it" in line)
    # `saving` and `result` are noted within what is replaced here
    assert re.match(r"error: rank 1, step \d( \(\w+\))?: ValueError: a bug of the user's\. The traceback stands above\.$", own), own
    assert other.startswith(own.removesuffix("The traceback stands above.") + "Rank 0 ends with it.")
    assert_failed(tmp_path / "run", other)
    record("ranks raising", injected=1, fired=1, ended=1)


# -------------------------------------------------------------------------------------------------------- stuck, and only slow


def hang() -> None:
    time.sleep(1000)


@forks
@pytest.mark.parametrize("place", ["step 3", pytest.param("step 2 (saving)", marks=pytest.mark.slow)])
def test_a_rank_whose_main_thread_is_stuck_is_named_with_its_place(
    place: str, tiny_command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its own thread goes on to beat; it is found by what the others wait for, and by its standing still."""
    codes, seconds = disturbed(place, hang, [*tiny_command, "trainer.stuck_after=3"], tmp_path / "run")
    assert codes == [8, 8] and 3 < seconds < 3 + SECONDS
    lines = error_lines(capfd.readouterr().err)
    at = rf"rank 1 at {re.escape(__file__)}:\d+ \(hang\)"
    words = re.compile(rf"error: rank 1, step \d( \(\w+\))?: stuck for 3 s while the others wait \({at}\)\. ")
    assert 1 <= len(lines) <= 2 and all(map(words.match, lines)), lines
    assert status(tmp_path / "run")["exit_code"] == 8
    record("ranks stuck in their main thread", injected=1, fired=1, ended=1)


@forks
@pytest.mark.parametrize("alone", ["evaluation", "saving"])
def test_a_rank_that_works_alone_for_longer_than_any_limit_ends_nobody(
    alone: str, tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting is no fault: only standing still without computing is."""

    def work() -> None:
        until, total = time.monotonic() + 6, 0
        while time.monotonic() < until:
            total += sum(range(1000))

    place = {"evaluation": "step 2 (evaluation)", "saving": "save"}[alone]

    def body(rank: int) -> None:
        with in_midst(place, work) if rank == 0 else nullcontext():
            run(tiny_command, tmp_path / "run", *TWO, *PERIODS, "trainer.stuck_after=2")

    for name in ("STOPPED", "GRACE", "AFTER_ERROR"):
        monkeypatch.setattr(process_group, name, 2.0)
    started = time.monotonic()
    assert in_processes(2, body) == [0, 0] and time.monotonic() - started > 6
    record("slow ranks: left alone", injected=1, fired=1, finished=1)


@forks
@pytest.mark.slow
def test_processes_that_are_all_stopped_for_a_while_go_on(tiny_command: list[str], tmp_path: Path) -> None:
    """As where a laptop sleeps, or Ctrl-Z is pressed: nobody is to be blamed for what he did not hear meanwhile."""
    children = [fork(body) for body in as_ranks(2, lambda rank: run(tiny_command, tmp_path / "run", *TWO, "trainer.max_steps=400"))]
    while not (tmp_path / "run" / "checkpoints").exists():
        time.sleep(0.1)
    for child in children:
        os.kill(child, signal.SIGSTOP)
    time.sleep(process_group.STOPPED + 5)
    for child in children:
        os.kill(child, signal.SIGCONT)
    assert [wait(child) for child in children] == [0, 0]
    record("all processes stopped and woken", injected=1, fired=1, finished=1)


# ------------------------------------------------------------------------------------------------------------------- torchrun


def ended_within(process: subprocess.Popen[str], seconds: float) -> tuple[str, float]:
    """What torchrun and its workers printed, and how long they lived on."""
    started = time.monotonic()
    _, errors = process.communicate(timeout=seconds + 60)
    return errors, time.monotonic() - started


def start_two(command: list[str], folder: Path, *more: str) -> tuple[subprocess.Popen[str], dict[int, int]]:
    """torchrun with two workers: its process, and the number of each rank's."""
    process = command_line(command, folder, *TWO, *PERIODS, *more, torchrun=2)
    until = time.monotonic() + 60
    while len(ranks := ranks_of(process.pid)) < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    return process, ranks


STOPPED = re.compile(r"rank [01], step 0: stopped by SIGTERM before a step was done\. The same command begins again\.")
ENDED = re.compile(r"error: rank [01], step \d+( \(\w+\))?: (gone without a word|stopped by SIGTERM before)")


@pytest.mark.timeout(280)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_a_kill_at_a_random_moment_under_torchrun_ends_all_with_a_line(seed: int, tiny_command: list[str], tmp_path: Path) -> None:
    """The line sometimes lacked the step, and once there was none: a process that loads has no answer to torchrun's SIGTERM."""
    draw, folder = random.Random(seed), tmp_path / "run"
    victim, seconds = draw.choice([0, 1]), draw.uniform(0, 12)
    process, ranks = start_two(tiny_command, folder, "trainer.max_steps=100000", "trainer.log_every=100")
    time.sleep(seconds)
    os.kill(ranks[victim], signal.SIGKILL)
    errors, took = ended_within(process, SECONDS)
    lines = error_lines(errors) or [line for line in errors.splitlines() if STOPPED.match(line)]
    assert process.returncode == 1 and took < SECONDS and not any(is_alive(pid) for pid in ranks.values())
    assert len(lines) == 1 and (ENDED.match(lines[0]) or STOPPED.match(lines[0])), errors
    if "gone without a word" in lines[0]:
        assert lines[0].startswith(f"error: rank {victim}, step ")
        if victim == 1:
            assert_failed(folder, lines[0])
    record("ranks killed at random moments under torchrun", injected=1, fired=1, ended=1)


@pytest.mark.timeout(280)
def test_a_stopped_rank_under_torchrun_ends_all_and_the_same_command_goes_on(tiny_command: list[str], tmp_path: Path) -> None:
    folder, more = tmp_path / "run", ["trainer.max_steps=100", "trainer.eval_every=50"]
    process, ranks = start_two(tiny_command, folder, *more)
    while not (folder / "checkpoints" / "step-00000002").exists():
        time.sleep(0.05)
    os.kill(ranks[1], signal.SIGSTOP)
    errors, took = ended_within(process, SECONDS)
    (line,) = error_lines(errors)
    assert process.returncode == 1 and took < SECONDS and not any(is_alive(pid) for pid in ranks.values())
    assert re.match(r"error: rank 1, step \d+.*: stopped for \d+ s", line), line
    assert_failed(folder, line)
    for name in ("run", "undisturbed"):
        assert in_processes(2, lambda rank, name=name: run(tiny_command, tmp_path / name, *TWO, *PERIODS, *more)) == [0, 0]
    exact = digest_run(folder) == digest_run(tmp_path / "undisturbed")
    record("ranks hanging (kill -STOP)", injected=1, fired=1, ended=1, exact=int(exact))
    assert exact


@pytest.mark.timeout(280)
def test_sigterm_to_torchrun_stops_all_and_saves(tiny_command: list[str], tmp_path: Path) -> None:
    """That of torchrun's own, where a process has died, is told from this one."""
    process, ranks = start_two(tiny_command, tmp_path / "run", "trainer.max_steps=100000")
    while not (tmp_path / "run" / "checkpoints").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    errors, _ = ended_within(process, 60)
    found = status(tmp_path / "run")
    assert (found["state"], found["exit_code"]) == ("preempted", 143), errors
    assert not error_lines(errors) and errors.count(f"step {found['step']}: stopped by SIGTERM and saved.") == 2, errors
    assert not any(is_alive(pid) for pid in ranks.values())
    record("SIGTERM and Ctrl-C", injected=1, fired=1)
