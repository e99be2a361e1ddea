"""The settings: one dataclass tree a verb, filled by Hydra from `configs/` and the command line, checked by `contract.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TEACHER_KINDS = ("embedded", "hf", "server", "cached", "none")
STUDENT_KINDS = ("scratch", "from_teacher", "hf")
DATA_SOURCES = ("python_stdlib", "text", "jsonl", "hub", "mixture")
CACHE_KINDS = ("sampled", "topk", "full", "hidden")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EVALUATION_METRICS = (
    *(f"eval/{model}_{what}" for model in ("student", "teacher") for what in ("perplexity", "nll", "bits_per_byte", "ece")),
    "eval/forward_kl",
    "eval/reverse_kl",
    "eval/top1_agreement",
    "eval/tokens",
)
FINGERPRINTS = ("tokenizer", "world_size", "global_batch_size", "code", "metrics")
"""Compared on resuming besides the settings; resume_allow takes them too."""


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
    cache_kind: str | None = option(None, "Write the targets down first, as a cache of this kind, and train on them: in cache_dir, or in ~/.cache/mini_distill, where all runs with this teacher and data find them", choices=CACHE_KINDS)
    cache_k: int | None = option(None, "cache_kind sampled or topk: what cache.k is to the cache command; null: as there", at_least=1, at_most=255)
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
    eval_path: str | None = option(None, "The same, held out for evaluation (evaluate needs no path beside it); null: eval_fraction of path is held out")
    eval_fraction: float = option(0.05, "Share of the rows held out, chosen by a hash of each row; 1, in evaluate: all of them are measured", at_least=0, at_most=1)
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
    compile: bool | None = option(None, "Compile the terms (torch.compile): one kernel in place of a dozen passes over the logits. null: with trainer.compile, and on a GPU with Triton, unless a function of your own is among them. What cannot be compiled runs as it is, and says so")
    logits_memory_mib: float | None = option(None, "Budget for the logits that exist at once, student's and teacher's; what terms make of them on top is at most 1 MiB a tensor on a CPU, 128 on a GPU. null: 256 on a CPU, 1024 on a GPU. Changes results by rounding only; teacher_sample_ce draws otherwise", above=0)


@dataclass
class TermConfig:
    """A further term of the objective: another divergence, or the matching of inner states of student and teacher."""

    kind: str | None = option(None, "A divergence, or hidden_mse, hidden_cosine, relation_kl, attention_mse, attention_kl, or an import path; null: the term's name", importable=True)
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
    stuck_after: float | None = option(1800.0, "Several processes: seconds that one may stand still at one place, without computing, while the others wait for it; then all end. null: for ever", above=0)


@dataclass
class CacheConfig:
    """A teacher's targets, written down once (`python -m mini_distill.cache`)."""

    dir: str | None = option(None, "Folder of the cache")
    kind: str = option("sampled", "sampled: a few tokens that stand for all, unbiased; topk: the most likely, and the mass of the rest; full: all, in bfloat16; hidden: the input of the head, exact", choices=CACHE_KINDS)
    k: int = option(32, "sampled: one over the probability from which a token is always kept, or the number of draws; topk: tokens kept", at_least=1, at_most=255)
    sampling: str = option("threshold", "sampled: threshold (likely tokens exactly, the rest systematically), or draws (independent, with replacement)", choices=("threshold", "draws"))
    proposal: float = option(1.0, "sampling=draws: draw from p^proposal, and correct by importance weights, which stay bounded up to 1", above=0, at_most=1)
    tail: str = option("bucket", "topk: the tokens not kept are one outcome (bucket), or share their mass evenly (spread)", choices=("bucket", "spread"))
    temperature: float = option(1.0, "The temperature at which the targets are written; training has to use the same (any, for full and hidden)", above=0)
    batch_size: int = option(16, "Sequences that the teacher scores at a time; changes no target but by rounding", at_least=1)
    shard_sequences: int | None = option(None, "Sequences of a shard: what is made again when it is damaged or interrupted; null: about 64 MB", at_least=1)
    seed: int = option(0, "Decides what is drawn", at_least=0, below=2**32)
    num_verify: int = option(32, "cache verify: sequences of each side scored again", at_least=1)


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
    hooks: list[str] = option([], "Import paths of functions hook(context) -> {metric: number}, called at every evaluation", importable=True)


