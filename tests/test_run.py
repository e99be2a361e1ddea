"""Runs as Python sees them."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import pytest

import mini_distill as md
from mini_distill.errors import ConfigError
from mini_distill.losses.divergences import forward_kl

SHORT = ["trainer.max_steps=3", "evaluation.num_samples=0"]


def test_a_run_from_python_has_everything_the_folder_has(tiny_command: list[str], tmp_path: Path) -> None:
    run = md.train([*tiny_command, *SHORT, f"output_dir={tmp_path / 'run'}"])
    assert run.path == tmp_path / "run" and run.status["state"] == "finished" and "step 3" in repr(run)
    assert run.summary["eval/student_perplexity"] > 1 and run.config["trainer"]["max_steps"] == 3
    assert list(run.metrics.index) == [0, 1, 2, 3] and run.metrics["train/loss"].notna().sum() == 3
    assert run.student.config.vocab_size >= len(run.tokenizer) - 1
    assert isinstance(run.generate("a", max_new_tokens=4), str) and run.generate("a") == run.generate("a")
    assert "perplexity" in run._repr_markdown_()
    assert len(run.plot().axes) >= 3 and len(run.plot("train/ce").axes) == 1
    again = md.load_run(run.path)
    assert again.summary == run.summary


def test_a_checked_configuration_is_taken_too(tiny_command: list[str], tmp_path: Path) -> None:
    config = md.load_config([*tiny_command, *SHORT, f"output_dir={tmp_path / 'run'}"])
    assert md.train(config).status["step"] == 3


def test_runs_in_one_process_leave_nothing_behind(tiny_command: list[str], tmp_path: Path) -> None:
    """Handlers of signals, loggers: the second run is the first one again."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), list(logging.getLogger().handlers)
    losses = [md.train([*tiny_command, *SHORT, f"output_dir={tmp_path / name}"]).metrics["train/loss"].tolist() for name in ("a", "b")]
    assert losses[0][1:] == losses[1][1:]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), list(logging.getLogger().handlers)) == before


def test_mistakes_are_errors_and_not_exits(tiny_command: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_steps"):
        md.train([*tiny_command, "trainer.max_stpes=3"])
    with pytest.raises(ConfigError, match=r"list of overrides.*\['student=mini_2m'\]"):
        md.train("student=mini_2m")
    with pytest.raises(ConfigError, match="not the folder of a run"):
        md.load_run(tmp_path)


def test_what_is_not_there_is_named(tiny_command: list[str], tmp_path: Path) -> None:
    run = md.train([*tiny_command, *SHORT, f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"no metric called 'loss'.*train/loss"):
        run.plot("loss")
    (run.path / "student").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no student yet"):
        _ = run.student


def test_public_names_lead_where_they_say() -> None:
    assert md.divergences.forward_kl is forward_kl
    assert all(getattr(md, name) is not None for name in md.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = md.trian
