"""The configuration contract: one dataclass tree, filled by Hydra, checked here without importing torch.

`configs/` holds the presets that people combine; this file says what may stand in them. `build_config` turns a composed
configuration into plain dataclasses and reports *every* problem at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError, Problem

TEACHER_KINDS = ("embedded", "hf", "none")
STUDENT_KINDS = ("scratch", "from_teacher", "hf")
DATA_SOURCES = ("python_stdlib", "text", "jsonl", "hub", "mixture")
DTYPES = ("auto", "float32", "bfloat16", "float16")
FINGERPRINTS = ("tokenizer", "global_batch_size")  # compared on resuming besides the settings; resume_allow takes them too


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field of the contract: its default, what it means, and what it may be.

    Limits: `at_least`, `above`, `at_most`, `below` (numbers); `choices` (the allowed values); `importable=True` (besides the
    choices, an import path `package.module.name`).
    """
    metadata = {"help": help, **limits}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TeacherConfig:
    """The model whose distribution the student learns."""

    kind: str = option("embedded", "embedded: the small model shipped in the package; hf: any causal LM that transformers loads; none", choices=TEACHER_KINDS)
    path: str | None = option(None, "Folder or hub id of an hf teacher")
    revision: str | None = option(None, "Commit, tag or branch on the hub; pin it for a run that can be repeated")
    dtype: str = option("auto", "Weights in memory; auto: bfloat16 on an accelerator, float32 on a CPU (bfloat16 halves memory)", choices=DTYPES)
    device: str = option("auto", "auto: beside the student; else a torch device such as cuda:1 or cpu")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, …; null: what transformers picks")
    trust_remote_code: bool = option(False, "Run Python code from the repository; only with a pinned revision you have read")
    gated: bool = option(False, "The hub repository asks for a licence and a token; only makes the error message say so")


@dataclass
class StudentConfig:
    """The mini model that is trained. Sizes left null are the preset's or the teacher's."""

    kind: str = option("from_teacher", "scratch: random weights, Llama architecture, the teacher's tokenizer; from_teacher: its own layers, evenly spaced; hf: student.path", choices=STUDENT_KINDS)
    path: str | None = option(None, "Folder or hub id of an hf student")
    revision: str | None = option(None, "Commit, tag or branch on the hub")
    tokenizer: str | None = option(None, "Folder or hub id of the tokenizer of a student from scratch; null: the teacher's")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, …; null: what transformers picks")
    trust_remote_code: bool = option(False, "Run Python code from the repository; only with a pinned revision you have read")
    num_layers: int | None = option(None, "Transformer blocks; latency grows with them. from_teacher keeps this many of the teacher's", at_least=1)
    hidden_size: int | None = option(None, "Width of the residual stream (scratch)", at_least=1)
    intermediate_size: int | None = option(None, "Width of the feed-forward layer (scratch)", at_least=1)
    num_heads: int | None = option(None, "Attention heads (scratch); divides hidden_size", at_least=1)
    num_kv_heads: int | None = option(None, "Key-value heads (scratch); divides num_heads; fewer make the cache of generation smaller", at_least=1)
    max_positions: int | None = option(None, "Longest sequence in tokens (scratch); null: the teacher's, at least data.seq_len", at_least=1)
    tie_embeddings: bool | None = option(None, "One matrix for input embedding and output head (scratch), which saves vocab × hidden weights; null: yes")
    rope_theta: float | None = option(None, "Base of the rotary positions (scratch), larger for longer contexts; null: 10000", above=0)
    initializer_range: float | None = option(None, "Standard deviation of the random weights (scratch); null: 1/√hidden_size", above=0)
    dropout: float | None = option(None, "Attention dropout (scratch); null: none", at_least=0, below=1)


