"""The configuration contract: one dataclass tree, filled by Hydra, checked here without importing torch.

`configs/` holds the presets that people combine; this file says what may stand in them. `build_config` turns a composed
configuration into plain dataclasses and reports *every* problem at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from .errors import ConfigError, Problem

TEACHER_KINDS = ("embedded", "hf", "server", "cached", "none")
STUDENT_KINDS = ("scratch", "from_teacher", "hf")
DATA_SOURCES = ("python_stdlib", "text", "jsonl", "hub", "mixture")
CACHE_KINDS = ("sampled", "topk", "full", "hidden")
DTYPES = ("auto", "float32", "bfloat16", "float16")
UNKNOWN = "unknown setting"
EVALUATION_METRICS = (
    *(f"eval/{model}_{what}" for model in ("student", "teacher") for what in ("perplexity", "nll", "bits_per_byte", "ece")),
    "eval/forward_kl",
    "eval/reverse_kl",
    "eval/top1_agreement",
    "eval/tokens",
)
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


# fmt: off
@dataclass
class TeacherConfig:
    """The model whose distribution the student learns."""

    kind: str = option("embedded", "embedded: the small model shipped in the package; hf: any causal LM that transformers loads; server: a vLLM server; cached: nothing but cache_dir; none", choices=TEACHER_KINDS)
    path: str | None = option(None, "Folder or hub id of an hf teacher; of a server teacher, that of its tokenizer")
    revision: str | None = option(None, "Commit, tag or branch on the hub; pin it for a run that can be repeated")
    dtype: str = option("auto", "Weights in memory; auto: bfloat16 on an accelerator, float32 on a CPU (bfloat16 halves memory)", choices=DTYPES)
    device: str = option("auto", "auto: beside the student; else a torch device such as cuda:1 or cpu")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, …; null: what transformers picks")
    trust_remote_code: bool = option(False, "Run Python code from the repository; only with a pinned revision you have read")
    cache_dir: str | None = option(None, "Train on the targets of this cache (python -m mini_distill.cache); a live teacher beside it only evaluates and initialises")
    gated: bool = option(False, "The hub repository asks for a licence and a token; only makes the error message say so")
    url: str | None = option(None, "server: its address, such as http://host:8000; a key it wants is read from MINI_DISTILL_API_KEY alone")
    model: str | None = option(None, "server: name of the model there; null: the only one")
    top_k: int = option(20, "server: most likely tokens asked for at each position; more than 20 need vllm serve --max-logprobs", at_least=1)
    num_requests: int = option(8, "server: requests at a time, of each process", at_least=1, at_most=1024)
    timeout: float = option(120.0, "server: seconds to wait for an answer", above=0)


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
    add_bos: bool | None = option(None, "Begin each document with the beginning-of-sequence token; null: if the tokenizer has one apart from EOS, and in a chat as the template says")
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
    terms: dict[str, Any] = option({}, "Further terms: name -> {weight, kind, …}, see TermConfig; the kind is the name unless given")
    schedules: dict[str, Any] = option({}, "Term's name, or ce -> {step: factor on its weight}, linear between the steps given, constant outside")
    logits_memory_mib: float | None = option(None, "Budget for the logits that exist at once, student's and teacher's; null: 128 on a CPU, 1024 on a GPU. Changes no result", above=0)


@dataclass
class TermConfig:
    """A further term of the objective: another divergence, or the matching of inner states of student and teacher."""

    kind: str | None = option(None, "A divergence, or hidden_mse, hidden_cosine, relation_kl, attention_mse, attention_kl; null: the term's name")
    weight: float = option(1.0, "Plain multiplier of the sum over supervised tokens", at_least=0)
    options: dict[str, Any] = option({}, "Further arguments of its function, such as skew, or normalise")
    temperature: float | None = option(None, "Of a divergence; null: objective.temperature", above=0)
    layers: str | None = option(None, "Matching: uniform (spread over the teacher's blocks) or last; null: last", choices=("uniform", "last"))
    layer_map: dict[Any, Any] = option({}, "Matching: student block -> teacher block, counted from 0, negative from the end; instead of layers")


@dataclass
class TrainerConfig:
    """The optimisation and its periods, all in optimizer steps."""

    max_steps: int = option(100, "Optimizer steps", at_least=1)
    micro_batch_size: int = option(16, "Sequences per device and pass; memory grows with it", at_least=1)
    grad_accum_steps: int = option(1, "Passes per optimizer step; a larger batch in the same memory", at_least=1)
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW", above=0)
    schedule: str = option("cosine", "After the warm-up: cosine or linear to min_lr_ratio, wsd (constant, then linear at the end), constant", choices=("cosine", "linear", "wsd", "constant"))
    warmup_steps: int | None = option(None, "Steps of linear warm-up from 0; null: a tenth of max_steps, at most 500", at_least=0)
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
class CacheConfig:
    """A teacher's targets, written down once (`python -m mini_distill.cache`)."""

    dir: str | None = option(None, "Folder of the cache")
    kind: str = option("sampled", "sampled: a few tokens that stand for all, unbiased; topk: the most likely, and the mass of the rest; full: all, in bfloat16; hidden: the input of the head, exact", choices=CACHE_KINDS)
    k: int = option(32, "sampled: one over the probability from which a token is always kept, or the number of draws; topk: tokens kept", at_least=1, at_most=255)
    sampling: str = option("threshold", "sampled: threshold (likely tokens exactly, the rest systematically), or draws (independent, with replacement)", choices=("threshold", "draws"))
    proposal: float = option(1.0, "sampling=draws: draw from p^proposal, and correct by importance weights", above=0)
    tail: str = option("bucket", "topk: the tokens not kept are one outcome (bucket), or share their mass evenly (spread)", choices=("bucket", "spread"))
    temperature: float = option(1.0, "The temperature at which the targets are written; training has to use the same (any, for hidden)", above=0)
    batch_size: int = option(16, "Sequences that the teacher scores at a time; changes no target but by rounding", at_least=1)
    shard_sequences: int | None = option(None, "Sequences of a shard: what is made again when it is damaged or interrupted; null: about 64 MB", at_least=1)
    seed: int = option(0, "Decides what is drawn", at_least=0, below=2**32)
    num_verify: int = option(32, "cache verify: sequences scored again", at_least=1)


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


