"""Runs against their controls: which belongs to which, what is computed, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import run, train_module

from mini_distill.compare import against_control, compare, control_of, gap_closed, interval, main, markdown, objective_text, student_t
from mini_distill.config import Config, ObjectiveConfig
from mini_distill.digest import digest_run
from mini_distill.errors import ConfigError

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(name, nll, seed=0, kl_weight=0.5, max_steps=100, **teacher)`: a folder with a configuration and figures."""

    def build(name: str, nll: float | None, seed: int = 0, kl_weight: float = 0.5, teacher_nll: float = 2.0, **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = Config(seed=seed, output_dir=str(folder), objective=ObjectiveConfig(kl_weight=kl_weight, ce_weight=1 - kl_weight))
        config.trainer.max_steps = settings.pop("max_steps", 100)
        config.teacher = dataclasses.replace(config.teacher, **settings)
        (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
        (folder / "status.json").write_text(json.dumps({"state": "finished" if nll is not None else "running", "step": 1}))
        if nll is not None:
            figures = {"eval/student_nll": nll, "eval/teacher_nll": teacher_nll, "eval/forward_kl": nll - 1.5}
            (folder / "summary.json").write_text(json.dumps(figures))
        return folder

    return build


def test_gap_closed_is_the_share_of_the_way_from_control_to_teacher() -> None:
    control, student = {"eval/student_nll": 4.0}, {"eval/student_nll": 3.5, "eval/teacher_nll": 2.0}
    assert gap_closed(student, control) == 0.25
    assert gap_closed({**student, "eval/student_nll": 4.5}, control) == -0.25
    assert gap_closed({**student, "eval/teacher_nll": 4.0}, control) is None  # a teacher that knows no more than the control
    assert gap_closed({"eval/student_nll": 3.5}, control) is None


def test_each_seed_is_compared_with_its_own_control(make_run: MakeRun) -> None:
    runs = [make_run("a0", 3.5, 0), make_run("a1", 3.4, 1), make_run("c0", 4.0, 0, 0.0), make_run("c1", 4.2, 1, 0.0)]
    distilled, control = compare([str(path) for path in runs])
    gaps = [0.25, (4.2 - 3.4) / (4.2 - 2.0)]
    assert distilled["gap_closed"] == pytest.approx(sum(gaps) / 2) and distilled["seeds"] == [0, 1]
    assert distilled["gap_closed_interval"] == pytest.approx(
        12.7062 * abs(gaps[0] - gaps[1]) / 2, rel=1e-5
    )  # t with one degree, s = |a − b| / √2
    assert "gap_closed" not in control and control["label"] == "ce (control)"
    assert control["student_nll"] == pytest.approx(4.1)


def test_a_control_of_other_settings_or_another_seed_is_none(make_run: MakeRun) -> None:
    rows = compare(
        [str(make_run("a", 3.5)), str(make_run("longer", 4.0, kl_weight=0.0, max_steps=200)), str(make_run("seed", 4.0, 3, 0.0))]
    )
    assert all("gap_closed" not in row for row in rows) and len(rows) == 3


def test_where_the_targets_came_from_makes_no_difference_to_a_control(make_run: MakeRun) -> None:
    """Runs on caches of several kinds had no control: theirs was trained beside the live teacher, whose targets it does not use."""
    cached = {"cache_dir": "caches/topk", "cache_kind": "topk", "cache_k": 8}
    live, topk, control = compare([str(make_run("a", 3.5)), str(make_run("b", 3.6, **cached)), str(make_run("c", 4.0, kl_weight=0.0))])
    assert (live["gap_closed"], topk["gap_closed"]) == (0.25, pytest.approx(0.2))
    assert live["runs"] != topk["runs"] and "gap_closed" not in control


CACHED = {"kind": "cached", "cache_dir": "caches/a"}


@pytest.mark.parametrize(
    ("of_run", "of_control"),
    [
        ({}, {"kind": "hf", "path": "other"}),
        ({}, {"revision": "abc"}),
        ({}, {"dtype": "bfloat16"}),
        (CACHED, CACHED | {"cache_dir": "caches/b"}),
    ],
)
def test_a_control_beside_another_teacher_is_none(make_run: MakeRun, of_run: dict[str, str], of_control: dict[str, str]) -> None:
    """A student has its teacher's tokenizer and can begin with its layers; which teacher a cache alone stands for, only the cache says."""
    rows = compare([str(make_run("a", 3.5, **of_run)), str(make_run("c", 4.0, kl_weight=0.0, **of_control))])
    assert all("gap_closed" not in row for row in rows)


def test_one_seed_gets_no_interval_and_the_table_says_so(make_run: MakeRun) -> None:
    text = markdown(compare([str(make_run("a", 3.5)), str(make_run("c", 4.0, kl_weight=0.0))]))
    assert "±" not in text and "One seed says little" in text and "25.0 %" in text


def test_an_interval_of_equal_values_has_no_width() -> None:
    assert interval([1.0, 1.0, 1.0]) == 0.0
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / 3**0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.70620), (2, 4.30265), (3, 3.18245), (15, 2.13145), (16, 2.11991), (30, 2.04227), (120, 1.97993), (1000, 1.96234)],
)
def test_the_quantiles_are_students_for_any_number_of_seeds(freedom: int, t: float) -> None:
    """The table ended at fifteen degrees of freedom, and seventeen seeds got the normal distribution's 1.96: too narrow."""
    assert student_t(0.95, freedom) == pytest.approx(t, rel=5e-6)


