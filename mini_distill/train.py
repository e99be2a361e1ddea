"""Distillation: a student learns a teacher's distribution. Read from top to bottom.

    python -m mini_distill.train                                              the embedded default
    python -m mini_distill.train teacher=hf teacher.path=… data=text data.path=…
    torchrun --nproc_per_node 2 -m mini_distill.train                         several processes

From Python, `md.train(["student=mini_2m", "trainer.max_steps=200"])`: the same settings as a list, and a `Run` to look at in return.

train → training_loop → optimizer_step → distill_step → losses/objective.py → losses/divergences.py
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and configuration errors are answered before torch is imported
    from mini_distill.starting import answer_signals

    answer_signals()

    from mini_distill.cli import run_command

    run_command("mini_distill.train:train")  # imports this module by its name, and does not return

import sys
from contextlib import nullcontext
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from .cache import write_targets
from .compare import control_of
from .config import Config, TrainerConfig
from .data.batch import Batch
from .distillation import Distillation, open_run, prepare
from .losses.objective import Objective, ObjectiveSums
from .losses.reduction import count_valid_tokens, supervised_targets
from .models.head import output_head
from .result import already_finished, write_result
from .run import CallableTrain
from .teachers.targets import Teacher
from .training.numerics import add_terms, check_finite, clip_gradient, memory_errors, name_fullest, step_metrics
from .training.optimizer import learning_rate, set_learning_rate
from .training.process_group import note
from .training.randomness import seed_step
from .training.rehearsal import rehearse
from .training.signals import StopRequest


def train(config: Config) -> dict[str, Any]:
    """Distil `config.teacher` into `config.student` and write the run's folder.

    The same call again goes on where an interrupted run stopped, and does nothing more when it had finished.

    Returns:
        The run's summary: every final number, keyed like the metrics.

    Raises:
        MiniDistillError: any problem that is the user's to mend, each kind with its exit code.
        Preempted: SIGTERM or Ctrl-C; the run is saved.
    """
    with StopRequest() as stop:  # SIGTERM and Ctrl-C
        control = train(control_of(config)) if config.control else None  # the same student without the teacher, in a folder of its own
        with open_run(config) as (run, tracker):
            with stop.at_once():
                if config.teacher.cache_kind is not None:
                    write_targets(config)  # unless another run has
                d = prepare(config, run, tracker, stop)  # tokenizer, teacher, student, data, objective, optimizer
                last_step = d.resume()  # 0 for a new run
                run.note_begun()
            if (summary := already_finished(d, last_step, control)) is not None:
                return summary
            training_loop(d, last_step)
            return write_result(d, control)  # student/, summary.json, the model card and the final table


def training_loop(d: Distillation, last_step: int) -> None:
    """Optimizer steps `last_step + 1` to `trainer.max_steps`: step, evaluate, log, save.

    The data of a step, its learning rate and its random numbers are functions of the seed and the step, so that a run that was
    stopped anywhere, and goes on from a checkpoint, is the run that was never stopped.

    Raises:
        Preempted: a process was asked to stop; nothing is begun after that, an evaluation that is under way is cut short, and the
            step is saved.
    """
    trainer = d.config.trainer
    if last_step == 0 or (_evaluates(last_step, trainer) and d.lacks_evaluation(last_step)):
        d.catch_up(last_step)  # the student before; or what a signal has cut short
    d.stop_if_asked(last_step, is_saved=True)
    rehearse(d, partial(distill_step, d.student, d.teacher, objective=d.objective, autocast=d.accelerator.autocast), last_step + 1)
    with d.progress(last_step) as progress, d.steps(last_step + 1) as steps:
        for step in range(last_step + 1, trainer.max_steps + 1):
            started = perf_counter()
            note(step)
            seed_step(d.config.seed, step, d.accelerator.process_index)
            micro_batches = next(steps)  # on the device; of a cache or a server, the targets are on their way
            is_last = step == trainer.max_steps

            with memory_errors(step, d.config, partial(name_fullest, d, micro_batches)):
                metrics = optimizer_step(d, micro_batches, step)
            metrics["perf/tokens_per_second"] = metrics["train/tokens"] / (perf_counter() - started)
            d.tokens_seen += int(metrics["train/tokens"])
            d.run.set_step(step)
            progress.update(step, metrics)

            if _evaluates(step, trainer):
                metrics |= d.evaluate(step)
            if _evaluates(step, trainer) or _due(step, trainer.log_every):
                d.log(step, metrics)
            is_best = d.note_if_best(step, metrics)
            if saves := is_last or is_best or _due(step, trainer.save_every):
                d.save(step)
            d.stop_if_asked(step, is_saved=saves)


def optimizer_step(d: Distillation, micro_batches: list[Batch], step: int) -> dict[str, float]:
    """One update of the student from this process's micro-batches.

    The gradient is that of Σ loss / N, where N counts the supervised tokens of *all* micro-batches on *all* processes: however
    the same sequences are cut into micro-batches and processes, the gradient is the same. (A mean per micro-batch, as several
    trainers took, gives short answers more weight than long ones.)

    Returns:
        The step's metrics.

    Raises:
        NumericsError: loss or gradient is not finite on any process; the student is not updated.
    """
    own_tokens = torch.stack([count_valid_tokens(batch.labels) for batch in micro_batches]).sum()
    num_valid_tokens = d.accelerator.reduce(own_tokens, "sum")

    divisor = num_valid_tokens.clamp(min=1)  # a step with nothing supervised divides nothing by zero
    autocast = d.accelerator.autocast
    objective = d.objective.at_step(step)  # its weights can have a schedule
    sums: dict[str, Tensor] = {}
    for micro_step, batch in enumerate(micro_batches):
        is_last = micro_step == len(micro_batches) - 1
        with nullcontext() if is_last else d.accelerator.no_sync(d.student):  # gradients are exchanged once a step
            result = distill_step(d.student, d.teacher, batch, objective, autocast)
            # DDP averages gradients over processes; the sum is meant.
            d.accelerator.backward(result.loss * d.accelerator.num_processes / divisor)
        add_terms(sums, result)

    grad_norm = clip_gradient(d.student, d.config.trainer.max_grad_norm)
    row_loss = partial(distill_step, d.language_model, d.teacher, objective=objective, autocast=autocast)
    check_finite(d, sums, grad_norm, micro_batches, step, row_loss)  # here the host waits for the step

    set_learning_rate(d.optimizer, learning_rate(step, d.config.trainer))
    d.optimizer.step()
    d.optimizer.zero_grad(set_to_none=True)
    return step_metrics(d, sums, grad_norm, num_valid_tokens, step)


def distill_step(
    student: nn.Module, teacher: Teacher | None, batch: Batch, objective: Objective, autocast: Any = nullcontext
) -> ObjectiveSums:
    """Teacher and student meet on the same batch: this is knowledge distillation.

    Both predict the next token at the same supervised positions. The objective compares the two distributions (the divergence)
    and the student's with the data (the cross-entropy). Prompts and padding never reach the vocabulary.

    Args:
        student: The `LanguageModel` under training, as wrapped for several processes.
        teacher: Gives its targets without gradient; None when the objective has no use for one.
        batch: Sequences with their supervision.
        objective: `kl_weight · T² · divergence + ce_weight · CE`.
        autocast: Context of mixed precision.

    Returns:
        Sums over the batch's supervised tokens, not yet divided by their number.
    """
    with autocast(), objective.watching():  # the layers whose inner states are matched, if any
        teacher_targets = teacher(batch) if teacher is not None and objective.needs_teacher else None  # at the supervised positions
        student_hidden = student(batch)  # (supervised, hidden)
        # From here both distributions are made and compared a few tokens at a time: losses/divergences.py has the formulas.
        sums = objective.fused(student_hidden, output_head(student), teacher_targets, supervised_targets(batch.labels))
        return objective.with_matching(sums, batch)


def _evaluates(step: int, trainer: TrainerConfig) -> bool:
    return step in (0, trainer.max_steps) or _due(step, trainer.eval_every)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


sys.modules[__name__].__class__ = CallableTrain  # import mini_distill as md; run = md.train(["student=mini_2m"])
