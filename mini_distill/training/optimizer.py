"""AdamW and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..config import TrainerConfig


def build_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; norms and biases, which have one axis, are left alone."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: TrainerConfig) -> float:
    """The learning rate of optimizer step `step` (the first is 1): a pure function, so that there is no schedule to save.

    Linear warm-up from 0 over `warmup_steps`, then `cosine` or `linear` down to `min_lr_ratio` of the peak at `max_steps`; `wsd`
    stays at the peak and decays linearly over the last `decay_fraction` of the steps (Hu et al. 2024, arXiv 2404.06395).
    """
    start = warmup_steps(config)
    if step <= start:
        return config.learning_rate * step / start
    if config.schedule == "wsd":
        start = max(start, round(config.max_steps * (1 - config.decay_fraction)))
    progress = min(1.0, max(0.0, (step - start) / max(1, config.max_steps - start)))
    falling = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "wsd": 1 - progress,
        "constant": 1.0,
    }[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.min_lr_ratio
    return config.learning_rate * (floor + (1 - floor) * falling)


def warmup_steps(config: TrainerConfig) -> int:
    """Those that were asked for, or a tenth of all, at most 500."""
    return min(config.max_steps // 10, 500) if config.warmup_steps is None else config.warmup_steps


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Every group gets the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
