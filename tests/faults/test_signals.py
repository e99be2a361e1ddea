"""SIGTERM and Ctrl-C, wherever they come: the run is saved or left as it was, and the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import (
    before_step,
    checkpoint_steps,
    command_line,
    run,
    send,
    status,
    steps_of,
    train_module,
)

from mini_distill.digest import digest_run
from mini_distill.errors import Preempted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_the_step_and_the_same_command_goes_on(
    number: signal.Signals, code: int, tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    folder = tmp_path / "run"
    with before_step(3, send(number)), pytest.raises(Preempted) as caught:
        run(tiny_command, folder)
    assert caught.value.exit_code == code and "step 3" in str(caught.value)
    assert checkpoint_steps(folder)[-1] == 3 and status(folder)["state"] == "preempted" and status(folder)["exit_code"] == code
    run(tiny_command, folder)
    assert digest_run(folder) == digest_run(undisturbed("plain")) and status(folder)["exit_code"] == 0


def test_signal_in_the_last_step_lets_the_run_finish(tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    with before_step(6, send(signal.SIGTERM)):
        run(tiny_command, tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "finished" and digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))


def test_signal_while_loading_saves_the_first_step(tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    def loading(*arguments: Any, original: Any = train_module.prepare) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(train_module, "prepare", loading)
        run(tiny_command, tmp_path / "run")
    run(tiny_command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_command_ends_in_its_exit_code_and_one_line(
    number: signal.Signals, code: int, tiny_command: list[str], tmp_path: Path
) -> None:
    process = command_line(tiny_command, tmp_path / "run", "trainer.max_steps=100000", "trainer.save_every=null")
    wait_for(
        lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) > 3
    )
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    last = errors.strip().splitlines()[-1]
    assert re.fullmatch(rf"step \d+: stopped by {number.name} and saved\. The same command goes on from here\.", last), errors
    assert "Traceback" not in errors
    step = int(last.split()[1].rstrip(":"))
    assert checkpoint_steps(tmp_path / "run") == [step] and steps_of(tmp_path / "run") == list(range(step + 1))


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
