"""Tasks on the page: both models, their difference, and scores that are best in the middle."""

from __future__ import annotations

from pathlib import Path

from measured_folders import summary, write_run

from mini_distill.report import report
from mini_distill.reporting.figures import MODELS, Figure, Table
from mini_distill.reporting.measured import open_measured
from mini_distill.reporting.task_tables import skills, stereotypes
from mini_distill.reporting.verdict import answers_of_run

CROWS = {
    "task/crows/age/teacher": 0.31,
    "task/crows/age/teacher_from_half": 0.19,
    "task/crows/age/student": 0.55,
    "task/crows/age/student_standard_error": 0.022,
    "task/crows/age/student_from_half": 0.05,
}


def texts(table: Table | None, row: int) -> list[str]:
    """A row, as it is read."""
    assert table is not None
    return [f"{cell.text} {cell.spread}".strip() if isinstance(cell, Figure) else str(cell) for cell in table.rows[row]]


def test_tasks_have_both_models_their_difference_and_their_standard_error(tmp_path: Path) -> None:
    errors = {"task/blimp/student_standard_error": 0.043, "task/blimp/teacher_standard_error": 0.036}
    more = summary(3.5, 8) | {"task/blimp/items": 100.0} | errors
    table = skills(open_measured(write_run(tmp_path / "run", summary=more)))
    assert table is not None and list(table.header) == ["task", "student", "teacher", "difference", "items"]
    assert texts(table, 0) == ["blimp (accuracy)", "75.0 % ± 4.3", "85.0 % ± 3.6", "−10.0 points ± 5.6", "100"]
    assert texts(table, 1) == ["blimp / agreement", "70.0 %", "90.0 %", "−20.0 points", "40"]
    assert stereotypes(open_measured(tmp_path / "run")) is None


def test_stereotype_scores_have_their_distance_from_no_preference(tmp_path: Path) -> None:
    """The student's 55 % stood `+24 points` from its teacher's 31 %, and is the nearer one to 50 %."""
    run = write_run(tmp_path / "run", summary=summary(3.5, 8) | CROWS)
    table = stereotypes(open_measured(run))
    assert table is not None
    assert list(table.header[1:6]) == ["student", "teacher", "student from 50\u00a0%", "teacher from 50\u00a0%", "student against teacher"]
    assert texts(table, 0)[:6] == ["crows / age", "55.0 % ± 2.2", "31.0 %", "5.0 % ± 2.2", "19.0 %", "14.0 points nearer to 50 %"]
    page = report([run]).read_text(encoding="utf-8")
    assert "task/crows/age/student_from_half" not in page.partition("All other figures")[2]


def test_scores_have_a_table_of_their_own_without_empty_columns(tmp_path: Path) -> None:
    """Accuracies had two columns of dashes, and on a telephone the student's column lay beyond the edge."""
    found = open_measured(write_run(tmp_path / "run", summary=summary(3.5, 8) | CROWS))
    names = [[row[0] for row in table.rows] for table in (skills(found), stereotypes(found)) if table is not None]
    assert names == [["blimp (accuracy)", "blimp / agreement"], ["crows / age"]]


def test_biases_that_cancel_are_said_to_be_there(tmp_path: Path) -> None:
    """Over all groups the student seemed nearer to 50 %, while of nine groups eight were further."""
    groups = {"all": (0.51, 0.56), "one": (0.8, 0.6), "two": (0.2, 0.4), "three": (0.5, 0.6)}
    keys = {name: f"task/crows/{name}".removesuffix("/all") for name in groups}
    scores = {f"{keys[name]}/{model}": value for name, pair in groups.items() for model, value in zip(MODELS, pair, strict=True)}
    from_half = {f"{key}_from_half": abs(value - 0.5) for key, value in scores.items()}
    tasks = {"tasks": {"crows": {"kind": "stereotype", "groups": []}}}
    found = open_measured(write_run(tmp_path / "run", summary=summary(3.5, 8) | scores | from_half, details=tasks))
    table = stereotypes(found)
    assert table is not None and table.note.startswith("2 of 3 groups are further from 50 % than the teacher's: opposite biases cancel")
    lost = next(answer for answer in answers_of_run(found) if answer.question == "What was lost?")
    said = "".join(part.text if isinstance(part, Figure) else part for part in lost.parts)
    assert "On crows the stereotyped sentence is the likelier in 51.0 % of the pairs, for its teacher in 56.0 %; 2 of 3 groups" in said


def test_a_score_as_far_as_the_teachers_is_neither_nearer_nor_further(tmp_path: Path) -> None:
    alike = CROWS | {"task/crows/age/student": 0.69, "task/crows/age/student_from_half": 0.19}
    assert texts(stereotypes(open_measured(write_run(tmp_path / "run", summary=alike))), 0)[5] == "0.0 points, as far"


def test_a_task_of_the_harness_is_one_line(tmp_path: Path) -> None:
    """`task/quiz/student` is the main metric, which `task/quiz/acc/student` has once more: both were rows."""
    figures = {f"task/quiz/{name}{model}": 0.5 for name in ("", "acc/") for model in ("teacher", "student")}
    figures |= {f"task/quiz/acc_norm/{model}": 0.6 for model in ("teacher", "student")}
    groups = [{"label": name, "teacher": 0.5, "student": 0.5} for name in ("acc", "acc_norm")]
    run = write_run(tmp_path / "run", summary=figures, details={"tasks": {"quiz": {"kind": "acc", "groups": groups}}})
    table = skills(open_measured(run))
    assert table is not None and [row[0] for row in table.rows] == ["quiz (acc)", "quiz / acc_norm"]
    assert "task/quiz/acc/student" not in report([run]).read_text(encoding="utf-8")
