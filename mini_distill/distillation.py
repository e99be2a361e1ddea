"""Everything a run holds, put together from its configuration: processes, models, data, objective, optimizer, folder."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import Config
from .data.loader import TrainingBatches, evaluation_batches
from .data.prepare import PreparedData, prepare_data
from .data.tokenizers import check_same_tokenizer, tokenizer_fingerprint, vocabulary_size
from .errors import DistributedError, MiniDistillError, ModelError, StorageError
from .evaluation.evaluator import Evaluator
from .imported_code import code_fingerprints
from .losses.objective import Objective
from .models.head import LanguageModel, embedding_rows
from .models.identity import architecture, model_identity
from .models.loading import load_tokenizer
from .models.packed_documents import check_documents_kept_apart
from .out_of_memory import is_out_of_memory, out_of_memory
from .redaction import print_traceback, redact
from .students.build import TeacherSizes, build_student
from .teachers.cache_identity import digest
from .teachers.cached import CachedTeacher
from .teachers.load import load_teacher, load_teacher_tokenizer
from .teachers.online import OnlineTeacher
from .teachers.server import ServerTeacher, open_server
from .teachers.targets import Teacher
from .training.checkpoint import Checkpoints, load_optimizer, load_weights, optimizer_to_tensors
from .training.fingerprints import compare_fingerprints
from .training.objective import add_matching, build_objective, divergences_in_use
from .training.optimizer import build_optimizer
from .training.progress import TrainingProgress
from .training.run_folder import RunFolder
from .training.signals import StopRequest
from .training.tracking import Tracker, open_tracker

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Distillation:
    """A run, ready to step.

    Attributes:
        config: The run's settings.
        run: Its folder.
        accelerator: The processes and devices.
        tokenizer: Shared by teacher and student.
        teacher: Where the targets come from; None when there is none.
        teacher_model: The live teacher, if it was loaded: a cache can stand in for it.
        language_model: The student, bare.
        student: The student as the processes wrap it; what a step calls.
        data: Training and held-out sequences.
        batches: The order of the training sequences.
        objective: The loss.
        optimizer: AdamW over the student's parameters.
        evaluator: Measures the student over held-out text; None without any.
        checkpoints: What has been saved.
        tracker: Where metrics go besides metrics.jsonl.
        fingerprints: What may not change between a run and its resumption.
        best: Value and step of the best evaluation so far.
        tokens_seen: Supervised tokens trained on so far, by all processes.
    """

    config: Config
    run: RunFolder
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    teacher: Teacher | None
    teacher_model: PreTrainedModel | None
    language_model: LanguageModel
    student: nn.Module
    data: PreparedData
    batches: TrainingBatches
    objective: Objective
    optimizer: torch.optim.AdamW
    evaluator: Evaluator | None
    checkpoints: Checkpoints
    tracker: Tracker
    fingerprints: dict[str, Any]
    best: dict[str, float] = dataclasses.field(default_factory=dict)  # {"value": …, "step": …}
    tokens_seen: int = 0

    @property
    def student_model(self) -> PreTrainedModel:
        """The student as transformers knows it."""
        return self.language_model.model

    def evaluate(self, step: int) -> dict[str, float]:
        """The student's metrics over held-out text; empty without any."""
        return self.evaluator(self.student_model, step) if self.evaluator is not None else {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row of metrics.jsonl, and the tracker."""
        self.run.log_metrics(step, metrics)
        self.tracker.log(step, metrics)

    def progress(self, last_step: int) -> TrainingProgress:
        """The live line of the training loop."""
        return TrainingProgress(self.config.trainer.max_steps, last_step + 1, self.accelerator.is_main_process)

    def agree_on(self, count: Tensor, flag: bool) -> tuple[Tensor, bool]:
        """The sum of `count` over processes , and whether any process raised `flag`. One exchange for both."""
        if self.accelerator.num_processes == 1:
            return count, flag
        both = torch.stack([count.double(), torch.tensor(float(flag), dtype=torch.float64, device=count.device)])
        total = self.accelerator.reduce(both, "sum")
        return total[0], bool(total[1].item() > 0)

    # -------------------------------------------------------------------------------------------------- saving and going on

    def note_if_best(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether this step's evaluation is the best so far by `evaluation.best_metric`."""
        value = metrics.get(self.config.evaluation.best_metric)
        if value is None or not math.isfinite(value):
            return False
        lowest = self.config.evaluation.best_is == "lowest"
        if not self.best or (value < self.best["value"] if lowest else value > self.best["value"]):
            self.best = {"value": value, "step": step}
            return True
        return False

    def save(self, step: int) -> None:
        """A checkpoint from which the run goes on as if it had not stopped.

        Learning rate, data position and random numbers are functions of the step and the seed, so weights, optimizer and
        step are all there is to save.
        """
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            optimizer_tensors, optimizer_state = optimizer_to_tensors(self.optimizer, self.language_model)
            self.checkpoints.save(
                step,
                {"model": self.language_model.state_dict(), "optimizer": optimizer_tensors},
                {
                    "step": step,
                    "optimizer": optimizer_state,
                    "best": self.best,
                    "tokens_seen": self.tokens_seen,
                    "metrics": self.run.seal_metrics(step),
                    "fingerprints": self.fingerprints,
                },
                best=self.best.get("step") == step,
            )
            self.run.note_saved(step)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Load the newest good checkpoint, if there is one, and give its step; 0 for a new run.

        Raises:
            ConfigError: settings, data, tokenizer, models or imported code differ from those of the checkpoint.
            StorageError: what the run had written, checkpoints or rows of its metrics, is damaged or gone.
        """
        folder, allow = self.config.resume, self.config.resume_allow
        checkpoint = self.checkpoints.newest() if folder in ("auto", "never") else self.checkpoints.at(folder)
        if checkpoint is None:
            self.begin_anew()
            return 0
        finished = checkpoint.step >= self.config.trainer.max_steps
        compare_fingerprints(checkpoint.state["fingerprints"], self.fingerprints, allow, finished)
        if (
            checkpoint.path.resolve().parent == self.checkpoints.folder.resolve() and "metrics" in checkpoint.state
        ):  # not that of another run
            self.run.check_metrics(checkpoint.step, checkpoint.state["metrics"], allowed="metrics" in allow)
        load_weights(self.language_model, checkpoint.tensors("model"))
        load_optimizer(self.optimizer, self.language_model, checkpoint.tensors("optimizer"), checkpoint.state["optimizer"])
        self.best, self.tokens_seen = checkpoint.state["best"], checkpoint.state["tokens_seen"]
        self.run.truncate_metrics(checkpoint.step)
        self.checkpoints.rewind(checkpoint.step)  # with resume=<folder> there may be later ones, of a way not taken
        return checkpoint.step

    def begin_anew(self) -> None:
        """Where there is no checkpoint: the rows of a run that was killed before its first one are dropped.

        Raises:
            StorageError: there was one.
        """
        if (saved := self.run.status().get("saved_step", 0)) > 0:
            what = f"no checkpoint is there, and the run has saved step {saved}"
            remedy = "Bring back a copy of one, name one of another run with resume=<folder>, or start anew with resume=never."
            raise StorageError(str(self.checkpoints.folder), what, remedy)
        if lost := max((row["step"] for row in self.run.metrics()), default=0):
            logger.warning("%s: it was stopped after step %d, before its first checkpoint, and begins anew", self.run.path, lost)
        self.run.truncate_metrics(None)


# ----------------------------------------------------------------------------------------------------------- putting it together


@contextmanager
def open_run(config: Config) -> Iterator[tuple[RunFolder, StopRequest, Tracker]]:
    """The run's folder, locked, the handler of SIGTERM and Ctrl-C, and the tracker; all closed again however the run ends."""
    assert config.output_dir is not None
    plain, is_main = dataclasses.asdict(config), int(os.environ.get("RANK", "0")) == 0
    with RunFolder(config.output_dir, plain, resume=config.resume, is_main=is_main) as run, StopRequest() as stop:
        tracker = open_tracker(config.tracking, run.path, plain, is_main)
        try:
            with naming_the_process():
                yield run, stop, tracker
        finally:
            tracker.close()


@contextmanager
def naming_the_process() -> Iterator[None]:
    """With several processes, whose output is mixed, an unexpected error ends in a line that names the one it happened on, and when.

    Memory that is not there is expected, with one process too.
    """
    try:
        yield
    except MiniDistillError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        steps = [note for note in getattr(error, "__notes__", []) if note.startswith("step ")]
        where = ", ".join([f"rank {os.environ.get('RANK', '0')}", *steps])
        if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):  # gloo has no class for it
            raise DistributedError(where, "another process of the group is gone", "Its own line says why, if it was not killed.") from error
        print_traceback()
        raise DistributedError(where, f"{type(error).__name__}: {error}", "The traceback stands above.") from error