@dataclass
class DataConfig:
    """Where the text comes from, what of it is supervised, and how it fills the sequences."""

    source: str = option("python_stdlib", "python_stdlib; text: plain files; jsonl: JSONL, JSON, CSV or Parquet files; hub: a data set on the hub; mixture", choices=DATA_SOURCES, importable=True)
    path: str | None = option(None, "File, folder or glob (text, jsonl), or data set id (hub)")
    eval_path: str | None = option(None, "The same, held out for evaluation; null: eval_fraction of path is held out")
    eval_fraction: float = option(0.05, "Share of the rows held out, chosen by a hash of each row", at_least=0, below=1)
    name: str | None = option(None, "Configuration of a hub data set, such as a language")
    revision: str | None = option(None, "Commit, tag or branch of a hub data set")
    split: str = option("train", "Split of a hub data set")
    eval_split: str | None = option(None, "Held-out split of a hub data set; null: eval_fraction of split")
    streaming: bool = option(False, "Read a hub data set over the network, row by row, without storing the raw files")
    max_rows: int | None = option(None, "Use the first rows only; null: all", at_least=1)
    text_column: str | None = option(None, "Column of plain text, all supervised; null: 'text' where no other column is named")
    prompt_column: str | None = option(None, "Column of the prompt, not supervised (with completion_column)")
    completion_column: str | None = option(None, "Column of the completion, supervised, with its end-of-sequence token")
    messages_column: str | None = option(None, "Column of chat messages; assistant turns are supervised")
    tools_column: str | None = option(None, "Column of tool schemas passed to the chat template")
    chat_template: str | None = option(None, "chatml, llama3, gemma, mistral or a .jinja file; null: the tokenizer's own")
    document_separator: str | None = option(None, "Regular expression that separates documents within a text file; null: a file is a document")
    add_bos: bool | None = option(None, "Begin each document with the beginning-of-sequence token; null: if the tokenizer has one apart from EOS")
    seq_len: int = option(256, "Tokens of a training sequence; attention memory grows with it", at_least=2)
    packing: bool = option(True, "Fill sequences with several documents, kept apart in attention and positions; false: one each, padded")
    on_long_row: str = option("auto", "Row longer than seq_len: split into pieces, truncate the end, drop, or error; auto: split text, truncate what has a prompt", choices=("auto", "split", "truncate", "drop", "error"))
    on_bad_row: str = option("error", "Malformed row: stop and name it, or skip and count it", choices=("error", "skip"))
    num_workers: int = option(0, "Processes that prepare batches beside the training process", at_least=0)
    cache_dir: str | None = option(None, "Tokenised data, reused between runs; null: ~/.cache/mini_distill")
    mixture: dict[str, Any] = option({}, "source=mixture: name -> settings of this group, with a weight (share of the sequences)")


@dataclass
class ObjectiveConfig:
    """kl_weight · T² · divergence(student, teacher; T) + ce_weight · CE, summed over supervised tokens, divided once by their number."""

    divergence: str = option("forward_kl", "A function of mini_distill/losses/divergences.py, or an import path", importable=True)
    divergence_options: dict[str, Any] = option({}, "Further arguments of that function, such as jsd_beta")
    temperature: float = option(1.0, "Softens both distributions; 1 for pretraining-like data, 2–4 when data repeats", above=0)
    scale_by_temperature_squared: bool = option(True, "Multiply the divergence by T², so that its gradient keeps its size (Hinton et al. 2015)")
    kl_weight: float = option(0.5, "Weight of the divergence; 0 needs no teacher", at_least=0)
    ce_weight: float = option(0.5, "Weight of the cross-entropy with the data's own next token", at_least=0)


