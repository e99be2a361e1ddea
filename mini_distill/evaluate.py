"""Measure a model against its teacher: quality, fidelity, calibration, tasks and bias, speed, memory, cost.

python -m mini_distill.evaluate model=runs/default                      a run's student, with the run's teacher and data
python -m mini_distill.evaluate model=<folder> teacher=… data=…         any model
python -m mini_distill.evaluate … data=jsonl data.eval_path=rows.jsonl  all rows of a file
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
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import DataConfig, EvaluateCommand
from .data.loader import evaluation_batches
from .data.order import Stream
from .data.prepare import column_of_rows, prepare_data
from .data.tokenizers import check_same_tokenizer
from .errors import ConfigError, DistributedError
from .evaluation.close_look import CloseLook, Groups, parts_of_mixture, write_details
from .evaluation.diversity import diversity
from .evaluation.efficiency import Origin, check_length, cost_and_energy, file_bytes, flops_per_token, peak_memory, timings, weight_bytes
from .evaluation.evaluator import smaller_batches
from .evaluation.hooks import EvaluationContext, Hook, load_hooks, run_hooks
from .evaluation.model_card import with_evaluation
from .evaluation.samples import Sample, format_samples, side_by_side
from .evaluation.speed import device_name, forward_tokens_per_second, num_parameters
from .evaluation.table import format_table, format_tasks
from .evaluation.tasks import check_tasks, run_tasks
from .models.loading import load_causal_lm, load_tokenizer
from .models.packed_documents import check_documents_kept_apart
from .out_of_memory import memory_errors
from .redaction import redact
from .reporting.measured import is_measured, open_measured
from .run import CallableEvaluate
from .storage import MANIFEST, atomic_write_text, check_writable, replace_in_folder
from .teachers.load import check_vocabulary, load_teacher, load_teacher_tokenizer, teacher_path
from .training.process_group import start_processes

SHOWN_SAMPLES = 3

logger = logging.getLogger(__name__)


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
    check_tasks(config.evaluation, config.seed)
    folder = Path(str(config.output_dir)).expanduser()
    check_writable(folder)
    figures = Figures(folder, config)
    try:
        e = load(config)
        measure(e, hooks, figures)
    except BaseException:
        if figures.summary:
            print(f"What was measured before: {folder / 'summary.json'}", file=sys.stderr)
        raise
    show(figures)
    update_model_cards(e, folder)
    return figures.summary


class Figures:
    """What has been measured, on disk as soon as it is there: what fails late costs nothing of what was measured early.

    Args:
        folder: Gets config.yaml, summary.json and details.json.
        config: What is measured.
    """

    def __init__(self, folder: Path, config: EvaluateCommand) -> None:
        self.folder, self.config = folder, config
        self.summary: dict[str, Any] = {}
        self.details: dict[str, Any] = {}
        self.samples: list[Sample] = []

    def add(self, summary: Mapping[str, Any], **details: Any) -> None:
        """Flat figures, and what is none by its name in details.json."""
        self.summary |= summary
        self.details |= details
        write_measured(self.folder, self.config, self.summary)
        write_details(self.folder, self.details, self.samples)


def measure(e: Evaluation, hooks: list[Hook], figures: Figures) -> None:
    """Held-out text, hooks, generations, tasks, costs: in this order, each into `figures`."""
    config, folder = e.config.evaluation, figures.folder
    look = CloseLook(
        e.models["student"],
        e.teacher,
        e.tokenizer,
        e.held_out,
        top_k=config.top_k,
        num_differences=config.num_differences,
        group_of=_groups(e),
    )
    remedies = [smaller_batches(config), "set teacher.dtype=bfloat16", "shorten data.seq_len"]
    with memory_errors("evaluation.batch_size", f"with {config.batch_size} sequences", remedies):
        look.over(batches(e), e.autocast, show_progress=True)
    sizes: dict[str, float] = {f"model/{name}_parameters": num_parameters(model) for name, model in e.models.items()}
    figures.add(
        sizes | look.metrics() | {"data/held_out_supervised_tokens": e.held_out.num_supervised},
        **look.details(),
        device=device_name(e.device),
    )

    context = EvaluationContext(
        e.models["student"], e.teacher, e.tokenizer, 0, lambda: batches(e), e.device, folder, gather_sum=lambda value: value
    )
    figures.add(run_hooks(hooks, context, taken=figures.summary))

    figures.samples = side_by_side(config, e.tokenizer, e.models, e.held_out, e.config.seed)
    figures.add(_diversity(figures.samples, e.tokenizer))

    tasks: dict[str, Any] = {}
    for found, details in run_tasks(config, e.models, e.tokenizer, e.device, e.autocast, show_progress=True, seed=e.config.seed):
        tasks |= details
        figures.add(found, tasks=tasks)

    figures.add(_sizes(e))
    if config.speed:
        figures.add(speeds := _speeds(e))
        figures.add(cost_and_energy(speeds, config, list(e.models)))
        figures.add(_memory(e))


def show(figures: Figures) -> None:
    """The end of an evaluation on the screen."""
    summary, folder = figures.summary, figures.folder
    print(format_table(summary))
    if text := _which_text(figures.config.data):
        print(text)
    if "tasks" in figures.details:
        print("\n" + format_tasks(summary))
    if figures.samples:
        print("\n" + format_samples(figures.samples[:SHOWN_SAMPLES]))
    print(f"\nFigures: {folder / 'summary.json'}. A page to look at: python -m mini_distill.report {folder}")


def update_model_cards(e: Evaluation, folder: Path) -> None:
    """The run's and its student's tell what was measured, where that is the run's `evaluation` and on its own data and teacher."""
    run, config = Path(str(e.config.model)).expanduser().parent, e.config
    if folder.resolve() != (run / "evaluation").resolve() or not is_measured(run):
        return
    found = open_measured(run)
    for file in (run / "README.md", run / "student" / "README.md") if found.is_evaluated else ():
        if not file.is_file():
            continue
        card = file.read_bytes().decode(errors="replace")
        text = with_evaluation(card, config.data, config.teacher.kind, found.summary, len(e.held_out), config.evaluation)
        if text is None or "\ufffd" in card:
            logger.warning("%s: stays as it is, since it is not the model card that was written there", file)
        elif (file.parent / MANIFEST).exists():
            replace_in_folder(file.parent, file.name, text)
        else:
            atomic_write_text(file, text)


