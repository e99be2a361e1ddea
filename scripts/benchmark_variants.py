"""The variants that `benchmark_step.py` measures: one of them is run here, in a process of its own, which may be a peer's Python.

Each is told when to step, so that several take turns, and does the same seeded work: Llama models with untied heads (teacher 30 M and
student 4 M parameters besides the embeddings), the same token ids, prompts and padding, fused AdamW, no clipping. Floors come first,
then this framework, then peers, which run inside their own `trainer.train()`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from itertools import cycle
from time import perf_counter
from typing import Any, cast

import torch
from benchmark_step import Settings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

IGNORE = -100
TEACHER, STUDENT = {"hidden": 512, "layers": 8}, {"hidden": 256, "layers": 4}
KEPT_LOSSES = 3

Fields = dict[str, Tensor]
Step = Callable[[], Any]
"""One step; returns its loss, if it has one."""


class Skipped(Exception):
    """The variant cannot run here; says why."""


class Stop(BaseException):
    """No further turn: leaves a peer's training loop."""


class PeakMemory:
    """The most memory in use since `start`, above what was in use then, in MiB."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def start(self) -> None:
        """The models are loaded: what comes from here on counts."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
            return
        ctypes.CDLL(None).malloc_trim(0)  # memory that loading left behind would hide some of what follows
        self.before = _resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM starts again from here

    def above(self) -> float:
        """The peak since then."""
        return (torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else _resident("VmHWM")) - self.before


def _resident(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key + ":"))


class Turns:
    """Waits for the turn at the start of every step, and times the step until the start of the next."""

    def __init__(self, device: str) -> None:
        self.channel = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # peers print freely
        self.memory, self.on_gpu = PeakMemory(device), device == "cuda"
        self.started: float | None = None
        self.losses: list[Any] = []

    def arrive(self) -> None:
        """Report the step that ended, and wait to be told to start another."""
        if self.on_gpu:
            torch.cuda.synchronize()
        if self.started is None:
            self.memory.start()
            self.tell(ready=True)
        else:
            self.tell(seconds=perf_counter() - self.started)
        if sys.stdin.readline().strip() != "go":
            raise Stop
        self.started = perf_counter()

    def note(self, loss: Any) -> None:
        """Keep the loss of the first steps; a tensor is not waited for."""
        if loss is not None and len(self.losses) < KEPT_LOSSES:
            self.losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def tell(self, **message: Any) -> None:
        """To the process that leads."""
        self.channel.write(json.dumps(message) + "\n")


class Work:
    """The models and batches that every variant is given."""

    def __init__(self, settings: Settings, turns: Turns) -> None:
        self.settings, self.turns = settings, turns
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
        self.prompt = max(1, round((1 - settings.supervised) * settings.seq))
        self.batches = [self._batch(seed) for seed in range(8)]
        self.supervised = int((self.batches[0]["labels"] != IGNORE).sum())
        self.head_flops = self.state_bytes = 0  # of the matrix products with the heads that cannot be avoided; of gradients and AdamW
        self.note = ""

    def teacher(self) -> LlamaForCausalLM:
        """Frozen."""
        self.head_flops += 2 * self.supervised * self.settings.vocab * TEACHER["hidden"]
        return self._model(**TEACHER, seed=1).eval().requires_grad_(False)

    def student(self) -> LlamaForCausalLM:
        """To be trained."""
        model = self._model(**STUDENT, seed=2).train()
        self.head_flops += 6 * self.supervised * self.settings.vocab * STUDENT["hidden"]
        self.state_bytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
        return model

    def on_device(self) -> Iterator[Fields]:
        """The batches again and again, each moved when it is asked for."""
        for batch in cycle(self.batches):
            yield {name: value.to(self.settings.device) for name, value in batch.items()}

    def train(self, model: nn.Module, loss_of: Callable[[Fields], Tensor]) -> Step:
        """A hand-written step: loss, backward, AdamW."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        batches = self.on_device()

        def step() -> Tensor:
            loss = loss_of(next(batches))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        return step

    def _model(self, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.settings.vocab,
            hidden_size=hidden,
            intermediate_size=hidden * 7 // 2,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            max_position_embeddings=8192,
            initializer_range=0.08,  # logits that differ, as those of trained models do
            tie_word_embeddings=False,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return cast(LlamaForCausalLM, model.to(self.settings.device, self.dtype))

    def _batch(self, seed: int) -> Fields:
        """Prompts of one length, and padding on the right that grows from row to row."""
        rows, seq = self.settings.batch, self.settings.seq
        ids = torch.randint(3, self.settings.vocab, (rows, seq), generator=torch.Generator().manual_seed(seed))
        padded = torch.linspace(0, 2 * self.settings.padding, rows) if rows > 1 else torch.tensor([self.settings.padding])
        real = torch.arange(seq) < seq - (padded * seq).round()[:, None]
        ids = ids.where(real, 0)
        labels = ids.masked_fill(~real, IGNORE)
        labels[:, : self.prompt] = IGNORE
        positions = torch.arange(seq).expand(rows, seq).where(real, 0)
        return {"input_ids": ids, "attention_mask": real.long(), "labels": labels, "position_ids": positions}


def inputs(batch: Fields) -> Fields:
    """What a model of transformers is called with."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


