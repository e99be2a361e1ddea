"""Command lines as users type them: exit code, the last line of stderr, and that torch stays out until it is needed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mini_distill.cli import load_config, run_command
from mini_distill.config import CacheLookCommand, EvaluateCommand
from mini_distill.errors import ConfigError

TASK = """
import os, signal, time
from pathlib import Path
from mini_distill.errors import DataError, Preempted

def task(config):
    with open("calls.txt", "a") as calls:
        calls.write(f"{config.output_dir} {config.objective.temperature}\\n")
    if config.seed == 3:
        raise DataError("rows.jsonl:7", "not valid JSON", "Mend the line.")
    if config.seed == 143:
        raise Preempted("step 5", "stopped by SIGTERM and saved")
    if config.seed == 99:
        raise RuntimeError("our own bug")
    if config.seed == 130:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us in the background
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
"""


@dataclass
class Ended:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`command("seed=1", …)` runs the verb whose task is TASK, in this process and in an empty folder."""
    (tmp_path / "a_task.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "a_task", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mini_distill", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command("a_task:task")
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def without_torch(tmp_path: Path) -> Callable[..., Ended]:
    """`without_torch("--help")` is `python -m mini_distill.train --help` where importing torch fails."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('torch', 'transformers', 'datasets'):\n    sys.modules[name] = None\n"
    )

    def run(*arguments: str) -> Ended:
        process = subprocess.run(
            [sys.executable, "-m", "mini_distill.train", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        return Ended(process.returncode, process.stdout, process.stderr)

    return run


# ----------------------------------------------------------------------------------------------- answered before torch is imported


def test_help_lists_groups_presets_and_settings_without_torch(without_torch: Callable[..., Ended]) -> None:
    ended = without_torch("--help")
    assert (ended.code, ended.err) == (0, "")
    for group in ("teacher", "student", "data", "objective", "trainer", "evaluation", "tracking", "experiment"):
        assert re.search(rf"^{group}: \w+", ended.out, flags=re.MULTILINE), group
    for text in ("llama3_8b", "mini_2m", "jsd", "max_steps: 100", "learning_rate", "output_dir"):
        assert text in ended.out


def test_all_configuration_errors_come_together_without_torch(without_torch: Callable[..., Ended]) -> None:
    ended = without_torch("+typo=1", "trainer.max_step=4", "trainer.learning_rate=high", "seed=-1", "teacher=hf")
    assert (ended.code, ended.out) == (2, "")
    assert sorted(line.split(":")[1].strip() for line in ended.lines) == ["seed", "trainer.learning_rate", "trainer.max_step", "typo"]
    assert all(line.startswith("error: ") for line in ended.lines)


@pytest.mark.parametrize("mistake", ["trainer.max_step=4", "teacher=lama3", "teacher=hf", "trainer.learning_rate=-1", "--bogus"])
def test_a_mistake_takes_about_a_second_of_a_processor(mistake: str, without_torch: Callable[..., Ended]) -> None:
    """Generously: what is slow is the import of torch, of several seconds, after which nobody likes to hear of a misspelt setting."""
    before = os.times()
    assert without_torch(mistake).code == 2
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3


def test_a_good_configuration_does_reach_the_import_of_torch(without_torch: Callable[..., Ended]) -> None:
    """Else the tests above would prove nothing."""
    ended = without_torch("trainer.max_steps=30")
    assert ended.code == 1
    assert "torch" in ended.lines[-1] and "Traceback" in ended.err


# ---------------------------------------------------------------------------------------------------------------- lines and codes


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["teacher=lama3"], r"teacher: no preset 'lama3' \(choices: cached, .*, smollm2_1_7b\)\. Did you mean 'llama3_8b'\?"),
        (["trainer.max_step=3"], r"trainer\.max_step: unknown setting\. Did you mean 'trainer\.max_steps'\?"),
        (["+typo=1"], r"typo: unknown setting\. Known here: teacher, .*"),
        (["++typo.x=1"], r"typo: unknown setting\. .*"),
        (["trainer.max_steps=many"], r"trainer\.max_steps: got 'many', expected a whole number\. Optimizer steps\."),
        (["trainer.max_steps="], r"trainer\.max_steps: got '', expected a whole number\. Optimizer steps\."),
        (["trainer.max_steps.x=1"], r"trainer\.max_steps: got \{'x': 1\}, expected a whole number\. .*"),
        (["data.path=${nosuch}"], r"data\.path: Interpolation key 'nosuch' not found\. .*"),
        (["data.path=${oc.env:NO_SUCH_VARIABLE}"], r"data\.path: Environment variable 'NO_SUCH_VARIABLE' not found\. .*"),
        (["teacher=hf,none"], r"teacher: got several values \(hf,none\), expected one\. Sweep with -m, .*"),
        (["~nosuch"], r"command line: Could not delete from config\. 'nosuch' does not exist\. .*"),
        (["hydra/launcher=nosuch"], r"hydra/launcher: no preset 'nosuch' \(choices: basic.*\)\."),
        (["hydra.nosuch=1"], r"command line: Could not override 'hydra\.nosuch'\. .*"),
        (["--bogus"], r"command line: unrecognized arguments: --bogus\. .*"),
        (["--config-dir"], r"command line: argument --config-dir.*: expected one argument\. .*"),
        (["--config-dir", "nosuch"], r"--config-dir: no such folder \(got 'nosuch'\)\."),
        (["--config-name", "nosuch"], r"command line: Cannot find primary config 'nosuch'\. .*"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(command: Callable[..., Ended], arguments: list[str], line: str) -> None:
    ended = command(*arguments)
    assert ended.code == 2
    assert len(ended.lines) == 1 and re.fullmatch("error: " + line, ended.lines[0]), ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("config_name", "schema", "key"), [("evaluate", EvaluateCommand, "model"), ("cache", CacheLookCommand, "cache.dir")]
)
def test_a_reference_that_leads_nowhere_is_one_line_for_every_verb(
    config_name: str, schema: type, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verbs that take settings from a run or a cache followed it before it was checked, and ended in a traceback."""
    monkeypatch.setattr(sys, "argv", ["mini_distill", f"{key}=${{nosuch}}"])
    with pytest.raises(SystemExit) as ended:
        run_command("a_task:task", config_name, schema)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"error: {key}: Interpolation key 'nosuch' not found.")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "# @package _global_\nresume_allow: [data\nseed: 3\n",
            r"\S+/mine\.yaml:3: not valid YAML: .* \(while parsing a flow sequence of line 2\)\.",
        ),
        ("# @package _global_\ntrainer:\n\tmax_steps: 1\n", r"\S+/mine\.yaml:3: not valid YAML: found character '\\t' .*"),
        ("# @package _global_\nseed: 1\nseed: 2\n", r"\S+/mine\.yaml:3: not valid YAML: found duplicate key seed.*"),
        (
            "# @package _global_\ndefaults:\n  - override /teacher: lama3\n",
            r"\S+/mine\.yaml:3: teacher: no preset 'lama3' .* 'llama3_8b'\?",
        ),
        ("# @package _global_\ndefaults:\n  - override /nosuch: x\n", r"experiment/mine\.yaml: Could not override 'nosuch'\. .*"),
        ("# @package _global_\n- a\n- b\n", r"experiment/mine\.yaml: got a list, expected settings \(name: value\)\."),
        ("# @package _global_\ntrainer:\n  max_step: 3\n", r"trainer\.max_step: unknown setting\. .*"),
        ("# @package _global_\nseed: ${nosuch}\n", r"seed: Interpolation key 'nosuch' not found\. .*"),
        ("trainer:\n  max_steps: 30\n", r"experiment: unknown setting\. .*# @package _global_.*"),
        ("", r"experiment: unknown setting\. .*# @package _global_.*"),
    ],
)
def test_a_mistake_in_a_users_preset_is_one_line_that_names_it(command: Callable[..., Ended], tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    ended = command("--config-dir", "conf", "experiment=mine")
    assert ended.code == 2
    assert len(ended.lines) == 1 and re.fullmatch("error: " + line, ended.lines[0]), ended.err


def test_a_preset_that_is_not_text_is_named(command: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_bytes("seed: 1".encode("utf-16"))
    ended = command("experiment=mine", "--config-dir=conf")
    assert (ended.code, ended.lines) == (2, ["error: conf/experiment/mine.yaml: not UTF-8 text. Save the file as UTF-8."])


def test_a_users_preset_is_used(command: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nobjective:\n  temperature: 7.0\n")
    assert command("experiment=mine", "--config-dir", "conf").code == 0
    assert (tmp_path / "calls.txt").read_text() == "runs/experiment=mine 7.0\n"


@pytest.mark.parametrize(("seed", "code", "last_line"), [(0, 0, None), (3, 3, "error: rows.jsonl:7: not valid JSON. Mend the line.")])
def test_the_exit_code_is_the_errors(command: Callable[..., Ended], seed: int, code: int, last_line: str | None) -> None:
    ended = command(f"seed={seed}")
    assert (ended.code, ended.lines) == (code, [last_line] if last_line else [])


def test_debug_shows_the_traceback_before_the_line(command: Callable[..., Ended]) -> None:
    ended = command("seed=3", "debug=true")
    assert ended.code == 3
    assert ended.lines[0].startswith("Traceback")
    assert ended.lines[-1] == "error: rows.jsonl:7: not valid JSON. Mend the line."


def test_our_own_bug_keeps_its_traceback(command: Callable[..., Ended]) -> None:
    ended = command("seed=99")
    assert (ended.code, ended.lines[-1]) == (1, "RuntimeError: our own bug")
    assert "Traceback" in ended.lines[0] and "in task" in ended.err


def test_an_interrupt_before_anything_is_130(command: Callable[..., Ended]) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        ended = command("seed=130")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.code, ended.lines) == (130, ["error: interrupted. The same command goes on from what was saved, if there is anything."])


# ------------------------------------------------------------------------------------------------------------- sweeps and printing


def test_a_sweep_runs_every_combination_each_in_its_own_folder(command: Callable[..., Ended], tmp_path: Path) -> None:
    assert command("seed=1", "-m", "objective.temperature=1,2", "objective=jsd,kl_ce").code == 0
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert sorted(calls) == [
        f"runs/objective.temperature={t}+objective={o}+seed=1 {t}.0" for t in (1, 2) for o in ("jsd", "kl_ce")
    ]  # fmt: skip


def test_a_job_that_fails_leaves_the_others_of_its_sweep_alone(command: Callable[..., Ended], tmp_path: Path) -> None:
    ended = command("-m", "seed=3,1,-1")
    assert ended.code == 3
    assert len((tmp_path / "calls.txt").read_text().splitlines()) == 2
    assert ended.lines == ["error: rows.jsonl:7: not valid JSON. Mend the line.", "error: seed: got -1, expected at least 0."]


def test_stopping_a_job_stops_its_sweep(command: Callable[..., Ended], tmp_path: Path) -> None:
    """The job was saved and reported, and the next one began: Ctrl-C had to be pressed once a job."""
    ended = command("-m", "seed=143,1,2")
    assert (ended.code, ended.lines) == (143, ["step 5: stopped by SIGTERM and saved."])
    assert len((tmp_path / "calls.txt").read_text().splitlines()) == 1


def test_cfg_job_prints_the_configuration_and_runs_nothing(command: Callable[..., Ended], tmp_path: Path) -> None:
    ended = command("--cfg", "job", "trainer.max_steps=30", "student=mini_2m")
    assert ended.code == 0
    printed = yaml.safe_load(ended.out)
    assert (printed["trainer"]["max_steps"], printed["student"]["kind"], printed["data"]["on_bad_row"]) == (30, "scratch", "error")
    assert not (tmp_path / "calls.txt").exists()


def test_a_command_leaves_nothing_beside_its_run(command: Callable[..., Ended], tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    assert command("seed=1").code == 0
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"calls.txt", "__pycache__"}


# -------------------------------------------------------------------------------------------------------------------- from Python


def test_the_same_overrides_from_python_are_the_same_run(command: Callable[..., Ended], tmp_path: Path) -> None:
    overrides = ["objective.temperature=2", "student=mini_2m", 'tracking.project="a, b"', 'data.split="x y"', "data=hub", "data.path=a/b"]
    assert command(*overrides).code == 0
    config = load_config(overrides)
    assert (tmp_path / "calls.txt").read_text() == f"{config.output_dir} {config.objective.temperature}\n"


def test_mistakes_from_python_are_one_exception(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(["trainer.max_step=3", "seed=-1"])
    assert [problem.where for problem in raised.value.problems] == ["trainer.max_step", "seed"]
    assert str(raised.value).count("trainer.max_step:") == 1
