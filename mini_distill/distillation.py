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
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import Config
from .data.batch import Batch
from .data.loader import TrainingBatches, evaluation_batches
from .data.prepare import PreparedData, prepare_data
from .data.tokenizers import tokenizer_fingerprint, vocabulary_size
from .errors import StorageError
from .evaluation.evaluator import Evaluator
from .imported_code import code_fingerprints
from .losses.objective import Objective
from .models.head import LanguageModel
from .models.identity import architecture, model_identity
from .models.packed_documents import check_documents_kept_apart
from .redaction import redact
from .students.build import TeacherSizes, build_student
from .teachers.asked_ahead import asked_ahead
from .teachers.cache_identity import digest
from .teachers.cached import CachedTeacher
from .teachers.load import check_vocabulary, load_shared_tokenizer, load_teacher, open_teacher
from .teachers.server import ServerTeacher
from .teachers.targets import Teacher
from .training.checkpoint import Checkpoints, load_optimizer, load_weights, optimizer_to_tensors
from .training.fingerprints import compare_fingerprints
from .training.objective import add_matching, build_objective, divergences_in_use, warn_of_growing_gradients
from .training.optimizer import build_optimizer, learning_rate, set_learning_rate
from .training.process_group import ending_together, note, start_processes
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
        stop: Whether this process was asked to stop.
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
    stop: StopRequest
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
        """The student's metrics over held-out text; empty without any, and where a signal cuts it short."""
        note(step, "evaluation")
        return self.evaluator(self.student_model, step) if self.evaluator is not None else {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row of metrics.jsonl, and the tracker."""
        self.run.log_metrics(step, metrics)
        self.tracker.log(step, metrics)

    @contextmanager
    def steps(self, first: int) -> Iterator[Iterator[list[Batch]]]:
        """The micro-batches of step `first` and of all after it, on the device; a cache or a server is asked about them a step ahead."""
        numbers = range(first, self.config.trainer.max_steps + 1)
        steps = ([batch.to(self.accelerator.device) for batch in step] for _, step in zip(numbers, self.batches.steps(first), strict=False))
        if isinstance(self.teacher, CachedTeacher | ServerTeacher) and self.objective.needs_teacher:
            with asked_ahead(self.teacher, steps) as announced:
                yield announced
        else:
            yield steps

    def progress(self, last_step: int) -> TrainingProgress:
        """The live line of the training loop."""
        return TrainingProgress(self.config.trainer.max_steps, last_step + 1, self.accelerator.is_main_process)

    def on_any_process(self, flag: bool) -> bool:
        """Whether `flag` is raised anywhere, the same answer on all processes."""
        if self.accelerator.num_processes == 1:
            return flag
        raised = torch.tensor([float(flag)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(raised, "sum").item())

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
        note(step, "saving")
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

    def stop_if_asked(self, step: int, is_saved: bool) -> None:
        """End the run after `step`, which is saved first, if any process was asked to stop.

        Raises:
            Preempted: on all of them.
        """
        if self.on_any_process(self.stop.requested):
            if not is_saved:
                self.save(step)
            raise self.stop.preempted(step)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether there is held-out text, and no evaluation of `step` in the metrics: a signal has cut it short."""
        is_main = self.accelerator.is_main_process
        return self.on_any_process(is_main and self.evaluator is not None and "eval/tokens" not in self._logged(step))

    def catch_up(self, step: int) -> None:
        """Evaluate the step from which the run sets out; the metrics, and the choice of the best, are as if it had not been stopped there."""
        metrics = self.evaluate(step)
        self.log(step, self._logged(step) | metrics)  # one row
        if step > 0 and self.note_if_best(step, metrics):
            self.save(step)

    def _logged(self, step: int) -> dict[str, float]:
        rows = [row for row in self.run.metrics() if row["step"] == step]
        return {key: value for row in rows for key, value in row.items() if key != "step"}

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
        set_learning_rate(self.optimizer, learning_rate(checkpoint.step, self.config.trainer))  # as the step left it
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
def open_run(config: Config) -> Iterator[tuple[RunFolder, Tracker]]:
    """The run's folder, locked, and the tracker; both closed again however the run ends."""
    assert config.output_dir is not None
    plain, is_main = dataclasses.asdict(config), int(os.environ.get("RANK", "0")) == 0
    with RunFolder(config.output_dir, plain, resume=config.resume, is_main=is_main) as run:
        tracker = open_tracker(config.tracking, run.path, plain, is_main)
        try:
            with ending_together(config.trainer.stuck_after, run.fail):
                yield run, tracker
        finally:
            tracker.close()


def prepare(config: Config, run: RunFolder, tracker: Tracker, stop: StopRequest) -> Distillation:
    """Load, build and check everything, the cheap things first."""
    accelerator = start_processes(config.trainer.precision, config.trainer.num_threads)
    objective = build_objective(config.objective, config.trainer, on_gpu=accelerator.device.type == "cuda")
    if accelerator.is_main_process:
        warn_of_growing_gradients(config.objective)
    teacher_model = load_teacher(config.teacher, accelerator.device)
    tokenizer = load_shared_tokenizer(config)
    objective.vocab_size = vocabulary_size(tokenizer)
    with accelerator.main_process_first():
        data = prepare_data(config.data, tokenizer, show_progress=accelerator.is_main_process)

    who = model_identity(teacher_model) if teacher_model is not None else None
    teacher, held_out_teacher = open_teacher(config, teacher_model, who, data, tokenizer, accelerator)
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
    evaluator = build_evaluator(config, accelerator, data, teacher_model, held_out_teacher, tokenizer, run.path, stop)
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
        stop=stop,
        checkpoints=checkpoints,
        tracker=tracker,
        fingerprints={
            "config": redact(dataclasses.asdict(config)),
            "world_size": accelerator.num_processes,
            "global_batch_size": trainer.micro_batch_size * trainer.grad_accum_steps * accelerator.num_processes,
            "data": data.fingerprint_parts,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "teacher": teacher.identity if isinstance(teacher, ServerTeacher) else who,
            "student": {"config": architecture(student_model)} if config.student.kind == "hf" else None,  # else the settings say it all
            "cache": digest(teacher.description["identity"]) if isinstance(teacher, CachedTeacher) else None,
            "code": code_fingerprints([*divergences_in_use(config.objective), *(config.evaluation.hooks if evaluator is not None else [])]),
        },
    )


def sizes_from_cache(teacher: Teacher | None) -> TeacherSizes | None:
    """What a cache tells of the sizes of its teacher; a server told it none."""
    if not isinstance(teacher, CachedTeacher) or teacher.facts["embedding_rows"] is None:
        return None
    return TeacherSizes(teacher.facts["embedding_rows"], teacher.facts["positions"])


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
    stop: StopRequest,
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
        stop=lambda: stop.requested,
    )
