"""Measuring without leaving a trace: whatever runs in here, training goes on as if it had not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def without_side_effects(*models: nn.Module | None) -> Iterator[None]:
    """The models in eval mode, no gradients; afterwards each module's own mode and all global random states are as before.

    The random states are Python's, NumPy's and torch's, on the CPU and on the models' CUDA devices. They matter even though
    evaluation draws nothing itself: a data loader takes a seed from torch's generator, and a user's hook may sample.
    """
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(_cuda_devices(models)), torch.no_grad():
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, training in modes:  # one by one: a part that was frozen in eval mode stays so
            module.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _cuda_devices(models: tuple[nn.Module | None, ...]) -> list[int]:
    devices = {p.device for model in models if model is not None for p in model.parameters()}
    return sorted(d.index for d in devices if d.type == "cuda" and d.index is not None)
