"""A run does not go on with other settings, data, tokenizer or teacher than it began with."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from runs import (
    copy_of,
    rows,
    run,
    status,
    weight_norm,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from faults.record import record
from faults.twins import crash_before
from mini_distill.digest import digest_run
from mini_distill.errors import ConfigError


def note_refused() -> None:
    record("changed runs", injected=1, fired=1, refused=1)


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
    for step in (5, 6):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    before = digest_run(folder)
    with pytest.raises(ConfigError) as caught:
        run(tiny_command, folder, override)
    (problem,) = [problem for problem in caught.value.problems if problem.where == key]
    assert old in problem.what and new in problem.what and f"resume_allow=[{key}]" in problem.remedy
    assert digest_run(folder) == before or status(folder)["state"] == "failed"
    note_refused()


def test_changed_data_file_is_refused(tiny_command: list[str], tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    shutil.copy(tiny_corpus, corpus)
    crash_before(4, [*tiny_command, f"data.path={corpus}"], tmp_path / "run")
    shutil.copy(variant_of_corpus(tiny_corpus, tmp_path), corpus)  # the same name, one row changed
    with pytest.raises(ConfigError, match=r"^data\.") as caught:
        run([*tiny_command, f"data.path={corpus}"], tmp_path / "run")
    assert "resume_allow=[data]" in str(caught.value)
    note_refused()


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
    note_refused()


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
    note_refused()


@pytest.mark.parametrize(
    ("which", "key", "value"),
    [
        ("teacher", "rms_norm_eps", 0.01),
        ("teacher", "hidden_act", "gelu"),
        ("teacher", "rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
        ("student", "rms_norm_eps", 0.01),
    ],
)
def test_a_changed_architecture_is_refused(
    which: str, key: str, value: object, tiny_command: list[str], tiny_teacher: Path, tmp_path: Path
) -> None:
    """The fingerprint was that of the weights alone: with another epsilon in config.json the run went on, and ended with other numbers."""
    model = copy_of(tiny_teacher, tmp_path / "model")
    own = ["student=hf", f"student.path={model}"] if which == "student" else [f"teacher.path={model}"]
    command = [*(text for text in tiny_command if not (which == "student" and text.startswith("student"))), *own]
    crash_before(4, command, tmp_path / "run")
    change_config(model, key, value)
    with pytest.raises(ConfigError) as caught:
        run(command, tmp_path / "run")
    lines = [str(problem) for problem in caught.value.problems]
    assert all(line.startswith(f"{which}.config.{key}") and f"resume_allow=[{which}]" in line for line in lines), lines
    run(command, tmp_path / "run", f"resume_allow=[{which}]")
    note_refused()


def change_config(model: Path, key: str, value: object) -> None:
    settings = json.loads((model / "config.json").read_text())
    assert settings[key] != value
    (model / "config.json").write_text(json.dumps({**settings, key: value}))


def test_a_model_that_moved_or_was_written_by_another_version_is_the_same(
    tiny_command: list[str], tiny_teacher: Path, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    crash_before(4, tiny_command, tmp_path / "run")
    moved = copy_of(tiny_teacher, tmp_path / "moved")
    change_config(moved, "transformers_version", "5.0.0")
    run(tiny_command, tmp_path / "run", f"teacher.path={moved}", "resume_allow=[teacher.path]")
    assert digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))


# ------------------------------------------------------------------------------------------------------------------ a user's own code


DIVERGENCE = """
from mini_distill.losses.divergences import forward_kl

FACTOR = 2.0

def mine(student_logits, teacher_logits, temperature):
    return FACTOR * forward_kl(student_logits, teacher_logits, temperature)

def layers(context):
    return {"layers": context.student.config.num_hidden_layers * FACTOR}
