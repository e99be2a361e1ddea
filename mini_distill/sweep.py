"""A sweep (`-m`): each job a process and a folder of its own, what is finished is left alone, what fails does not sink the rest.

    multirun/<the command's overrides>/
      <the job's overrides>/   an ordinary run, with job.log: what it printed
      jobs.jsonl               a line for each job that ended: overrides, folder, exit code, seconds, error

The same command again runs what is missing: a killed job goes on from its checkpoint, a failed one is tried again, a finished one with the
same settings is left alone. (Data that changed in between is noticed when a job is run, not when it is left alone.)
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from .config import Config
from .overrides import override
from .redaction import redact
from .running_jobs import RunningJobs
from .storage import open_regular, read_regular, storage_errors
from .training.run_folder import JOB_LOG
from .written import read_object

JOBS = "jobs.jsonl"
STOPPED = (130, 143)


def run_as_job(
    config: Config, overrides: Sequence[str], number: int, num_at_once: int, flags: Sequence[str] = (), jobs: RunningJobs | None = None
) -> int:
    """Train in a process of its own, unless it is done or the sweep was stopped, and give the exit code.

    Args:
        config: The job's settings, checked; `output_dir` is its folder.
        overrides: As Hydra was given them.
        number: Of the job, from 0.
        num_at_once: Jobs that run beside it and share the processor.
        flags: Further arguments of the command, such as `--config-dir`.
        jobs: Those that run now, to be stopped together; None: nobody stops them.
    """
    if jobs is not None:
        jobs.end_with_parent()
        if (stopped := jobs.exit_code) is not None:
            return stopped
    folder = Path(str(config.output_dir))
    name = f"[job {number}] {folder.name}"
    if is_finished(folder, config):
        print(f"{name}: already finished{_result(folder, config)}", flush=True)
        return 0
    print(f"{name}: running, see {folder / JOB_LOG}", flush=True)
    started = time.perf_counter()
    command = [sys.executable, "-m", "mini_distill.train", *overrides, override("output_dir", str(folder)), *flags]
    code = _run(command, folder / JOB_LOG, _environment(config, num_at_once), jobs)
    if jobs is not None and jobs.asked is not None and code == -jobs.asked:
        code = jobs.exit_code or 0  # before it could answer
    seconds = time.perf_counter() - started
    error = _last_line(folder / JOB_LOG) if code > 0 and code not in STOPPED else ""  # who is killed has no last words
    _note(
        folder.parent / JOBS,
        {"job": number, "overrides": list(overrides), "folder": folder.name, "exit_code": code, "seconds": seconds, "error": error},
    )
    if code == 0:
        said = f"finished in {seconds:.0f} s{_result(folder, config)}"
    else:
        said = _where_it_stopped(folder) if code in STOPPED else f"failed ({how_it_ended(code)}) {error}".rstrip()
    print(f"{name}: {said}", flush=True)
    return code if code >= 0 else 128 - code


def _where_it_stopped(folder: Path) -> str:
    step = read_object(folder / "status.json").get("saved_step", 0)
    return f"stopped and saved at step {step}" if step else "stopped before its first step"


def is_finished(folder: Path, config: Config) -> bool:
    """Whether a run with exactly these settings has finished there."""
    try:
        status = json.loads(read_regular(folder / "status.json"))
        settings = yaml.safe_load(read_regular(folder / "config.yaml"))
        summary = json.loads(read_regular(folder / "summary.json"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return status.get("state") == "finished" and summary.get("train/steps") == config.trainer.max_steps and settings == _plain(config)


def exit_code_of(sweep: Path, since: float) -> int:
    """The highest exit code of the jobs that have ended since a moment; jobs may run in other processes than the one that asks."""
    codes = [entry["exit_code"] for entry in jobs_of(sweep) if entry["ended"] >= since]
    return max((code if code >= 0 else 128 - code for code in codes), default=0)


def summary_of(sweep: Path, was_stopped: bool = False) -> str:
    """How many jobs have finished and which have not, and how to compare them; empty where no job has ended.

    Args:
        sweep: The folder.
        was_stopped: Further jobs may not have begun.
    """
    ended = {entry["folder"]: entry["exit_code"] for entry in jobs_of(sweep)}
    if not ended:
        return ""
    stopped = [folder for folder, code in ended.items() if code in STOPPED]
    failed = [folder for folder, code in ended.items() if code and code not in STOPPED]
    said = f"{len(ended)} jobs: {len(ended) - len(stopped) - len(failed)} finished"
    for folders, what in ((stopped, "stopped"), (failed, "not")):
        said += f", {len(folders)} {what} ({', '.join(folders[:3])})" if folders else ""
    again = " The same command runs what is missing." if failed or stopped or was_stopped else ""
    return f"{said}.{again} To compare them: python -m mini_distill.report {shlex.quote(str(sweep))}"


def jobs_of(sweep: Path) -> list[dict[str, Any]]:
    """The lines of jobs.jsonl; one that a kill cut short does not count."""
    file = sweep / JOBS
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def _plain(config: Config) -> Any:
    """As `config.yaml` has it."""
    return yaml.safe_load(yaml.safe_dump(redact(dataclasses.asdict(config)), allow_unicode=True))


def _run(command: list[str], log: Path, environment: dict[str, str], jobs: RunningJobs | None) -> int:
    """Run to the end, whatever it prints into the log, in a session of its own, so that it gets each signal once: from the sweep."""
    with storage_errors(log, "write the log of the job"):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(open_regular(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")
    environment |= jobs.environment() if jobs is not None else {}
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "env": environment, "start_new_session": True}
    with file, subprocess.Popen(command, stdout=file, **settings) as job, jobs.running(job) if jobs is not None else nullcontext():
        return job.wait()


def _environment(config: Config, num_at_once: int) -> dict[str, str]:
    """Jobs beside each other share the cores, unless somebody has said how."""
    environment = dict(os.environ)
    if num_at_once > 1 and config.trainer.num_threads is None and "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_at_once if hasattr(os, "sched_getaffinity") else 1))
    return environment


def _note(file: Path, entry: dict[str, Any]) -> None:
    line = json.dumps({**entry, "ended": time.time()}, ensure_ascii=False) + "\n"
    with storage_errors(file, "note the end of the job"), open(open_regular(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as jobs:
        jobs.write(line.encode())  # one write at the end of the file: lines of several jobs do not mix


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1].strip() if lines else "")


def how_it_ended(code: int) -> str:
    """An exit code in words; a negative one is a signal's."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _result(folder: Path, config: Config) -> str:
    try:
        value = json.loads(read_regular(folder / "summary.json")).get(config.evaluation.best_metric)
    except (OSError, ValueError):
        value = None
    return "" if value is None else f", {config.evaluation.best_metric} {value:.4g}"
