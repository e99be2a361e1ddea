"""A sweep's folder: the ranking, the effect of a setting, what failed, the command of the best."""

from __future__ import annotations

from pathlib import Path

import pytest
from measured_folders import status, summary, write_run

from mini_distill.errors import ConfigError
from mini_distill.report import report
from mini_distill.reporting.sweep import effects, is_full_grid, is_sweep, open_sweep, runs_below


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two temperatures, two weights, nested one folder a temperature; better with either, temperature 2 and weight 0.9."""
    for temperature, worse in ((1, 0.3), (2, 0.0)):
        for weight, more in ((0.5, 0.1), (0.9, 0.0)):
            overrides = f"objective.temperature={temperature}", f"objective.kl_weight={weight}"
            write_run(tmp_path / "sweep" / f"T{temperature}" / f"w{weight}", *overrides, nll=3.0 + worse + more)
    return tmp_path / "sweep"


def test_runs_are_found_at_any_depth_and_none_within_a_run(sweep: Path) -> None:
    write_run(sweep / "T1" / "w0.5" / "evaluation", status=None)
    write_run(sweep / "T1" / "w0.5.old-1")
    (sweep / "logs").mkdir()
    assert [str(run.relative_to(sweep)) for run in runs_below(sweep)] == ["T1/w0.5", "T1/w0.9", "T2/w0.5", "T2/w0.9"]
    assert is_sweep(sweep) and is_sweep(sweep / "T1") and not is_sweep(sweep / "T1" / "w0.5") and not is_sweep(sweep / "logs")


def test_runs_are_ranked_by_held_out_loss_or_another_metric(sweep: Path) -> None:
    found = open_sweep(sweep)
    assert [group.name for group in found.groups] == ["w0.9", "w0.5", "w0.9", "w0.5"] and not found.highest
    assert [group.mean("eval/student_nll") for group in found.groups] == sorted(group.mean("eval/student_nll") for group in found.groups)
    other = open_sweep(sweep, "eval/top1_agreement")
    assert other.highest and other.best.members[0].path == found.best.members[0].path
    assert [group.number for group in other.groups] == [1, 2, 3, 4]


def test_the_runs_own_choice_of_the_best_ranks_them_as_it_guides_a_search(tmp_path: Path) -> None:
    """The page ranked by the held-out loss whatever the runs were told, and named another best than Optuna had found."""
    for name, temperature, nll in (("a", 1, 3.0), ("b", 2, 3.1)):
        figures = summary(nll, 8) | {"eval/top1_agreement": nll / 10, "eval/layers": nll}
        for sweep, best in (("agree", "eval/top1_agreement"), ("hook", "eval/layers")):
            choice = f"evaluation.best_metric={best}", "evaluation.best_is=highest", f"objective.temperature={temperature}"
            write_run(tmp_path / sweep / name, *choice, summary=figures)
        write_run(tmp_path / "disagree" / name, f"evaluation.best_is={'highest' if name == 'a' else 'lowest'}", summary=figures)
    found = {name: open_sweep(tmp_path / name) for name in ("agree", "hook", "disagree")}
    assert {name: (sweep.metric, sweep.highest, sweep.best.name) for name, sweep in found.items()} == {
        "agree": ("eval/top1_agreement", True, "b"),
        "hook": ("eval/layers", True, "b"),
        "disagree": ("eval/student_nll", False, "a"),
    }
    assert open_sweep(tmp_path / "hook", "eval/layers").highest and not open_sweep(tmp_path / "hook", "eval/forward_kl").highest


def test_the_effect_of_a_setting_is_the_mean_over_the_others(sweep: Path) -> None:
    found = open_sweep(sweep)
    temperature, weight = sorted(effects(found), key=lambda drawing: drawing.chart.title, reverse=True)
    assert is_full_grid(found)
    assert (temperature.chart.title, list(temperature.chart.categories)) == ("objective.temperature", ["1.0", "2.0"])
    assert temperature.alt.startswith("objective.temperature: held-out loss, nats per token against objective.temperature.")
    assert ">held-out loss<" in temperature.svg and ">nats per token<" in temperature.svg  # each whole, in a line of its own
    assert [y for _, y in temperature.chart.series[0].points] == pytest.approx([3.35, 3.05])
    assert [y for _, y in weight.chart.series[0].points] == pytest.approx([3.25, 3.15])


def test_a_grid_with_a_hole_is_said_to_have_one(sweep: Path) -> None:
    write_run(sweep / "T4" / "w0.9", "objective.temperature=4", "objective.kl_weight=0.9")
    assert not is_full_grid(open_sweep(sweep))
    assert "Not every combination is there" in report([sweep]).read_text(encoding="utf-8")


def test_a_job_that_failed_is_a_hole_though_nothing_else_is_missing(sweep: Path) -> None:
    """With both jobs of a third temperature missing, the page said that every combination is there."""
    write_run(sweep / "T4" / "w0.9", "objective.temperature=4", "objective.kl_weight=0.9", summary=None, status=status(0, "failed"))
    assert not is_full_grid(open_sweep(sweep))


def test_presets_stand_for_the_settings_they_bring(tmp_path: Path) -> None:
    for student, size in (("mini_2m", 2e6), ("mini_125m", 1e8), ("mini_15m", 1e7)):
        for seq_len in (128, 256):
            figures = summary(3.5, 8) | {"model/student_parameters": size}
            write_run(tmp_path / "sweep" / f"{student}-{seq_len}", f"student={student}", f"data.seq_len={seq_len}", summary=figures)
    found = open_sweep(tmp_path / "sweep")
    assert {factor.key: set(factor.values) for factor in found.factors} == {
        "student": {"mini_2m", "mini_15m", "mini_125m"},
        "data.seq_len": {"128", "256"},
    }
    assert list(effects(found)[0].chart.categories) == ["mini_2m", "mini_15m", "mini_125m"]  # by size
    assert is_full_grid(found)


def test_names_have_no_order_to_be_joined_by_a_line(tmp_path: Path) -> None:
    """A line ran from one preset to the next, as if there were something between them."""
    for student in ("mini_2m", "mini_15m"):
        for rate in (0.1, 0.2):
            write_run(tmp_path / "sweep" / f"{student}-{rate}", f"student={student}", f"trainer.learning_rate={rate}")
    joined = {drawing.chart.title: drawing.chart.series[0].line for drawing in effects(open_sweep(tmp_path / "sweep"))}
    assert joined == {"student": False, "trainer.learning_rate": True}


def test_the_command_names_no_teacher_that_was_not_there(tmp_path: Path) -> None:
    """All presets of `kind: hf` are as near to a teacher of one's own, and gpt2 came first in the alphabet."""
    write_run(tmp_path / "sweep" / "a", "teacher=hf", "teacher.path=/home/me/models/mine")
    sweep = open_sweep(tmp_path / "sweep")
    assert "teacher=hf" in sweep.command and "teacher.path=/home/me/models/mine" in sweep.command
    assert "…/models/mine" in sweep.command_to_pass_on and "/home" not in sweep.command_to_pass_on


