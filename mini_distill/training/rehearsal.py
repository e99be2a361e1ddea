"""The fullest batch is tried first: memory that is not enough is found before the first step, and not after days."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch

from .numerics import memory_errors, name_fullest

if TYPE_CHECKING:
    from ..data.batch import Batch
    from ..distillation import Distillation
    from ..losses.objective import ObjectiveSums

NEVER_REFUSE = ("cpu",)
"""Devices that hand out memory they do not have, and kill whoever uses it: there is nothing to be found out on them."""


def rehearse(d: Distillation, score: Callable[[Batch], ObjectiveSums], step: int) -> None:
    """Run the fullest batch that there can be forward and backward, without an update, while AdamW's moments have their place.

    Batches have one shape, but the states that reach the head are those of supervised tokens, of which a chat may have a handful or
    thousands. Random numbers are seeded at each step, so that nothing of this is left.

    Args:
        d: The run.
        score: The loss of a batch.
        step: The first of the run.

    Raises:
        OutOfMemory: names the row with the most tokens to predict.
    """
    if d.accelerator.device.type in NEVER_REFUSE:
        return
    size = d.config.trainer.micro_batch_size
    batch = d.data.train.batch(list(islice(cycle(index for _, index in d.data.train.fullest(size)), size)))
    with memory_errors(step, d.config, partial(name_fullest, d, [batch])), d.accelerator.no_sync(d.student):
        moments = [torch.empty_like(p) for p in d.language_model.parameters() for _ in range(0 if d.optimizer.state else 2)]
        score(batch.to(d.accelerator.device)).loss.backward()
    del moments
    d.optimizer.zero_grad(set_to_none=True)
