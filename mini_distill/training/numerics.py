"""Clip, check and report the numbers of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import NumericsError, OutOfMemory
from ..losses.reduction import count_valid_tokens
from ..out_of_memory import is_out_of_memory, out_of_memory
from ..teachers.targets import DenseTargets
from .optimizer import learning_rate

if TYPE_CHECKING:
    from ..data.batch import Batch
    from ..distillation import Distillation
    from ..losses.objective import ObjectiveSums


def add_terms(sums: dict[str, Tensor], result: ObjectiveSums) -> None:
    """Add a micro-batch's sums to the step's; stays on the device."""
    for name, value in {"loss": result.loss.detach(), **result.terms}.items():
        sums[name] = sums[name] + value if name in sums else value


def clip_gradient(model: nn.Module, max_norm: float | None) -> Tensor:
    """Clip to `max_norm` (None: never) and give the norm before clipping, a scalar on the device."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if max_norm is None:
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return nn.utils.clip_grad_norm_(parameters, max_norm)


def check_finite(
    d: Distillation,
    sums: dict[str, Tensor],
    grad_norm: Tensor,
    micro_batches: list[Batch],
    step: int,
    row_loss: Callable[[Batch], ObjectiveSums],
) -> None:
    """Stop before the update when the loss or the gradient is not finite on any process.

    `row_loss` scores single rows again, to find the one at fault.

    Raises:
        NumericsError: names the step, the term and the rows.
    """
    values = torch.stack([*(v.float() for v in sums.values()), grad_norm.float()])
    bad = ~torch.isfinite(values)
    anywhere = torch.stack([bad[:-1].any(), bad.any()]).float()  # a sum; a sum or the gradient, which is that of all processes
    if d.accelerator.num_processes > 1:
        anywhere = d.accelerator.reduce(anywhere, "sum")
    some_sum, anything = anywhere.tolist()
    if not anything:
        return
    names = [name for name, value in zip([*sums, "gradient norm"], values.tolist(), strict=True) if not math.isfinite(value)]
    if some_sum and names == ["gradient norm"]:
        names = []  # it came with the exchange
    rows = [row for batch in micro_batches for row in batch.split_rows()] if names else []
    remedy = "Lower trainer.learning_rate, set trainer.max_grad_norm, use trainer.precision=fp32, or look at these rows."
    if of_teacher := [row for row in rows if not _teacher_is_finite(d, row)]:
        what = f"the teacher's logits not finite (rows {_names(d, of_teacher)})"
        remedy = "Load it with teacher.dtype=float32 and trainer.precision=fp32, or leave these rows out."
    elif names:
        guilty = _not_finite(rows, row_loss) or rows  # all of the batch when it is the gradient that overflowed
        what = f"{', '.join(names)} not finite (rows {_names(d, guilty)})"
    else:
        what = "loss or gradient of another process not finite"
    d.accelerator.wait_for_everyone()  # no process ends while another still looks for its rows
    raise NumericsError(f"step {step}", f"{what}; the student was not updated", remedy)


@contextmanager
def memory_errors(step: int, config: Config, fullest: Callable[[], str] | None = None) -> Iterator[None]:
    """An allocation that fails becomes one line with what to do. All batches have one shape, and the fullest is tried first (rehearsal.py).

    `fullest` names the row with the most tokens to predict.

    Raises:
        OutOfMemory: names the step and the settings that use less.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise _out_of_memory(step, config, error, f", the fullest from {fullest()}" if fullest is not None else "") from error
        raise


def name_fullest(d: Distillation, micro_batches: list[Batch]) -> str:
    """The source of the row with the most tokens to predict."""
    rows = [row for batch in micro_batches for row in batch.to("cpu").split_rows()]
    return _names(d, [max(rows, key=lambda row: int(count_valid_tokens(row.labels)))])


def _out_of_memory(step: int, config: Config, error: BaseException, fullest: str) -> OutOfMemory:
    trainer = config.trainer
    size = f"with {trainer.micro_batch_size} sequences of {config.data.seq_len} tokens{fullest}"
    remedies = [
        f"halve trainer.micro_batch_size and double trainer.grad_accum_steps (now {trainer.grad_accum_steps}), which changes no result",
        "set trainer.gradient_checkpointing=true",
        "load the teacher with teacher.dtype=bfloat16 or on another teacher.device",
        "shorten data.seq_len",
    ]
    return out_of_memory(error, f"step {step}", size, remedies)


def step_metrics(d: Distillation, sums: dict[str, Tensor], grad_norm: Tensor, num_valid_tokens: Tensor, step: int) -> dict[str, float]:
    """The step's numbers per supervised token over all processes: what was optimised, and each term."""
    values = torch.stack([v.double() for v in sums.values()])
    if d.accelerator.num_processes > 1:
        values = d.accelerator.reduce(values, "sum")
    means = (values / num_valid_tokens.clamp(min=1)).tolist()
    return {
        **{f"train/{name}": value for name, value in zip(sums, means, strict=True)},
        "train/grad_norm": grad_norm.item(),
        "train/learning_rate": learning_rate(step, d.config.trainer),
        "train/tokens": int(num_valid_tokens.item()),
    }


def _teacher_is_finite(d: Distillation, row: Batch, chunk: int = 256) -> bool:
    """Whether a live teacher's distribution over the next token is one at every supervised position; those of files are checked when read."""
    if d.teacher is None:
        return True
    with d.accelerator.autocast():
        targets = d.teacher(row)
        if not isinstance(targets, DenseTargets):
            return True
        starts = range(0, len(targets.hidden), chunk)
        return all(bool(targets.rows(slice(start, start + chunk)).logsumexp(-1).isfinite().all()) for start in starts)


@torch.no_grad()
def _not_finite(rows: list[Batch], row_loss: Callable[[Batch], ObjectiveSums]) -> list[Batch]:
    return [row for row in rows if not torch.isfinite(row_loss(row).loss)]


def _names(d: Distillation, rows: list[Batch], limit: int = 4) -> str:
    """The first of them as their source names them: file and line."""
    names = [name for row in rows[:limit] for name in d.data.train.origins(int(row.row_ids))[:2]]
    return ", ".join(names) + (f" and {len(rows) - limit} more" if len(rows) > limit else "")