def test_many_values_are_an_axis_of_numbers(tmp_path: Path) -> None:
    for i in range(10):
        write_run(tmp_path / "sweep" / str(i), f"trainer.learning_rate={10.0 ** (-i / 3 - 1):g}", nll=3 + i / 10, details=None)
    (drawing,) = effects(open_sweep(tmp_path / "sweep"))
    assert drawing.chart.logarithmic and not drawing.chart.categories and drawing.svg.count("<title>") == 10


def test_failed_damaged_and_unfinished_jobs_are_listed_with_their_reason(sweep: Path) -> None:
    write_run(sweep / "failed", summary=None, status=status(0, "failed", error="data.path: no such file."))
    write_run(sweep / "going", "trainer.max_steps=40", summary=None, status=status(4, "running"))
    write_run(sweep / "damaged")
    (sweep / "damaged" / "summary.json").write_text("{")
    early = write_run(sweep / "early", summary=None, status=status(0, "failed"))
    (early / "job.log").write_text("step 1\nerror: teacher.path: not there.\n")
    (sweep / "never").mkdir()
    (sweep / "never" / "train.log").write_text("error: data.path: no such folder.\n")
    (sweep / "sweep.log").write_text("12 jobs\n")
    write_run(sweep / "other", summary={"eval/forward_kl": 0.5})
    missing = {entry.name: (entry.state, entry.why) for entry in open_sweep(sweep).missing}
    assert missing["failed"] == ("failed", "data.path: no such file.")
    assert missing["going"] == ("running", "at step 8 of 40")  # status.json is behind the rows
    assert missing["damaged"][0] == "damaged" and "summary.json:1: not JSON" in missing["damaged"][1]
    assert missing["early"] == ("failed", "teacher.path: not there.")
    assert missing["never"] == ("failed", "data.path: no such folder.") and len(missing) == 6
    assert missing["other"] == ("finished", "no 'eval/student_nll' in its summary")
    assert len(open_sweep(sweep).groups) == 4


def test_a_sweep_without_a_finished_job_is_refused_with_a_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "a", summary=None, status=status(0, "failed", error="data.path: no such file."))
    with pytest.raises(ConfigError, match=r"no run has 'eval/student_nll' yet.*\(a: data.path: no such file.\)"):
        open_sweep(tmp_path / "sweep")


def test_the_control_beside_a_job_is_no_candidate(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "a", "control=true", nll=3.5)
    write_run(tmp_path / "sweep" / "a-control", "objective=ce", nll=3.4)
    assert [group.name for group in open_sweep(tmp_path / "sweep").groups] == ["a"]


def test_seeds_of_a_sweep_are_ranked_by_their_mean(tmp_path: Path) -> None:
    for name, overrides, nll in (("a0", [], 3.0), ("a1", ["seed=1"], 3.6), ("b0", ["objective=jsd"], 3.2)):
        write_run(tmp_path / "sweep" / name, *overrides, summary=summary(nll, 8))
    best, second = open_sweep(tmp_path / "sweep").groups
    assert (best.name, second.seeds, second.mean("eval/student_nll")) == ("b0", "0, 1", pytest.approx(3.3))


def test_the_page_has_the_command_of_the_best(sweep: Path) -> None:
    command = open_sweep(sweep).command
    assert command == "python -m mini_distill.train objective.temperature=2.0 objective.kl_weight=0.9"
    page = report([sweep]).read_text(encoding="utf-8")
    assert f'<code class="command">{command}</code>' in page
    assert "nats per token, ahead of the next by 0.100, which one seed cannot tell from chance." in page
    assert "on new text expect a slightly worse one" in page


def test_the_page_of_many_runs_stays_small(tmp_path: Path) -> None:
    for i in range(60):
        write_run(tmp_path / "sweep" / str(i), f"trainer.learning_rate={0.001 * (i + 1):g}", nll=3 + i / 100, steps=300, details=None)
    assert report([tmp_path / "sweep"]).stat().st_size < 500_000


def test_a_sweep_beside_another_run_is_taken_apart(sweep: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", "objective=jsd")
    assert "5 runs" in report([sweep, other, other], tmp_path / "page.html").read_text(encoding="utf-8")
