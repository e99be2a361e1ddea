"""The training loop through whole runs of a second: what a run does with its settings."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import before_step, checkpoint_steps, rows, run, status, steps_of, train_module
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from mini_distill.cli import load_config
from mini_distill.errors import ConfigError, ModelError, NumericsError, StorageError
from mini_distill.training.signals import StopRequest


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in rows(folder) if "train/loss" in row]


# -------------------------------------------------------------------------------------------------------------------- the loop


def test_loss_falls_and_every_step_has_one_row(tiny_command: list[str], tmp_path: Path) -> None:
    run(tiny_command, tmp_path / "run", "trainer.max_steps=40", "trainer.save_every=null")
    values = losses(tmp_path / "run")
    assert steps_of(tmp_path / "run") == list(range(41))
    assert sum(values[-5:]) < 0.8 * sum(values[:5])


def test_one_times_eight_accumulated_equals_eight_times_one(tiny_command: list[str], tmp_path: Path) -> None:
    run(tiny_command, tmp_path / "a", "trainer.micro_batch_size=8", "trainer.grad_accum_steps=1")
    run(tiny_command, tmp_path / "b", "trainer.micro_batch_size=1", "trainer.grad_accum_steps=8")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)
    assert_close(tmp_path / "a", tmp_path / "b", 1e-4)  # Adam's first steps divide tiny gradients by themselves


def test_accumulated_gradient_is_that_of_the_whole_batch_though_rows_differ_in_length(tiny_command: list[str], tmp_path: Path) -> None:
    """Several trainers averaged a mean per micro-batch, which gives the tokens of short rows more weight."""
    unpacked = [*tiny_command, "data.packing=false", "trainer.max_steps=3"]
    run(unpacked, tmp_path / "a", "trainer.micro_batch_size=6")
    run(unpacked, tmp_path / "b", "trainer.micro_batch_size=1", "trainer.grad_accum_steps=6")
    norms = [[row["train/grad_norm"] for row in rows(tmp_path / name) if row["step"]] for name in "ab"]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)


def test_activations_that_are_computed_again_change_nothing(
    tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = LlamaMLP.forward, []
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, states: calls.append(self.training) or forward(self, states))
    for name, again in (("a", "false"), ("b", "true")):
        run(tiny_command, tmp_path / name, "trainer.max_steps=3", f"trainer.gradient_checkpointing={again}")
    assert sum(calls) == 3 + 2 * 3  # the student has one block
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert_close(tmp_path / "a", tmp_path / "b", 0)


COMPILED = {
    "alone": ("data.eval_fraction=0",),
    "recomputed": ("trainer.gradient_checkpointing=true", "objective.terms.hidden_mse.weight=0.5"),
}


@pytest.mark.parametrize("more", COMPILED.values(), ids=COMPILED)
def test_a_compiled_student_trains_as_the_plain_one(
    more: tuple[str, ...], tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as for every backend, and then run by torch itself, which takes no minute."""
    traced, original = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **settings: traced.append(args) or original(*args, **settings, backend="aot_eager"))
    for name, compiled in (("a", "false"), ("b", "true")):
        run(tiny_command, tmp_path / name, "trainer.max_steps=3", *more, f"trainer.compile={compiled}")
    assert len(traced) == 2  # the trunk, and the terms of the loss
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)
    assert_close(tmp_path / "a", tmp_path / "b", 1e-4)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no C compiler is installed."""

    def fails(*_: Any) -> None:
        raise OSError("No working C++ compiler found")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **settings: original(*args, **settings, backend=fails))


def test_without_a_compiler_the_terms_run_as_they_are_and_a_line_says_so(
    no_compiler: None, tiny_command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU with Triton the terms are compiled unasked, and the run died where there was no C compiler."""
    for name, compiled in (("a", "false"), ("b", "true")):
        run(tiny_command, tmp_path / name, "trainer.max_steps=3", f"objective.compile={compiled}")
    (line,) = [record.getMessage() for record in caplog.records if "compile" in record.getMessage()]
    assert line.startswith("objective.compile: ") and "No working C++ compiler found" in line
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_without_a_compiler_a_student_that_shall_be_compiled_is_refused(no_compiler: None, tiny_command: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.compile: true, and the student cannot be compiled here \(.*No working C"):
        run(tiny_command, tmp_path / "run", "trainer.compile=true", "data.eval_fraction=0")


def test_tokens_and_learning_rate_are_those_of_the_step(tiny_command: list[str], tmp_path: Path) -> None:
    summary = run(tiny_command, tmp_path / "run", "trainer.warmup_steps=2", "trainer.schedule=constant")
    found = [row for row in rows(tmp_path / "run") if row["step"]]
    assert [row["train/learning_rate"] for row in found] == pytest.approx([0.005] + [0.01] * 5)
    assert summary["train/tokens_seen"] == sum(row["train/tokens"] for row in found)


def test_no_gradient_reaches_the_teacher_and_training_leaves_it_as_it_was(
    tiny_command: list[str], tmp_path: Path, tiny_teacher: Path
) -> None:
    config = load_config([*tiny_command, f"output_dir={tmp_path / 'run'}"])
    with StopRequest() as stop, train_module.open_run(config) as (folder, tracker):
        d = train_module.prepare(config, folder, tracker, stop)
        train_module.training_loop(d, 0)
    assert d.teacher is not None
    original = AutoModelForCausalLM.from_pretrained(tiny_teacher).state_dict()
    assert all(p.grad is None and not p.requires_grad for p in d.teacher.model.parameters())
    assert all(torch.equal(value, original[name]) for name, value in d.teacher.model.state_dict().items())


# --------------------------------------------------------------------------------------------------------------------- numbers


def test_nan_in_one_row_names_step_and_row_and_changes_no_weight(
    tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer of others went on after a NaN loss and ended as success with NaN weights."""
    import user_functions

    monkeypatch.setattr(user_functions, "calls", 0)
    nan = "objective.divergence=user_functions.nan_from_third_step"
    with pytest.raises(NumericsError) as caught:
        run(tiny_command, tmp_path / "run", nan, "trainer.save_every=1", "trainer.keep_checkpoints=9")
    message = str(caught.value)
    assert caught.value.exit_code == 7
    assert "step 3" in message and "nan_from_third_step" in message and "corpus.jsonl:" in message
    assert checkpoint_steps(tmp_path / "run") == [1, 2]
    assert status(tmp_path / "run")["state"] == "failed" and status(tmp_path / "run")["exit_code"] == 7
    for path in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


def test_row_at_fault_is_the_one_that_is_named(tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origins: list[str] = []
    original = train_module.distill_step

    def poisoned(student: Any, teacher: Any, batch: Any, objective: Any, autocast: Any) -> Any:
        """NaN wherever the row 5 of the prepared data takes part."""
        result = original(student, teacher, batch, objective, autocast)
        if 5 in batch.row_ids.tolist():
            return type(result)(result.loss * float("nan"), result.terms)
        return result

    monkeypatch.setattr(train_module, "distill_step", poisoned)
    config = load_config([*tiny_command, f"output_dir={tmp_path / 'run'}", "data.packing=false", "trainer.max_steps=20"])
    with pytest.raises(NumericsError) as caught, StopRequest() as stop, train_module.open_run(config) as (folder, tracker):
        d = train_module.prepare(config, folder, tracker, stop)
        origins += d.data.train.origins(5)
        train_module.training_loop(d, 0)
    assert f"(rows {origins[0]})" in str(caught.value)


def test_weights_stay_when_the_gradient_is_not_finite(tiny_command: list[str], tmp_path: Path) -> None:
    config = load_config([*tiny_command, f"output_dir={tmp_path / 'run'}"])
    with StopRequest() as stop, train_module.open_run(config) as (folder, tracker):
        d = train_module.prepare(config, folder, tracker, stop)
        before = {name: p.detach().clone() for name, p in d.language_model.named_parameters()}
        next(d.language_model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(NumericsError, match="gradient norm not finite"):
            train_module.optimizer_step(d, next(d.batches.steps()), 1)
    assert all(torch.equal(p, before[name]) for name, p in d.language_model.named_parameters())


def test_step_with_nothing_supervised_gives_exactly_zero(tiny_command: list[str], tmp_path: Path) -> None:
    config = load_config([*tiny_command, f"output_dir={tmp_path / 'run'}", "trainer.weight_decay=0"])
    with StopRequest() as stop, train_module.open_run(config) as (folder, tracker):
        d = train_module.prepare(config, folder, tracker, stop)
        before = {name: p.detach().clone() for name, p in d.language_model.named_parameters()}
        (batch,) = next(d.batches.steps())
        batch.labels.fill_(-100)
        metrics = train_module.optimizer_step(d, [batch], 1)
    assert metrics["train/loss"] == 0 and metrics["train/grad_norm"] == 0
    assert all(torch.equal(p, before[name]) for name, p in d.language_model.named_parameters())


# --------------------------------------------------------------------------------------------------------------------- periods


def test_periods_of_logging_saving_and_evaluation(tiny_command: list[str], tmp_path: Path) -> None:
    run(
        tiny_command,
        tmp_path / "run",
        "trainer.max_steps=7",
        "trainer.log_every=3",
        "trainer.eval_every=4",
        "trainer.save_every=2",
        "trainer.keep_checkpoints=9",
    )
    found = {row["step"]: row for row in rows(tmp_path / "run")}
    assert list(found) == [0, 3, 4, 6, 7]
    assert [step for step, row in found.items() if "eval/student_perplexity" in row] == [0, 4, 7]
    assert {2, 4, 6, 7} <= set(checkpoint_steps(tmp_path / "run")) <= {2, 4, 6, 7}


def test_keep_checkpoints_keeps_the_newest_and_the_best(tiny_command: list[str], tmp_path: Path) -> None:
    best_first = ["trainer.eval_every=1", "evaluation.best_metric=eval/tokens"]  # always the same: the first stays the best
    run(tiny_command, tmp_path / "run", "trainer.save_every=1", "trainer.keep_checkpoints=2", *best_first)
    assert checkpoint_steps(tmp_path / "run") == [1, 5, 6]


def test_no_saving_between_leaves_the_last_checkpoint(tiny_command: list[str], tmp_path: Path) -> None:
    run(tiny_command, tmp_path / "run", "trainer.save_every=null")
    assert checkpoint_steps(tmp_path / "run") == [6]


# ------------------------------------------------------------------------------------------------------- what users bring along


def test_divergence_by_import_path_is_the_one_used(tiny_command: list[str], tmp_path: Path) -> None:
    own = ["objective.divergence=user_functions.twice_forward_kl", "objective.ce_weight=0", "trainer.max_steps=2"]
    run(tiny_command, tmp_path / "a", *own)
    run(tiny_command, tmp_path / "b", "objective.ce_weight=0", "trainer.max_steps=2")
    run(tiny_command, tmp_path / "c", *own, "objective.divergence_options={factor: 3.0}")
    first = [losses(tmp_path / name)[0] for name in "abc"]
    assert first[0] == pytest.approx(2 * first[1]) and first[2] == pytest.approx(3 * first[1])
    assert "train/twice_forward_kl" in rows(tmp_path / "a")[1]


@pytest.mark.parametrize("path", ["user_functions.not_there", "no_such_module.kl"])
def test_divergence_that_cannot_be_imported_is_named(tiny_command: list[str], tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"objective\.divergence: cannot import") as caught:
        run(tiny_command, tmp_path / "run", f"objective.divergence={path}")
    assert path in str(caught.value)


def test_hook_by_import_path_shows_in_metrics_and_summary(tiny_command: list[str], tmp_path: Path) -> None:
    summary = run(tiny_command, tmp_path / "run", "evaluation.hooks=[user_functions.parameter_sum]", "trainer.eval_every=3")
    found = {row["step"]: row for row in rows(tmp_path / "run")}
    assert [step for step, row in found.items() if "eval/parameter_sum" in row] == [0, 3, 6]
    assert [found[step]["custom/step"] for step in (0, 3, 6)] == [0, 3, 6]
    assert summary["eval/parameter_sum"] == found[6]["eval/parameter_sum"]


# ---------------------------------------------------------------------------------------------------------- teachers and students

SCRATCH = [
    "student=mini_2m",
    "student.hidden_size=32",
    "student.intermediate_size=64",
    "student.num_layers=1",
    "student.num_heads=2",
    "student.num_kv_heads=1",
]


def without_teacher(command: list[str]) -> list[str]:
    return [o for o in command if not o.startswith(("teacher", "student"))] + ["teacher=none", "objective=ce"]


def test_student_from_scratch_learns_without_a_teacher(tiny_command: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    command = [*without_teacher(tiny_command), *SCRATCH, f"student.tokenizer={tiny_teacher}"]
    summary = run(command, tmp_path / "run", "trainer.max_steps=30")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert not any("teacher" in key for key in summary)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")


def test_student_from_a_folder_goes_on_from_its_weights(tiny_command: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    command = [o for o in tiny_command if not o.startswith("student")]
    run(command, tmp_path / "run", "student=hf", f"student.path={tiny_teacher}", "objective=forward_kl")
    assert rows(tmp_path / "run")[0]["eval/forward_kl"] == pytest.approx(0, abs=1e-6)


def test_student_with_another_tokenizer_is_refused(tiny_command: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny_teacher).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]  # of equal size: only a comparison of the tokens can tell
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = [o for o in tiny_command if not o.startswith("student")]
    with pytest.raises(ModelError, match=r"student\.path"):
        run(command, tmp_path / "run", "student=hf", f"student.path={other}")


def test_contradictions_of_a_run_without_a_teacher_are_named(tiny_command: list[str]) -> None:
    command = [o for o in tiny_command if not o.startswith(("teacher", "student"))]
    for overrides, where in (
        (["student=from_teacher", "objective=ce"], "student.kind"),
        (["student=mini_2m", "objective=ce"], "student.tokenizer"),
        (["student=mini_2m", "student.tokenizer=x/y", "objective=forward_kl"], "objective.kl_weight"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config([*command, "teacher=none", *overrides])
        assert where in [problem.where for problem in caught.value.problems]


def test_teacher_whose_tokenizer_has_more_tokens_than_embeddings_is_refused(
    tiny_command: list[str], tiny_teacher: Path, tiny_llama: Any, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    tiny_llama(vocab=40).save_pretrained(small)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(small)
    with pytest.raises(ModelError, match=r"teacher\.path.*ids up to 61.*40"):
        run([*tiny_command, f"teacher.path={small}"], tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------- folders and trackers


def test_folder_of_a_running_run_is_in_use(tiny_command: list[str], tmp_path: Path) -> None:
    caught: list[StorageError] = []

    def second_run() -> None:
        with pytest.raises(StorageError) as error:
            run(tiny_command, tmp_path / "run")
        caught.append(error.value)

    with before_step(3, second_run):
        run(tiny_command, tmp_path / "run")
    assert f"in use by process {os.getpid()}" in str(caught[0]) and caught[0].exit_code == 6
    assert status(tmp_path / "run")["state"] == "finished" and steps_of(tmp_path / "run") == list(range(7))


def test_file_in_the_way_of_the_output_folder_is_a_storage_error(tiny_command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError) as caught:
            run(tiny_command, folder)
        assert "file" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_read_only_output_folder_is_a_storage_error(tiny_command: list[str], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StorageError):
        run(tiny_command, tmp_path / "locked" / "run")


def test_folder_that_is_not_a_run_is_left_alone(tiny_command: list[str], tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("mine")
    with pytest.raises(StorageError, match=r"holds 'holiday\.jpg' and is not a run"):
        run(tiny_command, tmp_path)
    assert (tmp_path / "holiday.jpg").read_text() == "mine"


def test_tensorboard_writes_the_run(tiny_command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tiny_command, tmp_path / "run", "tracking=tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.*"))


def test_wandb_offline_writes_the_run(tiny_command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run(tiny_command, tmp_path / "run", "tracking=wandb", "tracking.mode=offline", "trainer.max_steps=2")
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert files and files[0].stat().st_size > 0


def test_tracker_changes_nothing_in_the_run(tiny_command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mini_distill.digest import digest_run

    pytest.importorskip("tensorboard")
    caplog.set_level(logging.ERROR)
    run(tiny_command, tmp_path / "a", "tracking=tensorboard")
    run(tiny_command, tmp_path / "b")
    assert digest_run(tmp_path / "a") == digest_run(tmp_path / "b")
    assert all(math.isfinite(value) for value in losses(tmp_path / "a"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=jsd", "objective.divergence_options.jsd_beta=2"], r"objective\.divergence_options\.jsd_beta: got 2, expected"),
        (["objective=jsd", "objective.divergence_options.jsd_beta=hello"], r"objective\.divergence_options\.jsd_beta: got hello, expected"),
        (
            ["objective=ranking_hinge", "objective.divergence_options.top_k=2.5"],
            r"divergence_options\.top_k: got 2\.5, expected a whole number",
        ),
        (["objective.terms.skew_reverse_kl.options.skew=1"], r"objective\.terms\.skew_reverse_kl\.options\.skew: got 1"),
        (["objective.divergence=torch.nn.functional.mse_loss"], r"objective\.divergence: .*mse_loss"),
        (["objective.divergence=user_functions.parameter_sum"], r"objective\.divergence: .*parameter_sum refuses it"),
    ],
)
def test_a_divergence_is_tried_out_before_anything_is_loaded(
    tiny_command: list[str], tmp_path: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run([text for text in tiny_command if not text.startswith("teacher.path")], tmp_path / "run", "teacher.path=no/model", *overrides)


def test_terms_and_schedules_are_optimised_as_logged(tiny_command: list[str], tmp_path: Path) -> None:
    terms = ["objective.terms.total_variation.weight=2", "objective.schedules={ce: {1: 0, 5: 1}}"]
    run(tiny_command, tmp_path / "run", *terms)
    for row in rows(tmp_path / "run")[1:]:
        weight = min(1.0, (row["step"] - 1) / 4)
        expected = 0.5 * row["train/forward_kl"] + 2 * row["train/total_variation"] + 0.5 * weight * row["train/ce"]
        assert row["train/loss"] == pytest.approx(expected, rel=1e-5)