# ----------------------------------------------------------------------------------------------------------- floors, and the plain way


def student_ce_plain(work: Work) -> Step:
    """The model's own cross-entropy."""
    student = work.student()
    return work.train(student, lambda batch: student(**inputs(batch), labels=batch["labels"]).loss)


def teacher_forward_plain(work: Work) -> Step:
    """The teacher's logits at every position."""
    teacher, batches = work.teacher(), work.on_device()

    @torch.no_grad()
    def step() -> None:
        teacher(**inputs(next(batches)))

    return step


def plain_full(work: Work) -> Step:
    """Distillation as it is written by hand: both models' logits at every position, float32 log-softmax, a masked mean."""
    needs_teacher = work.settings.objective != "ce"
    teacher, student = work.teacher() if needs_teacher else None, work.student()

    def loss_of(batch: Fields) -> Tensor:
        targets = batch["labels"][:, 1:].flatten()
        student_logits = student(**inputs(batch)).logits[:, :-1].flatten(0, 1).float()
        needs_ce = work.settings.objective != "forward_kl"
        ce = cross_entropy(student_logits, targets, ignore_index=IGNORE) if needs_ce else student_logits.new_zeros(())
        if teacher is None:
            return ce
        with torch.no_grad():
            teacher_logits = teacher(**inputs(batch)).logits[:, :-1].flatten(0, 1).float()
        each = kl_div(log_softmax(student_logits, -1), log_softmax(teacher_logits, -1), reduction="none", log_target=True).sum(-1)
        kl = each[targets != IGNORE].mean()
        return kl if work.settings.objective == "forward_kl" else 0.5 * kl + 0.5 * ce

    return work.train(student, loss_of)


# ------------------------------------------------------------------------------------------------------------------- this framework


def mini_distill(work: Work) -> Step:
    """Its own optimizer step, from batch to updated weights and metrics."""
    return _framework(work, work.settings.objective)


def ce_fused(work: Work) -> Step:
    """Floor: the same step with nothing but the cross-entropy, and no teacher."""
    return _framework(work, "ce")


