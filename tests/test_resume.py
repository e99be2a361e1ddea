"""A run that was stopped anywhere, and goes on, is the run that was never stopped: to the bit."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.injection import count_operations
from runs import (
    before_step,
    checkpoint_steps,
    command_line,
    copy_of,
    fork,
    forks,
    rows,
    run,
    send,
    status,
    steps_of,
    train_module,
    wait,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from mini_distill.digest import digest_run
from mini_distill.errors import ConfigError, Preempted, StorageError

KEEP_ALL = ["trainer.save_every=1", "trainer.keep_checkpoints=99"]
SCRATCH = [
    *("student=mini_2m", "student.hidden_size=32", "student.intermediate_size=64"),
    *("student.num_layers=1", "student.num_heads=2", "student.num_kv_heads=1"),
]
KINDS: dict[str, list[str]] = {
    "plain": [],
    "accumulation": ["trainer.grad_accum_steps=2", "trainer.micro_batch_size=2"],
    "dropout": [*SCRATCH, "student.dropout=0.3"],
    "bf16": ["trainer.precision=bf16"],
    "unpacked": ["data.packing=false", "trainer.micro_batch_size=5"],  # several epochs, with ragged ends
    "workers": ["data.num_workers=2"],
    "evaluation": ["trainer.eval_every=2", "trainer.export=best", "evaluation.sampling_temperature=1.0"],
    "jsd": ["objective=jsd", "trainer.schedule=wsd", "trainer.log_every=2"],
}


class Crash(Exception):
    """Stands for any sudden end."""


def crash() -> None:
    raise Crash


def command_of(kind: str, tiny_command: list[str]) -> list[str]:
    kept = [o for o in tiny_command if not (o.startswith("student") and "dropout" in kind)]
    return [*kept, *KEEP_ALL, *KINDS[kind]]


def crash_before(step: int, command: list[str], folder: Path) -> None:
    with before_step(step, crash), pytest.raises(Crash):
        run(command, folder)


@pytest.fixture(scope="module")
def undisturbed(tiny_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the run of a kind that was never stopped; made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp("undisturbed") / kind
            run(command_of(kind, tiny_command), path)
            made[kind] = path
        return made[kind]

    return folder


# ------------------------------------------------------------------------------------------------------------- to the bit


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_twice_it_ends_as_undisturbed(
    kind: str, tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    command = command_of(kind, tiny_command)
    crash_before(3, command, tmp_path / "run")
    crash_before(6, command, tmp_path / "run")
    run(command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(undisturbed(kind))
    assert len(steps_of(tmp_path / "run")) == len(set(steps_of(tmp_path / "run")))


def test_every_saved_step_is_a_place_to_go_on_from(tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    command = command_of("plain", tiny_command)
    for step in range(1, 6):
        folder = copy_of(undisturbed("plain"), tmp_path / f"from-{step}")
        run(command, folder, f"resume={folder / 'checkpoints' / f'step-{step:08d}'}")
        assert digest_run(folder) == digest_run(undisturbed("plain")), f"from step {step}"
        assert steps_of(folder) == list(range(7))


def test_stopped_before_every_step_it_ends_as_undisturbed(
    tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    command = command_of("plain", tiny_command)
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


def test_two_undisturbed_runs_are_equal_and_another_seed_is_not(
    tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    run(command_of("plain", tiny_command), tmp_path / "again")
    run(command_of("plain", tiny_command), tmp_path / "seed", "seed=1")
    assert digest_run(tmp_path / "again") == digest_run(undisturbed("plain")) != digest_run(tmp_path / "seed")


def test_workers_change_nothing(undisturbed: Callable[[str], Path]) -> None:
    assert digest_run(undisturbed("workers")) == digest_run(undisturbed("plain"))


def test_periods_of_saving_and_the_place_change_nothing(
    tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    run(tiny_command, tmp_path / "elsewhere", "trainer.save_every=null")
    assert digest_run(tmp_path / "elsewhere") == digest_run(undisturbed("plain"))


# ---------------------------------------------------------------------------------------------------------------------- signals


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


# ------------------------------------------------------------------------------------------------------------------------- kills


@forks
def test_killed_at_random_moments_it_ends_as_undisturbed(
    tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    assert killed_again_and_again("plain", 4, tiny_command, tmp_path / "run") == digest_run(undisturbed("plain"))


@forks
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_kind_killed_at_random_moments_end_as_undisturbed(
    kind: str, tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    seed = 1 + list(KINDS).index(kind)
    assert killed_again_and_again(kind, 4, tiny_command, tmp_path / "run", seed) == digest_run(undisturbed(kind))


def killed_again_and_again(kind: str, kills: int, tiny_command: list[str], folder: Path, seed: int = 0) -> str:
    """The digest of a run that got `kills` kill -9 at random moments of its whole length, and then was left alone."""
    command = command_of(kind, tiny_command)
    started = time.monotonic()
    assert wait(fork(lambda: run(command, folder.with_name("timed")))) == 0
    length = time.monotonic() - started
    shutil.rmtree(folder.with_name("timed"))
    draw = random.Random(seed)
    fired = 0
    for _ in range(20 * kills):
        child = fork(lambda: run(command, folder))
        time.sleep(draw.uniform(0.1, 1.0) * length)
        os.kill(child, signal.SIGKILL)  # until it is waited for, the number is the child's
        fired += wait(child) == -signal.SIGKILL
        if fired == kills:
            break
        if (folder / "student").exists():
            shutil.rmtree(folder)  # there is nothing left of it to kill
    assert fired == kills
    run(command, folder)
    assert steps_of(folder) == sorted(set(steps_of(folder)))
    return digest_run(folder)


@forks
def test_killed_inside_a_save_it_ends_as_undisturbed(tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    command = [*tiny_command, "trainer.save_every=1", "trainer.keep_checkpoints=1"]  # every save also deletes
    count = operations_of_a_save(command, tmp_path / "counted")
    operations = random.Random(0).sample(range(count), 4)
    assert killed_inside_saves(command, tmp_path, operations) == digest_run(undisturbed("plain")), operations


@forks
@pytest.mark.slow
def test_killed_at_every_operation_of_a_save_it_ends_as_undisturbed(
    tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    command = [*tiny_command, "trainer.save_every=1", "trainer.keep_checkpoints=1"]
    for number in range(operations_of_a_save(command, tmp_path / "counted")):
        assert killed_inside_saves(command, tmp_path / str(number), [number, number]) == digest_run(undisturbed("plain")), number


def killed_inside_saves(command: list[str], tmp_path: Path, operations: list[int]) -> str:
    """The digest of a run that was killed in a save, before each of these file operations, and then left alone."""
    for number in operations:
        child = fork(lambda number=number: killing_in_save(number, command, tmp_path / "run"))
        assert wait(child) == -signal.SIGKILL, "the fault did not fire"
    run(command, tmp_path / "run")
    assert steps_of(tmp_path / "run") == list(range(7))
    return digest_run(tmp_path / "run")


def killing_in_save(number: int, command: list[str], folder: Path) -> None:
    watch_a_save(lambda seen: os.kill(os.getpid(), signal.SIGKILL) if seen == number else None)
    run(command, folder)


def operations_of_a_save(command: list[str], folder: Path) -> int:
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        watch_a_save(seen.append, patch)
        run(command, folder)
    return len(seen)


def watch_a_save(before: Callable[[int], object], patch: pytest.MonkeyPatch | None = None) -> None:
    """Call `before` ahead of every file operation of the first checkpoint that is saved after step 1, and so replaces another."""
    patch = patch or pytest.MonkeyPatch()
    original, saves = train_module.Distillation.save, 0

    def save(d: Any, step: int) -> None:
        nonlocal saves
        saves += step > 1
        if step == 1 or saves > 1:
            return original(d, step)
        with pytest.MonkeyPatch.context() as watched:
            count_operations(before, watched)
            return original(d, step)

    patch.setattr(train_module.Distillation, "save", save)


@forks
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_killed_while_the_result_is_written_it_ends_as_undisturbed(
    share: float, tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train_module, "write_result", lambda d, control: crash())
        run(tiny_command, folder)
    seen: list[int] = []
    counted = copy_of(folder, tmp_path / "counted")
    with pytest.MonkeyPatch.context() as patch:
        count_operations(seen.append, patch)
        run(tiny_command, counted)
    child = fork(lambda: killed_before_operation(int(share * len(seen)), tiny_command, folder))
    assert wait(child) == -signal.SIGKILL
    run(tiny_command, folder)
    assert digest_run(folder) == digest_run(undisturbed("plain"))


def killed_before_operation(number: int, command: list[str], folder: Path) -> None:
    count_operations(lambda seen: os.kill(os.getpid(), signal.SIGKILL) if seen == number else None)
    run(command, folder)


# ---------------------------------------------------------------------------------------------------------- damaged checkpoints


def test_damaged_newest_checkpoint_is_skipped_and_the_end_is_the_same(
    tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    command = command_of("plain", tiny_command)
    crash_before(5, command, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        run(command, tmp_path / "run")
    assert "step-00000004" in caplog.text and "skipped" in caplog.text
    assert digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))


def test_run_whose_checkpoints_are_all_damaged_is_not_silently_begun_anew(tiny_command: list[str], tmp_path: Path) -> None:
    crash_before(4, tiny_command, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(StorageError, match="resume=never"):
        run(tiny_command, tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- what may not change


def variant_of_corpus(corpus: Path, folder: Path) -> Path:
    lines = corpus.read_text().splitlines()
    (folder / "other.jsonl").write_text("\n".join([json.dumps({"text": "the cat sat on another mat"}), *lines[1:]]) + "\n")
    return folder / "other.jsonl"


@pytest.mark.parametrize(
    ("override", "key", "old", "new"),
    [
        ("trainer.learning_rate=0.02", "trainer.learning_rate", "0.01", "0.02"),
        ("seed=7", "seed", "0", "7"),
        ("trainer.micro_batch_size=8", "trainer.micro_batch_size", "4", "8"),
        ("trainer.grad_accum_steps=2", "global_batch_size", "4", "8"),
        ("objective=jsd", "objective.divergence", "forward_kl", "jsd"),
        ("objective.temperature=2", "objective.temperature", "1.0", "2.0"),
        ("data.seq_len=16", "data.seq_len", "32", "16"),
        ("trainer.max_steps=8", "trainer.max_steps", "6", "8"),
        ("trainer.precision=bf16", "trainer.precision", "fp32", "bf16"),
    ],
)
def test_changed_setting_is_refused_with_old_and_new_value(
    override: str, key: str, old: str, new: str, tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    """Trainers of others took another batch size, seed or data without a word, and ignored a new learning rate."""
    folder = copy_of(undisturbed("plain"), tmp_path / "run")
    before = digest_run(folder)
    with pytest.raises(ConfigError) as caught:
        run(tiny_command, folder, override)
    (problem,) = [problem for problem in caught.value.problems if problem.where == key]
    assert old in problem.what and new in problem.what and f"resume_allow=[{key}]" in problem.remedy
    assert digest_run(folder) == before or status(folder)["state"] == "failed"


def test_changed_data_file_is_refused(tiny_command: list[str], tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    shutil.copy(tiny_corpus, corpus)
    crash_before(4, [*tiny_command, f"data.path={corpus}"], tmp_path / "run")
    shutil.copy(variant_of_corpus(tiny_corpus, tmp_path), corpus)  # the same name, one row changed
    with pytest.raises(ConfigError, match=r"^data\.") as caught:
        run([*tiny_command, f"data.path={corpus}"], tmp_path / "run")
    assert "resume_allow=[data]" in str(caught.value)


def test_one_changed_teacher_weight_is_refused(tiny_command: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = copy_of(tiny_teacher, tmp_path / "teacher")
    command = [*tiny_command, f"teacher.path={teacher}"]
    crash_before(4, command, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.25
    model.save_pretrained(teacher)
    with pytest.raises(ConfigError, match=r"^teacher"):
        run(command, tmp_path / "run")


def test_changed_tokenizer_is_refused(tiny_command: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = copy_of(tiny_teacher, tmp_path / "teacher")
    command = [*tiny_command, f"teacher.path={teacher}"]
    crash_before(4, command, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(teacher)
    with pytest.raises(ConfigError) as caught:
        run(command, tmp_path / "run")
    assert "tokenizer" in [problem.where for problem in caught.value.problems]


def test_harmless_settings_may_change(tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]) -> None:
    crash_before(4, tiny_command, tmp_path / "run")
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    run(tiny_command, moved, "trainer.save_every=1", "trainer.keep_checkpoints=5", "data.num_workers=1", "evaluation.num_samples=0")
    assert digest_run(moved) == digest_run(undisturbed("plain"))


def test_allowed_learning_rate_is_really_used(tiny_command: list[str], tmp_path: Path) -> None:
    """A trainer of others accepted the new value and went on with the one in its checkpoint."""
    constant = [*tiny_command, "trainer.schedule=constant", "trainer.save_every=3"]
    crash_before(4, constant, tmp_path / "run")
    run(constant, tmp_path / "run", "trainer.learning_rate=0.002", "resume_allow=[trainer.learning_rate]")
    rates = [row["train/learning_rate"] for row in rows(tmp_path / "run") if row["step"]]
    assert rates == pytest.approx([0.01] * 3 + [0.002] * 3)
    run(constant, tmp_path / "other")
    assert digest_run(tmp_path / "run") != digest_run(tmp_path / "other")


def test_allowed_weight_decay_reaches_the_optimizer(tiny_command: list[str], tmp_path: Path) -> None:
    for name, decay in (("none", 0.0), ("heavy", 50.0)):
        crash_before(4, [*tiny_command, "trainer.save_every=3"], tmp_path / name)
        run(
            [*tiny_command, "trainer.save_every=3"], tmp_path / name, f"trainer.weight_decay={decay}", "resume_allow=[trainer.weight_decay]"
        )
    norms = [weight_norm(tmp_path / name) for name in ("none", "heavy")]
    assert norms[1] < 0.9 * norms[0]


def weight_norm(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    return sum(p.double().square().sum().item() for p in model.parameters())


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


def test_going_on_from_a_named_checkpoint_sets_later_ones_aside(
    tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    folder = copy_of(undisturbed("plain"), tmp_path / "run")
    command = command_of("plain", tiny_command)
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
