"""How large and how fast the models are."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.batch import Batch
from ..models.head import LanguageModel
from .isolation import without_side_effects

MIN_ROUNDS = 3
MAX_ROUNDS = 50


def num_parameters(model: nn.Module) -> int:
    """Weights of the model; one that two modules share, such as a tied output head, counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def device_name(device: torch.device) -> str:
    """What speeds are those of: the GPU's name, or the processor's as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # where there is such a file, Python knows no more than the architecture
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or device.type


def forward_tokens_per_second(
    models: Mapping[str, PreTrainedModel],
    batch: Batch,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    seconds: float = 2.0,
) -> dict[str, float]:
    """Tokens that each model reads in a second: the median over forward passes on one batch, in turn.

    It measures reading a prompt of this shape in this process on this machine, padding included, with the output head applied
    once. It is no measure of generation, where each token waits for the one before, nor of a serving engine. The models take
    turns, so that what else the machine does hits all of them alike; compare the numbers of one call, not of two.

    Args:
        models: By name.
        batch: The sequences to read, with at least one supervised position.
        autocast: Makes the context of a forward pass (mixed precision, or nothing).
        seconds: Time to spend in all, after a warm-up pass each; at least three rounds are timed whatever they take, and fifty do.

    Returns:
        Name -> tokens per second.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with without_side_effects(*models.values()):
        wrapped = {name: LanguageModel(model, name) for name, model in models.items()}
        for model in wrapped.values():
            _seconds_to_read(model, batch, autocast)  # warm-up: allocations, kernel choice
        end = time.perf_counter() + seconds
        for number in range(MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() >= end:
                break
            for name, model in wrapped.items():
                times[name].append(_seconds_to_read(model, batch, autocast))
    return {name: batch.input_ids.numel() / median(values) for name, values in times.items()}


def _seconds_to_read(model: LanguageModel, batch: Batch, autocast: Callable[[], AbstractContextManager[Any]]) -> float:
    batch = batch.to(next(model.parameters()).device)
    start = time.perf_counter()
    with autocast():
        model.head.logits(model.hidden(batch)[-1:]).cpu()  # the copy waits for the device to finish
    return time.perf_counter() - start