def teacher_rows(work: Work) -> Step:
    """Floor: the teacher's trunk, and its head on the rows that are needed, in the same chunks, with nothing done to them."""
    from mini_distill.losses.linear import MEMORY_MIB
    from mini_distill.teachers.online import OnlineTeacher

    teacher, batches = OnlineTeacher(work.teacher()), cycle(_framework_batches(work))
    most = max(1, int(MEMORY_MIB[work.settings.device] * 2**20 / (2 * 4 * work.settings.vocab)))
    chunks = -(-work.supervised // most)
    size = -(-work.supervised // chunks)

    def step() -> None:
        targets = teacher(next(batches).to(work.settings.device))
        for start in range(0, work.supervised, size):
            targets.rows(slice(start, start + size))

    return step


def _framework(work: Work, objective: str) -> Step:
    from accelerate import Accelerator

    from mini_distill.config import Config, ObjectiveConfig, TrainerConfig
    from mini_distill.distillation import Distillation
    from mini_distill.models.head import LanguageModel
    from mini_distill.teachers.online import OnlineTeacher
    from mini_distill.training.objective import build_objective
    from mini_distill.training.optimizer import build_optimizer

    weights = {"forward_kl": (1.0, 0.0), "kl_ce": (0.5, 0.5), "ce": (0.0, 1.0)}[objective]
    trainer = TrainerConfig(learning_rate=1e-4, weight_decay=0.0, max_grad_norm=None, schedule="constant", warmup_steps=0, precision="fp32")
    d = Distillation.__new__(Distillation)  # what a step looks at, without a run's folder, data and tokenizer
    d.config = Config(trainer=trainer, objective=ObjectiveConfig(kl_weight=weights[0], ce_weight=weights[1]))
    d.accelerator = Accelerator(cpu=work.settings.device == "cpu", mixed_precision="no")
    d.objective = build_objective(d.config.objective, trainer, on_gpu=work.settings.device == "cuda")
    d.teacher = OnlineTeacher(work.teacher()) if d.objective.needs_teacher else None
    d.language_model = LanguageModel(work.student())
    d.student = d.accelerator.prepare_model(d.language_model)
    d.optimizer = build_optimizer(d.student, trainer)
    optimizer_step = importlib.import_module("mini_distill.train").optimizer_step
    batches = cycle(_framework_batches(work))

    def step() -> float:
        metrics = optimizer_step(d, [next(batches).to(d.accelerator.device)], step=1)
        loss: float = metrics["train/loss"]
        return loss

    return step


def _framework_batches(work: Work) -> list[Any]:
    from mini_distill.data.batch import Batch

    row_ids = torch.arange(work.settings.batch)
    return [Batch(b["input_ids"], b["labels"], b["position_ids"], row_ids, b["attention_mask"]) for b in work.batches]


# ------------------------------------------------------------------------------------------------------------------------------ peers


def liger_jsd(work: Work) -> Step:
    """Liger's fused distillation loss in a hand-written loop: no trainer of TRL 1.16 uses it any more."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    only_forward_kl(work, "Liger's fused loss is measured as a divergence alone")
    on_gpu = work.settings.device == "cuda"
    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=on_gpu)
    teacher, student = work.teacher(), work.student()

    def loss_of(batch: Fields) -> Tensor:
        with torch.no_grad():
            known = teacher.model(**inputs(batch)).last_hidden_state[:, :-1].flatten(0, 1)
        hidden = student.model(**inputs(batch)).last_hidden_state[:, :-1].flatten(0, 1)
        loss: Tensor = fused(hidden, student.lm_head.weight, known, teacher.lm_head.weight, batch["labels"][:, 1:].flatten())
        return loss

    return work.train(student, loss_of)


def trl_gkd(work: Work, **arguments: Any) -> None:
    """TRL's GKDTrainer on the given tokens (no sampling from the student)."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    only_forward_kl(work, "GKDTrainer has no cross-entropy term")
    config = GKDConfig(**trainer_arguments(work), lmbda=0.0, beta=0.0, seq_kd=False, max_length=work.settings.seq, **arguments)
    models = {"model": work.student(), "teacher_model": work.teacher()}
    collator = _collator(work)
    _train(work, GKDTrainer(**models, args=config, data_collator=collator, train_dataset=_rows(work), processing_class=_tokenizer()))


def trl_gkd_liger(work: Work) -> None:
    """The same with `use_liger_kernel=True`."""
    from trl.experimental.gkd import GKDTrainer

    if work.settings.device != "cuda":
        raise Skipped("use_liger_kernel puts Triton kernels into the model, which need a GPU; this GKDTrainer has no fused loss of Liger")
    assert not hasattr(GKDTrainer, "use_liger_gkd_loss")
    work.note = "kernels of the model only: this GKDTrainer has no fused loss of Liger"
    trl_gkd(work, use_liger_kernel=True)


def trl_distillation(work: Work) -> None:
    """TRL's DistillationTrainer; the completions that it would have sampled from the student are those of the batch."""
    from trl import DistillationConfig, DistillationTrainer

    only_forward_kl(work, "DistillationTrainer has no cross-entropy term")
    collate, prompt = _collator(work), work.prompt

    class GivenCompletions(DistillationTrainer):
        def _generate_and_score_completions(self, rows: list[dict[str, Any]]) -> Fields:
            ids, mask = (collate(rows)[name].to(self.accelerator.device) for name in ("input_ids", "attention_mask"))
            halves = {"prompt_ids": ids[:, :prompt], "prompt_mask": mask[:, :prompt]}
            return {
                **halves,
                "completion_ids": ids[:, prompt:],
                "completion_mask": mask[:, prompt:],
                "num_items_in_batch": mask[:, prompt:].sum(),
            }

    work.note = "on-policy only: sampling replaced by the batch's own completions"
    completion = work.settings.seq - prompt
    config = DistillationConfig(**trainer_arguments(work), beta=0.0, temperature=1.0, max_completion_length=completion)
    models = {"model": work.student(), "teacher_model": work.teacher()}
    _train(work, GivenCompletions(**models, args=config, train_dataset=_rows(work), processing_class=_tokenizer()))


def only_forward_kl(work: Work, reason: str) -> None:
    """Peers are compared in what they can do."""
    if work.settings.objective != "forward_kl":
        raise Skipped(reason)


def trainer_arguments(work: Work) -> dict[str, Any]:
    """Nothing that costs time and that the others do not do: no clipping, no recomputation, no reports."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="benchmark_step_"),
        "use_cpu": work.settings.device == "cpu",
        "per_device_train_batch_size": work.settings.batch,
        "max_steps": 10**6,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch_fused",
        "bf16": False,  # the models are in the type that is measured
        "fp16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _collator(work: Work) -> Callable[[list[dict[str, Any]]], Fields]:
    """A prepared batch by the number of its first row."""

    def collate(rows: list[dict[str, Any]]) -> Fields:
        batch = work.batches[rows[0]["number"] // work.settings.batch]
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    return collate


def _rows(work: Work) -> Any:
    from datasets import Dataset

    count = len(work.batches) * work.settings.batch
    return Dataset.from_list([{"number": number, "prompt": "x", "messages": []} for number in range(count)])


def _tokenizer() -> Any:
    """The trainers want one, and never use it on the prepared batches."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(special.values())}, unk_token="<unk>"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", chat_template=template, **special)


def _train(work: Work, trainer: Any) -> None:
    """The trainer's own loop; each of its steps waits for its turn."""
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            work.turns.arrive()

    own_step = trainer.training_step

    def training_step(*arguments: Any, **options: Any) -> Tensor:
        loss: Tensor = own_step(*arguments, **options)
        work.turns.note(loss)
        return loss

    trainer.training_step = training_step
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)  # the same batches in the same order
    trainer.add_callback(TakeTurns())
    trainer.train()