@dataclass
class TrainerConfig:
    """The optimisation and its periods, all in optimizer steps."""

    max_steps: int = option(100, "Optimizer steps", at_least=1)
    micro_batch_size: int = option(16, "Sequences per device and pass; memory grows with it", at_least=1)
    grad_accum_steps: int = option(1, "Passes per optimizer step; a larger batch in the same memory", at_least=1)
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW", above=0)
    schedule: str = option("cosine", "After the warm-up: cosine or linear to min_lr_ratio, wsd (constant, then linear at the end), constant", choices=("cosine", "linear", "wsd", "constant"))
    warmup_steps: int = option(10, "Steps of linear warm-up from 0", at_least=0)
    min_lr_ratio: float = option(0.1, "Final over peak learning rate", at_least=0, at_most=1)
    decay_fraction: float = option(0.2, "Share of the steps that wsd decays over", above=0, at_most=1)
    weight_decay: float = option(0.1, "Of matrices; norms and biases are not decayed", at_least=0)
    beta1: float = option(0.9, "AdamW: memory of the gradient", at_least=0, below=1)
    beta2: float = option(0.95, "AdamW: memory of its square; 0.999 for small batches", at_least=0, below=1)
    max_grad_norm: float | None = option(1.0, "Clip the gradient's norm to this; null: never", above=0)
    precision: str = option("auto", "bf16: autocast with fp32 weights; fp32; auto: bf16 on an accelerator that has it", choices=("auto", "fp32", "bf16"))
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: about a third slower, far less memory")
    compile: bool = option(False, "torch.compile the student: a slow start, then faster steps")
    save_every: int | None = option(50, "Checkpoint period; null: only at the end and when interrupted", at_least=1)
    keep_checkpoints: int = option(2, "Newest checkpoints kept (the best one is kept besides)", at_least=1)
    eval_every: int | None = option(None, "Evaluation period; null: only before and after", at_least=1)
    log_every: int = option(1, "Period of the rows in metrics.jsonl", at_least=1)
    export: str = option("last", "Which weights become student/: the last, or the best by evaluation.best_metric", choices=("last", "best"))
    num_threads: int | None = option(None, "CPU threads of torch; null: torch's choice", at_least=1)


@dataclass
class EvaluationConfig:
    """What is measured over held-out text, at eval_every, before and after."""

    max_batches: int | None = option(20, "Batches of held-out text; null: all of it", at_least=1)
    batch_size: int = option(16, "Sequences per device", at_least=1)
    best_metric: str = option("eval/student_perplexity", "The metric that chooses the best checkpoint")
    best_is: str = option("lowest", "Whether the best is the lowest or the highest", choices=("lowest", "highest"))
    prompts: list[str] = option([], "Prompts of the side-by-side samples; empty: beginnings of held-out rows")
    num_samples: int = option(3, "Side-by-side samples; 0: none", at_least=0)
    sample_tokens: int = option(48, "Tokens generated for a sample", at_least=1)
    sampling_temperature: float = option(0.0, "0: greedy; above: sampled with the run's seed", at_least=0)
    hooks: list[str] = option([], "Import paths of functions hook(context) -> {metric: number}, called at every evaluation")


@dataclass
class TrackingConfig:
    """Where the metrics go besides metrics.jsonl."""

    kind: str = option("none", "none, wandb or tensorboard", choices=("none", "wandb", "tensorboard"))
    project: str = option("mini_distill", "wandb project")
    run_name: str | None = option(None, "Name of the run; null: that of the output folder")
    mode: str = option("online", "wandb: online, or offline (synchronise later)", choices=("online", "offline"))


@dataclass
class Config:
    """Everything `python -m mini_distill.train` can be told."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = option(0, "Decides weights, data order and dropout", at_least=0, below=2**32)
    output_dir: str | None = option(None, "Folder of the run; null: runs/<the overrides>, so that the same command finds its run again")
    resume: str = option("auto", "auto: go on from output_dir's newest good checkpoint; never: start anew, the old run is moved aside; or a checkpoint folder")
    resume_allow: list[str] = option([], "Settings that may differ from the run that is resumed, such as trainer.max_steps")
    debug: bool = option(False, "Show tracebacks of user errors too")


# --------------------------------------------------------------------------------------------- from Hydra's tree to dataclasses


def build_config(composed: Mapping[str, Any] | DictConfig, schema: type = Config) -> Any:
    """The composed configuration as plain dataclasses, every value checked.

    Raises:
        ConfigError: with one `Problem` per unknown key, wrong type, value out of range or impossible combination, all together.
    """
    plain: Any = OmegaConf.to_container(composed, resolve=True) if isinstance(composed, DictConfig) else composed
    tree = OmegaConf.structured(schema)
    problems = list(_merge(tree, plain, schema, prefix=""))
    config: Any = OmegaConf.to_object(tree)
    wrong = {problem.where for problem in problems}
    problems += [problem for problem in _check_ranges(config, prefix="") if problem.where not in wrong]
    if not problems:  # relations between settings mean something only when each setting does
        problems += check_relations(config)
    if problems:
        raise ConfigError.from_problems(problems)
    return config


def known_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every full path of the contract: `trainer.max_steps`, …"""
    keys: list[str] = []
    for f in dataclasses.fields(schema):
        keys.append(prefix + f.name)
        if f.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(f.default_factory):
            keys += known_keys(f.default_factory, prefix + f.name + ".")
    return keys