@dataclass
class FullEvaluationConfig:
    """What `python -m mini_distill.evaluate` measures."""

    max_batches: int | None = option(None, "Batches of held-out text; null: all of it", at_least=1)
    batch_size: int = option(16, "Sequences read at a time", at_least=1)
    top_k: int = option(5, "Size of the sets of most likely tokens whose overlap is measured", at_least=2)
    group_by: str | None = option(None, "Column of the rows whose values the figures are split by too, such as a language or a domain")
    num_differences: int = option(8, "Texts kept where the student is furthest from the teacher, token by token", at_least=0)
    prompts: list[str] = option([], "Prompts of the generations; empty: beginnings of held-out rows")
    num_samples: int = option(16, "Generations whose repetition and diversity are measured; the first are shown; 0: none", at_least=0)
    sample_tokens: int = option(48, "Tokens of a generation", at_least=1)
    sampling_temperature: float = option(0.0, "0: greedy; above: sampled with the seed", at_least=0)
    pairs: dict[str, Any] = option({}, "Minimal pairs by likelihood: name -> {path, …} (JSONL or CSV), see PairsConfig; BLiMP and CrowS-Pairs as they come")
    choices: dict[str, Any] = option({}, "Multiple choice by likelihood: name -> {path, …} (JSONL or CSV), see ChoicesConfig")
    tasks: list[str] = option([], "Tasks of lm-evaluation-harness, by name or YAML file; needs the extra mini_distill[eval]")
    task_limit: int | None = option(None, "Items used of each task, pairs or choices, drawn with the seed over all files (of a task of the harness the first); null: all", at_least=1)
    speed: bool = option(True, "Time reading and writing, teacher and student in turn, with their peak memory")
    prompt_tokens: int = option(128, "Tokens of the prompt that is read when timing", at_least=1)
    generation_tokens: int = option(32, "Tokens written when timing", at_least=2)
    generation_batch_size: int = option(8, "Texts written at a time when timing, besides one alone", at_least=1)
    price_per_hour: float | None = option(None, "What this machine costs an hour, in any currency: gives the cost of a million tokens", above=0)
    watts: float | None = option(None, "What this machine draws while it works: gives an estimate of the energy of a million tokens", above=0)
    hooks: list[str] = option([], "Import paths of functions hook(context) -> {metric: number}", importable=True)


@dataclass
class PairsConfig:
    """Sentences of which one should be likelier than the other. Columns left null are found by the names that BLiMP and CrowS-Pairs use."""

    path: str | None = option(None, "File, folder or glob of JSONL, JSON, CSV or Parquet")
    better_column: str | None = option(None, "The sentence that should be likelier; null: sentence_good, or sent_more of CrowS-Pairs")
    worse_column: str | None = option(None, "The other one; null: sentence_bad, or sent_less")
    group_column: str | None = option(None, "Figures are given for each value of it too; null: UID, or bias_type; a file's name without either")
    prefix: str | None = option(None, "What stands before a sentence; null: a blank, as lm-evaluation-harness has it for BLiMP, and nothing before CrowS-Pairs")
    kind: str | None = option(None, "accuracy: share of pairs with the better one likelier; stereotype: the same share, of which half is no bias; null: stereotype for CrowS-Pairs", choices=("accuracy", "stereotype"))


@dataclass
class ChoicesConfig:
    """Questions with several answers, of which the likeliest is taken."""

    path: str | None = option(None, "File, folder or glob of JSONL, JSON, CSV or Parquet")
    question_column: str = option("question", "What is read before the answer")
    choices_column: str = option("choices", "The answers, a list of texts")
    answer_column: str = option("answer", "The right one: its index from 0, its letter from A, or its text")
    group_column: str | None = option(None, "Figures are given for each value of it too")
    normalise: str = option("characters", "Divide the log-likelihood of an answer by its characters (as acc_norm of lm-evaluation-harness) or by nothing (acc)", choices=("characters", "none"))


