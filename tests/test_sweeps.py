"""Sweeps: a folder and a process for each job, what is finished is left alone, what fails does not sink the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from runs import checkpoint_steps, forked_sweep, forks, run, status

from mini_distill import sweep
from mini_distill.cli import _check_direction, config_dir, load_config
from mini_distill.errors import ConfigError
from mini_distill.processes import is_alive
from mini_distill.running_jobs import passing_on_signals
from mini_distill.sweep import exit_code_of, is_finished, run_as_job


def train(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line, in `folder`."""
    command = [sys.executable, "-m", "mini_distill.train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command line, started in `folder` as from a terminal of its own."""
    command = [sys.executable, "-m", "mini_distill.train", *arguments]
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, **settings)


def wait_for(condition: Callable[[], Any], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def job_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("[job ")]


@forks
def test_a_failed_job_does_not_sink_the_sweep_and_the_same_command_runs_what_is_missing(tiny_command: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{broken\n")
    good = next(text.removeprefix("data.path=") for text in tiny_command if text.startswith("data.path="))
    command = [text for text in tiny_command if not text.startswith("data.path=")] + [
        "trainer.max_steps=2",
        f"data.path={bad},{good}",
        "-m",
    ]
    ended = forked_sweep(tmp_path, *command)
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
    again = forked_sweep(tmp_path, *command)
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


LAUNCHERS = {"basic": [], "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]}
LONG = ["trainer.max_steps=100000", "trainer.log_every=1000", "trainer.save_every=100000", "seed=0,1,2", "hydra.sweep.dir=sweep", "-m"]


def start_sweep(launcher: str, tiny_command: list[str], folder: Path) -> tuple[subprocess.Popen[str], list[Path]]:
    """A sweep without end whose first jobs train: its process, and their folders."""
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra mini_distill[sweep]")
    process = start(folder, *tiny_command, *LONG, *LAUNCHERS[launcher])
    wait_for(lambda: len(training(folder / "sweep")) == (2 if launcher == "joblib" else 1))
    return process, training(folder / "sweep")


def training(sweep: Path) -> list[Path]:
    """The jobs of a sweep that have begun to train."""
    return [file.parent for file in sweep.glob("*/metrics.jsonl") if file.read_text()]


def has_saved_and_stopped(job: Path, code: int) -> bool:
    """Whether the status says so, the checkpoint is there, and the process is gone."""
    found = status(job)
    ended = found["state"] == "preempted" and found["exit_code"] == code and not is_alive(found["pid"])
    return ended and checkpoint_steps(job) == [found["saved_step"]][: found["saved_step"] > 0]


@pytest.mark.timeout(280)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_stopping_a_sweep_saves_every_running_job_and_begins_no_other(
    launcher: str, number: signal.Signals, tiny_command: list[str], tmp_path: Path
) -> None:
    """With joblib the jobs trained on as orphans after SIGTERM, and died unsaved of Ctrl-C, which came to the launcher's processes too."""
    process, jobs = start_sweep(launcher, tiny_command, tmp_path)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal's Ctrl-C is for all of a group
    else:
        process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output + errors
    assert "Traceback" not in errors and f"{number.name}: {len(jobs)} jobs save and stop; no further one begins" in errors
    assert all(has_saved_and_stopped(job, 128 + number) for job in jobs)
    ended = [json.loads(line) for line in (tmp_path / "sweep" / "jobs.jsonl").read_text().splitlines()]
    assert [job["exit_code"] for job in ended] == [128 + number] * len(jobs)
    for job in jobs:
        step = status(job)["saved_step"]
        assert f"{job.name}: " + (f"stopped and saved at step {step}\n" if step else "stopped before its first step\n") in output
    names = ", ".join(job["folder"] for job in ended)
    assert f"{len(jobs)} jobs: 0 finished, {len(jobs)} stopped ({names}). The same command runs what is missing." in output
    assert "failed" not in output and not (tmp_path / "sweep" / "seed=2" / "status.json").exists()


@pytest.mark.timeout(280)
@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=pytest.mark.slow)])
def test_the_jobs_of_a_sweep_that_is_killed_save_and_stop_too(launcher: str, tiny_command: list[str], tmp_path: Path) -> None:
    process, jobs = start_sweep(launcher, tiny_command, tmp_path)
    process.kill()
    process.communicate(timeout=100)  # until nobody holds its output any more: the processes of joblib end, too
    wait_for(lambda: all(has_saved_and_stopped(job, 143) for job in jobs), 60)
    if launcher == "joblib":  # its processes have outlived the sweep, and noted how the jobs ended
        assert len((tmp_path / "sweep" / "jobs.jsonl").read_text().splitlines()) == len(jobs)


