"""Several processes are one: the same global batch gives the same run."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import user_functions
from faults.places import in_midst
from runs import (
    TWO,
    before_step,
    checkpoint_steps,
    command_line,
    copy_of,
    forks,
    in_processes,
    rows,
    run,
    send,
    status,
    steps_of,
    train_module,
)
from safetensors.torch import load_file, save_file

from mini_distill.data.batch import Batch
from mini_distill.data.loader import TrainingBatches
from mini_distill.digest import digest_run
from mini_distill.errors import ConfigError, DistributedError, Preempted


def assert_same_run(one: Path, other: Path) -> None:
    for name in (
        "train/loss",
        "train/ce",
        "train/forward_kl",
        "train/grad_norm",
        "train/tokens",
        "eval/student_nll",
        "eval/tokens",
        "eval/top1_agreement",
    ):
        found = [[row[name] for row in rows(folder) if name in row] for folder in (one, other)]
        assert found[0] == pytest.approx(found[1], abs=1e-4 if "norm" in name else 1e-5), name
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (one, other)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def single(tiny_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    run(tiny_command, folder)
    return folder


@forks
def test_two_processes_train_as_one_and_keep_equal_weights(tiny_command: list[str], tmp_path: Path, single: Path) -> None:
    def body(rank: int) -> None:
        original = train_module.write_result

        def keep(d: Any, control: Any) -> Any:
            weights = {name: p.detach().clone() for name, p in d.language_model.named_parameters()}
            save_file(weights, tmp_path / f"rank-{rank}.safetensors")
            return original(d, control)

        train_module.write_result = keep
        run(tiny_command, tmp_path / "run", *TWO)

    assert in_processes(2, body) == [0, 0]
    assert_same_run(tmp_path / "run", single)
    ranks = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert rows(tmp_path / "run")[0]["eval/student_nll"] == pytest.approx(rows(single)[0]["eval/student_nll"], abs=1e-6)


@forks
def test_two_processes_with_accumulation_train_as_one(tiny_command: list[str], tmp_path: Path, single: Path) -> None:
    more = ["trainer.micro_batch_size=1", "trainer.grad_accum_steps=2"]
    assert in_processes(2, lambda rank: run(tiny_command, tmp_path / "run", *more)) == [0, 0]
    assert_same_run(tmp_path / "run", single)


@forks
def test_process_without_a_supervised_token_takes_part(tiny_command: list[str], tmp_path: Path) -> None:
    """A loss without a graph on one process lets the others wait for its gradients for ever."""

    def body(rank: int, count: int) -> None:
        with first_rows_supervised(2 - 2 * rank):  # of the four rows of a step: both of rank 0, none of rank 1
            run(tiny_command, tmp_path / f"of-{count}", f"trainer.micro_batch_size={4 // count}")

    assert in_processes(2, lambda rank: body(rank, 2)) == [0, 0]
    body(0, 1)
    assert_same_run(tmp_path / "of-2", tmp_path / "of-1")


@contextmanager
def first_rows_supervised(count: int) -> Iterator[None]:
    """Nothing is supervised in a training batch beyond its first `count` rows."""
    original = TrainingBatches.steps

    def steps(batches: TrainingBatches, first_step: int = 1) -> Iterator[list[Batch]]:
        for micro_batches in original(batches, first_step):
            for batch in micro_batches:
                batch.labels[count:] = -100
            yield micro_batches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingBatches, "steps", steps)
        yield


@forks
@pytest.mark.parametrize(("place", "step"), [("step", 3), ("step 2 (evaluation)", 2), ("step 0 (evaluation)", 0), ("step 0 (loading)", 0)])
def test_two_processes_go_on_to_the_bit(place: str, step: int, tiny_command: list[str], tmp_path: Path) -> None:
    """A signal to one of them stops all at the same step, also one that cuts an evaluation short."""
    command = [*tiny_command, *TWO, "trainer.eval_every=2", "evaluation.hooks=[user_functions.parameter_sum]"]
    assert in_processes(2, lambda rank: run(command, tmp_path / "undisturbed")) == [0, 0]

    def stopped(rank: int) -> None:
        with in_midst(place, send(signal.SIGTERM)) if rank == 1 else nullcontext():
            run(command, tmp_path / "run")

    assert in_processes(2, stopped) == [143, 143]
    assert checkpoint_steps(tmp_path / "run")[-1:] == [step][: step > 0] and status(tmp_path / "run")["state"] == "preempted"
    assert in_processes(2, lambda rank: run(command, tmp_path / "run")) == [0, 0]
    assert digest_run(tmp_path / "run") == digest_run(tmp_path / "undisturbed")
    assert steps_of(tmp_path / "run") == list(range(7))


@forks
def test_another_number_of_processes_is_another_batch_and_refused(
    tiny_command: list[str], tmp_path: Path, single: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(single, tmp_path / "run")
    assert in_processes(2, lambda rank: run(tiny_command, folder)) == [2, 2]
    errors = capfd.readouterr().err
    assert "global_batch_size: got 8, and the run, which has finished, has 4" in errors
    assert "world_size: got 2, and the run, which has finished, has 1." in errors


@forks
def test_a_run_of_one_process_goes_on_with_two_and_with_one_again_where_that_is_allowed(
    tiny_command: list[str], tmp_path: Path, single: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The global batch stays: the same sequences in the same order, cut otherwise. The sums are rounded otherwise."""
    folder, allowed = tmp_path / "run", ["resume_allow=[world_size,trainer.micro_batch_size]"]

    def part(until: int, *more: str) -> None:
        with before_step(until, send(signal.SIGTERM)):
            run(tiny_command, folder, *more)

    with pytest.raises(Preempted):
        part(2)
    assert in_processes(2, lambda rank: part(4, *TWO, "resume_allow=[trainer.micro_batch_size]")) == [2, 2]
    assert capfd.readouterr().err.count("world_size: got 2, and the run to be resumed has 1.") == 2 and checkpoint_steps(folder) == [2]
    assert in_processes(2, lambda rank: part(4, *TWO, *allowed)) == [143, 143]
    with pytest.raises(ConfigError, match="world_size: got 1, and the run to be resumed has 2"):
        run(tiny_command, folder, "resume_allow=[trainer.micro_batch_size]")
    run(tiny_command, folder, *allowed)
    assert_same_run(folder, single)
    assert steps_of(folder) == list(range(7))


