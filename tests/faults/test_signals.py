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
import user_functions
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

from faults.places import PLACES, in_midst
from faults.record import record
from faults.twins import Twins
from mini_distill.digest import digest_run
from mini_distill.errors import Preempted
from mini_distill.evaluation import hooks
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


def test_signal_in_the_last_step_leaves_the_last_evaluation_to_the_same_command(
    tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    with before_step(6, send(signal.SIGTERM)), pytest.raises(Preempted, match="step 6: stopped by SIGTERM and saved"):
        run(tiny_command, tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run")[-1] == 6 and not (tmp_path / "run" / "summary.json").exists()
    run(tiny_command, tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "finished" and digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))
    assert steps_of(tmp_path / "run") == list(range(7))


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


ANYWHERE = [place for place in PLACES if place != "hook"]  # which only a run with a hook has


@forks
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ANYWHERE)
def test_a_signal_anywhere_is_answered_and_the_same_command_ends_as_undisturbed(
    place: str, number: signal.Signals, twins: Twins, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = twins.command("evaluation")
    with in_midst(place, send(number)):
        code = wait(fork(lambda: run(command, tmp_path / "run")))
    errors = capfd.readouterr().err
    assert code == (0 if place == "export" else 128 + number)
    assert (f"{number.name}: finishing what is under way" in errors) == (place != "loading")
    assert "Traceback" not in errors and "error: " not in errors
    assert status(tmp_path / "run")["exit_code"] == code
    run(command, tmp_path / "run")
    exact = digest_run(tmp_path / "run") == twins.digest("evaluation")
    record("SIGTERM and Ctrl-C", injected=1, fired=1, exact=int(exact))
    assert exact


class Begun:
    """What a run begins after the signal, while `watching()`: optimizer steps, batches of an evaluation, hooks."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __str__(self) -> str:
        return self.file.read_text()

    def signal(self) -> None:
        """To this process; what begins from now on counts."""
        self.file.write_text("")
        os.kill(os.getpid(), signal.SIGTERM)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, word in (
                (train_module, "optimizer_step", "step "),
                (Evaluator, "_measure", "batch "),
                (hooks, "_call", "hook "),
            ):
                patch.setattr(owner, name, self._noting(getattr(owner, name), word))
            yield

    def _noting(self, original: Callable[..., Any], word: str) -> Callable[..., Any]:
        def noting(*arguments: Any, **settings: Any) -> Any:
            if self.file.exists():
                with self.file.open("a") as file:
                    file.write(word)
            return original(*arguments, **settings)

        return noting


@forks
@pytest.mark.parametrize("place", [place for place in PLACES if place != "export"])
def test_nothing_is_begun_after_a_signal(place: str, twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the first evaluation ran the rest of it, one step and another whole evaluation; one in loading the same.

    What is under way ends: a step, a batch of an evaluation, a hook, a save.
    """
    monkeypatch.setattr(user_functions, "calls", 0)
    command, begun = [*twins.command("evaluation"), "evaluation.hooks=[user_functions.parameter_sum]"], Begun(tmp_path / "begun")
    run(command, tmp_path / "undisturbed")

    def body() -> None:
        with in_midst(place, begun.signal), begun.watching():
            run(command, tmp_path / "run")

    assert wait(fork(body)) == 143
    assert str(begun) == ""
    run(command, tmp_path / "run")
    exact = digest_run(tmp_path / "run") == digest_run(tmp_path / "undisturbed")
    assert exact and steps_of(tmp_path / "run") == list(range(7))
    record("SIGTERM: nothing is begun after it", injected=1, fired=1, exact=int(exact))


def test_a_signal_to_an_inner_part_is_told_to_the_run_around_it(tiny_command: list[str], tmp_path: Path) -> None:
    """Of a run with a control, a signal that came when the control had nothing left to stop was forgotten, and the run trained."""
    with in_midst("export", send(signal.SIGTERM)), pytest.raises(Preempted, match="before a step was done"):
        run([*tiny_command, "control=true"], tmp_path / "run")
    assert status(tmp_path / "run-control")["state"] == "finished" and status(tmp_path / "run")["state"] == "preempted"
    assert not checkpoint_steps(tmp_path / "run")


def twice() -> None:
    """Two presses, far enough from each other not to be one."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(SAME_PRESS + 0.1)
    os.kill(os.getpid(), signal.SIGINT)


@forks
@pytest.mark.parametrize("place", [pytest.param(place, marks=[] if place == "save" else pytest.mark.slow) for place in ANYWHERE])
def test_a_second_ctrl_c_stops_at_once_and_harms_nothing(place: str, twins: Twins, tmp_path: Path) -> None:
    command, folder = twins.command("evaluation"), tmp_path / "run"

    ended = Preempted if place == "loading" else KeyboardInterrupt  # by the first press, where there is nothing to save

    def body() -> None:
        with in_midst(place, twice), contextlib.suppress(ended):
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
