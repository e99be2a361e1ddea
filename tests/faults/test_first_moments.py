"""Signals in the first moments of a command, while modules are imported; and the terminal that is closed over a run."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import TESTS, checkpoint_steps, forks, run, status, steps_of

from faults.record import record
from mini_distill.digest import digest_run

INTERRUPTED = "error: interrupted. The same command goes on from what was saved, if there is anything."
ENDINGS = rf"({re.escape(INTERRUPTED)}|step \d+: stopped by SIGINT .*)"
VERBS = ["train", "cache", "evaluate", "plan", "doctor", "digest", "report", "compare"]


def answers_signals(pid: int) -> bool:
    """Whether a process has a handler of SIGTERM, which Python by itself has not."""
    try:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return False
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def started(verb: str, *arguments: str) -> subprocess.Popen[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"mini_distill.{verb}", *arguments]
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ends_in_a_line(process: subprocess.Popen[str], number: signal.Signals, code: int, line: str) -> None:
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, (process.returncode, errors)
    assert "Traceback" not in errors and re.fullmatch(line, errors.strip().splitlines()[-1]), errors
    record("signals in the first moments of a command", injected=1, fired=1, ended=1)


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_before_anything_is_imported_is_one_line(verb: str) -> None:
    """Half a second after its start a command answered Ctrl-C with a traceback from the midst of some import."""
    process = started(verb, "folder" if verb in ("digest", "report", "compare") else "seed=0")
    wait_until(lambda: answers_signals(process.pid))
    ends_in_a_line(process, signal.SIGINT, 130, re.escape(INTERRUPTED))


@pytest.mark.parametrize(
    "pause", [0.1, 0.3, 0.6, *(pytest.param(pause, marks=pytest.mark.slow) for pause in (0.9, 1.2, 1.6, 2.0, 3.0, 4.0))]
)
def test_ctrl_c_while_modules_are_imported_is_one_line(pause: float, tiny_command: list[str], tmp_path: Path) -> None:
    process = started("train", *tiny_command, "trainer.max_steps=100000", f"output_dir={tmp_path / 'run'}")
    wait_until(lambda: answers_signals(process.pid))
    time.sleep(pause)
    ends_in_a_line(process, signal.SIGINT, 130, ENDINGS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_before_anything_is_imported_are_one_line_and_143(number: signal.Signals) -> None:
    process = started("train")
    wait_until(lambda: answers_signals(process.pid))
    ends_in_a_line(process, number, 143, rf"error: stopped by {number.name}\. The same command goes on .*")


def test_a_process_of_several_that_has_said_why_it_ends_says_nothing_more() -> None:
    """torchrun's SIGTERM, sent because another process had ended first, added a line about a run that had not begun."""
    body = "import os, signal; from mini_distill import starting as s; s.answer_signals(); s.told(8); os.kill(os.getpid(), signal.SIGTERM)"
    done = subprocess.run([sys.executable, "-c", body], env={**os.environ, "RANK": "0"}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (8, "", "")


def test_signals_that_whoever_started_the_command_ignores_stay_ignored(tiny_command: list[str], tmp_path: Path) -> None:
    """A run under nohup goes on when the terminal is closed."""
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    arguments = ["-m", "mini_distill.train", *tiny_command, "trainer.max_steps=100000", "trainer.save_every=null"]
    command = [sys.executable, "-c", ignoring, *arguments, f"output_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for _ in range(2):
        before = rows_in(tmp_path / "run")
        wait_until(lambda before=before: rows_in(tmp_path / "run") > before + 3)
        process.send_signal(signal.SIGHUP)
    before = rows_in(tmp_path / "run")
    wait_until(lambda: rows_in(tmp_path / "run") > before + 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def rows_in(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@forks
def test_a_run_whose_terminal_is_closed_saves_and_goes_on(tiny_command: list[str], tmp_path: Path) -> None:
    """SIGHUP killed it where it stood; and once it is answered, every line that is printed to the closed terminal is an error."""
    command = [*tiny_command, "trainer.max_steps=400", "trainer.save_every=null", "evaluation.num_samples=0", "data.num_workers=1"]
    folder = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
        os.execv(sys.executable, [sys.executable, "-m", "mini_distill.train", *command, f"output_dir={folder}"])
    os.set_blocking(terminal, False)
    wait_until(lambda: (drain(terminal), rows_in(folder) > 3)[1])
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    saved = checkpoint_steps(folder)[-1]
    assert 3 <= saved < 400 and status(folder)["state"] == "preempted" and steps_of(folder) == list(range(saved + 1))
    run(command, folder)
    run(command, tmp_path / "undisturbed")
    assert digest_run(folder) == digest_run(tmp_path / "undisturbed")
    record("a terminal that is closed", injected=1, fired=1, exact=1)


def drain(terminal: int) -> None:
    """Read what was printed, or the process would wait for somebody who does."""
    try:
        while os.read(terminal, 65536):
            pass
    except BlockingIOError:
        pass