def prepare(config: Config, run: RunFolder, tracker: Tracker) -> Distillation:
    """Load, build and check everything, the cheap things first."""
    accelerator = start_processes(config.trainer.precision, config.trainer.num_threads)
    objective = build_objective(config.objective, config.trainer, on_gpu=accelerator.device.type == "cuda")
    teacher_model = load_teacher(config.teacher, accelerator.device)
    tokenizer = load_shared_tokenizer(config)
    objective.vocab_size = vocabulary_size(tokenizer)
    with accelerator.main_process_first():
        data = prepare_data(config.data, tokenizer, show_progress=accelerator.is_main_process)

    who = model_identity(teacher_model) if teacher_model is not None else None
    teacher, held_out_teacher = open_teacher(config, teacher_model, who, data, tokenizer)
    student_model = build_student(
        config.student,
        teacher=teacher_model,
        tokenizer=tokenizer,
        seq_len=config.data.seq_len,
        seed=config.seed,
        sizes=sizes_from_cache(teacher),
    )
    for where, model in (("teacher", teacher_model), ("student", student_model)):
        check_vocabulary(model, tokenizer, where)
    language_model = LanguageModel(student_model.to(accelerator.device)).train()
    add_matching(objective, config.objective, language_model, teacher_model, config.seed)
    language_model.projections.to(accelerator.device)
    if config.data.packing:
        for where, model in (("teacher.path", teacher_model), ("student.path", student_model)):
            check_documents_kept_apart(model, where)
    student = ready_to_train(language_model, config, accelerator)
    trainer = config.trainer
    checkpoints = Checkpoints(run.path / "checkpoints", keep=trainer.keep_checkpoints)
    if accelerator.is_main_process:
        checkpoints.check_space(language_model)
    evaluator = build_evaluator(config, accelerator, data, teacher_model, held_out_teacher, tokenizer, run.path)
    return Distillation(
        config=config,
        run=run,
        accelerator=accelerator,
        tokenizer=tokenizer,
        teacher=teacher,
        teacher_model=teacher_model,
        language_model=language_model,
        student=student,
        data=data,
        batches=TrainingBatches(
            data.train,
            seed=config.seed,
            micro_batch_size=trainer.micro_batch_size,
            grad_accum_steps=trainer.grad_accum_steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=config.data.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        ),
        objective=objective,
        optimizer=build_optimizer(language_model, trainer),
        evaluator=evaluator,
        checkpoints=checkpoints,
        tracker=tracker,
        fingerprints={
            "config": redact(dataclasses.asdict(config)),
            "global_batch_size": trainer.micro_batch_size * trainer.grad_accum_steps * accelerator.num_processes,
            "data": data.fingerprint_parts,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "teacher": teacher.identity if isinstance(teacher, ServerTeacher) else who,
            "student": {"config": architecture(student_model)} if config.student.kind == "hf" else None,  # else the settings say it all
            "cache": digest(teacher.description["identity"]) if isinstance(teacher, CachedTeacher) else None,
            "code": code_fingerprints([*divergences_in_use(config.objective), *(config.evaluation.hooks if evaluator is not None else [])]),
        },
    )


