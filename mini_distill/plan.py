"""What a training needs, said before a weight is loaded: memory, time, operations, disk, and the largest micro-batch that fits.

python -m mini_distill.plan teacher=… student=… data=…                        the settings of the training
python -m mini_distill.plan … plan.device=cuda plan.memory_gib=80 plan.matmul_tflops=400 plan.memory_gb_per_second=2000    a GPU elsewhere
"""

from __future__ import annotations

if __name__ == "__main__":
    from mini_distill.starting import answer_signals

    answer_signals()

    from mini_distill.cli import run_command
    from mini_distill.config import PlanCommand

    run_command("mini_distill.plan:plan", config_name="plan", schema=PlanCommand)

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from .config import PlanCommand
from .contract import objective_terms
from .data.tokenizers import vocabulary_size
from .errors import ConfigError
from .evaluation.speed import num_parameters
from .losses.catalogue import matching_parameters
from .planning.disk import disk_needs
from .planning.machine import free_memory
from .planning.models import weightless_models
from .planning.needs import Needs, largest_micro_batch
from .planning.table import format_plan
from .planning.tokens import DataSize, data_size
from .redaction import redact
from .run import called, checked
from .storage import atomic_write_text, check_writable
from .students.build import TeacherSizes
from .teachers.cache_identity import read_description
from .teachers.load import load_shared_tokenizer
from .training.process_group import start_processes


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        parameters: Of `teacher` and `student`; what two modules share counts once.
        memory: Bytes of one device: `total`, what it is made of, and `available`.
        seconds: Of an optimizer step by phase, `step`, `evaluation` (one), `run` (all).
        flops: Floating-point operations of an optimizer step on one device by phase, and `step`.
        tokens: `step` (positions, all devices), `supervised_step`, `run`, `epoch` and `epochs` (absent where unknown).
        disk: Bytes.
        largest_micro_batch: Sequences of a device and pass that fit; 0: not even one.
        largest_micro_batch_bytes: What it takes.
        notes: What has to be known besides.
    """

    parameters: dict[str, int]
    memory: dict[str, int]
    seconds: dict[str, float]
    flops: dict[str, float]
    tokens: dict[str, float]
    disk: dict[str, float]
    largest_micro_batch: int
    largest_micro_batch_bytes: int
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether the memory there is suffices."""
        return self.memory["total"] <= self.memory["available"]

    def summary(self) -> dict[str, Any]:
        """Every number, flat: `memory/total`, `seconds/step`, …"""
        groups = ("parameters", "memory", "seconds", "flops", "tokens", "disk")
        flat = {f"{group}/{name}": value for group in groups for name, value in getattr(self, group).items()}
        return flat | {"largest_micro_batch": self.largest_micro_batch, "fits": self.fits}

    def __str__(self) -> str:
        return format_plan(self)


def plan(config: PlanCommand) -> Plan:
    """Reckon what the training needs, print it, and write it into `output_dir` where that is given.

    Raises:
        MiniDistillError: a setting, model configuration, tokenizer or data source that the training would refuse, too.
    """
    folder = None if config.output_dir is None else Path(config.output_dir).expanduser()
    if folder is not None:
        check_writable(folder)
    made = make_plan(config)
    print(made)
    if folder is not None:
        settings = redact(dataclasses.asdict(config))
        atomic_write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        atomic_write_text(folder / "summary.json", json.dumps(made.summary() | {"notes": made.notes}, indent=2) + "\n")
    return made


def make_plan(config: PlanCommand) -> Plan:
    """The same without printing or writing."""
    device, on_gpu = _device(config)
    tokenizer = load_shared_tokenizer(config)
    models = weightless_models(config, tokenizer, _sizes_in_cache(config), on_gpu)
    data = data_size(config.data, tokenizer)
    trainer, given = config.trainer, config.plan.memory_gib
    needs = Needs(models, config, trainer.micro_batch_size, data.supervised_share, vocabulary_size(tokenizer), on_gpu)
    available = int(given * 2**30) if given is not None else free_memory(device)
    largest, largest_bytes = largest_micro_batch(needs, available)
    return Plan(
        parameters={name: num_parameters(model) for name, model in vars(models).items() if model is not None},
        memory=needs.memory() | {"available": available},
        seconds=_seconds(config, needs.seconds(device), data),
        flops=_with_total({phase: value * trainer.grad_accum_steps for phase, value in needs.flops().items()}),
        tokens=_tokens(config, needs.tokens, data),
        disk=disk_needs(config, models, data),
        largest_micro_batch=largest,
        largest_micro_batch_bytes=largest_bytes,
        notes=_notes(config, data),
    )


