"""SIGTERM and Ctrl-C, wherever they come: the run is saved or left as it was, and the same command goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs import (
    before_step,
    checkpoint_steps,
    command_line,
    fork,
    forks,
    run,
    send,
    status,
    steps_of,
    train_module,
    wait,
)

from faults.record import record
from faults.twins import Twins
from mini_distill import result, storage
from mini_distill.digest import digest_run
from mini_distill.errors import Preempted
from mini_distill.evaluation.evaluator import Evaluator
from mini_distill.training.signals import SAME_PRESS


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


# ------------------------------------------------------------------------------------------------------------ wherever they come


@contextmanager
def in_midst(of: str, action: Callable[[], object]) -> Iterator[None]:
    """Call `action` once while this is going on."""
    owner, name, call = PLACES[of]()
    original, calls = getattr(owner, name), 0

    def watched(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return original(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield


PLACES: dict[str, Callable[[], tuple[Any, str, int]]] = {
    "loading": lambda: (train_module, "prepare", 1),
    "first evaluation": lambda: (Evaluator, "__call__", 1),
    "step": lambda: (train_module, "distill_step", 3),
    "save": lambda: (storage, "_write_manifest", 2),
    "evaluation": lambda: (Evaluator, "__call__", 2),
    "export": lambda: (result, "write_student", 1),
}
"""What a run does, as a function that does it, and which of its calls is meant."""


@forks
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_anywhere_is_answered_and_the_same_command_ends_as_undisturbed(
    place: str, number: signal.Signals, twins: Twins, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = twins.command("evaluation")
    with in_midst(place, send(number)):
        code = wait(fork(lambda: run(command, tmp_path / "run")))
    errors = capfd.readouterr().err
    assert code == (0 if place == "export" else 128 + number) and f"{number.name}: finishing the step" in errors
    assert "Traceback" not in errors and "error: " not in errors
    assert status(tmp_path / "run")["exit_code"] == code
    run(command, tmp_path / "run")
    exact = digest_run(tmp_path / "run") == twins.digest("evaluation")
    record("SIGTERM and Ctrl-C", injected=1, fired=1, exact=int(exact))
    assert exact


def twice() -> None:
    """Two presses, far enough from each other not to be one."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(SAME_PRESS + 0.1)
    os.kill(os.getpid(), signal.SIGINT)


@forks
@pytest.mark.parametrize("place", [pytest.param(place, marks=[] if place == "save" else pytest.mark.slow) for place in PLACES])
def test_a_second_ctrl_c_stops_at_once_and_harms_nothing(place: str, twins: Twins, tmp_path: Path) -> None:
    command, folder = twins.command("evaluation"), tmp_path / "run"

    def body() -> None:
        with in_midst(place, twice), contextlib.suppress(KeyboardInterrupt):
            run(command, folder)
            os._exit(77)  # it was not stopped

    assert wait(fork(body)) == 0
    assert status(folder)["state"] == "preempted" and status(folder)["exit_code"] == 130
    assert not list(folder.rglob(".tmp-*"))
    run(command, folder)
    exact = digest_run(folder) == twins.digest("evaluation")
    record("second Ctrl-C", injected=1, fired=1, exact=int(exact))
    assert exact


@pytest.mark.slow
def test_a_second_ctrl_c_to_the_command_is_one_line_and_130(tiny_command: list[str], tmp_path: Path) -> None:
    """The line said that there was nothing to save, whatever had been saved before."""
    hanging = ["objective.divergence=user_functions.waits_for_ever_from_third_step", "trainer.save_every=1"]
    process = command_line(tiny_command, tmp_path / "run", *hanging)
    wait_for(lambda: checkpoint_steps(tmp_path / "run") == [1, 2])
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(SAME_PRESS + 0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert errors.strip().splitlines()[-1] == "error: interrupted. The same command goes on from what was saved, if there is anything."
    record("second Ctrl-C", injected=1, fired=1, ended=1)