def start_processes(precision: str, num_threads: int | None) -> Accelerator:
    """The process group, device and precision.

    Raises:
        DistributedError: more processes were launched than joined the group.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    on_gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    AcceleratorState._reset_state()  # of another run in this process, as in a sweep: its precision is not ours
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=not on_gpu)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        what = f"accelerate is set up for {accelerator.distributed_type.value}, and checkpoints of sharded weights are not written here"
        raise DistributedError("torch.distributed", what, "Start with torchrun, which replicates the student (DDP).")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise DistributedError(
            "torch.distributed",
            f"{launched} processes were launched, but the group has {accelerator.num_processes}",
            "Start with torchrun --nproc_per_node N -m mini_distill.train.",
        )
    return accelerator


def open_teacher(
    config: Config,
    model: PreTrainedModel | None,
    who: dict[str, Any] | None,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Teacher | None, CachedTeacher | ServerTeacher | None]:
    """Where the training's targets come from, and those of the held-out text where no teacher in this process gives them.

    `who` is what `model` is, to be compared with the cache.

    Raises:
        CacheError: the cache is damaged, incomplete, or of something else.
        ModelError: a server does not answer, or not as it has to.
    """
    if (server := open_server(config.teacher, tokenizer)) is not None:
        server.check_length(config.data.seq_len)
        return server, server
    if config.teacher.cache_dir is None:
        return (OnlineTeacher(model) if model is not None else None), None
    wanted: dict[str, Any] = {"data": data.fingerprint_parts, "tokenizer": tokenizer_fingerprint(tokenizer)}
    if who is not None:
        wanted["teacher"] = who
    folder = Path(config.teacher.cache_dir).expanduser()
    held_out = CachedTeacher(folder, wanted, "held_out") if model is None and data.held_out is not None else None
    return CachedTeacher(folder, wanted), held_out


def sizes_from_cache(teacher: Teacher | None) -> TeacherSizes | None:
    """What a cache tells of the sizes of its teacher; a server told it none."""
    if not isinstance(teacher, CachedTeacher) or teacher.facts["embedding_rows"] is None:
        return None
    return TeacherSizes(teacher.facts["embedding_rows"], teacher.facts["positions"])


def load_shared_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The one tokenizer of teacher and student.

    Raises:
        ModelError: an hf student brings another tokenizer than the teacher's.
    """
    teacher, student = config.teacher, config.student
    own = None
    if student.kind == "hf":
        assert student.path is not None
        own = load_tokenizer(student.path, revision=student.revision, trust_remote_code=student.trust_remote_code, where="student.path")
    if teacher.kind == "none":
        return own if own is not None else load_tokenizer(str(student.tokenizer), where="student.tokenizer")
    tokenizer = load_teacher_tokenizer(teacher)
    if own is not None:
        check_same_tokenizer(tokenizer, own, where="student.path")
    return tokenizer


