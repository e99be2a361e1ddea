"""Several runs: which belong together, what is averaged, what is set against what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from measured_folders import summary, write_run

from mini_distill.compare import interval
from mini_distill.reporting.comparison import common_name, grouped, overlaid, overview, settings_that_differ, text_differs, trade_offs
from mini_distill.reporting.figures import Figure, Numbered
from mini_distill.reporting.measured import open_measured


def open_all(*folders: Path) -> list[Any]:
    """The folders, read."""
    return [open_measured(folder) for folder in folders]


def test_runs_that_differ_in_the_seed_alone_are_one_with_mean_and_interval(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"a-seed={seed}", f"seed={seed}", nll=nll) for seed, nll in ((0, 3.4), (1, 3.5), (2, 3.9))]
    folders.append(write_run(tmp_path / "b", "objective=jsd", nll=3.1))
    first, second = grouped(open_all(*folders))
    assert (first.name, first.seeds, second.name) == ("a", "0, 1, 2", "b")
    shown = first.figure("eval/student_nll")
    assert shown is not None and shown.value == pytest.approx(3.6) and shown.text == "3.600"
    assert shown.spread == f"± {interval([3.4, 3.5, 3.9]):.3f}" and shown.of.split("\n") == [str(folder) for folder in folders[:3]]
    alone = second.figure("eval/student_nll")
    assert alone is not None and alone.spread == ""


def test_what_says_nothing_of_the_result_does_not_separate_runs(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", "trainer.num_threads=1", "control=true"),
        write_run(tmp_path / "b", "seed=1", "tracking=tensorboard"),
    ]
    assert len(grouped(open_all(*folders))) == 1


def test_the_gap_closed_is_taken_from_the_control_of_the_same_seed(tmp_path: Path) -> None:
    without = {key: value for key, value in summary(3.5, 8).items() if not key.startswith("control/")}
    distilled = [write_run(tmp_path / f"a{seed}", f"seed={seed}", summary=without) for seed in (0, 1)]
    control = write_run(tmp_path / "c0", "objective=ce", summary=without | {"eval/student_nll": 4.5})
    first, second = grouped(open_all(*distilled, control))
    assert [value for _, value in first.values("control/gap_closed")] == [pytest.approx((4.5 - 3.5) / (4.5 - 2.5))]
    assert second.values("control/gap_closed") == []


def test_the_table_has_all_runs_and_the_teacher_they_share(tmp_path: Path) -> None:
    runs = open_all(write_run(tmp_path / "a", nll=3.4), write_run(tmp_path / "b", "objective=jsd", nll=3.6))
    table = overview(grouped(runs))
    assert [row[0] for row in table.rows] == [Numbered(1, "a", "run0"), Numbered(2, "b", "run1"), "teacher"]
    column = list(table.header).index("held-out loss")
    assert [cell.value for row in table.rows if isinstance(cell := row[column], Figure)] == [3.4, 3.6, 2.5]
    other = write_run(tmp_path / "c", "objective=forward_kl", summary=summary(3.2, 8) | {"eval/teacher_nll": 2.4})
    assert "teacher" not in [row[0] for row in overview(grouped([*runs, *open_all(other)])).rows]


def test_only_settings_that_differ_are_shown(tmp_path: Path) -> None:
    same = open_all(write_run(tmp_path / "a"), write_run(tmp_path / "b", "seed=1"))
    assert settings_that_differ(grouped(same)) is None
    table = settings_that_differ(grouped([*same, *open_all(write_run(tmp_path / "c", "objective.temperature=2"))]))
    assert table is not None and [list(row) for row in table.rows] == [["objective.temperature", "1.0", "2.0"]]


def test_losses_of_different_text_are_not_compared_in_silence(tmp_path: Path) -> None:
    usual, objective = write_run(tmp_path / "a"), write_run(tmp_path / "b", "objective=jsd")
    longer = write_run(tmp_path / "c", "data.seq_len=128")
    fewer = write_run(tmp_path / "d", "seed=4", "objective=jsd", summary=summary(3.5, 8) | {"eval/tokens": 100.0})
    assert not text_differs(grouped(open_all(usual, objective)))
    assert text_differs(grouped(open_all(usual, longer)))
    assert text_differs(grouped(open_all(usual, fewer)))


def test_quality_is_set_against_costs_that_differ(tmp_path: Path) -> None:
    small = write_run(tmp_path / "small", "student=mini_2m")
    large = write_run(tmp_path / "large", "student=mini_15m", summary=summary(3.0, 8) | {"model/student_parameters": 15_000_000})
    drawn = trade_offs(grouped(open_all(small, large)))
    assert [drawing.chart.title for drawing in drawn] == ["Quality against size"]  # the times are the same
    assert sorted(re.findall(r"<text style=.font-weight[^>]*>([^<]*)</text>", drawn[0].svg)) == ["1", "2", "teacher"]


def test_of_students_of_one_size_no_costs_are_drawn(tmp_path: Path) -> None:
    slow = write_run(tmp_path / "slow", "objective=jsd", summary=summary(3.0, 8) | {"perf/student_tokens_per_second": 900.0})
    assert trade_offs(grouped(open_all(slow, write_run(tmp_path / "quick")))) == []


def test_times_are_over_the_teachers_of_the_same_run(tmp_path: Path) -> None:
    busy = {key: value / 2 for key, value in summary(3.0, 8).items() if key.endswith("_tokens_per_second")}  # a machine with other work
    small = write_run(tmp_path / "small", "student=mini_2m")
    large = write_run(tmp_path / "large", "student=mini_15m", summary=summary(3.0, 8) | busy | {"model/student_parameters": 15_000_000})
    assert [drawing.chart.title for drawing in trade_offs(grouped(open_all(small, large)))] == ["Quality against size"]


def test_runs_beyond_the_eighth_share_a_colour(tmp_path: Path) -> None:
    groups = grouped(open_all(*(write_run(tmp_path / f"{i}", f"objective.temperature={i + 1}") for i in range(10))))
    assert [group.style for group in groups] == [*(f"run{i}" for i in range(8)), "other", "other"]
    assert {name for name, _, _ in overlaid(groups)[0].legend} == {*map(str, range(1, 9)), "others"}


def test_a_group_is_called_what_its_runs_have_in_common() -> None:
    assert common_name(["small-seed=0", "small-seed=1"]) == "small"
    assert common_name(["seed0", "seed1"]) == "seed0"
    assert common_name(["alone-1"]) == "alone-1"