def did_you_mean(word: str, known: list[str]) -> str:
    """`Did you mean 'x'?`, or the empty string when nothing is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.6) or get_close_matches(
        word.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in known], n=1, cutoff=0.6
    )
    if not near:
        return ""
    full = near[0] if near[0] in known else next(k for k in known if k.endswith("." + near[0]) or k == near[0])
    return f"Did you mean '{full}'?"


def _merge(tree: DictConfig, values: Mapping[str, Any], schema: type, prefix: str) -> Iterator[Problem]:
    """Write `values` into the typed `tree`, leaf by leaf, so that one bad value does not hide the next."""
    by_name = {f.name: f for f in dataclasses.fields(schema)}
    for name, value in values.items():
        where = prefix + str(name)
        if name not in by_name:
            remedy = did_you_mean(where, known_keys()) or f"Known here: {', '.join(by_name)}."
            yield Problem(where, "unknown setting", remedy)
            continue
        nested = by_name[name].default_factory
        if nested is not dataclasses.MISSING and dataclasses.is_dataclass(nested):
            if isinstance(value, Mapping):
                yield from _merge(tree[name], value, nested, where + ".")
            else:
                yield Problem(where, f"got {value!r}, expected a group of settings", f"Set {where}.<name>=… or choose a preset.")
            continue
        try:
            tree[name] = value
        except OmegaConfBaseException:
            yield Problem(where, f"got {value!r}, expected {_type_name(by_name[name].type)}", by_name[name].metadata["help"] + ".")


def _type_name(annotation: Any) -> str:
    words = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "None": "null"}
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if text.startswith("list"):
        return "a list, such as [a,b]"
    if text.startswith("dict"):
        return "a mapping, such as {name: value}"
    return " or ".join(words.get(part.strip(), part.strip()) for part in text.split("|"))


def _check_ranges(config: Any, prefix: str) -> Iterator[Problem]:
    for f in dataclasses.fields(config):
        value, limits, where = getattr(config, f.name), f.metadata, prefix + f.name
        if dataclasses.is_dataclass(value):
            yield from _check_ranges(value, where + ".")
        elif isinstance(value, str) and not value.strip():
            yield Problem(where, "got an empty text", "Give a value, or null for none.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield Problem(where, f"got {value}, expected a finite number")
        elif value is not None:
            yield from _check_limits(where, value, limits)


def _check_limits(where: str, value: Any, limits: Mapping[str, Any]) -> Iterator[Problem]:
    if "choices" in limits and value not in limits["choices"] and not (limits.get("importable") and "." in value):
        remedy = did_you_mean(value, list(limits["choices"]))
        also = " or an import path" if limits.get("importable") else ""
        yield Problem(where, f"got {value!r}, expected one of {', '.join(limits['choices'])}{also}", remedy)
    for name, words, holds in (
        ("at_least", "at least", lambda limit: value >= limit),
        ("above", "above", lambda limit: value > limit),
        ("at_most", "at most", lambda limit: value <= limit),
        ("below", "below", lambda limit: value < limit),
    ):
        if name in limits and not holds(limits[name]):
            yield Problem(where, f"got {value}, expected {words} {limits[name]}")


# -------------------------------------------------------------------------------------------------------- what must fit together


def check_relations(config: Config) -> list[Problem]:
    """Settings that are each possible but not together, and paths that are not there."""
    return [
        *_check_models(config.teacher, config.student),
        *_check_heads(config.student),
        *check_data(config.data, "data"),
        *_check_objective(config.objective, config.teacher),
        *_check_trainer(config),
    ]


def _check_models(teacher: TeacherConfig, student: StudentConfig) -> Iterator[Problem]:
    for where, part in (("teacher", teacher), ("student", student)):
        if part.kind == "hf" and part.path is None:
            yield Problem(f"{where}.path", f"missing, and {where}.kind is hf", "Give a folder or a hub id.")
        elif part.path is not None and part.kind == "hf":
            yield from check_local_path(f"{where}.path", part.path)
        if part.trust_remote_code and part.revision is None and not Path(part.path or "").is_dir():
            yield Problem(f"{where}.trust_remote_code", "true without a pinned revision", f"Set {where}.revision to a commit you have read.")
    if teacher.kind == "none" and student.kind == "from_teacher":
        yield Problem("student.kind", "from_teacher, and there is no teacher", "Choose a teacher, or student=mini_2m.")
    if teacher.kind == "none" and student.kind == "scratch" and student.tokenizer is None:
        yield Problem("student.tokenizer", "missing, and there is no teacher to take one from", "Give the folder or hub id of a tokenizer.")
    if teacher.kind != "none" and student.tokenizer is not None:
        yield Problem("student.tokenizer", "given, and the student uses the teacher's", "Leave it out, or set teacher=none.")


def check_local_path(where: str, path: str) -> Iterator[Problem]:
    """A path that can only be meant locally must exist; `org/name` may be a hub id."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().exists():
        parent = Path(path).expanduser().parent
        found = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
        near = get_close_matches(Path(path).name, found, n=1)
        yield Problem(where, f"no such file or folder (got '{path}')", f"Did you mean '{parent / near[0]}'?" if near else "")


