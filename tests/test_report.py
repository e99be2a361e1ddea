"""The report as a verb: what it takes, what it writes, and the one line for what it cannot use."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from measured_folders import details, rows, status, summary, write_run

import mini_distill as md
from mini_distill.errors import MiniDistillError
from mini_distill.report import main, report
from mini_distill.reporting.measured import open_measured


def error_of(*arguments: Path | str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and last line of a command."""
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err.strip().splitlines()[-1]


def test_the_page_goes_into_the_runs_folder_or_where_one_wants_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"The page: {run / 'report.html'}\n"
    assert main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == (run / "report.html").read_bytes()  # and it is the same every time


def test_several_folders_are_beside_each_other_in_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", nll=3.4)
    write_run(tmp_path / "b", "objective=jsd", nll=3.6)
    assert report(["a", "b"]) == Path("report.html")
    assert "2 runs" in Path("report.html").read_text(encoding="utf-8")


def test_of_a_sweep_the_terminal_has_the_best_and_how_to_train_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine without a browser the page alone helped nobody."""
    for rate, nll in (("1e-3", 3.4), ("3e-3", 3.6)):
        write_run(tmp_path / "sweep" / rate, f"trainer.learning_rate={rate}", "data=jsonl", "data.path=/home/me/my text.jsonl", nll=nll)
    write_run(tmp_path / "sweep" / "left", "trainer.learning_rate=1e-2", status=status(3, "failed", error="out of memory"), summary=None)
    assert main([str(tmp_path / "sweep")]) == 0
    missing, best, command, page = capsys.readouterr().out.splitlines()
    assert missing.startswith("Not finished: left: failed")
    assert best.startswith("The best is trainer.learning_rate = 0.001, with held-out loss 3.400 nats per token, ahead of the next by 0.200")
    again = "python -m mini_distill.train data=jsonl 'data.path=\"/home/me/my text.jsonl\"' trainer.learning_rate=0.001"
    assert command == f"To train it again: {again}"
    assert page == f"The page: {tmp_path / 'sweep' / 'report.html'}"


def test_from_python_and_from_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert md.load_run(run).report(tmp_path / "one.html").read_bytes() == md.report(run).read_bytes() == md.report([str(run)]).read_bytes()


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    code = "import sys; from mini_distill.report import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(run)], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_what_is_no_folder_of_ours_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    code, line = error_of(tmp_path / "gone", capsys=capsys)
    assert (
        code == 2 and line == f"error: {tmp_path / 'gone'}: no such folder. Give the output_dir of a run, of an evaluation or of a sweep."
    )
    assert error_of(tmp_path / "emtpy", capsys=capsys)[1].endswith(f"no such folder. Did you mean '{tmp_path / 'empty'}'?")
    with pytest.raises(MiniDistillError, match=r"Did you mean '.*empty'"):
        md.load_run(tmp_path / "emtpy")
    with pytest.raises(MiniDistillError, match="is not the folder of a run"):
        md.load_run("a" * 5000)
    code, line = error_of(tmp_path / "empty", capsys=capsys)
    assert code == 2 and line.startswith(f"error: {tmp_path / 'empty'}: neither a run nor an evaluation")


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("summary.json", '{"eval/student_nll": 3.5,\n "eval/teacher_nll" 2.5}', "summary.json:2: not JSON"),
        ("summary.json", "[1]", "summary.json:1: got a list"),
        ("details.json", "{", "details.json:1: not JSON"),
        ("details.json", '{"differences": [{"tokens": 3}]}', "details.json: 'differences' is not as"),
        ("details.json", '{"samples": [{"prompt": "x"}]}', "details.json: 'samples' is not as"),
        ("status.json", "", "status.json:1: not JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"step": 2\n{"step": 3}\n', "metrics.jsonl:2: not JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"train/loss": 2}\n', "metrics.jsonl:2: a row without a step"),
        ("config.yaml", "seed: 1\ntrainer: [\n", "config.yaml:3: not YAML"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, where: str
) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_text(text)
    code, line = error_of(run, capsys=capsys)
    assert code == 6 and line.startswith(f"error: {run}/{where}")
    assert not (run / "report.html").exists()


def test_a_file_that_is_not_text_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n')
    assert error_of(run, capsys=capsys) == (6, f"error: {run}/metrics.jsonl:2: not UTF-8 text. Delete this line.")


def test_a_row_that_a_kill_cut_short_does_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    whole = report([run]).read_bytes()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train/lo')
    assert report([run]).read_bytes() == whole


def test_a_run_without_a_figure_is_refused_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", summary=None, details=None, status=status(0, "failed", error="data.path: no such file."))
    (run / "metrics.jsonl").write_text("")
    code, line = error_of(run, capsys=capsys)
    assert code == 2 and "nothing has been logged yet (the run is failed: data.path: no such file.)" in line


def test_what_the_file_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = error_of("x" * 5000, capsys=capsys)
    assert code == 6 and line.startswith("error: xxx") and "cannot read: File name too long" in line


def test_a_metric_without_a_sweep_and_a_folder_as_output_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert error_of(run, "--metric", "eval/forward_kl", capsys=capsys)[1].startswith("error: --metric: ranks the runs of a sweep")
    assert error_of(run, "--output", tmp_path, capsys=capsys)[1].startswith(f"error: --output: '{tmp_path}' is a folder")


def test_a_metric_that_no_run_has_is_refused_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "sweep" / "a")
    code, line = error_of(tmp_path / "sweep", "--metric", "eval/foward_kl", capsys=capsys)
    assert code == 2 and line.endswith("no run has 'eval/foward_kl' yet. Did you mean 'eval/forward_kl'?")


def test_a_run_is_taken_with_what_evaluate_measured_of_it_later(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", summary={key: value for key, value in summary(3.5, 8).items() if not key.startswith(("task/", "text/"))}
    )
    assert "blimp" not in report([run]).read_text(encoding="utf-8")
    later = summary(3.1, 8) | {"perf/student_tokens_per_second": 77777.0}
    write_run(run / "evaluation", summary=later, status=None, details=details("unmistakable"))
    page = report([run]).read_text(encoding="utf-8")
    assert "blimp" in page and "77,777" in page and "unmistakable" in page
    assert re.search(
        'data-key="eval/student_nll eval/teacher_nll"[^>]*>1.000<', page
    )  # of the run itself, to which before and control belong


def test_an_evaluation_older_than_the_run_is_left_out_and_the_page_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_run(run / "evaluation", summary={"task/other/student": 0.5}, status=None, details=None)
    os.utime(run / "evaluation" / "summary.json", (1, 1))
    page = report([run]).read_text(encoding="utf-8")
    assert "task/other" not in page and "older than the run" in page


def test_an_evaluation_of_other_data_is_left_out_and_the_page_says_so(tmp_path: Path) -> None:
    """Whatever lay in `evaluation/` and was newer stood under the run's headline: figures of one text beside those of another."""
    run = write_run(tmp_path / "run")
    other = {"task/other/student": 0.5, "perf/student_tokens_per_second": 77777.0}
    write_run(run / "evaluation", "data.seq_len=64", summary=other, status=None, details=details("unmistakable"))
    page = report([run]).read_text(encoding="utf-8")
    assert "task/other" not in page and "77,777" not in page and "unmistakable" not in page
    assert "was measured otherwise (data.seq_len is 64, and 256 in the run)" in page
    assert "unmistakable" in report([run / "evaluation"]).read_text(encoding="utf-8")  # on a page of its own, with its data
    for settings in ("teacher=none", "teacher.revision=abc"):
        shutil.rmtree(run / "evaluation")
        write_run(run / "evaluation", settings, summary=other, status=None)
        assert open_measured(run).evaluation.startswith("evaluation/ was measured otherwise (teacher.")