# ------------------------------------------------------------------------------------------------------------------------ the process

OWN = ("mini_distill", "ce_fused", "teacher_rows")

VARIANTS: dict[str, Callable[[Work], Step | None]] = {
    function.__name__: function
    for function in (
        mini_distill,
        ce_fused,
        teacher_rows,
        student_ce_plain,
        teacher_forward_plain,
        plain_full,
        liger_jsd,
        trl_gkd,
        trl_gkd_liger,
        trl_distillation,
    )
}


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product: the ceiling."""
    size, times = (8192, []) if device == "cuda" else (1024, [])
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(8):
        started = perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - started)
    rate: float = 2 * size**3 / min(times)
    return rate


def run(settings: Settings, turns: Turns) -> dict[str, Any]:
    """Step whenever it is this variant's turn; what is known at the end."""
    work = Work(settings, turns)
    try:
        step = VARIANTS[settings.variant](work)
        while step is not None:
            turns.arrive()
            turns.note(step())
    except Stop:
        pass
    found = {
        "peak_mib": round(turns.memory.above(), 1),
        "state_mib": round(work.state_bytes / 2**20, 1),
        "supervised_share": round(work.supervised / work.batches[0]["labels"].numel(), 4),
        "loss": [float(loss) for loss in turns.losses],
        "head_flops": work.head_flops,
        "matmul_rate": matmul_rate(settings.device, work.dtype),
        "torch": torch.__version__,
    }
    return {**found, "note": work.note} if work.note else found


def main() -> None:
    """`benchmark_step.py` starts this with the settings in JSON."""
    settings = Settings(**json.loads(sys.argv[1]))
    if settings.variant in OWN:
        importlib.import_module("mini_distill")  # which sets torch's allocator up, as in training, before the first tensor
    torch.set_num_threads(settings.threads)
    turns = Turns(settings.device)
    try:
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise Skipped("no CUDA device")
        turns.tell(final=run(settings, turns))
    except Skipped as reason:
        turns.tell(skipped=str(reason))
    except ImportError as error:
        turns.tell(skipped=f"not installed ({error})")
    except Exception as error:
        traceback.print_exc()
        turns.tell(skipped=f"{type(error).__name__}: {str(error)[:300]}")
    turns.channel.flush()
    os._exit(0)  # peers leave threads behind


if __name__ == "__main__":
    main()
