"""Several runs: which belong together, what is averaged, what is set against what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from measured_folders import summary, write_run

from mini_distill.compare import interval
from mini_distill.report import report
from mini_distill.reporting.comparison import (
    common_name,
    costs,
    grouped,
    overlaid,
    overview,
    same_objective,
    settings_that_differ,
    trade_offs,
    warning_of_text,
)
from mini_distill.reporting.figures import Figure, Numbered
from mini_distill.reporting.measured import open_measured
from mini_distill.reporting.verdict import answers_of_groups, margin

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


def test_a_run_on_a_cache_has_the_control_that_was_trained_beside_the_live_teacher(tmp_path: Path) -> None:
    """Three settings on caches were `not measured`, with the control of each seed on the same page."""
    without = {key: value for key, value in summary(3.5, 8).items() if not key.startswith("control/")}
    run = write_run(tmp_path / "a", "teacher.cache_dir=caches/topk", "teacher.cache_k=8", summary=without)
    control = write_run(tmp_path / "c", "objective=ce", summary=without | {"eval/student_nll": 4.5})
    other = write_run(tmp_path / "o", "teacher.revision=abc", summary=without)
    cached, _, of_another_teacher = grouped(open_all(run, control, other))
    assert cached.mean("control/gap_closed") == pytest.approx(0.5) and of_another_teacher.mean("control/gap_closed") is None


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
    speed = cost.rows[0][list(cost.header).index("reading speed ÷ teacher's")]
    assert isinstance(speed, Figure) and speed.spread == ""  # the same in both; seeds have nothing to do with it
    assert costs(grouped(open_all(write_run(tmp_path / "c", summary={"eval/student_nll": 3.0})))) is None


def test_over_seeds_the_answer_is_as_sure_as_its_interval(tmp_path: Path) -> None:
    def answer(name: str, gains: list[float]) -> str:
        figures = [summary(3.5, 8) | {"control/student_nll": 3.5 + gain} for gain in gains]
        runs = [write_run(tmp_path / f"{name}{i}", f"seed={i}", summary=of_run) for i, of_run in enumerate(figures)]
        first = answers_of_groups(grouped(open_all(*runs)))[0]
        return "".join(part.text + part.spread if isinstance(part, Figure) else part for part in first.parts)

    assert answer("sure", [0.40, 0.41, 0.42]).startswith("Yes: on held-out text the student's loss is 0.410± 0.025 nats per token lower")
    assert answer("unsure", [0.4, -0.3, 0.3]).startswith("Not clear:")
    assert "interval of the difference, paired by seed, which includes no difference at all: more seeds might tell." in answer(
        "torn", [0.4, -0.3, 0.3]
    )
    assert answer("harm", [-0.40, -0.41, -0.42]).startswith("No, it did harm:")


def test_the_table_of_costs_has_speeds_over_the_teachers_of_the_same_run(tmp_path: Path) -> None:
    """Students of one architecture, timed at different moments, seemed twice as fast as each other; the teacher's speed was one run's."""
    busy = {key: value / 2 for key, value in summary(3.5, 8).items() if key.endswith("tokens_per_second")}
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", "objective=jsd", summary=summary(3.4, 8) | busy)
    cost = costs(grouped(open_all(*runs)))
    assert cost is not None and list(cost.header) == [
        "run",
        "parameters",
        "reading speed ÷ teacher's",
        "writing speed ÷ teacher's",
        "steps",
    ]
    assert [[cell.text for cell in row[2:4] if isinstance(cell, Figure)] for row in cost.rows] == [["3.00", "3.00"], ["3.00", "3.00"], []]
    untimed = {key: value for key, value in summary(3.5, 8).items() if not key.startswith("perf/teacher")}
    alone = costs(grouped(open_all(write_run(tmp_path / "c", summary=untimed))))
    assert alone is not None and list(alone.header) == ["run", "parameters", "steps"]


def test_the_leader_is_as_far_ahead_as_seeds_can_tell(tmp_path: Path) -> None:
    """`The best is …` stood over a lead of 0.001 nats, of one seed each."""

    def said(name: str, *losses: tuple[float, float]) -> str:
        folders = [
            write_run(tmp_path / name / f"{objective}{seed}", f"objective={objective}", f"seed={seed}", nll=nll)
            for seed, pair in enumerate(losses)
            for objective, nll in zip(("jsd", "kl_ce"), pair, strict=True)
        ]
        return margin(grouped(open_all(*folders)), "eval/student_nll")

    assert said("one", (3.0, 3.5)) == ", ahead of the next by 0.500, which one seed cannot tell from chance"
    assert said("far", (3.0, 3.5), (3.2, 3.71), (3.1, 3.59)) == ", ahead of the next by 0.500 ± 0.025, seed by seed"
    assert said("near", (3.0, 3.1), (3.2, 3.15), (3.1, 3.1)).endswith("seed by seed, which may be chance")
    others = [write_run(tmp_path / f"x{seed}", f"seed={seed}", f"objective={'jsd' if seed < 2 else 'kl_ce'}") for seed in range(4)]
    assert margin(grouped(open_all(*others)), "eval/student_nll").endswith("over different seeds, so that it may be chance")
    assert margin(grouped(open_all(write_run(tmp_path / "alone"))), "eval/student_nll") == ""
    shares = grouped(open_all(*(write_run(tmp_path / name, f"objective={name}") for name in ("jsd", "kl_ce"))))
    assert margin(shares, "eval/top1_agreement").startswith(", ahead of the next by 0.0 points")


def test_the_number_in_the_lead_is_that_of_the_table(tmp_path: Path) -> None:
    page = report([write_run(tmp_path / "a", nll=3.6), write_run(tmp_path / "b", "objective=jsd", nll=3.4)], tmp_path / "page.html")
    lead = page.read_text(encoding="utf-8").partition('<p class="lead">')[2].partition("</p>")[0]
    assert '<span class="number run1">2</span> <bdi>jsd</bdi>' in lead and "nats per token, ahead of the next by 0.200" in lead


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
    assert not warning_of_text(groups) and overview(groups).rows[-1][0] == "teacher"


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


def test_an_empty_mapping_is_no_setting_of_its_own(tmp_path: Path) -> None:
    """`objective.divergence_options` was `{}` beside a dash, above a line for the option that one of both had."""
    runs = open_all(write_run(tmp_path / "a"), write_run(tmp_path / "b", "objective.divergence_options={jsd_beta: 0.25}"))
    table = settings_that_differ(grouped(runs))
    assert table is not None and [list(row) for row in table.rows] == [["objective.divergence_options.jsd_beta", None, "0.25"]]
    terms = grouped(open_all(write_run(tmp_path / "c"), write_run(tmp_path / "d", "objective.terms={jsd: {}}")))
    assert not same_objective(terms)  # a term of which nothing is said is one


def test_two_measurements_are_marked_and_said_to_be_two(tmp_path: Path) -> None:
    """Straight lines through two points seemed to be curves."""
    ends = overlaid(grouped(open_all(*(write_run(tmp_path / name, f"objective={name}", steps=2) for name in ("jsd", "ce")))))[0]
    assert (
        ends.chart.note == "Measured only at the first and at the last step shown." and ends.svg.count("<title>") == 5
    )  # and the teacher's level
    more = overlaid(grouped(open_all(*(write_run(tmp_path / f"{name}8", f"objective={name}") for name in ("jsd", "ce")))))[0]
    assert more.chart.note == ""


def test_losses_of_different_text_are_not_compared_in_silence(tmp_path: Path) -> None:
    usual, objective = write_run(tmp_path / "a"), write_run(tmp_path / "b", "objective=jsd")
    longer = write_run(tmp_path / "c", "data.seq_len=128")
    fewer = write_run(tmp_path / "d", "seed=4", "objective=jsd", summary=summary(3.5, 8) | {"eval/tokens": 100.0})
    assert not warning_of_text(grouped(open_all(usual, objective)))
    assert warning_of_text(grouped(open_all(usual, longer)))
    assert warning_of_text(grouped(open_all(usual, fewer)))


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