def test_where_an_evaluation_ran_makes_no_difference(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_run(run / "evaluation", "data.num_workers=2", "teacher.device=cpu", summary={"task/other/student": 0.5}, status=None)
    assert open_measured(run).is_evaluated


def test_an_evaluation_that_does_not_say_what_it_measured_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_run(run / "evaluation", summary={"task/other/student": 0.5}, status=None)
    (run / "evaluation" / "config.yaml").unlink()
    found = open_measured(run)
    assert "task/other/student" not in found.summary and "does not say what" in found.evaluation


def test_of_an_evaluation_over_fewer_tokens_only_what_depends_on_no_text_is_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    fewer = summary(3.1, 8) | {"eval/tokens": 4096.0, "eval/rank_correlation": 0.5, "perf/student_tokens_per_second": 77777.0}
    write_run(run / "evaluation", summary=fewer, status=None, details=details("unmistakable"))
    found = open_measured(run)
    assert found.value("perf/student_tokens_per_second") == 77777.0 and found.value("eval/student_nll") == 3.5
    assert found.value("eval/rank_correlation") is None and found.value("eval/tokens") == 40960.0
    assert "unmistakable" in str(found.details["samples"]) and "unmistakable" not in str(found.details["differences"])
    assert "it measured 4,096 tokens and the run 40,960" in found.evaluation


def test_rows_in_any_order_and_numbers_that_are_not_finite_are_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", summary=summary(3.5, 8) | {"eval/student_perplexity": None})
    logged = [*reversed(rows(3.5, 8)), {"step": 9, "train/loss": None}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    assert "not finite" in report([run]).read_text(encoding="utf-8")


def test_the_errors_are_those_of_the_package(tmp_path: Path) -> None:
    with pytest.raises(MiniDistillError, match="none was given"):
        report([])
    with pytest.raises(MiniDistillError, match="cannot write"):
        report([write_run(tmp_path / "run")], tmp_path / "no" / "such" / "page.html")