@dataclass
class CacheCommand:
    """Everything `python -m mini_distill.cache` can be told."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    precision: str = option("auto", "Of the teacher's forward pass. bf16: autocast; fp32; auto: bf16 on an accelerator that has it", choices=("auto", "fp32", "bf16"))
    num_threads: int | None = option(None, "CPU threads of torch; null: torch's choice", at_least=1)
    debug: bool = option(False, "Show tracebacks of user errors too")
# fmt: on


# --------------------------------------------------------------------------------------------- from Hydra's tree to dataclasses


def build_config(composed: Mapping[str, Any] | DictConfig, schema: type = Config) -> Any:
    """The composed configuration as plain dataclasses, every value checked.

    Raises:
        ConfigError: with one `Problem` per unknown key, wrong type, value out of range or impossible combination, all together.
    """
    from .relations import check_cache_command, check_relations

    plain: Any = _resolved(composed) if isinstance(composed, DictConfig) else composed
    tree = deepcopy(_typed_tree(schema))
    problems = list(_merge(tree, plain, schema, prefix=""))
    config: Any = _resolved(tree)
    wrong = {problem.where for problem in problems}
    problems += [problem for problem in _check_ranges(config, prefix="") if problem.where not in wrong]
    if schema in (Config, CacheCommand) and all(problem.what == UNKNOWN for problem in problems):  # relations need good values
        problems += check_relations(config) if schema is Config else check_cache_command(config)
    if problems:
        raise ConfigError.from_problems(problems)
    return config


@cache
def _typed_tree(schema: type) -> DictConfig:
    """Made once: it takes OmegaConf longer than all the rest."""
    return OmegaConf.structured(schema)


def _resolved(tree: DictConfig) -> Any:
    """`tree` as plain objects, its `${…}` followed."""
    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        what = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).split("\n")[0]).strip('"')
        missing = isinstance(error, MissingMandatoryValue)
        remedy = "Give a value in place of '???'." if missing else "${…} takes the full path of another setting, or oc.env:NAME."
        raise ConfigError(error.full_key or "configuration", "missing" if missing else what, remedy) from error


def known_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every full path of the contract: `trainer.max_steps`, …"""
    keys: list[str] = []
    for f in dataclasses.fields(schema):
        keys.append(prefix + f.name)
        if f.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(f.default_factory):
            keys += known_keys(f.default_factory, prefix + f.name + ".")
    return keys


