"""The live line of training, and what stands in for it in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from ..onlooker import in_notebook, is_watched

LINES = 20  # over a whole run, where there is no terminal
SECONDS_BETWEEN_LINES = 30.0
SHORT = {"learning_rate": "lr", "tokens_per_second": "tokens/s"}
LEFT_OUT = ("tokens", "seconds")
NOTEBOOK_COLUMNS = 120  # a cell has no width to ask for


class TrainingProgress:
    """`with TrainingProgress(total, first) as progress: progress.update(step, metrics)`.

    In a terminal and in a notebook a live line: step, loss terms, learning rate, tokens per second, time left. Elsewhere, as in
    the log of a cluster job, a plain line every twentieth of the run and at least every 30 seconds.

    Args:
        total_steps: The last step.
        first_step: The first step that will be done; above 1 for a run that goes on.
        is_main: Other processes show nothing.
    """

    def __init__(self, total_steps: int, first_step: int = 1, is_main: bool = True) -> None:
        self._total = total_steps
        self._is_main = is_main
        self._live = is_main and is_watched()
        done = first_step - 1
        look: dict[str, Any] = {"ncols": NOTEBOOK_COLUMNS, "mininterval": 0.5} if in_notebook() else {"dynamic_ncols": True}
        self._bar = tqdm(total=total_steps, initial=done, desc="train", unit="step", disable=not self._live, file=sys.stderr, **look)
        self._start_step, self._start_time = done, time.monotonic()
        self._said_step, self._said_time = done, self._start_time

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done; of `metrics`, those of `train/` and `perf/`."""
        if self._live:
            self._bar.set_postfix_str(describe(metrics), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._is_main and self._is_due(step):
            self._said_step, self._said_time = step, time.monotonic()
            print(f"step {step}/{self._total}  {describe(metrics)}  {self._time_left(step)} left", file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """A line of its own, above the live one."""
        if self._is_main:
            tqdm.write(text, file=sys.stderr)

    def _is_due(self, step: int) -> bool:
        many_steps = (step - self._said_step) * LINES >= self._total
        return step >= self._total or many_steps or time.monotonic() - self._said_time >= SECONDS_BETWEEN_LINES

    def _time_left(self, step: int) -> str:
        pace = (time.monotonic() - self._start_time) / max(1, step - self._start_step)
        return tqdm.format_interval(pace * (self._total - step))


def describe(metrics: Mapping[str, float]) -> str:
    """`loss 2.31, forward_kl 0.41, ce 1.9, lr 0.001, tokens/s 5200`."""
    shown = {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(("train/", "perf/"))}
    return ", ".join(f"{SHORT.get(name, name)} {_number(value)}" for name, value in shown.items() if name not in LEFT_OUT)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
