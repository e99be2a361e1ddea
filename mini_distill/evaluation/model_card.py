"""The model card: what the student is, what it was made from, how good it is, and what nobody knows about it."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import Config, DataConfig, FullEvaluationConfig, TeacherConfig
from ..redaction import redact_text
from ..storage import atomic_write_text
from .samples import Sample, printable
from .table import FROM_HALF, markdown_table, markdown_tasks, scores_of_tasks

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class CardFacts:
    """What the card says.

    Attributes:
        config: The run's settings.
        objective: The loss with its numbers, `0.5 · forward_kl + 0.5 · ce`.
        training_steps: Optimizer steps really taken.
        training_tokens: Supervised tokens really trained on, or None where nobody counted.
        summary: The final numbers, as `build_summary` makes them.
        samples: Side by side; may be empty.
        held_out_sequences: Size of the held-out text that the figures come from, or None.
        name: Of the student; None: what the output folder is called.
    """

    config: Config
    objective: str
    training_steps: int
    training_tokens: int | None
    summary: Mapping[str, Any]
    samples: Sequence[Sample] = ()
    held_out_sequences: int | None = None
    name: str | None = None

    @property
    def title(self) -> str:
        """The student's name."""
        return self.name or Path(self.config.output_dir or "student").name or "student"


def write_model_card(facts: CardFacts, folder: Path) -> Path:
    """Write `folder/README.md`, and give its path. Needs no network."""
    path = folder / "README.md"
    atomic_write_text(path, str(model_card(facts)) + "\n")
    return path


def model_card(facts: CardFacts) -> ModelCard:
    """The card, with its metadata for the hub."""
    config = facts.config
    sections = [
        f"# {escape(facts.title)}",
        *_introduction(facts),
        _measured(config.data, config.teacher.kind, facts.summary, facts.held_out_sequences),
        *_samples(facts),
        *_licence(facts),
        *_usage(),
    ]
    return ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections))


BEGIN, END = "<!-- measured: python -m mini_distill.evaluate rewrites what follows -->", "<!-- end of what was measured -->"
"""Around figures and limits. No text of models, data or settings can hold them, since theirs is escaped."""


def with_evaluation(
    card: str, data: DataConfig, teacher_kind: str, summary: Mapping[str, Any], held_out_sequences: int, evaluation: FullEvaluationConfig
) -> str | None:
    """A model card whose figures and limits are those of a run that has been evaluated; all else in it stays, whoever wrote it.

    Args:
        card: The text of a README.md.
        data: What the run was trained and measured on.
        teacher_kind: Of its teacher.
        summary: The run's figures, with those of its evaluation.
        held_out_sequences: Size of the held-out text.
        evaluation: How it was evaluated.

    Returns:
        The new text; None where the card has no such part, or is none that the hub could read.
    """
    try:
        found = ModelCard(card)
    except (ValueError, TypeError, yaml.YAMLError):
        return None
    before, begin, rest = found.text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return None
    found.text = before + _measured(data, teacher_kind, summary, held_out_sequences, evaluation) + after
    metadata: Any = found.data  # its attributes are what the card's header has
    metadata.eval_results = list(_eval_results(data, summary))
    metadata.model_name = metadata.model_name or "student"
    return str(found)


# ---------------------------------------------------------------------------------------------------------------------- metadata


def _metadata(facts: CardFacts) -> ModelCardData:
    teacher, data = facts.config.teacher, facts.config.data
    return ModelCardData(
        model_name=facts.title,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mini_distill", *(["knowledge-distillation"] if teacher.kind != "none" else [])],
        base_model=[path for path in _origins(facts.config) if _is_hub_id(path)] or None,
        datasets=[data.path] if data.source == "hub" and data.path is not None and _is_hub_id(data.path) else None,
        eval_results=list(_eval_results(data, facts.summary)),
        license=_licence_of(facts.config),
        license_name="same-as-base-model" if _licence_of(facts.config) == "other" else None,
    )


def _origins(config: Config) -> list[str]:
    """Models that the student's weights come from: its teacher, and what it was initialised from."""
    return [part.path for part in (config.teacher, config.student) if part.kind == "hf" and part.path is not None]