def check_vocabulary(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Every token of the tokenizer needs an embedding; more embeddings than tokens (padding) are fine."""
    size = vocabulary_size(tokenizer)
    if model is not None and (rows := embedding_rows(model)) < size:
        raise ModelError(
            f"{where}.path", f"the tokenizer has ids up to {size - 1}, the model embeds {rows}", "Use the model's own tokenizer."
        )


def ready_to_train(language_model: LanguageModel, config: Config, accelerator: Accelerator) -> nn.Module:
    """The student as the processes call it."""
    if config.trainer.gradient_checkpointing:
        language_model.model.activation_checkpointing_enable({"use_reentrant": False})
    if config.trainer.compile:
        language_model.model.base_model.compile()  # in place: names in the state dict stay
    return accelerator.prepare_model(language_model)


def build_evaluator(
    config: Config,
    accelerator: Accelerator,
    data: PreparedData,
    teacher: PreTrainedModel | None,
    cached: CachedTeacher | ServerTeacher | None,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
) -> Evaluator | None:
    """The evaluation hooks over held-out text; None when none is held out."""
    held_out = data.held_out
    if held_out is None:
        return None

    def batches() -> Iterator[Any]:
        evaluation = config.evaluation
        return evaluation_batches(
            held_out, evaluation.batch_size, evaluation.max_batches, accelerator.process_index, accelerator.num_processes
        )

    return Evaluator(
        config.evaluation,
        held_out=held_out,
        batches=batches,
        teacher=teacher,
        cached=cached,
        tokenizer=tokenizer,
        device=accelerator.device,
        autocast=accelerator.autocast,
        gather_sum=lambda value: accelerator.reduce(value, "sum"),
        show_progress=accelerator.is_main_process,
        output_dir=output_dir,
    )
