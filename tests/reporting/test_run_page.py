"""The page of one run: what its words claim, and what it admits not to know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from measured_folders import status, summary, write_run

from mini_distill.processes import this_host
from mini_distill.report import main, report
from mini_distill.reporting.charts import Drawing
from mini_distill.reporting.figures import Figure, figures_table, seconds, text_of
from mini_distill.reporting.measured import open_measured
from mini_distill.reporting.run_page import curves, efficiency, not_measured
from mini_distill.reporting.settings import settings_tables
from mini_distill.reporting.verdict import answers_of_run


def words(folder: Path) -> str:
    """The answers on top."""
    parts = [part for answer in answers_of_run(open_measured(folder)) for part in (answer.question, " ", *answer.parts, " ")]
    return "".join(part.text if isinstance(part, Figure) else part for part in parts)


def test_the_words_say_what_the_figures_say(tmp_path: Path) -> None:
    said = words(write_run(tmp_path / "run"))
    assert "Did distillation help? Yes, in this run: on held-out text the student's loss is 0.400 nats per token lower" in said
    assert "One seed cannot tell a small difference from chance." in said
    assert "By how much? Perplexity 33.12 instead of the control's 49.40; the teacher's is 12.18. That closes 28.6 % of the gap" in said
    assert "What was lost? Its loss is 1.000 nats per token higher than the teacher's." in said
    assert (
        "the same token the most likely at 41.7 % of the places. On blimp it gets 75.0 % (guessing: 50.0 %), 10.0 points below its teacher."
        in said
    )
    assert "What was saved? It has 33.3 % of the teacher's parameters and reads text 3.00 times as fast" in said


@pytest.mark.parametrize(
    ("error", "said"), [(0.03, "(standard error 4.2 points). "), (0.04, "(standard error 5.7 points): not told apart. ")]
)
def test_a_difference_on_a_task_is_held_against_its_error(tmp_path: Path, error: float, said: str) -> None:
    """`4.3 points below its teacher` stood on top, of scores that were both within their error of guessing."""
    errors = {f"task/blimp/{model}_standard_error": error for model in ("student", "teacher")}
    told = words(write_run(tmp_path / "run", summary=summary(3.5, 8) | errors))
    assert f"On blimp it gets 75.0 % (guessing: 50.0 %), 10.0 points below its teacher {said}" in told


def test_the_words_do_not_praise_what_did_not_help(tmp_path: Path) -> None:
    worse = summary(3.5, 8) | {"control/student_nll": 3.4, "control/gap_closed": -0.11, "perf/student_tokens_per_second": 3000.0}
    said = words(write_run(tmp_path / "run", summary=worse))
    assert "No, not in this run" in said and "0.100 nats per token higher than the control's" in said
    assert "closes -11.0 %" in said and "but reads text at 0.750 of the teacher's speed" in said


def test_without_a_control_whether_it_helped_is_not_known(tmp_path: Path) -> None:
    alone = {key: value for key, value in summary(3.5, 8).items() if not key.startswith("control/")}
    said = words(write_run(tmp_path / "run", summary=alone))
    assert "Not measured: that takes a control" in said
    assert "What did training do? Training took perplexity from 90.02 to 33.12: 50.0 % of the way to the teacher's, in loss." in said
    assert "By how much?" not in said  # that is training's doing, and not the teacher's
    assert "This run is a control" in words(write_run(tmp_path / "control", "objective=ce", summary=alone))


def test_a_control_that_needs_no_teacher_leaves_no_gap_to_close(tmp_path: Path) -> None:
    good = {key: value for key, value in summary(2.4, 8).items() if key != "control/gap_closed"} | {"control/student_nll": 2.45}
    said = words(write_run(tmp_path / "run", summary=good))
    assert "0.050 nats per token lower than the control's" in said and "0.100 nats per token lower than the teacher's" in said
    assert "of the gap" not in said


def test_what_was_not_measured_is_said_and_not_shown_as_nothing(tmp_path: Path) -> None:
    bare = write_run(tmp_path / "a b", summary={"eval/student_nll": 3.5, "eval/x": None}, details=None)
    said = " ".join(f"{what} {remedy}" for what, remedy in not_measured(open_measured(bare)))
    for part in (
        "no teacher to compare",
        "control=true",
        "Tasks and bias",
        "memory",
        "Reliability, slices, differences, samples",
        "eval/x",
        "no error bars",
    ):
        assert part in said
    assert "python -m mini_distill.evaluate model='" in said  # a path with a space, quoted
    assert (
        words(bare)
        == "Did distillation help? Not measured: that takes a control, the same student trained alike but without the teacher. control=true trains one. "
    )
    page = report([bare]).read_text(encoding="utf-8")
    for absent in ("Calibration", "Samples side by side", "What the models cost"):
        assert absent not in page
    everything = {what for what, _ in not_measured(open_measured(write_run(tmp_path / "whole")))}
    assert everything == {"Spread: one run with one seed has no error bars. Train it with other seeds, then:"}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("running", "is still running at step 8 of 100."),
        ("preempted", "was stopped at step 8 of 100."),
        ("failed", "failed at step 8 of 100 (out of luck)."),
    ],
)
def test_a_run_that_is_not_finished_is_shown_as_far_as_it_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: str, said: str
) -> None:
    run = write_run(
        tmp_path / "run", summary=None, details=None, status=status(4, state, **({"error": "out of luck"} if state == "failed" else {}))
    )
    assert main([str(run)]) == 0
    assert f"Not finished: {run} {said}" in capsys.readouterr().out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"<strong>Not finished.</strong> This run {said}" in page
    assert "Held-out loss" in page and "The final figures: they are measured when a run ends." in page


def test_a_run_that_was_killed_is_not_said_to_be_running(tmp_path: Path) -> None:
    """A killed process writes no status: hours later the page still said `running`."""
    run = write_run(tmp_path / "run", summary=None, details=None, status=status(4, "running"))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (run / ".lock").write_text(json.dumps({"pid": ended.pid, "host": this_host(), "started": "2026-01-02T03:04:05+00:00"}))
    assert open_measured(run).unfinished.startswith("was killed at step 8 of 100.")
    (run / ".lock").write_text(json.dumps({"pid": os.getpid(), "host": this_host(), "started": "2026-01-02T03:04:05+00:00"}))
    assert open_measured(run).state == "running"
    (run / ".lock").write_text(json.dumps({"pid": ended.pid, "host": "another", "started": "2026-01-02T03:04:05+00:00"}))
    assert open_measured(run).state == "running"  # who lives on another host is not known here


def test_the_teachers_level_is_beside_the_held_out_loss(tmp_path: Path) -> None:
    drawn = {drawing.chart.title: drawing for drawing in curves(open_measured(write_run(tmp_path / "run")))}
    assert list(drawn) == ["Held-out loss", "KL to the teacher", "Top-1 agreement", "Training loss"]
    assert [(name, y) for name, y, _ in drawn["Held-out loss"].chart.levels] == [("teacher", 2.5), ("control", 3.9)]
    assert len(drawn["Training loss"].chart.series[0].points) == 8


def test_a_mixture_of_losses_is_not_taken_for_the_held_out_loss(tmp_path: Path) -> None:
    """`Training loss` fell to 2.5 beside a held-out loss of 4.2, which looked like overfitting."""
    mixed, alone = (
        curves(open_measured(write_run(tmp_path / objective, f"objective={objective}")))[-1].chart for objective in ("kl_ce", "ce")
    )
    assert mixed.note == "The objective, 0.5 forward_kl + 0.5 ce: not on the scale of the held-out loss."
    assert (mixed.title, mixed.y_label, alone.note) == ("Training loss", "objective", "")


def test_a_line_through_two_measurements_is_said_to_be_one(tmp_path: Path) -> None:
    two, more = ({drawing.chart.title: drawing.chart.note for drawing in _curves(tmp_path / str(steps), steps)} for steps in (2, 8))
    assert two["Held-out loss"] == "Measured only at the first and at the last step shown. Dashed lines: final values."
    assert more["Held-out loss"] == "Dashed lines: final values."


def _curves(folder: Path, steps: int) -> list[Drawing]:
    return curves(open_measured(write_run(folder, steps=steps)))


def test_the_page_says_how_its_evaluation_was_done(tmp_path: Path) -> None:
    """300 of 6,600 pairs were drawn, the k of top-k was nowhere, and a part of the held-out text seemed to be all of it."""
    part = {"eval/tokens": 40960.0, "data/held_out_supervised_tokens": 339793, "eval/topk_agreement": 0.5}
    run = write_run(tmp_path / "run", summary=summary(3.5, 8) | part)
    before = report([run]).read_text(encoding="utf-8")
    assert (
        "Over 40,960 of 339,793 held-out tokens" in before
        and "Sampled at temperature 0.7." in before
        and "top-k agreement\u00a0↑" in before
    )
    evaluation = write_run(run / "evaluation", summary=summary(3.5, 8), status=None)
    settings = yaml.safe_load((evaluation / "config.yaml").read_text(encoding="utf-8"))
    del settings["trainer"]
    settings |= {"evaluation": {"task_limit": 300, "top_k": 7, "sampling_temperature": 0.0}, "num_threads": 3}
    (evaluation / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    for page in (report([run]).read_text(encoding="utf-8"), report([evaluation]).read_text(encoding="utf-8")):
        for said in ("at most 300 items were done", "Greedy: ", " with num_threads = 3"):
            assert said in page and said not in before
    assert "top-7 agreement\u00a0↑" in report([run]).read_text(encoding="utf-8")


def test_the_student_comes_first_where_a_narrow_screen_shows_it(tmp_path: Path) -> None:
    """On a telephone the last of four columns, the student's, lay beyond the edge."""
    table = figures_table(open_measured(write_run(tmp_path / "run")))
    assert table is not None and list(table.header) == ["", "student after", "control", "teacher", "student before"]
    loss, first = ([cell.text if isinstance(cell, Figure) else cell for cell in row] for row in table.rows[:2])
    assert loss == ["loss (nats per token)\u00a0↓", "3.500", "3.900", "2.500", "4.500"]  # the answers are in nats
    assert first == ["perplexity\u00a0↓", "33.12", "49.40", "12.18", "90.02"]
    cost = efficiency(open_measured(tmp_path / "run"))
    assert cost is not None and list(cost.header) == ["", "student", "teacher", "student ÷ teacher"]