def _check_heads(student: StudentConfig) -> Iterator[Problem]:
    if student.kind != "scratch":
        own = [f.name for f in dataclasses.fields(student) if "(scratch)" in f.metadata["help"]]
        given = [name for name in own if getattr(student, name) is not None]
        if student.kind == "hf" and student.num_layers is not None:
            given.append("num_layers")
        for name in given:
            yield Problem(f"student.{name}", f"given, and a student of kind {student.kind} is shaped elsewhere", "Choose student=mini_2m or another scratch preset.")
        return
    for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size"):
        if getattr(student, name) is None:
            yield Problem(f"student.{name}", "missing for a student from scratch", "Choose a preset such as student=mini_2m, or give it.")
    hidden, heads, kv_heads = student.hidden_size, student.num_heads, student.num_kv_heads
    if hidden and heads and hidden % (2 * heads):
        yield Problem("student.hidden_size", f"got {hidden}, expected an even multiple of student.num_heads={heads}", "Rotary positions need heads of even width.")
    if heads and kv_heads and heads % kv_heads:
        yield Problem("student.num_kv_heads", f"got {kv_heads}, expected a divisor of student.num_heads={heads}")


def check_data(data: DataConfig, where: str) -> Iterator[Problem]:
    """The data group alone; `where` is its path, so that parts of a mixture are named."""
    if data.source == "mixture":
        yield from _check_mixture(data, where)
        return
    if data.mixture:
        yield Problem(f"{where}.mixture", f"given, and {where}.source is {data.source}", "Choose data=mixture.")
    if data.source in ("text", "jsonl", "hub") and data.path is None:
        what = "a data set id" if data.source == "hub" else "a file, folder or glob"
        yield Problem(f"{where}.path", f"missing for source {data.source}", f"Give {what}.")
    if data.source in ("text", "jsonl"):
        for name in ("path", "eval_path"):
            path = getattr(data, name)
            if path is not None and not any(c in path for c in "*?["):
                yield from check_local_path(f"{where}.{name}", path if "/" in path else "./" + path)
    if (data.prompt_column is None) != (data.completion_column is None):
        missing = "completion_column" if data.completion_column is None else "prompt_column"
        yield Problem(f"{where}.{missing}", "missing: prompt and completion go together", "Name both columns.")
    kinds = [name for name in ("text_column", "prompt_column", "messages_column") if getattr(data, name) is not None]
    if len(kinds) > 1:
        yield Problem(f"{where}.{kinds[1]}", f"given together with {where}.{kinds[0]}", "A row is text, or prompt and completion, or messages: name one.")
    if data.tools_column and not data.messages_column:
        yield Problem(f"{where}.tools_column", f"given without {where}.messages_column", "Tools belong to chat messages.")
    if data.eval_path and data.eval_split:
        yield Problem(f"{where}.eval_split", f"given together with {where}.eval_path", "Name one held-out source.")
    if data.streaming and data.source != "hub":
        yield Problem(f"{where}.streaming", f"true, and {where}.source is {data.source}", "Only hub data sets stream.")