def did_you_mean(word: str, known: list[str]) -> str:
    """`Did you mean 'x'?`, or the empty string when nothing is near. Siblings come first, then the same name elsewhere."""
    if len(word) > 100:
        return ""
    group, _, name = word.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == group]
    by_path = {key: key for key in known}
    for wanted, keys, cutoff in ((name, _by_name(siblings), 0.7), (name, _by_name(known), 0.7), (word, by_path, 0.85)):
        if near := get_close_matches(wanted, list(keys), n=1, cutoff=cutoff):
            return f"Did you mean '{keys[near[0]]}'?"
    return ""


def _by_name(keys: list[str]) -> dict[str, str]:
    return {key.rpartition(".")[2]: key for key in reversed(keys)}


def _merge(tree: DictConfig, values: Mapping[str, Any], schema: type, prefix: str) -> Iterator[Problem]:
    """Write `values` into the typed `tree`, leaf by leaf, so that one bad value does not hide the next."""
    by_name = {f.name: f for f in dataclasses.fields(schema)}
    for name, value in values.items():
        where = prefix + str(name)
        if name not in by_name:
            yield Problem(where, UNKNOWN, _unknown_remedy(where, value, list(by_name)))
            continue
        nested = by_name[name].default_factory
        if nested is dataclasses.MISSING or not dataclasses.is_dataclass(nested):
            yield from _write(tree, by_name[name], value, where)
        elif isinstance(value, Mapping):
            yield from _merge(tree[name], value, nested, where + ".")
        else:
            yield Problem(where, f"got {shown(value)}, expected a group of settings", f"Set {where}.<name>=… or choose a preset.")


def _write(tree: DictConfig, setting: dataclasses.Field[Any], value: Any, where: str) -> Iterator[Problem]:
    expected, remedy = _type_name(setting.type), setting.metadata["help"] + "."
    if value == "???":  # OmegaConf's sign for what someone has to give
        yield Problem(where, f"missing, expected {expected}", remedy)
    elif _was_text(value, setting.type):
        yield Problem(where, f"got {shown(value)}, expected {expected}", f"Quote a text that reads as something else: '{where}=\"…\"'.")
    else:
        try:
            tree[setting.name] = value
        except OmegaConfBaseException:
            yield Problem(where, f"got {shown(value)}, expected {expected}", remedy)


def _unknown_remedy(where: str, value: Any, known_here: list[str]) -> str:
    if near := did_you_mean(where, known_keys()):
        return near
    if isinstance(value, Mapping) and "." not in where:
        return "A preset of your own that sets several groups begins with the line '# @package _global_'."
    return f"Known here: {', '.join(known_here)}."


def _was_text(value: Any, annotation: Any) -> bool:
    """Whether a text was meant and something else was read: the commit 5e12 is a number to YAML and to Hydra, and `on` is true."""
    return isinstance(value, bool | float) and "str" in _parts(annotation)


