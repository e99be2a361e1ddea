"""What a run leaves behind: the student's folder, the summary, the model card, and the table on the screen."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from .compare import against_control
from .data.loader import evaluation_batches
from .data.tokenizers import vocabulary_size
from .distillation import Distillation
from .evaluation.close_look import CloseLook, parts_of_mixture, write_details
from .evaluation.model_card import CardFacts, write_model_card
from .evaluation.samples import Sample, format_samples
from .evaluation.speed import device_name, forward_tokens_per_second, num_parameters
from .evaluation.table import build_summary, format_table
from .models.head import embedding_rows
from .models.loading import quiet
from .storage import atomic_folder, read_regular, verify_folder
from .teachers.cached import CachedTeacher
from .training.process_group import note

logger = logging.getLogger(__name__)


def already_finished(d: Distillation, last_step: int, control: dict[str, Any] | None) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do, printed again; None otherwise."""
    if last_step < d.config.trainer.max_steps or (summary := _read_summary(d.run.path)) is None or not _is_whole(d.run.path / "student"):
        return None
    if summary.get("train/steps") != last_step:
        return None  # written before the run was made longer
    if control is not None and not summary.items() >= against_control(summary, control).items():
        return None  # written before there was this control
    if d.accelerator.is_main_process:
        print(format_table(summary))
        print(f"\nAlready finished at step {last_step}; nothing to do. The student: {d.run.path / 'student'}")
    return summary


def write_result(d: Distillation, control: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write student/, summary.json, details.json and the model card, print the table and the samples, and give the summary.

    Args:
        d: The run, trained.
        control: The summary of the same run without its teacher, to compare with.
    """
    note(d.config.trainer.max_steps, "result")
    exported_step = export_weights(d)
    after = metrics_at(d, exported_step) or d.evaluate(exported_step)  # its row is gone where resume_allow=[metrics] was needed
    samples = write_samples(d)
    look = look_closely(d)
    further = {} if look is None else {key: value for key, value in look.metrics().items() if key not in after}
    compared = {} if control is None else against_control(after, control)
    summary = build_summary(metrics_at(d, 0), after | further, _facts(d, exported_step) | compared)
    if d.accelerator.is_main_process:
        write_details(d.run.path, (look.details() if look is not None else {}) | {"device": device_name(d.accelerator.device)}, samples)
        facts = CardFacts(
            config=d.config,
            objective=d.objective.formula(),
            training_steps=exported_step,
            training_tokens=d.tokens_seen,
            summary=summary,
            samples=samples,
            held_out_sequences=len(d.data.held_out) if d.data.held_out is not None else None,
        )
        write_student(d, facts)
        write_model_card(facts, d.run.path)
        d.run.write_summary(summary)
        show(d, summary, samples)
    d.accelerator.wait_for_everyone()
    return summary


def _read_summary(run: Path) -> dict[str, Any] | None:
    """What `write_result` wrote last; None where it did not come so far, or the file is damaged."""
    try:
        summary = json.loads(read_regular(run / "summary.json"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def _is_whole(student: Path) -> bool:
    """Whether the student is there as it was written; one that is damaged is named, to be written again from the checkpoint."""
    if not (student / "config.json").exists():
        return False
    problems = verify_folder(student, may_grow=True)
    if problems:
        logger.warning("%s: damaged (%s); it is written again", student, problems[0])
    return not problems


def export_weights(d: Distillation) -> int:
    """Put the weights to export into the student, and give their step: the last, or with `trainer.export=best` the best."""
    last = d.config.trainer.max_steps
    best = int(d.best.get("step", last))
    if d.config.trainer.export == "best" and best != last:
        checkpoint = d.checkpoints.at(d.checkpoints.folder / f"step-{best:08d}")
        d.language_model.load_state_dict(checkpoint.tensors("model"))
        return best
    return last


def metrics_at(d: Distillation, step: int) -> dict[str, float]:
    """The logged evaluation of a step."""
    rows = [row for row in d.run.metrics() if row["step"] == step]
    return {key: value for row in rows for key, value in row.items() if key.startswith("eval/")}


def write_student(d: Distillation, facts: CardFacts) -> None:
    """An ordinary Hugging Face folder: `AutoModelForCausalLM.from_pretrained(".../student")`."""
    with atomic_folder(d.run.path / "student") as folder, quiet():
        model = d.student_model
        model.generation_config = generation_config(d)
        model.save_pretrained(folder)
        d.tokenizer.save_pretrained(folder)
        write_model_card(facts, Path(folder))


def generation_config(d: Distillation) -> GenerationConfig:
    """The student's own, kept from writing the padding columns of a padded vocabulary, which no loss ever trained."""
    config = d.student_model.generation_config or GenerationConfig()
    padding = list(range(vocabulary_size(d.tokenizer), embedding_rows(d.student_model)))
    if padding:
        config.suppress_tokens = padding
    return config


def write_samples(d: Distillation) -> list[Sample]:
    """Teacher and student on the same prompts."""
    if d.evaluator is None or d.config.evaluation.num_samples == 0 or not d.accelerator.is_main_process:
        return []
    models = {"teacher": d.teacher_model, "student": d.student_model}
    return d.evaluator.samples({name: model for name, model in models.items() if model is not None}, d.config.seed)


def look_closely(d: Distillation) -> CloseLook | None:
    """Where the exported student's figures come from, on the main process, which reads the held-out text once more; None without any."""
    if d.data.held_out is None or not d.accelerator.is_main_process:
        return None
    evaluation = d.config.evaluation
    look = CloseLook(d.student_model, d.teacher_model, d.tokenizer, d.data.held_out, group_of=parts_of_mixture(d.data.held_out))
    look.over(
        evaluation_batches(d.data.held_out, evaluation.batch_size, evaluation.max_batches), d.accelerator.autocast, show_progress=True
    )
    return look


def show(d: Distillation, summary: dict[str, Any], samples: list[Sample]) -> None:
    """The end of the run on the screen."""
    if samples:
        print("\n" + format_samples(samples, color=sys.stdout.isatty()))
    print("\n" + format_table(summary))
    print(f"\nThe student: {d.run.path / 'student'}")


def _facts(d: Distillation, exported_step: int) -> dict[str, Any]:
    models = {"student": d.student_model} | ({"teacher": d.teacher_model} if d.teacher_model is not None else {})
    facts: dict[str, Any] = {
        "train/steps": d.config.trainer.max_steps,
        "train/exported_step": exported_step,
        "train/tokens_seen": d.tokens_seen,
        **{f"model/{name}_parameters": num_parameters(model) for name, model in models.items()},
        **({"model/teacher_parameters": size} if isinstance(d.teacher, CachedTeacher) and (size := d.teacher.facts["parameters"]) else {}),
        **{f"data/{key}": value for key, value in d.data.report.items() if isinstance(value, int | float)},
    }
    if d.data.held_out is not None:
        batch = next(evaluation_batches(d.data.held_out, d.config.evaluation.batch_size, 1)).to(d.accelerator.device)
        speeds = forward_tokens_per_second(models, batch, d.accelerator.autocast)
        facts |= {f"perf/{name}_tokens_per_second": value for name, value in speeds.items()}
    return facts
