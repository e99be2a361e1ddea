"""A run that was stopped between two steps, and goes on, is the run that was never stopped: to the bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.twins import KINDS, Crash, Twins, crash, crash_before
from runs import (
    before_step,
    checkpoint_steps,
    copy_of,
    fork,
    forks,
    rows,
    run,
    status,
    steps_of,
    wait,
    weight_norm,
)

from mini_distill.data.row import Row
from mini_distill.data.sources import HubDataset
from mini_distill.digest import digest_run
from mini_distill.errors import ConfigError

# ------------------------------------------------------------------------------------------------------------- to the bit


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_twice_it_ends_as_undisturbed(kind: str, twins: Twins, tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    command = twins.command(kind)
    crash_before(3, command, tmp_path / "run")
    crash_before(6, command, tmp_path / "run")
    run(command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(undisturbed(kind))
    assert len(steps_of(tmp_path / "run")) == len(set(steps_of(tmp_path / "run")))


@pytest.mark.parametrize("rows", [1, 3])
def test_with_fewer_rows_than_a_batch_it_ends_as_undisturbed(rows: int, tiny_command: list[str], tiny_corpus: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(tiny_corpus.read_text().splitlines(keepends=True)[:rows]))
    command = [*tiny_command, f"data.path={few}", "data.eval_fraction=0", "data.packing=false", "trainer.micro_batch_size=8"]
    crash_before(4, command, tmp_path / "run")
    run(command, tmp_path / "run")
    run(command, tmp_path / "undisturbed")
    assert digest_run(tmp_path / "run") == digest_run(tmp_path / "undisturbed")


@forks
def test_a_streamed_data_set_is_read_again_from_its_beginning_and_the_run_ends_as_undisturbed(
    tiny_command: list[str], tiny_corpus: Path, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    """`datasets` with a shuffle buffer, resumed twice, lost 5 of 24 rows. Here a stream becomes tokens on disk before the first step."""
    streamed = ["data.source=hub", f"data.path={tiny_corpus.parent}", "data.streaming=true", f"data.cache_dir={tmp_path / 'tokens'}"]
    command = [*tiny_command, *streamed]

    def killed_in_the_stream() -> None:
        original = HubDataset.rows

        def rows_until(source: HubDataset) -> Iterator[Row]:
            for number, row in enumerate(original(source)):
                if number == 30:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield row

        HubDataset.rows = rows_until  # type: ignore[method-assign]
        run(command, tmp_path / "run")

    assert wait(fork(killed_in_the_stream)) == -signal.SIGKILL
    for step in (3, 5):
        crash_before(step, command, tmp_path / "run")
    summary = run(command, tmp_path / "run")
    assert summary["data/rows_read"] == summary["data/rows_used"] == 60
    assert digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))


def test_every_saved_step_is_a_place_to_go_on_from(twins: Twins, tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    command = twins.command("plain")
    for step in range(1, 6):
        folder = copy_of(undisturbed("plain"), tmp_path / f"from-{step}")
        run(command, folder, f"resume={folder / 'checkpoints' / f'step-{step:08d}'}")
        assert digest_run(folder) == digest_run(undisturbed("plain")), f"from step {step}"
        assert steps_of(folder) == list(range(7))


def test_stopped_before_every_step_it_ends_as_undisturbed(twins: Twins, tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    command = twins.command("plain")
    for step in range(1, 7):
        crash_before(step, command, tmp_path / "run")
    run(command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))
    assert steps_of(tmp_path / "run") == list(range(7))


def test_steps_after_the_last_checkpoint_are_done_again(tiny_command: list[str], tmp_path: Path) -> None:
    """Rows of the metrics that a killed run wrote beyond its checkpoint must not stand twice."""
    sparse = [*tiny_command, "trainer.save_every=3"]
    run(sparse, tmp_path / "undisturbed")
    crash_before(6, sparse, tmp_path / "run")  # five steps done, three saved
    assert checkpoint_steps(tmp_path / "run") == [3]
    run(sparse, tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(tmp_path / "undisturbed")
    assert steps_of(tmp_path / "run") == list(range(7))


def test_two_undisturbed_runs_are_equal_and_another_seed_is_not(twins: Twins, tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    run(twins.command("plain"), tmp_path / "again")
    run(twins.command("plain"), tmp_path / "seed", "seed=1")
    assert digest_run(tmp_path / "again") == digest_run(undisturbed("plain")) != digest_run(tmp_path / "seed")


def test_workers_change_nothing(undisturbed: Callable[[str], Path]) -> None:
    assert digest_run(undisturbed("workers")) == digest_run(undisturbed("plain"))


def test_periods_of_saving_and_the_place_change_nothing(
    tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    run(tiny_command, tmp_path / "elsewhere", "trainer.save_every=null")
    assert digest_run(tmp_path / "elsewhere") == digest_run(undisturbed("plain"))


# ----------------------------------------------------------------------------------------------------------------- ways to go on


def test_longer_run_goes_on_from_the_end(tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    constant = [*tiny_command, "trainer.schedule=constant"]
    run(constant, tmp_path / "run")
    summary = run(constant, tmp_path / "run", "trainer.max_steps=9", "resume_allow=[trainer.max_steps]")
    run(constant, tmp_path / "at-once", "trainer.max_steps=9", "evaluation.num_samples=0")
    assert summary["train/steps"] == 9 and steps_of(tmp_path / "run") == list(range(10))
    one, other = ({row["step"]: row["train/loss"] for row in rows(tmp_path / name) if row["step"]} for name in ("run", "at-once"))
    assert one == other
    assert weight_norm(tmp_path / "run") == weight_norm(tmp_path / "at-once")
    again = run(constant, tmp_path / "run", "trainer.max_steps=9", "resume_allow=[trainer.max_steps]")
    assert again == json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_never_resuming_moves_the_old_run_aside(tiny_command: list[str], tmp_path: Path) -> None:
    crash_before(4, tiny_command, tmp_path / "run")
    old = digest_run(tmp_path / "run")
    run(tiny_command, tmp_path / "run", "resume=never", "seed=3")
    (aside,) = [path for path in tmp_path.iterdir() if path.name != "run"]
    assert aside.name == "run.old-1" and digest_run(aside) == old
    assert steps_of(tmp_path / "run") == list(range(7)) and status(tmp_path / "run")["state"] == "finished"


def test_going_on_from_a_named_checkpoint_sets_later_ones_aside(twins: Twins, tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    folder = copy_of(undisturbed("plain"), tmp_path / "run")
    command = twins.command("plain")
    start = f"resume={folder / 'checkpoints' / 'step-00000002'}"
    with before_step(4, crash), pytest.raises(Crash):
        run(command, folder, start)
    assert checkpoint_steps(folder) == [1, 2, 3] and steps_of(folder) == [0, 1, 2, 3]
    assert (folder / "checkpoints" / "step-00000006.old-1").is_dir()


def test_checkpoint_of_another_run_begins_a_new_folder(tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    checkpoint = undisturbed("plain") / "checkpoints" / "step-00000003"
    run(tiny_command, tmp_path / "branch", f"resume={checkpoint}")
    assert [step for step in steps_of(tmp_path / "branch") if step > 3] == [4, 5, 6]
    branch, trunk = ({row["step"]: row.get("train/loss") for row in rows(folder)} for folder in (tmp_path / "branch", undisturbed("plain")))
    assert all(branch[step] == trunk[step] for step in (4, 5, 6))
    assert weight_norm(tmp_path / "branch") == weight_norm(undisturbed("plain"))


def test_checkpoint_that_is_not_there_is_named(tiny_command: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume"):
        run(tiny_command, tmp_path / "run", f"resume={tmp_path / 'step-00000400'}")
