"""Several runs: which belong together, what is averaged, what is set against what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from measured_folders import summary, write_run

from mini_distill.compare import interval
from mini_distill.reporting.comparison import (
    common_name,
    costs,
    grouped,
    lead,
    overlaid,
    overview,
    same_objective,
    settings_that_differ,
    text_differs,
    trade_offs,
)
from mini_distill.reporting.figures import Figure, Numbered
from mini_distill.reporting.measured import open_measured
from mini_distill.reporting.verdict import answers_of_groups

JSD = "jsd"
ENDS = (("", "objective=kl_ce"), ("-control", "objective=ce"))


def open_all(*folders: Path) -> list[Any]:
    """The folders, read."""
    return [open_measured(folder) for folder in folders]


def test_runs_that_differ_in_the_seed_alone_are_one_with_mean_and_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [write_run(tmp_path / f"a-seed={seed}", f"seed={seed}", nll=nll) for seed, nll in ((0, 3.4), (1, 3.5), (2, 3.9))]
    folders.append(write_run(tmp_path / "b", "objective=jsd", nll=3.1))
    first, second = grouped(open_all(*folders))
    assert (first.name, first.seeds, second.name) == ("a", "0, 1, 2", "b")
    shown = first.figure("eval/student_nll")
    assert shown is not None and shown.value == pytest.approx(3.6) and shown.text == "3.600"
    assert shown.spread == f"± {interval([3.4, 3.5, 3.9]):.3f}" and shown.of.split("\n") == [folder.name for folder in folders[:3]]
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


def test_of_a_control_trained_apart_the_page_says_from_which_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    without = {key: value for key, value in summary(3.5, 8).items() if not key.startswith("control/")}
    run = write_run(tmp_path / "a", summary=without)
    control = write_run(tmp_path / "c", "objective=ce", summary=without | {"eval/student_nll": 4.5})
    gap = grouped(open_all(run, control))[0].figure("control/gap_closed")
    assert gap is not None and (gap.text, gap.keys, gap.of) == ("50.0 %", "control/gap_closed", "a\nc")


def test_runs_are_told_apart_by_their_objective_as_compare_does(tmp_path: Path) -> None:
    """`s0 s0-control s1 s1-control`: the letters that the folders share named both groups `s`, student and control alike."""
    folders = [write_run(tmp_path / f"s{seed}{end}", f"seed={seed}", objective) for seed in (0, 1) for end, objective in ENDS]
    student, control = grouped(open_all(*folders))
    assert (student.label, control.label) == ("0.5 forward_kl + 0.5 ce", "ce (control)")
    assert (student.name, control.name, control.is_control) == ("s", "s…-control", True)
    alike = grouped(open_all(write_run(tmp_path / "small"), write_run(tmp_path / "long", "trainer.max_steps=9")))
    assert [group.label for group in alike] == ["small", "long"]
    mixed = grouped(open_all(write_run(tmp_path / "x"), write_run(tmp_path / "y", "data.seq_len=64"), folders[1]))
    assert [group.label for group in mixed] == ["0.5 forward_kl + 0.5 ce (x)", "0.5 forward_kl + 0.5 ce (y)", "ce (control)"]


def test_training_losses_of_different_objectives_are_not_on_one_axis(tmp_path: Path) -> None:
    """The control minimises ce alone and the student a mixture: of their losses, in one chart, the higher seemed the worse."""
    groups = grouped(open_all(write_run(tmp_path / "a"), write_run(tmp_path / "b", "objective=ce")))
    assert not same_objective(groups)
    assert [drawing.chart.title for drawing in overlaid(groups)] == ["Held-out loss", "KL to the teacher", "Top-1 agreement"]
    alike = grouped(open_all(write_run(tmp_path / "c"), write_run(tmp_path / "d", "trainer.max_steps=9")))
    assert same_objective(alike) and "Training loss" in [drawing.chart.title for drawing in overlaid(alike)]


def test_quality_and_cost_are_tables_of_their_own_so_that_no_column_is_cut_off(tmp_path: Path) -> None:
    """Ten columns in one table did not fit a screen of 1280 pixels."""
    groups = grouped(open_all(write_run(tmp_path / "a"), write_run(tmp_path / "b", "seed=1", nll=3.6)))
    cost = costs(groups)
    assert cost is not None and "parameters" in cost.header and "parameters" not in overview(groups).header
    assert len(overview(groups).header) <= 8 and len(cost.header) <= 6
    speed, of_run = cost.rows[0][list(cost.header).index("reading speed")], groups[0].members[0]
    assert isinstance(speed, Figure) and speed.spread == ""  # the same in both; seeds have nothing to do with it
    student, teacher = (of_run.value(f"perf/{model}_tokens_per_second") for model in ("student", "teacher"))
    assert (
        student and teacher and speed.value == pytest.approx(student / teacher)
    )  # students of one size, timed on two days, seemed to differ
    assert costs(grouped(open_all(write_run(tmp_path / "c", summary={"eval/student_nll": 3.0})))) is None


def test_a_control_is_one_also_of_the_runs_whose_targets_came_from_elsewhere(tmp_path: Path) -> None:
    """Beside runs from a cache lay the control of all of them, and the page said that there was none."""
    bare = summary(3.5, 8) | {"eval/teacher_nll": 2.5}
    bare = {key: value for key, value in bare.items() if not key.startswith("control/")}
    taught = write_run(tmp_path / "cached", "teacher.cache_dir=targets", "objective=kl_ce", summary=bare)
    control = write_run(tmp_path / "alone", "objective=ce", summary=bare | {"eval/student_nll": 3.9})
    (group, _) = grouped(open_all(taught, control))
    assert group.mean("control/student_nll") == pytest.approx(3.9) and group.mean("control/gap_closed") == pytest.approx(0.4 / 1.4)
    other = write_run(tmp_path / "other", "objective=ce", "data.path=elsewhere", summary=bare)
    assert grouped(open_all(taught, other))[0].mean("control/student_nll") is None


def test_the_leader_is_not_surer_than_its_lead(tmp_path: Path) -> None:
    def lead_of(*losses: tuple[str, float]) -> str:
        folder = tmp_path / str(losses)
        runs = [write_run(folder / str(i), setting, f"seed={i}", nll=nll) for i, (setting, nll) in enumerate(losses)]
        groups = grouped(open_all(*runs))
        return lead(groups[0], groups, "eval/student_nll")

    a, b = "objective=kl_ce", "objective=jsd"
    assert lead_of((a, 3.4)) == ""
    assert lead_of((a, 3.4), (b, 3.5)) == ", ahead of the next by 0.100, which one seed cannot tell from chance"
    assert lead_of((a, 3.4), (a, 3.5), (b, 3.45), (b, 3.56)) == ", ahead of the next by 0.055, less than the seeds differ"
    assert lead_of((a, 3.4), (b, 3.4001)) == ", level with the next"
    assert lead_of((a, 3.40), (a, 3.41), (b, 3.90), (b, 3.91)) == ", ahead of the next by 0.500"


def test_over_seeds_the_answer_is_as_sure_as_its_interval(tmp_path: Path) -> None:
    def answer(name: str, gains: list[float]) -> str:
        figures = [summary(3.5, 8) | {"control/student_nll": 3.5 + gain} for gain in gains]
        runs = [write_run(tmp_path / f"{name}{i}", f"seed={i}", summary=of_run) for i, of_run in enumerate(figures)]
        first = answers_of_groups(grouped(open_all(*runs)))[0]
        return "".join(part.text + part.spread if isinstance(part, Figure) else part for part in first.parts)

    assert answer("sure", [0.40, 0.41, 0.42]).startswith("Yes: on held-out text the student's loss is 0.410± 0.025 nats per token lower")
    assert answer("unsure", [0.4, -0.3, 0.3]).startswith("Not clear:")
    assert "interval of the difference, seed by seed, which includes no difference at all: more seeds might tell." in answer(
        "torn", [0.4, -0.3, 0.3]
    )
    assert answer("harm", [-0.40, -0.41, -0.42]).startswith("No, it did harm:")


def test_of_several_taught_settings_each_is_answered(tmp_path: Path) -> None:
    groups = grouped(open_all(*(write_run(tmp_path / name, f"objective={name}") for name in ("kl_ce", "jsd", "ce"))))
    assert [answer.question for answer in answers_of_groups(groups)] == [
        "Did distillation help?",
        Numbered(1, "0.5 forward_kl + 0.5 ce", "run0"),
        Numbered(2, JSD, "run1"),
    ]


def test_a_run_without_figures_spoils_no_comparison(tmp_path: Path) -> None:
    """A killed run among others had no held-out tokens, so that all were said to be measured on different text."""
    runs = open_all(write_run(tmp_path / "a"), write_run(tmp_path / "b", "objective=jsd"))
    killed = open_all(write_run(tmp_path / "k", "objective.temperature=3", summary=None))
    groups = grouped([*killed, *runs])
    assert not text_differs(groups) and overview(groups).rows[-1][0] == "teacher"


def test_the_table_has_all_runs_and_the_teacher_they_share(tmp_path: Path) -> None:
    runs = open_all(write_run(tmp_path / "a", nll=3.4), write_run(tmp_path / "b", "objective=jsd", nll=3.6))
    table = overview(grouped(runs))
    assert [row[0] for row in table.rows] == [Numbered(1, "0.5 forward_kl + 0.5 ce", "run0"), Numbered(2, JSD, "run1"), "teacher"]
    column = list(table.header).index("held-out loss\u00a0↓")
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
    assert {name.partition(":")[0] for name, _, _ in overlaid(groups)[0].legend} == {*map(str, range(1, 9)), "others", "teacher"}


def test_a_group_is_called_what_its_runs_have_in_common() -> None:
    assert common_name(["small-seed=0", "small-seed=1"]) == "small"
    assert common_name(["seed0", "seed1"]) == "seed0"
    assert common_name(["alone-1"]) == "alone-1"
    assert common_name(["s0-control", "s1-control"]) == "s…-control"