def _is_hub_id(path: str | None) -> bool:
    return path is not None and HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def _eval_results(data: DataConfig, summary: Mapping[str, Any]) -> Iterator[EvalResult]:
    for metric, name in (("perplexity", "Perplexity"), ("bits_per_byte", "Bits per byte")):
        value = summary.get(f"eval/student_{metric}")
        if value is not None and math.isfinite(value):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=data.path if data.source == "hub" and data.path else data.source,
                dataset_name=f"held-out part of {_data_name(data)}",
                metric_type=metric,
                metric_name=name,
                metric_value=round(value, 5),
            )
    for task, value in scores_of_tasks(summary):
        metric = "stereotype_score" if f"task/{task}/student{FROM_HALF}" in summary else "score"
        yield EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_name=metric.replace("_", " ").capitalize(),
            metric_value=round(value, 5),
        )


def _licence_of(config: Config) -> str | None:
    if config.teacher.kind in ("hf", "server") or config.student.kind == "hf":
        return "other"
    return "apache-2.0" if config.teacher.kind == "embedded" else None


# ---------------------------------------------------------------------------------------------------------------------- sections


def _introduction(facts: CardFacts) -> Iterator[str]:
    config, summary = facts.config, facts.summary
    tokens = f", {facts.training_tokens:,} supervised tokens" if facts.training_tokens is not None else ""
    trainer = config.trainer
    yield (
        "A small causal language model distilled from a larger one with mini_distill."
        if config.teacher.kind != "none"
        else "A small causal language model trained with mini_distill, without a teacher."
    )
    lines = [
        ("Teacher", f"{_teacher_name(config.teacher)}{_parameters(summary, 'teacher')}"),
        ("Student", f"{_student_name(config)}{_parameters(summary, 'student')}"),
        ("Data", f"{escape(_data_name(config.data))}, sequences of {config.data.seq_len} tokens"),
        ("Objective", escape(facts.objective)),
        (
            "Training",
            f"{facts.training_steps:,} optimizer steps{tokens}; AdamW, peak learning rate {trainer.learning_rate:g}, {trainer.schedule} schedule",
        ),
        ("Seed", str(config.seed)),
    ]
    yield "\n".join(f"- **{name}:** {text}" for name, text in lines)


def _teacher_name(teacher: TeacherConfig) -> str:
    if teacher.kind == "none":
        return "none"
    if teacher.kind == "embedded":
        return "the small model embedded in mini_distill"
    if teacher.kind == "server" and teacher.model is not None:
        return f"{escape(teacher.model)}, on a server"
    revision = f", revision {escape(teacher.revision)}" if teacher.revision else ""
    return escape(teacher.path or "") + revision


def _student_name(config: Config) -> str:
    student = config.student
    if student.kind == "hf":
        return f"initialised from {escape(student.path or '')}"
    if student.kind == "from_teacher":
        layers = f"{student.num_layers} of the teacher's layers" if student.num_layers else "the teacher's own layers"
        return f"initialised from {layers}, evenly spaced"
    return "Llama architecture, trained from random weights"


def _parameters(summary: Mapping[str, Any], model: str) -> str:
    value = summary.get(f"model/{model}_parameters")
    return "" if value is None else f", {int(value):,} parameters"


def _data_name(data: DataConfig) -> str:
    if data.source == "mixture":
        return "a mixture of " + ", ".join(map(str, data.mixture))
    if data.source == "python_stdlib":
        return "the source text of Python's standard library"
    parts = [redact_text(data.path or data.source), data.name, data.split if data.source == "hub" else None]
    revision = f" at revision {data.revision}" if data.revision else ""
    return " / ".join(part for part in parts if part) + revision


def _measured(
    data: DataConfig,
    teacher_kind: str,
    summary: Mapping[str, Any],
    held_out_sequences: int | None,
    evaluation: FullEvaluationConfig | None = None,
) -> str:
    """Figures, tasks and limits, between the marks by which `with_evaluation` finds them again."""
    sections = [*_figures(summary, evaluation), *_tasks(summary, evaluation), *_limits(data, teacher_kind, summary, held_out_sequences)]
    return "\n\n".join([BEGIN, *sections, END])


def _figures(summary: Mapping[str, Any], evaluation: FullEvaluationConfig | None) -> Iterator[str]:
    yield "## Figures"
    yield markdown_table(summary)
    speed = "Reading speed was measured" if evaluation is None else "Speed and memory were measured"
    yield (
        "KL is KL(teacher‖student) in nats per token at temperature 1. The calibration error is the expected calibration error of the "
        f"most probable token (15 bins). {speed} on the machine that {'trained' if evaluation is None else 'evaluated'} the student."
        f"{_written(summary, evaluation)}"
    )


