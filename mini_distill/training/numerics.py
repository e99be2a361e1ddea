"""Clip, check and report the numbers of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import MiniDistillError, NumericsError, OutOfMemory
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
    bad = (~torch.isfinite(values)).any().float()
    if d.accelerator.num_processes > 1:
        bad = d.accelerator.reduce(bad, "sum")
    if bad.item() == 0:
        return
    names = [name for name, value in zip([*sums, "gradient norm"], values.tolist(), strict=True) if not math.isfinite(value)]
    if names:
        what = f"{', '.join(names)} not finite (rows {_rows(d, micro_batches, row_loss)})"
    else:
        what = "loss or gradient of another process not finite"
    remedy = "Lower trainer.learning_rate, set trainer.max_grad_norm, use trainer.precision=fp32, or look at these rows."
    raise NumericsError(f"step {step}", f"{what}; the student was not updated", remedy)


@contextmanager
def memory_errors(step: int, config: Config) -> Iterator[None]:
    """An allocation that fails becomes one line with what to do. All batches have one shape, so the first step tells.

    Other unexpected errors are noted with the step, which `naming_the_process` puts into their line.

    Raises:
        OutOfMemory: names the step and the settings that use less.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(step, config, error) from error
    except Exception as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch has no class of its own for a CPU's memory
            raise _out_of_memory(step, config, error) from error
        if not isinstance(error, MiniDistillError):
            error.add_note(f"step {step}")
        raise


def _out_of_memory(step: int, config: Config, error: BaseException) -> OutOfMemory:
    trainer = config.trainer
    what = f"out of memory with {trainer.micro_batch_size} sequences of {config.data.seq_len} tokens ({str(error).splitlines()[0][:120]})"
    remedies = [
        f"halve trainer.micro_batch_size and double trainer.grad_accum_steps (now {trainer.grad_accum_steps}), which changes no result",
        "set trainer.gradient_checkpointing=true",
        "load the teacher with teacher.dtype=bfloat16 or on another teacher.device",
        "shorten data.seq_len",
    ]
    return OutOfMemory(f"step {step}", what, "In this order: " + "; ".join(remedies) + ".")


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


@torch.no_grad()
def _rows(d: Distillation, micro_batches: list[Batch], row_loss: Callable[[Batch], ObjectiveSums], limit: int = 4) -> str:
    """The rows whose own loss is not finite; all of the batch when it is the gradient that overflowed."""
    rows = [row for batch in micro_batches for row in batch.split_rows()]
    suspects = [int(row.row_ids) for row in rows if not torch.isfinite(row_loss(row).loss)]
    everyone = [int(row.row_ids) for row in rows]
    guilty = suspects or everyone
    names = [name for number in guilty[:limit] for name in d.data.train.origins(number)[:2]]
    return ", ".join(names) + (f" and {len(guilty) - limit} more" if len(guilty) > limit else "")