def _which_text(data: DataConfig) -> str:
    """What a share of the rows is a share of; "" where all of what was named is measured."""
    if data.source == "mixture" or data.eval_path or data.eval_split or data.eval_fraction == 1:
        return ""
    return f"They are those of {100 * data.eval_fraction:g} % of the rows of {data.path or data.source} (data.eval_fraction=1: all rows)."


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
    data = prepare_data(config.data, tokenizer, to_measure=True)
    if data.held_out is None:
        remedy = "Set data.eval_fraction=1 to measure all rows, or name data.eval_path."
        raise ConfigError("data.eval_fraction", "nothing is held out, so there is nothing to measure on", remedy)
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


def _diversity(samples: list[Sample], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    names = dict.fromkeys(name for sample in samples for name in sample.continuations)
    found: dict[str, float] = {}
    for name in names:
        of_model = diversity([sample.continuations[name] for sample in samples], tokenizer)
        found |= {f"text/{name}_{key}": value for key, value in of_model.items()}
    return found


def _sizes(e: Evaluation) -> dict[str, float]:
    """Bytes and operations."""
    found: dict[str, float] = {}
    for name, model in e.models.items():
        found[f"model/{name}_weight_bytes"] = weight_bytes(model)
        found[f"model/{name}_flops_per_token"] = flops_per_token(model, e.config.evaluation.prompt_tokens)
        if (size := file_bytes(e.origins[name])) is not None:
            found[f"model/{name}_file_bytes"] = size
    return found


def _speeds(e: Evaluation) -> dict[str, float]:
    """Of reading and writing, the models in turn."""
    batch = next(iter(batches(e))).to(e.device)
    reading = forward_tokens_per_second(e.models, batch, e.autocast)
    return {f"perf/{name}_tokens_per_second": value for name, value in reading.items()} | timings(e.models, e.config.evaluation, e.autocast)


def _memory(e: Evaluation) -> dict[str, float]:
    """Peaks, as far as they could be measured."""
    peaks = {name: peak_memory(name, origin, e.config.evaluation, str(e.device)) for name, origin in e.origins.items()}
    return {f"perf/{name}_peak_memory_bytes": peak for name, peak in peaks.items() if peak is not None}


sys.modules[__name__].__class__ = CallableEvaluate  # import mini_distill as md; md.evaluate(["model=runs/default"])
