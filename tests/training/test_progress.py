from __future__ import annotations

import io
import sys
from types import ModuleType, SimpleNamespace

import pytest

from mini_distill.onlooker import CELL_COLUMNS, bar
from mini_distill.training import progress as module
from mini_distill.training.progress import TrainingProgress, describe

METRICS = {
    "train/loss": 2.34567,
    "train/forward_kl": 0.25,
    "train/learning_rate": 1e-3,
    "perf/tokens_per_second": 5234.6,
    "eval/ce": 1.0,
    "train/tokens": 900,
}
ALL = {"train/loss": 2.34567, "train/forward_kl": 0.25, "train/ce": 4.4413, "train/grad_norm": 1.1873, "train/learning_rate": 1e-3}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """`stream` as stderr; within the test, as pytest puts its own there before each."""
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_the_line_shows_losses_learning_rate_and_speed() -> None:
    assert describe(METRICS) == "loss 2.346, forward_kl 0.25, lr 0.001, tokens/s 5235"


def test_a_log_file_gets_about_twenty_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = use(io.StringIO(), monkeypatch)
    with TrainingProgress(1000, first_step=1) as progress:
        for step in range(1, 1001):
            progress.update(step, METRICS)
    lines = stderr.getvalue().splitlines()
    assert len(lines) == 20 and "\r" not in stderr.getvalue()
    assert (
        lines[0].startswith("step 50/1000  loss 2.346, ") and lines[-1].startswith("step 1000/1000 ") and lines[-1].endswith(" 00:00 left")
    )


def test_slow_steps_are_reported_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = use(io.StringIO(), monkeypatch)
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with TrainingProgress(1000, first_step=401) as progress:
        for step in range(401, 411):
            now[0] += 16.0
            progress.update(step, METRICS)
    lines = stderr.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/1000" for step in (402, 404, 406, 408, 410)]
    assert lines[0].endswith("  2:39:28 left")  # 598 steps of 16 seconds, though 400 were done by an earlier process


def test_a_terminal_gets_one_live_line_that_starts_where_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = use(Terminal(), monkeypatch)
    with TrainingProgress(10, first_step=6) as progress:
        progress.message("evaluating …")
        for step in range(6, 11):
            progress.update(step, METRICS)
    text = stderr.getvalue()
    assert "\r" in text and "5/10" in text and "10/10" in text and "evaluating …\n" in text and "loss 2.346" in text


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (200, "loss 2.35, forward_kl 0.25, ce 4.44, grad_norm 1.19, lr 0.001, tokens/s 5235"),
        (100, "loss 2.35, forward_kl 0.25, ce 4.44, lr 0.001, tokens/s 5235"),
        (80, "loss 2.35, forward_kl 0.25, ce 4.44"),
        (60, "loss 2.35"),
    ],
)
def test_a_narrow_terminal_gets_fewer_terms_and_still_a_bar(columns: int, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terms took the whole line: a bar of one column, and the last of them cut off, in a terminal of a hundred columns."""
    stderr = use(Terminal(), monkeypatch)
    with TrainingProgress(200, first_step=1) as progress:
        progress._bar.dynamic_ncols = lambda _: (columns, 24)
        progress.update(100, {**ALL, "perf/tokens_per_second": 5234.6})
    line = stderr.getvalue().rstrip("\n").split("\r")[-1]
    assert line.endswith(f", {shown}]") and len(line) == columns and line.partition("|")[2].index("|") >= 8


def test_a_notebook_gets_one_line_whatever_is_within_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation left a stale line of training and two of its own: a cell does not go up to where the outer bar is."""
    pytest.importorskip("IPython", reason="needs the extra mini_distill[notebooks]")
    lines = displays(monkeypatch)
    with TrainingProgress(10) as progress:
        for step in range(1, 11):
            progress.update(step, METRICS)
            for _ in bar(range(3), desc="evaluating", leave=False):
                pass
    ((*before, last),) = lines
    assert any("evaluating" in text for text in before) and "10/10" in last and "loss 2.35" in last and len(last) <= CELL_COLUMNS
    assert not sys.stderr.getvalue()  # type: ignore[attr-defined]  # it is on red in a cell


def displays(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Pretends that stderr is a cell's; what each display that is made shows, one text after the other."""
    kernel = ModuleType("ipykernel.iostream")
    kernel.OutStream = io.StringIO  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ipykernel.iostream", kernel)
    use(io.StringIO(), monkeypatch)
    made: list[list[str]] = []

    def display(data: dict[str, str], **_: object) -> SimpleNamespace:
        made.append(texts := [data["text/plain"]])
        return SimpleNamespace(update=lambda data, **_: texts.append(data["text/plain"]))

    monkeypatch.setattr("IPython.display.display", display)
    return made


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_other_processes_show_nothing(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = use(stream(), monkeypatch)
    with TrainingProgress(3, is_main=False) as progress:
        progress.message("hello")
        for step in range(1, 4):
            progress.update(step, METRICS)
    assert stderr.getvalue() == ""
