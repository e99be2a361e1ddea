"""The live line of training, and what stands in for it in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from ..onlooker import bar, is_watched

LINES = 20  # over a whole run, where there is no terminal
SECONDS_BETWEEN_LINES = 30.0
SHORT = {"learning_rate": "lr", "tokens_per_second": "tokens/s"}
LEFT_OUT = ("tokens", "seconds")
LEAST_TELLING = ("grad_norm", "learning_rate", "tokens_per_second")  # the first to go where the line is narrow; then from the end
LIVE = "{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class TrainingProgress:
    """`with TrainingProgress(total, first) as progress: progress.update(step, metrics)`.

    In a terminal and in a notebook a live line: step, time gone and left, and of loss terms, speed, learning rate and gradient
    what fits beside them. Elsewhere, as in the log of a cluster job, a plain line every twentieth of the run and at least every
    30 seconds.

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
        self._bar = bar(total=total_steps, initial=done, desc="train", bar_format=LIVE, show=is_main)
        self._start_step, self._start_time = done, time.monotonic()
        self._said_step, self._said_time = done, self._start_time

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done; of `metrics`, those of `train/` and `perf/`."""
        if self._live:
            self._bar.set_postfix_str(describe(metrics, self._room()), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._is_main and self._is_due(step):
            self._said_step, self._said_time = step, time.monotonic()
            print(f"step {step}/{self._total}  {describe(metrics)}  {self._time_left(step)} left", file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """A line of its own, above the live one."""
        if self._is_main:
            tqdm.write(text, file=sys.stderr)

    def _room(self) -> int | None:
        """Columns beside a bar of ten; None where nobody knows how wide the line is."""
        look = self._bar.format_dict
        if not look["ncols"]:
            return None
        return int(look["ncols"]) - len(tqdm.format_meter(**{**look, "ncols": None, "postfix": None})) - len(", ")

    def _is_due(self, step: int) -> bool:
        many_steps = (step - self._said_step) * LINES >= self._total
        return step >= self._total or many_steps or time.monotonic() - self._said_time >= SECONDS_BETWEEN_LINES

    def _time_left(self, step: int) -> str:
        pace = (time.monotonic() - self._start_time) / max(1, step - self._start_step)
        return tqdm.format_interval(pace * (self._total - step))


def describe(metrics: Mapping[str, float], room: int | None = None) -> str:
    """`loss 2.31, forward_kl 0.41, ce 1.9, lr 0.001, tokens/s 5200`, or as much of it as fits into `room` characters."""
    shown = {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(("train/", "perf/"))}
    digits = 4 if room is None else 3
    parts = {name: f"{SHORT.get(name, name)} {_number(value, digits)}" for name, value in shown.items() if name not in LEFT_OUT}
    while room is not None and parts and len(", ".join(parts.values())) > room:
        del parts[next((name for name in LEAST_TELLING if name in parts), list(parts)[-1])]
    return ", ".join(parts.values())


def _number(value: float, digits: int) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
