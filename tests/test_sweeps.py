"""Sweeps: a folder and a process for each job, what is finished is left alone, what fails does not sink the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import run

from mini_distill import sweep
from mini_distill.cli import config_dir, load_config
from mini_distill.sweep import exit_code_of, is_finished, run_as_job


def train(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line, in `folder`."""
    command = [sys.executable, "-m", "mini_distill.train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


def job_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("[job ")]


@pytest.mark.timeout(280)
def test_a_failed_job_does_not_sink_the_sweep_and_the_same_command_runs_what_is_missing(tiny_command: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{broken\n")
    good = next(text.removeprefix("data.path=") for text in tiny_command if text.startswith("data.path="))
    command = [text for text in tiny_command if not text.startswith("data.path=")] + [
        "trainer.max_steps=2",
        f"data.path={bad},{good}",
        "-m",
    ]
    ended = train(tmp_path, *command)
    assert ended.returncode == 3, ended.stderr
    (folder,) = (tmp_path / "multirun").iterdir()
    first, second = (json.loads(line) for line in (folder / "jobs.jsonl").read_text().splitlines())
    assert (first["exit_code"], second["exit_code"]) == (3, 0) and "bad.jsonl:1" in first["error"]
    assert second["folder"].startswith("data.path=")  # named after what is swept
    lines = job_lines(ended.stdout)
    assert "failed (exit code 3) error: " in lines[1] and "eval/student_perplexity" in lines[3]
    assert json.loads((folder / second["folder"] / "status.json").read_text())["state"] == "finished"
    assert "step 2/2" in (folder / second["folder"] / "job.log").read_text()

    bad.write_text((Path(good)).read_text())  # mended
    again = train(tmp_path, *command)
    assert again.returncode == 0, again.stdout + again.stderr
    lines = job_lines(again.stdout)
    assert len(lines) == 3 and "finished in" in lines[1] and "already finished, eval/student_perplexity" in lines[2]


def test_a_killed_job_is_told_and_goes_on_from_its_checkpoint(
    tiny_command: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder = tmp_path / "sweep" / "job"
    config = load_config([*tiny_command, f"output_dir={folder}"])
    monkeypatch.setattr(sweep.sys, "executable", str(_kills_itself(tmp_path)))
    assert run_as_job(config, tiny_command, 0, 1) == 128 + signal.SIGKILL
    assert "failed (killed by SIGKILL)" in capsys.readouterr().out
    assert exit_code_of(tmp_path / "sweep", since=0.0) == 128 + signal.SIGKILL
    assert exit_code_of(tmp_path / "sweep", since=time.time() + 1) == 0
    run(tiny_command, folder)  # the folder with its log is still a run's
    assert (folder / "job.log").exists() and run_as_job(config, tiny_command, 0, 1) == 0
    assert "already finished" in capsys.readouterr().out


def _kills_itself(folder: Path) -> Path:
    script = folder / "python"
    script.write_text("#!/bin/sh\necho started\nkill -9 $$\n")
    script.chmod(0o755)
    return script


def test_only_a_run_with_the_same_settings_is_left_alone(tiny_command: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "job"
    same = load_config([*tiny_command, f"output_dir={folder}"])
    assert not is_finished(folder, same)
    run(tiny_command, folder)
    assert is_finished(folder, same)
    assert not is_finished(folder, load_config([*tiny_command, "trainer.max_steps=7", f"output_dir={folder}"]))
    assert not is_finished(folder, load_config([*tiny_command, "seed=1", f"output_dir={folder}"]))
    (folder / "status.json").write_text(json.dumps({"state": "running", "step": 6}))
    assert not is_finished(folder, same)


@pytest.mark.parametrize("preset", sorted(path.stem for path in (config_dir() / "sweep").glob("*.yaml")))
def test_every_value_of_a_shipped_sweep_composes(preset: str) -> None:
    params = yaml.safe_load((config_dir() / "sweep" / f"{preset}.yaml").read_text())["hydra"]["sweeper"]["params"]
    for key, values in params.items():
        for value in str(values).split(","):
            load_config([f"{key}={value}"])
    assert len(params) >= 1


def test_jobs_beside_each_other_share_the_cores(tiny_command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = load_config([*tiny_command, "trainer.num_threads=null"])
    cores = len(os.sched_getaffinity(0))
    assert sweep._environment(config, 2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert "OMP_NUM_THREADS" not in sweep._environment(config, 1)
    assert "OMP_NUM_THREADS" not in sweep._environment(load_config(tiny_command), 2)  # it says how many itself
