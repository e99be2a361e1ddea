"""Measure a model against its teacher: quality, fidelity, calibration, tasks and bias, speed, memory, cost.

python -m mini_distill.evaluate model=runs/default                      a run's student, with the run's teacher and data
python -m mini_distill.evaluate model=<folder> teacher=… data=…         any model
"""

from __future__ import annotations

if __name__ == "__main__":
    from mini_distill.starting import answer_signals

    answer_signals()

    from mini_distill.cli import run_command
    from mini_distill.config import EvaluateCommand

    run_command("mini_distill.evaluate:evaluate", config_name="evaluate", schema=EvaluateCommand)

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import EvaluateCommand
from .data.loader import evaluation_batches
from .data.order import Stream
from .data.prepare import column_of_rows, prepare_data
from .data.tokenizers import check_same_tokenizer
from .distillation import check_vocabulary, start_processes
from .errors import ConfigError, DistributedError
from .evaluation.close_look import CloseLook, Groups, parts_of_mixture, write_details
from .evaluation.diversity import diversity
from .evaluation.efficiency import Origin, check_length, cost_and_energy, file_bytes, flops_per_token, peak_memory, timings, weight_bytes
from .evaluation.hooks import EvaluationContext, load_hooks, run_hooks
from .evaluation.samples import Sample, format_samples, side_by_side
from .evaluation.speed import forward_tokens_per_second, num_parameters
from .evaluation.table import format_table, format_tasks
from .evaluation.tasks import check_tasks, run_tasks
from .models.loading import load_causal_lm, load_tokenizer
from .models.packed_documents import check_documents_kept_apart
from .out_of_memory import memory_errors
from .redaction import redact
from .run import CallableEvaluate
from .storage import atomic_write_text, check_writable
from .teachers.load import load_teacher, load_teacher_tokenizer, teacher_path

SHOWN_SAMPLES = 3


@dataclass
class Evaluation:
    """What there is to measure, loaded.

    Attributes:
        config: What is measured.
        models: By name: `teacher`, if there is one, and `student`, the model in question.
        origins: Where each can be loaded from again.
        tokenizer: Of both.
        held_out: The sequences.
        device: Where the student is.
        autocast: Makes the context of forward passes.
    """

    config: EvaluateCommand
    models: dict[str, PreTrainedModel]
    origins: dict[str, Origin]
    tokenizer: PreTrainedTokenizerBase
    held_out: Stream
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The teacher, if there is one."""
        return self.models.get("teacher")


def evaluate(config: EvaluateCommand) -> dict[str, Any]:
    """Measure everything asked for, write summary.json and details.json into `output_dir`, and print the table.

    Returns:
        The summary: every number, keyed like the metrics of a training.

    Raises:
        MiniDistillError: any problem that is the user's to mend, before anything is measured where that can be known.
    """
    hooks = load_hooks(config.evaluation.hooks)
    check_tasks(config.evaluation)
    folder = Path(str(config.output_dir)).expanduser()
    check_writable(folder)
    e = load(config)
    summary: dict[str, Any] = {f"model/{name}_parameters": num_parameters(model) for name, model in e.models.items()}
    look = CloseLook(
        e.models["student"],
        e.teacher,
        e.tokenizer,
        e.held_out,
        top_k=config.evaluation.top_k,
        num_differences=config.evaluation.num_differences,
        group_of=_groups(e),
    )
    remedies = ["lower evaluation.batch_size, which changes no result", "set teacher.dtype=bfloat16", "shorten data.seq_len"]
    with memory_errors("evaluation.batch_size", f"with {config.evaluation.batch_size} sequences", remedies):
        look.over(batches(e), e.autocast, show_progress=True)
    summary |= look.metrics()
    context = EvaluationContext(
        e.models["student"], e.teacher, e.tokenizer, 0, lambda: batches(e), e.device, folder, gather_sum=lambda value: value
    )
    summary |= run_hooks(hooks, context, taken=summary)
    samples = side_by_side(config.evaluation, e.tokenizer, e.models, e.held_out, config.seed)
    summary |= _diversity(samples)
    tasks, task_details = run_tasks(config.evaluation, e.models, e.tokenizer, e.device, e.autocast, show_progress=True)
    summary |= tasks
    summary |= _costs(e)
    write_measured(folder, config, summary)
    write_details(folder, look.details() | ({"tasks": task_details} if task_details else {}), samples)
    print(format_table(summary))
    if tasks:
        print("\n" + format_tasks(tasks))
    if samples:
        print("\n" + format_samples(samples[:SHOWN_SAMPLES]))
    print(f"\nFigures: {folder / 'summary.json'}. A page to look at: python -m mini_distill.report {folder}")
    return summary


def load(config: EvaluateCommand) -> Evaluation:
    """Tokenizer, data and models, the cheap things first.

    Raises:
        ModelError: a model cannot be loaded, or its tokenizer is not the teacher's.
        DataError: the data cannot be read, or nothing is held out.
        DistributedError: several processes were launched.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DistributedError("torch.distributed", "evaluate measures in one process", "Start it without torchrun.")
    path, teacher = str(config.model), config.teacher
    accelerator = start_processes(config.precision, config.num_threads)
    tokenizer = load_tokenizer(path, where="model")
    if teacher.kind != "none":
        check_same_tokenizer(load_teacher_tokenizer(teacher), tokenizer, where="model")
    data = prepare_data(config.data, tokenizer)
    if data.held_out is None:
        raise ConfigError(
            "data.eval_fraction", "nothing is held out, so there is nothing to measure on", "Name data.eval_path, or raise it."
        )
    student = load_causal_lm(path, where="model").to(accelerator.device)
    models, origins = {"student": student}, {"student": Origin(path)}
    if (model := load_teacher(teacher, accelerator.device)) is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        origin = Origin(teacher_path(teacher), teacher.revision, dtype, teacher.attn_implementation, teacher.trust_remote_code)
        models, origins = {"teacher": model, **models}, {"teacher": origin, **origins}
    for name, model in models.items():
        check_vocabulary(model, tokenizer, name)
        if config.data.packing:
            check_documents_kept_apart(model, "teacher.path" if name == "teacher" else "model")
        if config.evaluation.speed:
            check_length(name, model, config.evaluation)
    return Evaluation(config, models, origins, tokenizer, data.held_out, accelerator.device, accelerator.autocast)