def _written(summary: Mapping[str, Any], evaluation: FullEvaluationConfig | None) -> str:
    """How the texts were written whose repetition is among the figures: samples in the card may have been written otherwise."""
    if evaluation is None or "text/student_repetition" not in summary:
        return ""
    how = f"sampled at temperature {evaluation.sampling_temperature:g}" if evaluation.sampling_temperature else "greedy"
    return f" Repetition and distinct tokens are those of {how} generations."


def _tasks(summary: Mapping[str, Any], evaluation: FullEvaluationConfig | None) -> Iterator[str]:
    if scores_of_tasks(summary):
        yield "## Tasks"
        yield markdown_tasks(summary, escape)
        if evaluation is not None and evaluation.task_limit:
            harness = "; of lm-evaluation-harness the first" if evaluation.tasks else ""
            yield f"Of each task at most {evaluation.task_limit} items were done, drawn with the seed{harness}."


def _samples(facts: CardFacts) -> Iterator[str]:
    """In `<pre>` with everything escaped: text of a model or a data set is never markup."""
    if not facts.samples:
        return
    yield "## Samples"
    temperature = facts.config.evaluation.sampling_temperature
    yield "Greedy continuations." if temperature == 0 else f"Continuations sampled at temperature {temperature:g}."
    for sample in facts.samples:
        texts = {"prompt": sample.prompt, **sample.continuations}
        for name, text in texts.items():
            yield f"**{escape(name)}**\n\n<pre>\n{html.escape(printable(text), quote=False)}\n</pre>"


def _limits(data: DataConfig, teacher_kind: str, summary: Mapping[str, Any], held_out_sequences: int | None) -> Iterator[str]:
    kind = (
        "Python source code with English comments"
        if data.source == "python_stdlib"
        else f"the language and domain of {escape(_data_name(data))}"
    )
    size = f"{summary['eval/tokens']:,.0f} supervised tokens" if "eval/tokens" in summary else "no tokens at all"
    if held_out_sequences is not None:
        size += f" of a held-out part of {held_out_sequences:,} sequences"
    inherited = (
        "what is wrong or harmful in the teacher and in the data" if teacher_kind != "none" else "what is wrong or harmful in the data"
    )
    yield "## Limits"
    limits = [
        f"The training text was {kind}; nothing is known about the student elsewhere{' but for the tasks' if scores_of_tasks(summary) else ''}.",
        f"The figures come from {size} of the same source, and from one run with one seed: they have no error bars.",
        "Perplexities compare only between models with the same tokenizer; bits per byte compare across tokenizers.",
        f"{_not_evaluated(summary)} It may repeat {inherited}.",
    ]
    yield "\n".join(f"- {limit}" for limit in limits)


def _not_evaluated(summary: Mapping[str, Any]) -> str:
    """What no figure says anything about."""
    if not scores_of_tasks(summary):
        return "Facts, instructions, safety and bias were not evaluated."
    if any(key.endswith(FROM_HALF) for key in summary):
        return "Of bias the stereotype scores above are all that is known; beyond the tasks above, facts, instructions and safety were not evaluated."
    return "Beyond the tasks above, facts, instructions, safety and bias were not evaluated."


def _licence(facts: CardFacts) -> Iterator[str]:
    origins = [f"its teacher ({_teacher_name(facts.config.teacher)})"] if facts.config.teacher.kind != "none" else []
    if facts.config.student.kind == "hf":
        origins.append(f"the model it was initialised from ({escape(facts.config.student.path or '')})")
    if origins:
        yield "## Licence"
        yield f"The student is derived from {' and '.join(origins)}: that licence and those terms of use apply to it, and those of the data."


def _usage() -> Iterator[str]:
    yield "## Use"
    yield (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'tokenizer = AutoTokenizer.from_pretrained("path/to/student")\n'
        'model = AutoModelForCausalLM.from_pretrained("path/to/student")\n'
        "```"
    )


def escape(text: str) -> str:
    """Text of unknown origin within a line of Markdown: HTML and Markdown marks are shown, not obeyed."""
    line = html.escape(" ".join(printable(redact_text(text)).split()), quote=False)
    line = re.sub(r"([\\`*\[\]|~#])", r"\\\1", line)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)  # inside a word an underscore is only that