@forks
def test_nan_on_one_process_stops_all_before_the_update(tiny_command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def body(rank: int) -> None:
        name = "nan_from_third_step" if rank == 1 else "twice_forward_kl"
        user_functions.on_this_rank = getattr(user_functions, name)
        run(tiny_command, tmp_path / "run", *TWO, "objective.divergence=user_functions.on_this_rank", "trainer.save_every=1")

    assert in_processes(2, body) == [7, 7]
    assert checkpoint_steps(tmp_path / "run")[-1] == 2
    assert "step 3" in capfd.readouterr().err


# -------------------------------------------------------------------------------------------------------------------- torchrun


def test_torchrun_trains_as_one_process(tiny_command: list[str], tmp_path: Path, single: Path) -> None:
    process = command_line(tiny_command, tmp_path / "run", *TWO, torchrun=2)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert_same_run(tmp_path / "run", single)
    assert output.count("The student:") == 1


def test_process_that_raises_ends_all_quickly_with_its_line(tiny_command: list[str], tmp_path: Path) -> None:
    raising = ["objective.divergence=user_functions.raises_on_rank_1", "trainer.max_steps=100000"]
    started = time.monotonic()
    process = command_line(tiny_command, tmp_path / "run", *TWO, *raising, torchrun=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    ours = [line for line in errors.splitlines() if line.startswith("error: ")]
    what = "error: rank 1, step 3: ValueError: a bug of the user's."
    other = f"{what} Rank 0 ends with it. The same command goes on from the last checkpoint."
    assert sorted(ours) == [other, f"{what} The traceback stands above."], errors
    assert errors.count("Traceback (most recent call last)") <= 2, errors  # the bug's and torchrun's own
    assert time.monotonic() - started < 90
    found = status(tmp_path / "run")
    assert (found["state"], found["exit_code"]) == ("failed", 8) and found["error"] == other.removeprefix("error: ")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharding_that_accelerate_passes_over_is_refused_by_name(
    name: str, tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, or with one process, accelerate ignores it: the run ended well, with the whole student on every process."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(DistributedError, match=f"set up for {name} .*Start with torchrun"):
        run(tiny_command, tmp_path / "run")