def test_settings_that_differ_from_the_defaults_come_first(tmp_path: Path) -> None:
    tables = settings_tables(open_measured(write_run(tmp_path / "run", "objective.temperature=2")))
    assert tables is not None and ["objective.temperature", "2.0", "1.0"] in [list(row) for row in tables[0].rows]
    assert "trainer.learning_rate" in [row[0] for row in tables[1].rows]


def test_secrets_in_a_configuration_are_not_carried_into_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    text = (run / "config.yaml").read_text().replace("path: null", "path: https://me:hunter22@host/data", 1)
    (run / "config.yaml").write_text(text)
    page = report([run]).read_text(encoding="utf-8")
    assert "hunter22" not in page and "host/data" in page


def test_an_evaluation_alone_needs_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text(json.dumps({"eval/student_nll": 3.5, "eval/student_perplexity": 33.1}))
    assert "33.10" in report([tmp_path / "old"]).read_text(encoding="utf-8")


def test_numbers_are_written_as_suits_them() -> None:
    assert [seconds(value) for value in (0.0123, 3.24, 600, 36000)] == ["12.3 ms", "3.24 s", "10 min", "10 h"]
    assert text_of("perf/student_time_to_first_token", 0.0123) == "12.3 ms"
    assert text_of("model/student_file_bytes", 6.28e6) == text_of("model/student_weight_bytes", 6.28e6) == "6.28 MB"
    assert text_of("perf/student_generation_tokens_per_second_batch8", 159.7) == "160"
    assert text_of("data/train_supervised_tokens", 3135087.0) == "3,135,087"
    assert text_of("control/gap_closed", 0.286) == "28.6 %"
    assert text_of("unheard/of", 0.00012) == "1.200e-04" and text_of("unheard/of", 1234.5) == "1,234"
