"""Whole runs for tests: in this process, in forked ones, and by the command line."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from mini_distill.cli import load_config, report
from mini_distill.config import Config
from mini_distill.errors import MiniDistillError

TESTS = Path(__file__).parent
TWO = ["trainer.micro_batch_size=2"]
"""On each of two processes; the tiny command has 4 on one."""
train_module: Any = importlib.import_module("mini_distill.train")  # `mini_distill.train` may also mean the function
forks = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used CUDA cannot be forked")


def run(command: list[str], output_dir: Path, *more: str) -> dict[str, Any]:
    """Train in this process, as the command line would; gives the summary."""
    return train_module.train(dataclasses.replace(copy.deepcopy(checked((*command, *more))), output_dir=str(output_dir)))


@functools.cache
def checked(command: tuple[str, ...]) -> Config:
    """The configuration of a command without `output_dir`: composing it takes longer than the tiny runs themselves."""
    return load_config(list(command))


def steps_of(run_folder: Path) -> list[int]:
    """The steps in the rows of metrics.jsonl, in their order."""
    return [row["step"] for row in rows(run_folder)]


def rows(run_folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def status(run_folder: Path) -> dict[str, Any]:
    """status.json."""
    return json.loads((run_folder / "status.json").read_text())


def checkpoint_steps(run_folder: Path) -> list[int]:
    """The steps of the checkpoints that are there."""
    return sorted(int(path.name[5:]) for path in (run_folder / "checkpoints").glob("step-????????"))


def copy_of(run_folder: Path, target: Path) -> Path:
    """The same run somewhere else."""
    shutil.copytree(run_folder, target)
    return target


def weight_norm(run_folder: Path) -> float:
    """The squared norm of the student that a run left behind."""
    model = AutoModelForCausalLM.from_pretrained(run_folder / "student")
    return sum(p.double().square().sum().item() for p in model.parameters())


@contextmanager
def before_step(step: int, action: Callable[[], object]) -> Iterator[None]:
    """Call `action` once, as optimizer step `step` begins."""
    original = train_module.seed_step

    def watched(seed: int, current: int, rank: int = 0) -> None:
        if current == step:
            action()
        original(seed, current, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "seed_step", watched)
        yield


def send(number: signal.Signals) -> Callable[[], None]:
    """An action: this process gets a signal."""
    return lambda: os.kill(os.getpid(), number)


def in_processes(count: int, body: Callable[[int], object]) -> list[int]:
    """Run `body(rank)` in a group of forked processes, as torchrun would start them; gives how each ended (1: it raised)."""
    return [wait(child) for child in [fork(of_rank) for of_rank in as_ranks(count, body)]]


def as_ranks(count: int, body: Callable[[int], object]) -> list[Callable[[], None]]:
    """What each of a group of processes has to do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [functools.partial(_as_rank, rank, count, port, body) for rank in range(count)]


def _as_rank(rank: int, count: int, port: int, body: Callable[[int], object]) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()  # what the parent found out about its own processes
    body(rank)


def fork(body: Callable[[], object]) -> int:
    """Run `body` in a forked process and give its number; it ends with 0, with a MiniDistillError's code, or with 1."""
    child = os.fork()
    if child:
        return child
    code = 1
    tqdm.set_lock(threading.RLock())  # its own is shared with the parent, which would wait for ever for a child killed holding it
    try:
        body()
        code = 0
    except MiniDistillError as error:
        code = report(error)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """How a forked process ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked_sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m mini_distill.train -m …` in `folder`, with forks in place of processes: these begin with everything imported."""
    files = folder / "stdout", folder / "stderr"
    for file in files:
        file.write_text("")
    code = wait(fork(lambda: _as_program(folder, arguments, *files)))
    return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))


def _as_program(folder: Path, arguments: Sequence[str], stdout: Path, stderr: Path) -> None:
    """Its jobs are forks, too."""
    from hydra.core.global_hydra import GlobalHydra

    from mini_distill import sweep
    from mini_distill.cli import TRAIN, run_command

    for number, file in ((1, stdout), (2, stderr)):
        file.parent.mkdir(parents=True, exist_ok=True)
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115 - to the end
    os.chdir(folder)
    GlobalHydra.instance().clear()  # that of the sweep, of which this is a job
    sys.argv = ["train.py", *arguments]
    sweep._run = lambda command, log, *_: wait(fork(lambda: _as_program(folder, command[3:], log.resolve(), log.resolve())))
    run_command(TRAIN)


def ranks_of(torchrun: int) -> dict[int, int]:
    """The processes that torchrun has started: rank -> number."""
    found = {}
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        environment = dict(text.partition("=")[::2] for text in Path(f"/proc/{child}/environ").read_text().split("\0"))
        if "RANK" in environment:
            found[int(environment["RANK"])] = int(child)
    return found


def command_line(command: list[str], output_dir: Path, *more: str, torchrun: int = 0, **environment: str) -> subprocess.Popen[str]:
    """`python -m mini_distill.train …` or `torchrun …`, started; modules of tests/ can be imported."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"] if torchrun else []
    arguments = [sys.executable, *start, "-m", "mini_distill.train", *command, f"output_dir={output_dir}", *more]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(arguments, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