def mixture_parts(data: DataConfig) -> dict[str, tuple[DataConfig, float]]:
    """The parts of a mixture: name -> (its own complete settings, its weight).

    A part takes seq_len, packing, chat_template and the other settings of form from the mixture unless it names its own.
    """
    shared = {name: getattr(data, name) for name in ("chat_template", "add_bos", "seq_len", "packing", "on_long_row", "on_bad_row", "eval_fraction", "cache_dir", "num_workers")}
    parts = {}
    for name, values in data.mixture.items():
        values = dict(values)
        weight = values.pop("weight", 1.0)
        parts[name] = (DataConfig(**{**shared, **values}), weight)
    return parts


def _check_mixture(data: DataConfig, where: str) -> Iterator[Problem]:
    if not data.mixture:
        yield Problem(f"{where}.mixture", "empty for source mixture", "Give name: {source: …, weight: …} for each part.")
    fixed = ("seq_len", "packing", "cache_dir", "num_workers", "mixture")
    for name, values in data.mixture.items():
        part_path = f"{where}.mixture.{name}"
        if not isinstance(values, Mapping):
            yield Problem(part_path, f"got {values!r}, expected a mapping", "Give {source: …, weight: …}.")
            continue
        weight = values.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight <= 0:
            yield Problem(f"{part_path}.weight", f"got {weight!r}, expected a number above 0")
            continue
        for key in fixed:
            if key in values:
                yield Problem(f"{part_path}.{key}", "is a setting of the whole mixture", f"Set {where}.{key}.")
        if values.get("source") == "mixture":
            yield Problem(f"{part_path}.source", "a mixture within a mixture", "List all parts on one level.")
            continue
        try:
            part = build_config({"data": {k: v for k, v in values.items() if k not in ("weight", *fixed)}}, _DataOnly).data
        except ConfigError as error:
            yield from (Problem(part_path + p.where.removeprefix("data"), p.what, p.remedy) for p in error.problems)
        else:
            yield from check_data(part, part_path)


@dataclass
class _DataOnly:
    data: DataConfig = field(default_factory=DataConfig)


def _check_objective(objective: ObjectiveConfig, teacher: TeacherConfig) -> Iterator[Problem]:
    from .losses.catalogue import divergence_parameters

    if objective.kl_weight == 0 and objective.ce_weight == 0:
        yield Problem("objective.kl_weight", "0, and objective.ce_weight is 0 too: nothing would be learnt", "Give one of them a weight.")
    if objective.kl_weight > 0 and teacher.kind == "none":
        yield Problem("objective.kl_weight", f"got {objective.kl_weight}, and there is no teacher", "Choose a teacher, or objective=ce.")
    known = divergence_parameters()
    if "." in objective.divergence:
        return  # the user's own function: checked when it is imported
    if objective.divergence not in known:
        remedy = did_you_mean(objective.divergence, list(known)) or f"Known: {', '.join(known)}."
        yield Problem("objective.divergence", f"no divergence called '{objective.divergence}'", remedy)
        return
    for name in objective.divergence_options:
        if name not in known[objective.divergence]:
            takes = ", ".join(known[objective.divergence]) or "no options"
            yield Problem(f"objective.divergence_options.{name}", f"{objective.divergence} takes {takes}", did_you_mean(name, list(known[objective.divergence])))


def _check_trainer(config: Config) -> Iterator[Problem]:
    trainer = config.trainer
    if trainer.warmup_steps >= trainer.max_steps:
        yield Problem("trainer.warmup_steps", f"got {trainer.warmup_steps}, expected less than trainer.max_steps={trainer.max_steps}")
    flash = [w for w, part in (("teacher", config.teacher), ("student", config.student)) if (part.attn_implementation or "").startswith("flash")]
    if flash and trainer.micro_batch_size > 1:
        yield Problem(f"{flash[0]}.attn_implementation", "flash attention keeps packed documents apart only with trainer.micro_batch_size=1", "Use sdpa, or micro_batch_size=1 with more grad_accum_steps.")
    if config.resume not in ("auto", "never") and not Path(config.resume).expanduser().exists():
        yield Problem("resume", f"got '{config.resume}', expected auto, never or a checkpoint folder")
    keys = [*known_keys(), *FINGERPRINTS]
    for key in config.resume_allow:
        if key not in keys:
            yield Problem("resume_allow", f"unknown setting '{key}'", did_you_mean(key, keys))