def shown(value: Any) -> str:
    """As the user would have written it, shortened to fit in a line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]}…{text[-20:]}"


def _parts(annotation: Any) -> list[str]:
    """`int | None` -> ["int", "None"]. Annotations are texts here: `from __future__ import annotations`."""
    return [part.strip() for part in str(annotation).split("|")]


def _type_name(annotation: Any) -> str:
    words = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "None": "null"}
    words |= {"list[str]": "a list of texts, such as [a,b]", "dict[str, Any]": "a mapping, such as {name: value}"}
    words |= {"dict[Any, Any]": "a mapping, such as {0: 3}"}
    return " or ".join(words[part] for part in _parts(annotation))


def _check_ranges(config: Any, prefix: str) -> Iterator[Problem]:
    for f in dataclasses.fields(config):
        value, limits, where = getattr(config, f.name), f.metadata, prefix + f.name
        if dataclasses.is_dataclass(value):
            yield from _check_ranges(value, where + ".")
        elif any(isinstance(text, str) and not text.strip() for text in (value if isinstance(value, list) else [value])):
            yield Problem(where, "got an empty text", "Give a value, or null for none." if "None" in _parts(f.type) else "")
        elif isinstance(value, str) and "\0" in value:
            yield Problem(where, "got a text with a NUL character")
        elif isinstance(value, float) and not math.isfinite(value):
            yield Problem(where, f"got {value}, expected a finite number")
        elif isinstance(value, int) and abs(value) >= 2**63:
            yield Problem(where, f"got {value}, expected a number of at most 64 bits")
        elif value is not None:
            yield from _check_limits(where, value, limits)


def _check_limits(where: str, value: Any, limits: Mapping[str, Any]) -> Iterator[Problem]:
    if limits.get("importable") and "." in value:
        if not all(part.isidentifier() for part in value.split(".")):
            yield Problem(where, f"got {shown(value)}, expected an import path such as my_package.my_module.name")
    elif "choices" in limits and value not in limits["choices"]:
        also = " or an import path" if limits.get("importable") else ""
        yield Problem(
            where, f"got {shown(value)}, expected one of {', '.join(limits['choices'])}{also}", did_you_mean(value, list(limits["choices"]))
        )
    for name, words, holds in (
        ("at_least", "at least", lambda limit: value >= limit),
        ("above", "above", lambda limit: value > limit),
        ("at_most", "at most", lambda limit: value <= limit),
        ("below", "below", lambda limit: value < limit),
    ):
        if name in limits and not holds(limits[name]):
            yield Problem(where, f"got {value}, expected {words} {limits[name]}")


# -------------------------------------------------------------------------------------------- groups within a mapping of names


SETTINGS_OF_FORM = (
    "chat_template",
    "add_bos",
    "seq_len",
    "packing",
    "on_long_row",
    "on_bad_row",
    "eval_fraction",
    "cache_dir",
    "num_workers",
)


@dataclass
class TermOnly:
    """A term by itself."""

    term: TermConfig = field(default_factory=TermConfig)


def objective_terms(objective: ObjectiveConfig) -> dict[str, TermConfig]:
    """The further terms of an objective, each complete.

    Raises:
        ConfigError: with every problem in any of them.
    """
    terms, problems = {}, []
    for name, values in objective.terms.items():
        where = f"objective.terms.{name}"
        if not isinstance(values, Mapping):
            problems.append(Problem(where, f"got {shown(values)}, expected a mapping", "Give {weight: …, kind: …}."))
            continue
        try:
            term: TermConfig = build_config({"term": values}, TermOnly).term
        except ConfigError as error:
            problems += [
                Problem(where + p.where.removeprefix("term"), p.what, p.remedy.replace("'term.", f"'{where}.")) for p in error.problems
            ]
            continue
        terms[name] = dataclasses.replace(term, kind=term.kind or name, temperature=term.temperature or objective.temperature)
    if problems:
        raise ConfigError.from_problems(problems)
    return terms


@dataclass
class DataOnly:
    """A data group by itself, as the parts of a mixture are."""

    data: DataConfig = field(default_factory=DataConfig)


def mixture_parts(data: DataConfig) -> dict[str, tuple[DataConfig, float]]:
    """The parts of a mixture: name -> (its own complete settings, its weight).

    A part takes seq_len, packing, chat_template and the other settings of form from the mixture unless it names its own.
    """
    shared = {name: getattr(data, name) for name in SETTINGS_OF_FORM}
    parts = {}
    for name, values in data.mixture.items():
        own = {key: value for key, value in values.items() if key != "weight"}
        parts[name] = (build_config({"data": {**shared, **own}}, DataOnly).data, float(values.get("weight", 1.0)))
    return parts
