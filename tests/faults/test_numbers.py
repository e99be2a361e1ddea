"""Numbers that are not finite, or extreme: named with step and origin, and in no checkpoint, student or summary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import copy_of, run, status
from runs import train_module as module
from safetensors.torch import load_file, save_file

from faults.answers import Answer, answer_to
from faults.record import record
from mini_distill.losses.catalogue import divergence_parameters

BAD = [math.nan, math.inf, -math.inf]
LIVE = sorted(divergence_parameters())


def poisoned_teacher(folder: Path, teacher: Path, value: float) -> Path:
    """Its head has one weight that is no number."""
    weights = load_file(copy_of(teacher, folder) / "model.safetensors")
    weights["lm_head.weight"][5, 3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stopped(answer: Answer, folder: Path) -> str:
    """The one line of a run that ended with 7, after a look at everything that it left."""
    assert answer.error is not None and answer.error.exit_code == 7
    assert status(folder)["state"] == "failed" and status(folder)["exit_code"] == 7
    assert not (folder / "summary.json").exists() and not (folder / "student").exists()
    nothing_bad_is_kept(folder)
    return str(answer)


def nothing_bad_is_kept(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values() if tensor.is_floating_point()), file
    for file in folder.rglob("state.json"):
        json.loads(file.read_text(), parse_constant=pytest.fail)  # NaN, Infinity


@pytest.mark.parametrize("value", BAD)
def test_a_teacher_that_is_not_finite_is_blamed_itself(value: float, tiny_command: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = poisoned_teacher(tmp_path / "teacher", tiny_teacher, value)
    answer = answer_to(lambda: run([*tiny_command, f"teacher.path={teacher}"], tmp_path / "run"), 4)
    assert answer.places == ["teacher.path"] and "not finite" in str(answer)
    assert not (tmp_path / "run" / "checkpoints").exists()
    record("numbers that are not finite", injected=1, fired=1, refused=1)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["weight", "gradient", "loss"])
def test_a_student_that_is_not_finite_ends_the_run_before_it_is_saved(
    where: str, value: float, tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil, calls = module.distill_step, []

    def poison(student: Any, *rest: Any, **named: Any) -> Any:
        calls.append(1)
        third = len(calls) >= 3  # and every look at the rows of the third
        if third and where == "weight":
            next(student.parameters()).data.view(-1)[0:64] = value
        result = distil(student, *rest, **named)
        if third and where == "loss":
            return type(result)(result.loss * value, result.terms)
        if third and where == "gradient" and result.loss.requires_grad:
            result.loss.register_hook(lambda gradient: gradient * value)
        return result

    monkeypatch.setattr(module, "distill_step", poison)
    answer = answer_to(lambda: run([*tiny_command, "trainer.save_every=1"], tmp_path / "run"), 7)
    assert "step 3" in stopped(answer, tmp_path / "run")
    record("numbers that are not finite", injected=1, fired=len(calls) // 3, refused=1)


def test_a_learning_rate_far_too_high_ends_in_a_line_or_in_finite_weights(tiny_command: list[str], tmp_path: Path) -> None:
    high = ["trainer.learning_rate=1e30", "trainer.max_steps=12", "trainer.save_every=1", "trainer.max_grad_norm=null"]
    answer = answer_to(lambda: run([*tiny_command, *high], tmp_path / "run"), 7)
    assert "learning_rate" in stopped(answer, tmp_path / "run")
    record("numbers that are not finite", injected=1, fired=1, refused=1)


@pytest.mark.parametrize("temperature", ["1e-3", "1e4"])
@pytest.mark.parametrize("name", [name if name == "forward_kl" else pytest.param(name, marks=pytest.mark.slow) for name in LIVE])
def test_extreme_temperatures_and_a_sure_teacher_stay_finite(
    name: str, temperature: str, tiny_command: list[str], tiny_teacher: Path, tmp_path: Path
) -> None:
    """The teacher's logits are in the ten thousands: all its probability is on one token."""
    teacher = copy_of(tiny_teacher, tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    weights["lm_head.weight"] *= 3e4
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    settings = [f"teacher.path={teacher}", f"objective={name}", f"objective.temperature={temperature}", "trainer.max_steps=2"]
    answer = answer_to(lambda: run([*tiny_command, *settings], tmp_path / "run"), 2)
    if answer.error is None:
        losses = [value for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() for value in json.loads(row).values()]
        assert all(value is None or math.isfinite(value) for value in losses)
        nothing_bad_is_kept(tmp_path / "run")
    else:
        assert "temperature" in str(answer)  # the losses that know none refuse one
    record("extreme temperatures", injected=1, fired=1, **{"refused" if answer.error else "exact": 1})


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e400"])
def test_a_temperature_that_is_none_is_refused(value: str, tiny_command: list[str], tmp_path: Path) -> None:
    answer = answer_to(lambda: run([*tiny_command, f"objective.temperature={value}"], tmp_path / "run"), 2)
    assert answer.places == ["objective.temperature"]
    record("extreme temperatures", injected=1, fired=1, refused=1)


@pytest.mark.parametrize("where", ["forward", "backward", "update"])
def test_memory_that_runs_out_ends_in_a_line_that_names_the_setting_and_nothing_is_lost(
    where: str, tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil, calls = module.distill_step, []

    def exhausted(*arguments: Any) -> Any:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def late(*arguments: Any) -> Any:
        result = distil(*arguments)
        if where == "forward":
            exhausted()
        result.loss.register_hook(exhausted)
        return result

    monkeypatch.setattr(module, "distill_step", late if where != "update" else distil)
    if where == "update":
        monkeypatch.setattr(torch.optim.AdamW, "step", exhausted)
    answer = answer_to(lambda: run(tiny_command, tmp_path / "run"), 9)
    line = str(answer)
    assert calls and "trainer.micro_batch_size" in line and "gradient_checkpointing" in line
    assert line.index("micro_batch_size") < line.index("gradient_checkpointing")
    record("memory that runs out", injected=1, fired=1, refused=1)