def test_without_its_control_a_run_is_compared_as_it_was_itself(make_run: MakeRun) -> None:
    """`control=true` had written the gap into the summary of each run, and comparing the runs alone showed a dash."""
    runs = [make_run("a0", 3.5, 0), make_run("a1", 3.4, 1)]
    for folder, gap in zip(runs, (0.25, 0.35), strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"control/gap_closed": gap}))
    (row,) = compare([str(path) for path in runs])
    assert row["gap_closed"] == pytest.approx(0.3)
    (with_one, _) = compare([*map(str, runs), str(make_run("c0", 4.5, 0, 0.0))])
    assert with_one["gap_closed"] == pytest.approx((0.4 + 0.35) / 2)  # what is given goes first


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["nowhere"], "is not the folder of a run"),
        (["unfinished"], "no figures yet (the run is running)"),
        (["a", "twin"], "given twice"),
    ],
)
def test_what_cannot_be_compared_is_one_line(make_run: MakeRun, tmp_path: Path, names: list[str], line: str, capsys: Any) -> None:
    make_run("a", 3.5), make_run("twin", 3.6), make_run("unfinished", None)
    assert main([str(tmp_path / name) for name in names]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and line in error


def test_the_command_prints_a_table_and_writes_the_rows(make_run: MakeRun, tmp_path: Path, capsys: Any) -> None:
    folders = [str(make_run("a", 3.5)), str(make_run("c", 4.0, kl_weight=0.0))]
    assert main([*folders, "--output", str(tmp_path / "rows.json")]) == 0
    assert "| 0.5 forward_kl + 0.5 ce (a) | 0 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text())[0]["gap_closed"] == 0.25


def test_an_objective_reads_as_its_weights() -> None:
    plain = asdict(ObjectiveConfig(kl_weight=0.9, ce_weight=0.0, divergence="mine.my_kl", temperature=2.0, terms={"jsd": {"weight": 0.5}}))
    assert objective_text(plain) == "0.9 my_kl + 0.5 jsd, T = 2"


@pytest.mark.parametrize(
    ("weights", "text"),
    [((1.0, 0.0), "forward_kl"), ((2.0, 0.0), "2 forward_kl"), ((1.0, 1.0), "1 forward_kl + 1 ce"), ((0.0, 1.0), "ce (control)")],
)
def test_a_single_term_needs_no_weight(weights: tuple[float, float], text: str) -> None:
    """The 1 of `1 forward_kl`, behind the number of a run, read as if it were that of run 1."""
    assert objective_text(asdict(ObjectiveConfig(kl_weight=weights[0], ce_weight=weights[1]))) == text


def test_control_trains_the_same_student_without_the_teacher(tiny_command: list[str], tmp_path: Path) -> None:
    with_control = run(tiny_command, tmp_path / "run", "control=true")
    alone = run(tiny_command, tmp_path / "alone", "objective=ce")
    assert digest_run(tmp_path / "run-control") == digest_run(tmp_path / "alone")
    distilled = run(tiny_command, tmp_path / "distilled")
    assert digest_run(tmp_path / "run") == digest_run(tmp_path / "distilled")  # a control changes nothing of the run
    assert with_control["control/student_nll"] == alone["eval/student_nll"]
    assert with_control["control/forward_kl"] == alone["eval/forward_kl"]
    expected = against_control(distilled, alone)
    assert {key: value for key, value in with_control.items() if key.startswith("control/")} == expected
    assert " control " in (tmp_path / "run" / "README.md").read_text()


def test_control_is_added_to_a_run_that_is_finished(tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny_command, tmp_path / "run")
    before = digest_run(tmp_path / "run")
    monkeypatch.setattr(train_module, "optimizer_step", _only_the_control(train_module.optimizer_step))
    summary = run(tiny_command, tmp_path / "run", "control=true")
    assert "control/student_nll" in summary and digest_run(tmp_path / "run") == before
    monkeypatch.setattr(train_module, "write_result", lambda d, control: pytest.fail("it was finished"))
    assert run(tiny_command, tmp_path / "run", "control=true") == summary


def _only_the_control(original: Any) -> Any:
    def step(d: Any, *arguments: Any, **more: Any) -> Any:
        assert d.objective.names == ["ce"]
        return original(d, *arguments, **more)

    return step


def test_a_control_of_a_control_is_refused(tiny_command: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this run is the control"):
        run(tiny_command, tmp_path / "run", "objective=ce", "control=true")


def test_the_control_has_every_other_setting_of_the_run() -> None:
    config = Config(seed=3, output_dir="runs/a", control=True, objective=ObjectiveConfig(terms={"jsd": {}}, logits_memory_mib=8.0))
    control = control_of(config)
    assert control.objective == ObjectiveConfig(kl_weight=0.0, ce_weight=1.0, logits_memory_mib=8.0)
    assert control.output_dir == "runs/a-control" and not control.control and control.seed == 3 and control.trainer == config.trainer