def _device(config: PlanCommand) -> tuple[torch.device, bool]:
    """Where operations are timed, and whether the run is on a GPU, here or elsewhere.

    Raises:
        ConfigError: on a GPU that is not here, and of which nothing is given.
    """
    plan = config.plan
    here = start_processes(config.trainer.precision, config.trainer.num_threads).device
    if plan.device == "auto" or plan.device == here.type:
        return here, here.type == "cuda"
    for name in ("memory_gib", "matmul_tflops", "memory_gb_per_second"):
        if getattr(plan, name) is None and plan.device == "cuda":
            raise ConfigError(f"plan.{name}", "missing, and there is no GPU here to measure", f"Give plan.{name}, or plan.device=cpu.")
    return torch.device("cpu"), plan.device == "cuda"


def _sizes_in_cache(config: PlanCommand) -> TeacherSizes | None:
    """What a cache tells of a teacher that is not there."""
    if config.teacher.kind != "cached":
        return None
    facts = read_description(Path(str(config.teacher.cache_dir)).expanduser())["teacher"]
    return None if facts["embedding_rows"] is None else TeacherSizes(facts["embedding_rows"], facts["positions"])


def _with_total(flops: dict[str, float]) -> dict[str, float]:
    return flops | {"step": sum(flops.values())}


def _seconds(config: PlanCommand, of_pass: dict[str, float], data: DataSize) -> dict[str, float]:
    """Of an optimizer step, an evaluation and the run, from those of a micro-batch and of a batch of evaluation."""
    trainer, evaluation = config.trainer, config.evaluation
    passes = {phase: spent * trainer.grad_accum_steps for phase, spent in of_pass.items() if phase not in ("update", "evaluation")}
    step = sum(passes.values()) + of_pass["update"]
    held_out = data.held_out_sequences
    batches = evaluation.max_batches if held_out is None else -(-held_out // (evaluation.batch_size * config.plan.num_devices))
    batches = min(batches or 0, evaluation.max_batches or batches or 0)
    times = 2 + (0 if trainer.eval_every is None else (trainer.max_steps - 1) // trainer.eval_every)
    spent = passes | {"update": of_pass["update"], "step": step, "evaluation": batches * of_pass["evaluation"]}
    run = trainer.max_steps * step + times * spent["evaluation"]
    if config.control:
        run = 2 * run - trainer.max_steps * passes.get("teacher", 0.0)
    return spent | {"run": run}


def _tokens(config: PlanCommand, supervised: int, data: DataSize) -> dict[str, float]:
    trainer, seq_len = config.trainer, config.data.seq_len
    sequences = trainer.micro_batch_size * trainer.grad_accum_steps * config.plan.num_devices
    found: dict[str, float] = {
        "step": sequences * seq_len,
        "supervised_step": supervised * trainer.grad_accum_steps * config.plan.num_devices,
        "run": sequences * seq_len * trainer.max_steps,
    }
    if data.sequences is not None:
        found |= {"epoch": data.sequences * seq_len, "epochs": sequences * trainer.max_steps / max(1.0, data.sequences)}
    return found


def _notes(config: PlanCommand, data: DataSize) -> list[str]:
    notes = []
    if data.sequences is None:
        notes.append("The number of training tokens is not known before the data are read.")
    elif not data.counted:
        notes.append("Training tokens are estimated from the first rows; they are counted once the data are tokenised.")
    matching = [name for name, term in objective_terms(config.objective).items() if term.kind in matching_parameters()]
    if matching:
        notes.append(f"Not in the figures: the inner states that {', '.join(matching)} compares.")
    if config.teacher.cache_kind is not None:
        notes.append("Not in the figures: writing the teacher's targets, which python -m mini_distill.cache predicts when it begins.")
    if config.teacher.cache_dir is not None:
        notes.append("Not in the figures: the terms against the cache's targets, which are short lists.")
    if config.teacher.kind == "server":
        notes.append("Not in the figures: waiting for the server's answers.")
    if config.trainer.compile:
        notes.append("The times are those without trainer.compile.")
    return notes


class CallablePlan(ModuleType):
    """The module `mini_distill.plan`, which Python also binds to the package's name `plan`: so that can be called, too."""

    def __call__(self, config: PlanCommand | Sequence[str] = ()) -> Plan:
        """What a training needs.

        Args:
            config: Overrides as on the command line (`["student=mini_2m"]`), or a checked configuration.

        Raises:
            MiniDistillError: any problem that is the user's to mend.
        """
        made: Plan = called(self.make_plan, checked(config, "plan", PlanCommand))
        return made


sys.modules[__name__].__class__ = CallablePlan  # import mini_distill as md; md.plan(["student=mini_2m"])
