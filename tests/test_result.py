"""What a finished run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from runs import checkpoint_steps, rows, run, status, train_module
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mini_distill.digest import digest_run


@pytest.fixture(scope="module")
def finished(tiny_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(tiny_command, folder)
    return folder


def test_student_is_an_ordinary_hugging_face_folder(finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    student = AutoModelForCausalLM.from_pretrained(finished / "student")
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    written = student.generate(ids, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("the cat")
    assert student.config.num_hidden_layers == 1


def test_student_never_writes_padding_columns_of_the_vocabulary(finished: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(finished / "student")
    assert student.config.vocab_size == 64 and student.generation_config.suppress_tokens == [62, 63]


def test_exported_weights_are_those_of_the_last_checkpoint(finished: Path) -> None:
    saved = load_file(finished / "checkpoints" / "step-00000006" / "model.safetensors")
    exported = AutoModelForCausalLM.from_pretrained(finished / "student").state_dict()
    assert saved.keys() <= {f"model.{name}" for name in exported}
    assert all(torch.equal(exported[name.removeprefix("model.")], tensor) for name, tensor in saved.items())


def test_summary_has_every_final_number(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    first, last = rows(finished)[0], rows(finished)[-1]
    assert summary["train/steps"] == summary["train/exported_step"] == 6
    assert summary["before/student_perplexity"] == first["eval/student_perplexity"]
    for name in ("eval/student_perplexity", "eval/teacher_perplexity", "eval/forward_kl", "eval/top1_agreement", "eval/student_ece"):
        assert summary[name] == last[name]
    assert 0 < summary["model/student_parameters"] < summary["model/teacher_parameters"]
    assert summary["perf/student_tokens_per_second"] > 0 and summary["data/train_sequences"] > 0


def test_metrics_have_one_row_per_step(finished: Path) -> None:
    assert [row["step"] for row in rows(finished)] == list(range(7))
    assert {"train/loss", "train/forward_kl", "train/ce", "train/grad_norm", "train/learning_rate", "train/tokens"} <= rows(finished)[
        1
    ].keys()


def test_loss_in_the_metrics_is_the_weighted_sum_of_its_terms(finished: Path) -> None:
    for row in rows(finished)[1:]:
        assert row["train/loss"] == pytest.approx(0.5 * row["train/forward_kl"] + 0.5 * row["train/ce"], rel=1e-5)


def test_status_config_and_card_are_written(finished: Path) -> None:
    finished_at_six = {"state": "finished", "step": 6, "saved_step": 6, "exit_code": 0}
    assert status(finished) | {"updated": "", "pid": 0} == finished_at_six | {"updated": "", "pid": 0}
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 6 and config["teacher"]["kind"] == "hf"
    for folder in (finished, finished / "student"):
        assert "forward_kl" in (folder / "README.md").read_text()
    assert not (finished / "error.log").exists() and not (finished / ".lock").exists()


def test_no_file_of_a_run_can_hold_code(finished: Path) -> None:
    suffixes = {path.suffix for path in finished.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".jinja"}


def test_same_command_again_does_nothing_and_gives_the_same_summary(
    finished: Path, tiny_command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a finished run trained on")

    monkeypatch.setattr(train_module, "optimizer_step", fail)
    monkeypatch.setattr(train_module.Distillation, "evaluate", fail)
    before, written = digest_run(finished), (finished / "student" / "model.safetensors").stat().st_mtime_ns
    summary = run(tiny_command, finished)
    assert summary == json.loads((finished / "summary.json").read_text())
    assert digest_run(finished) == before and (finished / "student" / "model.safetensors").stat().st_mtime_ns == written
    assert "nothing to do" in capsys.readouterr().out and status(finished)["state"] == "finished"


def test_run_killed_between_its_last_checkpoint_and_its_result_writes_the_result(
    finished: Path, tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "write_result", lambda d, control: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tiny_command, tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists() and status(tmp_path / "run")["exit_code"] == 130
    run(tiny_command, tmp_path / "run")
    assert digest_run(tmp_path / "run") == digest_run(finished)


def test_best_export_is_the_best_evaluation_and_the_summary_says_so(tiny_command: list[str], tmp_path: Path) -> None:
    ruinous = ["trainer.learning_rate=3", "trainer.warmup_steps=5", "trainer.max_grad_norm=null"]  # ever worse after a step or two
    summary = run(tiny_command, tmp_path / "run", *ruinous, "trainer.eval_every=1", "trainer.export=best", "trainer.keep_checkpoints=1")
    measured = {row["step"]: row["eval/student_perplexity"] for row in rows(tmp_path / "run") if row["step"]}
    best = min(measured, key=lambda step: measured[step])
    assert best != 6, "the test needs a run that gets worse"
    assert summary["train/exported_step"] == best and summary["eval/student_perplexity"] == measured[best]
    saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{best:08d}" / "model.safetensors")
    exported = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert all(torch.equal(exported[name], saved[f"model.{name}"]) for name in exported)
    assert checkpoint_steps(tmp_path / "run") == [best, 6]


def test_best_may_be_the_highest_of_another_metric(tiny_command: list[str], tmp_path: Path) -> None:
    best = ["trainer.export=best", "trainer.eval_every=1", "evaluation.best_metric=eval/forward_kl", "evaluation.best_is=highest"]
    summary = run(tiny_command, tmp_path / "run", *best)
    measured = {row["step"]: row["eval/forward_kl"] for row in rows(tmp_path / "run") if row["step"]}
    assert summary["train/exported_step"] == max(measured, key=lambda step: measured[step])


def test_run_without_held_out_text_finishes(tiny_command: list[str], tmp_path: Path) -> None:
    summary = run(tiny_command, tmp_path / "run", "data.eval_fraction=0")
    assert not any(key.startswith("eval/") for key in summary) and summary["train/steps"] == 6
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