"""


def write_module(folder: Path, name: str, source: str, patch: pytest.MonkeyPatch) -> None:
    """As another process finds it that starts afresh."""
    (folder / f"{name}.py").write_text(source)
    patch.setattr(sys, "dont_write_bytecode", True)
    patch.syspath_prepend(folder)
    patch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()


@pytest.mark.parametrize("setting", ["objective.divergence=own_code.mine", "evaluation.hooks=[own_code.layers]"])
def test_changed_code_of_the_user_is_refused(
    setting: str, tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A divergence that was edited between the kill and the next start went on with the new formula, without a word."""
    command = [*tiny_command, setting]
    write_module(tmp_path, "own_code", DIVERGENCE, monkeypatch)
    crash_before(4, command, tmp_path / "run")
    write_module(tmp_path, "own_code", DIVERGENCE.replace("2.0", "3.0"), monkeypatch)
    with pytest.raises(ConfigError, match=r"^code\.own_code\.\w+: not the code .* resume_allow=\[code\]"):
        run(command, tmp_path / "run")
    write_module(tmp_path, "own_code", DIVERGENCE, monkeypatch)
    run(command, tmp_path / "run")
    run(command, tmp_path / "undisturbed")
    assert digest_run(tmp_path / "run") == digest_run(tmp_path / "undisturbed")
    note_refused()


SOURCE = """
from mini_distill.data.row import Row

class Lines:
    def __init__(self, config):
        pass
    def rows(self):
        return (Row(f"line {i}", {"text": f"line {i} of my own"}) for i in range(40))
    def fingerprint(self):
        return {"lines": 40}
"""


def test_a_changed_data_source_of_the_user_is_read_anew_and_refused(
    tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own fingerprint need not see a change of its code: the rows tokenised by the old one were used further."""
    command = [*(text for text in tiny_command if not text.startswith("data")), "data=jsonl", "data.path=null", "data.seq_len=32"]
    command += ["data.source=own_source.Lines"]
    write_module(tmp_path, "own_source", SOURCE, monkeypatch)
    crash_before(4, command, tmp_path / "run")
    write_module(tmp_path, "own_source", SOURCE.replace("of my own", "of yours"), monkeypatch)
    with pytest.raises(ConfigError, match=r"^data\.code: got .* resume_allow=\[data\]"):
        run(command, tmp_path / "run")
    note_refused()


def test_a_redefined_function_of_a_notebook_is_no_finished_run(
    tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the cell with the divergence had been changed and run again, the same training said "Already finished"."""
    cell = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", cell)
    exec(DIVERGENCE, cell.__dict__)
    command = [*tiny_command, "objective.divergence=__main__.mine"]
    run(command, tmp_path / "run")
    exec(DIVERGENCE, cell.__dict__)  # the same cell again
    run(command, tmp_path / "run")
    exec(DIVERGENCE.replace("FACTOR *", "FACTOR**2 *"), cell.__dict__)
    with pytest.raises(
        ConfigError, match=r"^code\.__main__\.mine: not the code that the run, which has finished, has\. .* resume=never"
    ) as caught:
        run(command, tmp_path / "run")
    assert "resume_allow" not in str(caught.value)
    note_refused()


def test_a_refused_command_leaves_a_run_that_has_finished_as_it_is(
    tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    """Its state became "failed" and its config.yaml took the values that had been refused, which every report then showed."""
    folder = copy_of(undisturbed("plain"), tmp_path / "run")
    run(tiny_command, folder)  # settles where it lies
    before = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="has finished"):
        run(tiny_command, folder, "seed=7")
    assert {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    note_refused()


def test_a_refused_command_does_not_change_the_settings_of_a_run_that_is_to_go_on(tiny_command: list[str], tmp_path: Path) -> None:
    crash_before(4, tiny_command, tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="seed"):
        run(tiny_command, tmp_path / "run", "seed=7")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    run(tiny_command, tmp_path / "run", "seed=7", "resume_allow=[seed]")
    assert "seed: 7" in (tmp_path / "run" / "config.yaml").read_text()
    note_refused()


# ---------------------------------------------------------------------------------------------------------------- what may change


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