@dataclass
class GenerateConfig:
    """How a model goes on from the prompts of the data (`python -m mini_distill.generate`)."""

    max_new_tokens: int = option(256, "Tokens of a completion at most", at_least=1)
    prompt_tokens: int = option(32, "Of plain text, this many first tokens are the prompt; 0: the beginning-of-sequence token alone", at_least=0)
    num_beams: int = option(1, "Of beam search, which looks for the likeliest completion; 1: the likeliest token each time (greedy)", at_least=1)
    sampling_temperature: float = option(0.0, "0: greedy, or beams; above: sampled with the seed", at_least=0)
    top_p: float = option(1.0, "Sampled: from the likeliest tokens that together have this probability; 1: from all", above=0, at_most=1)
    num_samples: int = option(1, "Sampled: completions of each prompt", at_least=1)
    on_unfinished: str = option("auto", "Completion cut off at max_new_tokens: keep or drop it; auto: keep of texts, drop of what has a prompt, since half an answer teaches to stop in its middle", choices=("auto", "keep", "drop"))
    batch_size: int = option(16, "Completions written at a time, of like length; changes them by rounding only", at_least=1)


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
    control: bool = option(False, "Then train the same student again without the teacher (same weights, order, steps, rates), and say how much of the gap was closed")
    resume: str = option("auto", "auto: go on from output_dir's newest good checkpoint; never: start anew, the old run is moved aside; or a checkpoint folder")
    resume_allow: list[str] = option([], "Settings that may differ from the run that is resumed, such as trainer.max_steps")
    debug: bool = option(False, "Show tracebacks of user errors too")


@dataclass
class PlanConfig:
    """What `python -m mini_distill.plan` reckons with. Left null, it is that of this machine."""

    device: str = option("auto", "What the run is on: auto: what is here; cpu; cuda: a GPU, whose memory and rates have to be given where none is here", choices=("auto", "cpu", "cuda"))
    num_devices: int = option(1, "Devices, each with a copy of the student (torchrun)", at_least=1)
    memory_gib: float | None = option(None, "Memory of a device, in GiB; null: what is free here now", above=0)
    matmul_tflops: float | None = option(None, "Rate of matrix products of a device, in 10^12 operations a second; null: the step's operations are timed here", above=0)
    memory_gb_per_second: float | None = option(None, "Rate at which a device reads and writes its memory, in 10^9 bytes a second; with matmul_tflops", above=0)


@dataclass
class PlanCommand(Config):
    """Everything `python -m mini_distill.plan` can be told: the settings of a training, and what to reckon with."""

    plan: PlanConfig = field(default_factory=PlanConfig)


@dataclass
class CacheCommand:
    """Everything `python -m mini_distill.cache` can be told."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    precision: str = option("auto", "Of the teacher's forward pass. bf16: autocast; fp32; auto: bf16 on an accelerator that has it", choices=("auto", "fp32", "bf16"))
    num_threads: int | None = option(None, "CPU threads of torch; null: torch's choice", at_least=1)
    debug: bool = option(False, "Show tracebacks of user errors too")


@dataclass
class CacheLookCommand(CacheCommand):
    """Everything `python -m mini_distill.cache verify` and `… info` can be told; what is not said of the targets is as the cache has it."""


@dataclass
class EvaluateCommand:
    """Everything `python -m mini_distill.evaluate` can be told."""

    model: str | None = option(None, "The model: a folder or hub id; or the folder of a run, whose student, teacher and data are taken where not given")
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: FullEvaluationConfig = field(default_factory=FullEvaluationConfig)
    seed: int = option(0, "Decides what is sampled", at_least=0, below=2**32)
    output_dir: str | None = option(None, "Folder of the figures; null: <the run's folder>/evaluation for a run with its own data and teacher, else evaluations/<the overrides>")
    precision: str = option("auto", "bf16: autocast; fp32; auto: bf16 on an accelerator that has it", choices=("auto", "fp32", "bf16"))
    num_threads: int | None = option(None, "CPU threads of torch; null: torch's choice", at_least=1)
    debug: bool = option(False, "Show tracebacks of user errors too")


@dataclass
class GenerateCommand:
    """Everything `python -m mini_distill.generate` can be told."""

    model: str | None = option(None, "Who writes: a folder or hub id; or the folder of a run, whose student and data are taken where not given; null: the teacher")
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    seed: int = option(0, "Decides what is sampled", at_least=0, below=2**32)
    output_dir: str | None = option(None, "Folder of the rows; null: <the run's folder>/generated, or generated/<the overrides>")
    precision: str = option("auto", "bf16: autocast; fp32; auto: bf16 on an accelerator that has it", choices=("auto", "fp32", "bf16"))
    num_threads: int | None = option(None, "CPU threads of torch; null: torch's choice", at_least=1)
    debug: bool = option(False, "Show tracebacks of user errors too")
# fmt: on
