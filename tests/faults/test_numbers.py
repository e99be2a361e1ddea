"""Numbers that are not finite, or extreme: named with step and origin, and in no checkpoint, student or summary."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import SMALL, build
from runs import copy_of, forks, in_processes, rows, run, status
from runs import train_module as module
from safetensors.torch import load_file, save_file

from faults.answers import Answer, answer_to
from faults.record import record
from mini_distill.cli import load_config
from mini_distill.config import EvaluateCommand
from mini_distill.data.batch import Batch
from mini_distill.losses import divergences
from mini_distill.losses.catalogue import divergence_parameters
from mini_distill.losses.reduction import IGNORE_INDEX, loss_mask
from mini_distill.models.head import LanguageModel

BAD = [math.nan, *(pytest.param(value, marks=pytest.mark.slow) for value in (math.inf, -math.inf))]
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
@pytest.mark.parametrize("where", ["teacher.path", "student.path"])
def test_a_weight_that_no_token_reaches_is_found_before_the_first_step(
    where: str, value: float, tiny_command: list[str], tiny_teacher: Path, tmp_path: Path
) -> None:
    """The embedding of <pad> is in nobody's loss, and in everybody's checkpoint."""
    folder = copy_of(tiny_teacher, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    command = [text for text in tiny_command if not text.startswith("student.")] + ([] if where == "teacher.path" else ["student=hf"])
    answer = answer_to(lambda: run([*command, f"{where}={folder}"], tmp_path / "run"), 4)
    assert answer.places == [where] and "model.embed_tokens.weight" in str(answer)
    record("numbers that are not finite", injected=1, fired=1, refused=1)


@contextmanager
def overflowing(token: int, only: Callable[[], bool] = lambda: True) -> Iterator[list[int]]:
    """The teacher, and it alone, gives no numbers wherever it has just read `token`; its weights are whole, as in float16."""
    whole, fired = LanguageModel.hidden, list[int]()

    def hidden(model: LanguageModel, batch: Batch) -> torch.Tensor:
        found = whole(model, batch)
        if any(parameter.requires_grad for parameter in model.parameters()) or not only():
            return found
        overflows = batch.input_ids[loss_mask(batch.labels)] == token
        fired.append(int(overflows.sum()))
        return found.masked_fill(overflows[:, None], math.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "hidden", hidden)
        yield fired


def rows_with(character: str, corpus: Path) -> list[str]:
    return [f"{corpus}:{number}" for number, line in enumerate(corpus.read_text().splitlines(), 1) if character in json.loads(line)["text"]]


def test_a_teacher_that_overflows_on_a_row_is_named_with_the_row(
    tiny_command: list[str], tiny_corpus: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    token = tiny_tokenizer.convert_tokens_to_ids("b")
    with overflowing(token) as fired:
        answer = answer_to(lambda: run([*tiny_command, "data.packing=false", "data.eval_fraction=0"], tmp_path / "run"), 7)
    line = stopped(answer, tmp_path / "run")
    assert "step 1: the teacher's logits not finite" in line and "teacher.dtype" in line and "learning_rate" not in line
    named = re.findall(re.escape(str(tiny_corpus)) + r":\d+", line)
    assert named and set(named) <= set(rows_with("b", tiny_corpus))
    record("numbers that are not finite", injected=1, fired=min(1, sum(fired)), refused=1)


def test_a_teacher_that_overflows_on_held_out_text_alone_does_not_end_in_empty_figures(
    tiny_command: list[str], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with overflowing(tiny_tokenizer.convert_tokens_to_ids("b")) as fired:
        answer = answer_to(lambda: run(tiny_command, tmp_path / "run"), 7)
    assert "evaluation after step 0: the teacher's logits not finite" in stopped(answer, tmp_path / "run")
    record("numbers that are not finite", injected=1, fired=min(1, sum(fired)), refused=1)


@forks
def test_a_teacher_that_overflows_on_one_process_stops_both(
    tiny_command: list[str], tiny_tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def body(rank: int) -> None:
        with overflowing(tiny_tokenizer.convert_tokens_to_ids("b"), only=lambda: rank == 1):
            run(tiny_command, tmp_path / "run", "trainer.micro_batch_size=2", "data.eval_fraction=0", "trainer.save_every=1")

    assert in_processes(2, body) == [7, 7]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sorted("the teacher's logits" in line for line in lines) == [False, True]
    assert any("of another process" in line for line in lines)
    nothing_bad_is_kept(tmp_path / "run")
    record("numbers that are not finite", injected=1, fired=1, refused=1)


def test_a_cache_of_a_teacher_that_overflows_is_refused_with_the_row(
    tiny_command: list[str], tiny_corpus: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with overflowing(tiny_tokenizer.convert_tokens_to_ids("b")) as fired:
        answer = answer_to(lambda: build([*tiny_command, "data.packing=false"], tmp_path / "cache", *SMALL), 7)
    assert "the teacher's logits not finite" in str(answer) and any(row in str(answer) for row in rows_with("b", tiny_corpus))
    record("numbers that are not finite", injected=1, fired=min(1, sum(fired)), refused=1)


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
    record("numbers that are not finite", injected=1, fired=int(len(calls) >= 3), refused=1)


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
    record("extreme temperatures", injected=1, fired=1, **{"refused" if answer.error else "finite": 1})


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e400"])
def test_a_temperature_that_is_none_is_refused(value: str, tiny_command: list[str], tmp_path: Path) -> None:
    answer = answer_to(lambda: run([*tiny_command, f"objective.temperature={value}"], tmp_path / "run"), 2)
    assert answer.places == ["objective.temperature"]
    record("extreme temperatures", injected=1, fired=1, refused=1)


def logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher: both at random, sure of one token, sure of another, and equal."""
    student, teacher = (3 * torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    teacher[0], teacher[0, 5] = -80, 80
    student[1], student[1, 7] = -80, 80
    teacher[2], student[2] = 0, 0
    return student.requires_grad_(), teacher


@pytest.mark.parametrize(("temperature", "tolerance"), [(1e-3, 2e-3), (1.0, 1e-3), (100.0, 2e-3), (1e4, 0.1)])
@pytest.mark.parametrize("name", LIVE)
def test_the_gradient_at_an_extreme_temperature_is_that_of_float64(name: str, temperature: float, tolerance: float) -> None:
    """Of each token, relative to its largest entry, with the factor T²; a slope below a thousandth is a floor's."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)  # one of them draws samples
        student, teacher = logits(dtype)
        values = getattr(divergences, name)(student, teacher, temperature)
        (values.sum() * temperature**2).backward()
        assert values.isfinite().all() and student.grad is not None and student.grad.isfinite().all()
        gradients.append(student.grad.double() / temperature)
    ours, exact = gradients
    wrong = (ours - exact).abs().amax(-1) / exact.abs().amax(-1).clamp(min=1e-3 if temperature < 1 else 1e-3 / temperature)
    assert wrong.max() < tolerance, wrong
    record("extreme temperatures", injected=1, fired=1, exact=1)


@pytest.mark.parametrize("name", [name if name == "forward_kl" else pytest.param(name, marks=pytest.mark.slow) for name in LIVE])
def test_rows_and_batches_with_nothing_supervised_end_in_finite_weights(
    name: str, tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil, masked = module.distill_step, []

    def with_masked_rows(student: Any, teacher: Any, batch: Batch, *rest: Any) -> Any:
        masked.append(slice(None) if len(masked) % 2 else slice(2))  # all rows, the first two, all, …
        batch.labels[masked[-1]] = IGNORE_INDEX
        return distil(student, teacher, batch, *rest)

    monkeypatch.setattr(module, "distill_step", with_masked_rows)
    run([*tiny_command, f"objective={name}", "trainer.save_every=1"], tmp_path / "run")
    nothing_bad_is_kept(tmp_path / "run")
    losses = [row["train/loss"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert losses[1::2] == [0.0] * 3 and all(math.isfinite(loss) for loss in losses)
    record("rows and batches with nothing supervised", injected=len(masked), fired=len(masked), exact=len(masked))


ENDS = {
    "of a GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB"),
    "of a CPU": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
    "of Python": lambda: MemoryError(),
}


@pytest.mark.parametrize("kind", [next(iter(ENDS)), *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(ENDS)[1:])])
@pytest.mark.parametrize("where", ["loading", "evaluation", "cache", "evaluate"])
def test_memory_that_runs_out_outside_a_step_names_a_setting(
    where: str, kind: str, tiny_command: list[str], undisturbed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    finished = copy_of(undisturbed("plain"), tmp_path / "finished")

    def exhausted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        raise ENDS[kind]()

    target = {
        "loading": "mini_distill.distillation.build_student",
        "evaluation": "mini_distill.evaluation.evaluator.measure",
        "cache": "mini_distill.teachers.online.OnlineTeacher.__call__",
        "evaluate": "mini_distill.evaluate.CloseLook.over",
    }[where]
    monkeypatch.setattr(target, exhausted)
    if where == "cache":
        answer = answer_to(lambda: build(tiny_command, tmp_path / "cache", *SMALL), 9)
    elif where == "evaluate":
        answer = answer_to(lambda: evaluated(finished), 9)
    else:
        answer = answer_to(lambda: run(tiny_command, tmp_path / "run"), 9)
        assert status(tmp_path / "run")["exit_code"] == 9
    setting = {"loading": "teacher.dtype", "cache": "cache.batch_size"}.get(where, "evaluation.batch_size")
    assert calls and "out of memory" in str(answer) and setting in str(answer) and "In this order: " in str(answer)
    record("memory that runs out", injected=1, fired=1, refused=1)


def evaluated(folder: Path) -> Any:
    settings = [f"model={folder}", "evaluation.max_batches=1", "evaluation.num_samples=0", "evaluation.speed=false"]
    return importlib.import_module("mini_distill.evaluate").evaluate(load_config(settings, "evaluate", EvaluateCommand))


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
    assert "the fullest from " in line and "corpus.jsonl:" in line
    record("memory that runs out", injected=1, fired=1, refused=1)