def batches(e: Evaluation) -> Any:
    """A fresh iterator over the held-out batches."""
    return evaluation_batches(e.held_out, e.config.evaluation.batch_size, e.config.evaluation.max_batches)


def write_measured(folder: Path, config: EvaluateCommand, summary: dict[str, Any]) -> None:
    """The settings, without secrets, and the figures."""
    settings = redact(dataclasses.asdict(config))
    atomic_write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in summary.items()}
    atomic_write_text(folder / "summary.json", json.dumps(finite, indent=2, sort_keys=True) + "\n")


def _groups(e: Evaluation) -> Groups | None:
    """The column that was asked for; of a mixture, its parts."""
    column = e.config.evaluation.group_by
    if column is not None:
        values = column_of_rows(e.config.data, column)
        return Groups(column, lambda index, origin: values.get(origin.removesuffix(" (its end)"), "(none)"))
    return parts_of_mixture(e.held_out)


def _diversity(samples: list[Sample]) -> dict[str, float]:
    names = dict.fromkeys(name for sample in samples for name in sample.continuations)
    found: dict[str, float] = {}
    for name in names:
        of_model = diversity([sample.continuations[name] for sample in samples])
        found |= {f"text/{name}_{key}": value for key, value in of_model.items()}
    return found


def _costs(e: Evaluation) -> dict[str, float]:
    """Bytes and operations always; seconds and memory unless `evaluation.speed=false`."""
    config = e.config.evaluation
    found: dict[str, float] = {}
    for name, model in e.models.items():
        found[f"model/{name}_weight_bytes"] = weight_bytes(model)
        found[f"model/{name}_flops_per_token"] = flops_per_token(model, config.prompt_tokens)
        if (size := file_bytes(e.origins[name])) is not None:
            found[f"model/{name}_file_bytes"] = size
    if not config.speed:
        return found
    batch = next(iter(batches(e))).to(e.device)
    speeds = forward_tokens_per_second(e.models, batch, e.autocast)
    found |= {f"perf/{name}_tokens_per_second": value for name, value in speeds.items()}
    found |= timings(e.models, config, e.autocast)
    found |= {f"perf/{name}_peak_memory_bytes": peak_memory(origin, config, str(e.device)) for name, origin in e.origins.items()}
    return found | cost_and_energy(found, config, list(e.models))


sys.modules[__name__].__class__ = CallableEvaluate  # import mini_distill as md; md.evaluate(["model=runs/default"])
