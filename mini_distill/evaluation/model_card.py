"""The model card: what the student is, what it was made from, how good it is, and what nobody knows about it."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import Config, DataConfig, TeacherConfig
from ..redaction import redact_text
from ..storage import atomic_write_text
from .samples import Sample, printable
from .table import markdown_table

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
    sections = [
        f"# {escape(facts.title)}",
        *_introduction(facts),
        *_figures(facts),
        *_samples(facts),
        *_limits(facts),
        *_licence(facts),
        *_usage(),
    ]
    return ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections))


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
        eval_results=list(_eval_results(facts)),
        license=_licence_of(facts.config),
        license_name="same-as-base-model" if _licence_of(facts.config) == "other" else None,
    )


def _origins(config: Config) -> list[str]:
    """Models that the student's weights come from: its teacher, and what it was initialised from."""
    return [part.path for part in (config.teacher, config.student) if part.kind == "hf" and part.path is not None]


def _is_hub_id(path: str | None) -> bool:
    return path is not None and HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def _eval_results(facts: CardFacts) -> Iterator[EvalResult]:
    data = facts.config.data
    for metric, name in (("perplexity", "Perplexity"), ("bits_per_byte", "Bits per byte")):
        value = facts.summary.get(f"eval/student_{metric}")
        if value is not None and math.isfinite(value):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=data.path if data.source == "hub" and data.path else data.source,
                dataset_name=f"held-out part of {_data_name(data)}",
                metric_type=metric,
                metric_name=name,
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


def _figures(facts: CardFacts) -> Iterator[str]:
    yield "## Figures"
    yield markdown_table(facts.summary)
    yield (
        "KL is KL(teacher‖student) in nats per token at temperature 1. The calibration error is the expected calibration error of the "
        "most probable token (15 bins). Reading speed was measured on the machine that trained the student."
    )


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


def _limits(facts: CardFacts) -> Iterator[str]:
    data = facts.config.data
    kind = (
        "Python source code with English comments"
        if data.source == "python_stdlib"
        else f"the language and domain of {escape(_data_name(data))}"
    )
    size = f"{facts.summary['eval/tokens']:,.0f} supervised tokens" if "eval/tokens" in facts.summary else "no tokens at all"
    if facts.held_out_sequences is not None:
        size += f" of a held-out part of {facts.held_out_sequences:,} sequences"
    yield "## Limits"
    limits = [
        f"The training text was {kind}; nothing is known about the student elsewhere.",
        f"The figures come from {size} of the same source, and from one run with one seed: they have no error bars.",
        "Perplexities compare only between models with the same tokenizer; bits per byte compare across tokenizers.",
        "Facts, instructions, safety and bias were not evaluated. It may repeat what is wrong or harmful in the teacher and in the data.",
    ]
    if facts.config.teacher.kind == "none":
        limits[3] = "Facts, instructions, safety and bias were not evaluated. It may repeat what is wrong or harmful in the data."
    yield "\n".join(f"- {limit}" for limit in limits)


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
