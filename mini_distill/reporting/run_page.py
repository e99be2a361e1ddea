"""The page of one run or evaluation: what was kept, in words, figures, curves and text."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ..compare import has_teacher_signal, objective_text
from ..evaluation.table import percent
from .charts import Chart, Drawing, Series, draw, thinned
from .figures import MODELS, Cell, Figure, Table, count_text, factor, figure, ratio, signed_free, times
from .measured import Measured, finite
from .places import short_path, without_paths
from .settings import shown

FEWEST_POINTS = 2


@dataclass(frozen=True)
class Tile:
    """A headline figure: its name, the figure, and a few words with further ones (texts and figures in turn)."""

    name: str
    figure: Figure
    beside: tuple[str | Figure, ...] = ()


# ------------------------------------------------------------------------------------------------------------------------- headline


def about(found: Measured) -> tuple[str | Figure, ...]:
    """Which models these are, in a sentence: texts and figures in turn."""
    student, teacher = figure(found, "model/student_parameters"), figure(found, "model/teacher_parameters")
    taught = not has_objective(found.config) or has_teacher_signal(found.config["objective"])
    how = "measured beside" if not found.is_training else "taught by" if taught else "trained without its teacher,"
    steps, text = figure(found, "train/steps"), _name_of_data(found.config.get("data") or {})
    return (
        *(("A student of ", student, " parameters") if student else ("A student",)),
        f", {how} {_name_of(found.config.get('teacher') or {})}",
        *((" (", teacher, " parameters)") if teacher else ()),
        *((", ", steps, " steps") if steps else ()),
        f" on {text}" if text else "",
        "" if found.seed is None else f", seed {found.seed}",
        ".",
    )


def _name_of(teacher: dict[str, Any]) -> str:
    name = str(teacher.get("path") or teacher.get("model") or "")
    return PurePath(name).name if name else f"the {teacher.get('kind') or 'unknown'} teacher"


def _name_of_data(data: dict[str, Any]) -> str:
    known = data.get("path") or data.get("name") or ", ".join(map(str, data.get("mixture") or ())) or data.get("source") or ""
    return PurePath(str(known)).name


def tiles(found: Measured) -> list[Tile]:
    """The figures that a reader looks for first, as far as they were measured."""
    figures = {key: figure(found, key) for key in found.summary}
    wanted = [
        ("gap closed", figures.get("control/gap_closed"), ("of the way from the control to the teacher, in loss",)),
        ("perplexity", figures.get("eval/student_perplexity"), _beside(found, "student_perplexity", "eval/teacher_perplexity")),
        ("KL to the teacher", figures.get("eval/forward_kl"), _beside(found, "forward_kl")),
        ("top-1 agreement", figures.get("eval/top1_agreement"), _beside(found, "top1_agreement")),
        ("size", ratio(found, "model/student_parameters", "model/teacher_parameters", percent), _sizes(found)),
        (
            "reading speed",
            ratio(found, "perf/student_tokens_per_second", "perf/teacher_tokens_per_second", times),
            ("the teacher's",),
        ),
    ]
    return [Tile(name, shown, beside) for name, shown, beside in wanted if shown is not None]


def _beside(found: Measured, name: str, teacher: str = "") -> tuple[str | Figure, ...]:
    """The same of control, teacher and the student before training."""
    parts: list[str | Figure] = []
    for word, key in (("control", f"control/{name}"), ("teacher", teacher), ("before", f"before/{name}")):
        if (shown := figure(found, key)) is not None:
            parts += [", " if parts else "", f"{word} ", shown]
    return tuple(parts)


def _sizes(found: Measured) -> tuple[str | Figure, ...]:
    student, teacher = figure(found, "model/student_parameters"), figure(found, "model/teacher_parameters")
    return (student, " of ", teacher, " parameters") if student and teacher else ()


# --------------------------------------------------------------------------------------------------------------------------- curves

NOT_TRAINING_LOSS = (
    (
        "Held-out loss",
        "nats per token",
        (("eval/student_nll", "student"),),
        (("teacher", "eval/teacher_nll"), ("control", "control/student_nll")),
    ),
    ("KL to the teacher", "nats per token", (("eval/forward_kl", "student"),), (("control", "control/forward_kl"),)),
    ("Top-1 agreement", "share of tokens", (("eval/top1_agreement", "student"),), (("control", "control/top1_agreement"),)),
)
TRAINING_LOSS = "Training loss"
CURVES = (*NOT_TRAINING_LOSS, (TRAINING_LOSS, "objective", (("train/loss", "student"),), ()))


def curves(found: Measured) -> list[Drawing]:
    """Losses and agreement against steps, with the levels of teacher and control."""
    drawn = []
    for title, unit, keys, level_keys in CURVES:
        series, sizes = [], set()
        for key, style in keys:
            points, size = thinned(found.curve(key))
            if len(points) >= FEWEST_POINTS:
                series.append(Series(style, points, style))
                sizes.add(size)
        levels = [(name, value, name) for name, key in level_keys if (value := _level(found, key)) is not None]
        if series:
            notes = [f"Each point is the mean of {max(sizes)} logged steps." if max(sizes) > 1 else "", ends_alone(series)]
            notes += ["Dashed lines: final values." if levels else "", _what_is_minimised(found) if title == TRAINING_LOSS else ""]
            text = percent if unit == "share of tokens" else signed_free
            every_key = " ".join(key for key, _ in (*keys, *((key, name) for name, key in level_keys)))
            note = " ".join(filter(None, notes))
            drawn.append(draw(Chart(title, "optimizer step", unit, series, every_key, levels, y_text=text, x_text=count_text, note=note)))
    return drawn


def ends_alone(series: Sequence[Series]) -> str:
    """What a straight line through two measurements is."""
    return "" if any(len(one.points) > FEWEST_POINTS for one in series) else "Measured only at the first and at the last step shown."


def _what_is_minimised(found: Measured) -> str:
    """Of a mixture of losses, that it is one: beside the held-out loss it looks like overfitting."""
    if not has_objective(found.config) or not has_teacher_signal(found.config["objective"]):
        return ""
    return f"The objective, {objective_text(found.config['objective'])}: not on the scale of the held-out loss."


def _level(found: Measured, key: str) -> float | None:
    """The final figure; of a run that is not finished, the last that was logged."""
    logged = found.curve(key)
    return found.value(key) if found.value(key) is not None else (logged[-1][1] if logged else None)


# ---------------------------------------------------------------------------------------------------------------------- other tables

COSTS = (
    ("parameters", "model", "parameters"),
    ("weight files", "model", "file_bytes"),
    ("weights in memory", "model", "weight_bytes"),
    ("operations per token", "model", "flops_per_token"),
    ("tokens read per second", "perf", "tokens_per_second"),
    ("time to the first token", "perf", "time_to_first_token"),
    ("tokens written per second", "perf", "generation_tokens_per_second"),
    ("peak memory", "perf", "peak_memory_bytes"),
    ("cost of a million written tokens", "cost", "per_million_tokens"),
    ("joules per million written tokens (estimate)", "energy", "joules_per_million_tokens_estimate"),
)
BATCHED = "generation_tokens_per_second_batch"
BATCHED_AFTER = 7  # tokens written per second


def efficiency(found: Measured) -> Table | None:
    """What teacher and student cost."""
    batches = sorted({key.rpartition(BATCHED)[2] for key in found.summary if BATCHED in key}, key=lambda text: (len(text), text))
    batched = [(f"tokens written per second, {size} texts at a time", "perf", f"{BATCHED}{size}") for size in batches]
    lines = [*COSTS[:BATCHED_AFTER], *batched, *COSTS[BATCHED_AFTER:]]
    rows: list[list[Cell]] = []
    for label, family, name in lines:
        student, teacher = (f"{family}/{model}_{name}" for model in MODELS)
        if teacher in found.summary or student in found.summary:
            rows.append([label, figure(found, student), figure(found, teacher), ratio(found, student, teacher, factor)])
    return Table("What the models cost", ["", *MODELS, "student ÷ teacher"], rows) if rows else None


WRITTEN = {
    "tokens": "tokens a text",
    "repetition": "repeated 4-grams",
    "distinct_1": "distinct tokens",
    "distinct_2": "distinct token pairs",
}


def held_out(found: Measured) -> str:
    """How much text the figures are over."""
    tokens, there = found.value("eval/tokens"), found.value("data/held_out_supervised_tokens")
    if tokens is None:
        return ""
    of = f" of {there:,.0f}" if there is not None and tokens < there else ""
    return f"Over {tokens:,.0f}{of} held-out tokens, on which nothing was trained."


def drawn_items(found: Measured) -> str:
    """Whether tasks were done in part."""
    evaluation = found.evaluator.get("evaluation") or {}
    limit, harness = evaluation.get("task_limit"), "; of lm-evaluation-harness the first" if evaluation.get("tasks") else ""
    return f"Of each task at most {limit} items were done, drawn with the seed{harness} (evaluation.task_limit)." if limit else ""


def decoding(found: Measured) -> str:
    """How the samples were written."""
    settings = (found.evaluator or found.config).get("evaluation") or {}
    temperature = finite(settings.get("sampling_temperature"))
    if temperature is None:
        return ""
    return (
        f"Sampled at temperature {temperature:g}."
        if temperature
        else "Greedy: at each place the token that the model thinks the likeliest."
    )


def timed_on(found: Measured) -> str:
    """What the times were taken on, and with how many threads where that was settled."""
    trained_with = None if found.evaluator else (found.config.get("trainer") or {}).get("num_threads")
    number = found.evaluator.get("num_threads") or trained_with
    device = found.details.get("device") or "the machine that measured"
    return f"{device} with num_threads = {number}" if number else device


def generations(found: Measured) -> Table | None:
    """Repetition and diversity of what the models write."""
    return _by_model(found, "text", "What the models write", lambda name: WRITTEN.get(name, name.replace("_", " ")))


def _by_model(found: Measured, family: str, caption: str, label: Any) -> Table | None:
    names = dict.fromkeys(key.partition("/")[2].partition("_")[2] for key in found.summary if key.startswith(f"{family}/") and "_" in key)
    rows: list[list[Cell]] = [[label(name), *(figure(found, f"{family}/{model}_{name}") for model in MODELS)] for name in names]
    return Table(caption, ["", *MODELS], rows) if rows else None


def further(found: Measured, shown: set[str]) -> Table | None:
    """Every figure that no other table has."""
    rows: list[list[Cell]] = [
        [key, figure(found, key)] for key in sorted(found.summary) if key not in shown and not isinstance(found.summary[key], str)
    ]
    return Table("All other figures", ["key", "value"], rows) if rows else None


# ------------------------------------------------------------------------------------------------------------- where it all comes from


def provenance(found: Measured) -> list[tuple[str, str]]:
    """(what, text): where teacher, student, data and figures come from, as the folder says it."""
    config = found.config
    lines = [
        ("folder", found.place),
        ("state", _state(found)),
        ("error", without_paths(str(found.status.get("error", "")))),
        ("teacher", _origin(config.get("teacher") or {})),
        ("student", _origin(config.get("student") or {}) or short_path(str(config.get("model") or ""))),
        ("data", _data(config.get("data") or {})),
        ("objective", objective_text(config["objective"]) if has_objective(config) else ""),
        ("seed", "" if found.seed is None else str(found.seed)),
        ("evaluation", without_paths(found.evaluation)),
    ]
    lines += [(key.partition("/")[2] or key, short_path(value)) for key, value in found.summary.items() if isinstance(value, str)]
    return [(name, text) for name, text in lines if text]


def _state(found: Measured) -> str:
    status = found.status
    at, when = f" at step {found.step}" if "step" in status else "", f", {status['updated']}" if "updated" in status else ""
    return f"{found.state}{at}{when}"


def _data(data: dict[str, Any]) -> str:
    held_out = ("eval_path",) if data.get("eval_path") else ("eval_split",) if data.get("eval_split") else ("eval_fraction",)
    of_hub = ("name", "revision", "split") if data.get("source") == "hub" else ()
    return ", ".join(f"{key} {shown(data[key])}" for key in ("source", "path", *of_hub, *held_out, "seq_len") if data.get(key) is not None)


def has_objective(config: dict[str, Any]) -> bool:
    """Whether a configuration says what the loss was, in the terms of this version."""
    return {"kl_weight", "ce_weight", "divergence", "temperature", "terms"} <= set(config.get("objective") or {})


def _origin(model: dict[str, Any]) -> str:
    parts = [shown(model.get(key)) for key in ("kind", "path", "model", "cache_dir") if model.get(key)]
    if model.get("kind") == "from_teacher" and model.get("num_layers"):
        parts.append(f"{model['num_layers']} layers")
    if model.get("revision"):
        parts.append(f"revision {model['revision']}")
    elif model.get("kind") == "hf":
        parts.append("no revision pinned")
    return ", ".join(parts)


def not_measured(found: Measured) -> Iterator[tuple[str, str]]:
    """(what is not known, the command or setting that would tell, or "")."""
    has, place = found.summary.__contains__, shlex.quote(found.place)
    evaluate = f"python -m mini_distill.evaluate model={place}"
    if not found.summary:
        yield "The final figures: they are measured when a run ends.", ""
        return
    if not has("eval/forward_kl"):
        yield "Fidelity: there was no teacher to compare with.", ""
    if has_objective(found.config) and not has_teacher_signal(found.config["objective"]):
        yield "No teacher's signal was in the loss: this run is a control.", ""
    elif found.is_training and not has("control/student_nll"):
        yield "What the teacher was worth: the same student was not trained without it.", "control=true"
    if found.is_training and len(found.curve("eval/student_nll")) < 3:
        yield "How the held-out figures developed: they were measured only before and after training.", "trainer.eval_every=…"
    if not any(key.startswith("task/") for key in found.summary):
        yield "Tasks and bias.", f"{evaluate} 'evaluation.pairs={{…}}'"
    if not has("perf/student_generation_tokens_per_second"):
        yield "Writing speed, latency and memory.", evaluate
    missing = [name for name in ("reliability", "slices", "differences", "samples") if not found.details.get(name)]
    if missing:
        yield f"{', '.join(missing).capitalize()}: not in details.json.", evaluate
    broken = [key for key, value in found.summary.items() if value is None]
    if broken:
        yield f"Not finite, which no model should be: {', '.join(broken)}.", ""
    yield "Spread: one run with one seed has no error bars. Train it with other seeds, then:", f"python -m mini_distill.report {place} …"
