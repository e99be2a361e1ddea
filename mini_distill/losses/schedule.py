"""Weights that change over the optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

Schedule = Mapping[int, float]
"""Optimizer step -> factor; linear between the steps given, constant before the first and after the last."""


def multiplier(schedule: Schedule | None, step: int) -> float:
    """The factor at optimizer step `step` (the first is 1); 1 without a schedule.

    A pure function of the step, so that a run that goes on from a checkpoint has nothing to restore.
    """
    if not schedule:
        return 1.0
    points = sorted(schedule.items())
    for (start, low), (end, high) in pairwise(points):
        if start <= step < end:
            return low + (high - low) * (step - start) / (end - start)
    return points[0][1] if step < points[0][0] else points[-1][1]