@pytest.mark.timeout(280)
def test_a_job_that_is_stopped_alone_does_not_end_the_sweep_and_goes_on_next_time(tiny_command: list[str], tmp_path: Path) -> None:
    command = [*tiny_command, "seed=0,1", "trainer.max_steps=60", "trainer.save_every=100000", "hydra.sweep.dir=sweep", "-m"]
    process = start(tmp_path, *command)
    wait_for(lambda: training(tmp_path / "sweep"))
    os.kill(status(tmp_path / "sweep" / "seed=0")["pid"], signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 143, output + errors
    lines = job_lines(output)
    assert "[job 0] seed=0: stopped " in lines[1] and "finished in" in lines[3]
    assert "2 jobs: 1 finished, 1 stopped (seed=0). The same command runs what is missing." in output
    again = train(tmp_path, *command)
    assert again.returncode == 0 and "2 jobs: 2 finished." in again.stdout


def test_a_stop_that_comes_while_a_job_starts_reaches_it() -> None:
    """Whoever starts a job and whoever stops them all may not see each other."""
    with passing_on_signals() as jobs, subprocess.Popen(["sleep", "100"]) as job:
        assert not jobs.have_run_here and jobs.stop(signal.SIGTERM) == 0
        with jobs.running(job):
            assert job.wait(timeout=20) == -signal.SIGTERM
    assert not jobs.folder.exists()


def test_a_job_that_does_not_answer_yet_was_stopped_and_has_not_failed(
    tiny_command: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(sweep, "_run", lambda command, log, environment, jobs: -jobs.stop(signal.SIGTERM) or -signal.SIGTERM)
    monkeypatch.setattr(sweep, "_last_line", lambda log: "Traceback")
    config = load_config([*tiny_command, f"output_dir={tmp_path / 'sweep' / 'job'}"])
    (tmp_path / "sweep").mkdir()
    with passing_on_signals() as jobs:
        assert run_as_job(config, tiny_command, 0, 1, jobs=jobs) == 143
        assert capsys.readouterr().out.endswith("stopped before its first step\n")
        assert run_as_job(config, tiny_command, 1, 1, jobs=jobs) == 143
        assert capsys.readouterr().out == ""  # it does not begin


def test_where_no_job_has_run_a_signal_does_what_it_did_before() -> None:
    """Jobs of a cluster are the cluster's to stop: the command that has submitted them ends at once."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt), passing_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("preset", sorted(path.stem for path in (config_dir() / "sweep").glob("*.yaml")))
def test_every_value_of_a_shipped_sweep_composes(preset: str) -> None:
    params = yaml.safe_load((config_dir() / "sweep" / f"{preset}.yaml").read_text())["hydra"]["sweeper"]["params"]
    for key, values in params.items():
        (override,) = OverridesParser.create().parse_overrides([f"{key}={values}"])
        space = override.value()
        for value in [space.start, space.end] if override.is_interval_sweep() else str(values).split(","):
            load_config([f"{key}={value}"])
    assert len(params) >= 1


@forks
def test_a_search_proposes_again_what_has_finished_and_goes_on_from_there(tiny_command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra mini_distill[sweep]")
    search = [
        "-m",
        "hydra/sweeper=optuna",
        "sweep=optuna",
        *tiny_command,
        "trainer.max_steps=2",
        f'hydra.sweep.dir="{tmp_path / "search"}"',
    ]
    first = forked_sweep(tmp_path, *search, "hydra.sweeper.n_trials=1")
    assert first.returncode == 0, first.stdout + first.stderr
    second = forked_sweep(tmp_path, *search, "hydra.sweeper.n_trials=2")
    lines = job_lines(second.stdout)
    assert "already finished" in lines[0] and "finished in" in lines[2], second.stdout + second.stderr
    jobs = [json.loads(line)["folder"] for line in (tmp_path / "search" / "jobs.jsonl").read_text().splitlines()]
    perplexities = [json.loads((tmp_path / "search" / job / "summary.json").read_text())["eval/student_perplexity"] for job in jobs]
    found = yaml.safe_load((tmp_path / "search" / "optimization_results.yaml").read_text())
    assert len(set(jobs)) == 2 and found["best_value"] == min(perplexities)
    assert set(found["best_params"]) == {"objective.temperature", "objective.kl_weight", "trainer.learning_rate"}


@pytest.mark.timeout(280)
def test_a_search_without_a_result_ends_in_the_errors_of_its_jobs(tiny_command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra mini_distill[sweep]")
    search = ["-m", "hydra/sweeper=optuna", "sweep=optuna", "hydra.sweeper.n_trials=1", *tiny_command, "data.path=/nowhere.jsonl"]
    ended = train(tmp_path, *search)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr + ended.stdout
    assert "data.path: no such file" in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("direction", "best", "is_wrong"),
    [("minimize", "highest", 1), ("Direction.maximize", "lowest", 1), ("maximize", "highest", 0), ("", "highest", 0)],
)
def test_a_search_in_the_wrong_direction_is_refused(direction: str, best: str, is_wrong: int) -> None:
    composed = OmegaConf.create({"evaluation": {"best_is": best}})
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.direction: m.*imize, and the best .* is the") if is_wrong else nullcontext():
        _check_direction(direction, composed)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_submitit_runs_the_jobs_and_the_same_command_leaves_them_alone(tiny_command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra mini_distill[sweep]")
    command = ["-m", "hydra/launcher=submitit_local", *tiny_command, "trainer.max_steps=2", "seed=0,1"]
    first, second = train(tmp_path, *command), train(tmp_path, *command)
    (folder,) = (tmp_path / "multirun").iterdir()
    jobs = [json.loads(line) for line in (folder / "jobs.jsonl").read_text().splitlines()]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert sorted(job["folder"] for job in jobs) == ["seed=0", "seed=1"] and not any(job["exit_code"] for job in jobs)
    assert "2 jobs: 2 finished. To compare them: python -m mini_distill.report multirun/" in second.stdout


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_slurm_is_asked_for_what_the_settings_say(tiny_command: list[str], tmp_path: Path) -> None:
    """The commands of SLURM are replaced: sbatch keeps what it was given and runs it here."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra mini_distill[sweep]")
    (tmp_path / "bin").mkdir()
    for name, script in SLURM.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    settings = [
        "hydra.launcher.gpus_per_node=1",
        "hydra.launcher.timeout_min=90",
        "hydra.launcher.partition=short",
        "hydra.launcher.mem_gb=20",
    ]
    command = ["-m", "hydra/launcher=submitit_slurm", *settings, *tiny_command, "trainer.max_steps=2", "seed=0,1"]
    ended = train(tmp_path, *command, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", KEPT=str(tmp_path / "kept"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    asked = (tmp_path / "kept").read_text()
    assert all(f"#SBATCH --{line}" in asked for line in ("gpus-per-node=1", "time=90", "partition=short", "mem=20GB", "array=0-1"))
    (folder,) = (tmp_path / "multirun").iterdir()
    assert "2 jobs: 2 finished" in ended.stdout and (folder / "seed=1" / "student" / "model.safetensors").exists()


SLURM = {
    "srun": '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do case "$1" in --output|--error) shift;; esac; shift; done\nexec "$@"\n',
    "sbatch": """#!/bin/sh
cp "$1" "$KEPT"
for task in 0 1; do (
    SLURM_JOB_ID=7$task SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 \\
        SLURM_NNODES=1 SLURM_NODEID=0 SLURM_JOB_NODELIST=here sh "$1" > "$KEPT.$task" 2>&1
) & done
echo Submitted batch job 7
""",
    "sacct": "#!/bin/sh\necho 'JobID|State|NodeList'\nfor task in 0 1; do echo \"7_$task|COMPLETED|here\"; done\n",
    "scontrol": "#!/bin/sh\necho here\n",
}


def test_jobs_beside_each_other_share_the_cores(tiny_command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = load_config([*tiny_command, "trainer.num_threads=null"])
    cores = len(os.sched_getaffinity(0))
    assert sweep._environment(config, 2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert "OMP_NUM_THREADS" not in sweep._environment(config, 1)
    assert "OMP_NUM_THREADS" not in sweep._environment(load_config(tiny_command), 2)  # it says how many itself
