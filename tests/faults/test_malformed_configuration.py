"""Every setting of every command with values it cannot have, and command lines and presets that cannot be read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from faults.answers import answer_to
from faults.record import record
from mini_distill.cli import CONTRACTS, run_command
from mini_distill.contract import build_config

ODD: dict[str, Any] = {
    "a word": "a word",
    "empty": "",
    "blank": "   ",
    "null": None,
    "true": True,
    "zero": 0,
    "minus one": -1,
    "a fraction": 0.5,
    "not a number": math.nan,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "huge": 2**70,
    "a text that is a number": "12",
    "hexadecimal": "0x1F",
    "an empty list": [],
    "a list": [1, "two", None],
    "a nested list": [[1], [2, [3]]],
    "an empty mapping": {},
    "a mapping": {"a": {"b": 1}},
    "mapping of numbers": {1: 2},
    "a long text": "x" * 5000,
    "a zero byte": "a\x00b",
    "a line break": "a\nb",
    "an unknown reference": "${nowhere.at_all}",
    "half a reference": "${seed",
    "an unknown resolver": "${nothing:1}",
    "missing": "???",
    "bytes": b"bytes",
}


def leaves(schema: type, prefix: str = "") -> Iterator[str]:
    """The full path of every setting."""
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.default_factory):
            yield from leaves(field.default_factory, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def with_setting(command: str, key: str, value: Any) -> dict[str, Any]:
    """What a command needs, and one setting besides."""
    tree: Any = deepcopy(NEEDED.get(command, {}))
    *groups, name = key.split(".")
    at = tree
    for group in groups:
        at = at.setdefault(group, {})
    at[name] = value
    return tree


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def means_the_same(given: Any, taken: Any) -> bool:
    """A number may have been written as text, a number be taken as text, and a mapping have become settings."""
    if given is None or isinstance(given, bool):
        return given is taken
    if isinstance(taken, bool):
        return str(given) == str(int(taken))
    if isinstance(given, int | float) and isinstance(taken, int | float):
        return given == taken
    if isinstance(given, list):
        return isinstance(taken, list) and len(given) == len(taken) and all(map(means_the_same, given, taken))
    if isinstance(given, dict):
        return len(given) == len(taken)
    if isinstance(given, str) and isinstance(taken, int | float):
        return float(int(given, 0)) == taken
    return str(given) == str(taken)


NEEDED: dict[str, dict[str, Any]] = {"cache_contract": {"cache": {"dir": "targets"}}, "evaluate_contract": {"model": "student"}}
"""What a command asks for, so that what is wrong is the odd value alone."""
CASES = [(command, key) for command, schema in CONTRACTS.items() for key in leaves(schema)]


@pytest.mark.parametrize("odd", [pytest.param(odd, marks=() if odd in ("a word", "not a number") else pytest.mark.slow) for odd in ODD])
def test_a_setting_with_a_value_it_cannot_have_is_named(odd: str) -> None:
    """Each alone, since a second problem could hide the first."""
    counts = {"accepted": 0, "refused": 0}
    for command, key in CASES:
        answer = answer_to(lambda command=command, key=key: build_config(with_setting(command, key, ODD[odd]), CONTRACTS[command]), 2)
        if answer.error is None:
            assert means_the_same(ODD[odd], value_at(answer.value, key)), (command, key, value_at(answer.value, key))
        else:
            group = key.partition(".")[0]
            assert any(place == key or place.startswith((f"{key}.", f"{key}[", group)) for place in answer.places), (
                command,
                key,
                str(answer),
            )
        counts["accepted" if answer.error is None else "refused"] += 1
    record("malformed settings", injected=len(CASES), fired=len(CASES), **counts)


LINES = """
trainer.max_steps | trainer.max_steps= | =3 | trainer..max_steps=3 | .trainer=1 | trainer.=3 | trainer.max_steps=[ | trainer.max_steps='1
trainer.max_steps={a:1} | trainer.max_steps=[1,2] | trainer.max_steps=1,2 | trainer.max_steps==3 | trainer.max_steps=3=4 | trainer.max_steps=1e
trainer.max_steps=${ | trainer.max_steps=${nowhere} | trainer.max_steps=${oc.env:NOT_SET_ANYWHERE} | trainer.max_steps=${oc.env} | seed=${seed}
trainer.max_step=3 | trainer=3 | trainer=fast | trainer=[a] | ~trainer | ~trainer.max_steps | +nothing=1 | ++nothing.at.all=1 | nothing=1
objective=nosuch | objective=forward_kl,jsd | data=[text,jsonl] | data=text data.path= | data=nosuch | teacher=nosuch | student=nosuch | experiment=nosuch
teacher=hf | data=text | data=jsonl | data=chat | data=hub | data=mixture | student=hf | teacher=cached | teacher=server
trainer.learning_rate=fast | trainer.learning_rate=-1 | trainer.learning_rate=nan | trainer.learning_rate=1e999 | objective.temperature=0
objective.kl_weight=0 objective.ce_weight=0 | objective.kl_weight=-1 | data.seq_len=0 | data.seq_len=-5 | data.seq_len=1.5 | data.seq_len=1k
data.eval_fraction=1 | data.eval_fraction=2 | trainer.precision=fp8 | trainer.schedule=nosuch | trainer.micro_batch_size=0 | seed=-1 | seed=x
resume=maybe | resume_allow=seed | output_dir= | debug=perhaps | tracking.kind=nosuch | objective.terms={a:{weight:1}} | objective.terms=[1]
evaluation.num_samples=-1 | evaluation.hooks=[nosuch.module] | data.source=nosuch.Class | objective.divergence=nosuch | objective.divergence=os.system
--nosuch | --config-dir | --config-dir=/nowhere/at/all | --config-name=nosuch | -x | a b c | @ | trainer@x=default | /trainer=default | hydra.nosuch=1
hydra/launcher=nosuch | hydra/sweeper=nosuch | hydra.run.dir=${nowhere} | "" | ' | \\ | é=ü | 数据=1 | \U0001f600 | trainer.max_steps=\u00a05
""".replace("\n", " | ").split(" | ")
LINES = [line.strip() for line in LINES if line.strip()]


def command_line(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of `python -m mini_distill.train <text>`, which would do nothing."""
    monkeypatch.setattr("sys.argv", ["train", *text.split(), *more])
    with pytest.raises(SystemExit) as ended:
        run_command("builtins:id")
    code = ended.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("lines", [LINES[::8], pytest.param(LINES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_command_line_that_cannot_be_is_one_line_a_problem(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    counts = {"accepted": 0, "refused": 0, "lines": 0}
    for text in lines:
        code, printed = command_line(text, monkeypatch, capsys)
        assert code in (0, 2), (text, code, printed)
        assert not any("Traceback" in line for line in printed), (text, printed)
        if code == 2:
            assert printed and all(line.startswith("error: ") and ": " in line[7:] for line in printed), (text, printed)
        counts["refused" if code else "accepted"] += 1
        counts["lines"] += len(printed)
    record("malformed command lines", injected=len(lines), fired=len(lines), **counts)


PRESETS = {
    "trainer: [": "mine.yaml:",
    "trainer:\n  max_steps: 3\n   warmup_steps: 1": "mine.yaml:4",
    "trainer:\n\tmax_steps: 3": "mine.yaml:3",
    "trainer: {max_steps: 3": "mine.yaml:",
    "- 1\n- 2": "mine.yaml",
    "just a text": "just a text",
    "trainer: 'open": "mine.yaml:",
    "trainer: &a [*b]": "mine.yaml:",
    "defaults:\n  - nosuch: thing\n": "nosuch",
    "defaults:\n  - override /objective: nosuch\n": "mine.yaml:3",
    "defaults: 7": "mine.yaml",
    "trainer:\n  max_step: 3": "trainer.max_step",
    "trainer:\n  max_steps: three": "trainer.max_steps",
    "trainer: null": "trainer",
    "trainer:\n  max_steps: !!python/object/apply:os.system ['touch canary']": "mine.yaml:3",
    "trainer: !!python/name:os.system": "mine.yaml:2",
    "x: !custom 1": "mine.yaml:2",
    "%YAML 9.9\n---\nseed: 1": "mine.yaml",
    "seed: 1\nseed: 2": "mine.yaml:",
    "seed: 1\n---\nseed: 2": "mine.yaml",
    "seed: ${nowhere}": "seed",
    "? [1, 2]\n: 3": "mine.yaml",
    "\x00": "mine.yaml",
    "seed: \x07": "mine.yaml",
    "1: 2": "1",
    "trainer:\n  ? {a: b}\n  : c": "mine.yaml",
}


def test_a_preset_that_cannot_be_read_is_named_with_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    monkeypatch.chdir(tmp_path)
    wrong = []
    for text, named in PRESETS.items():
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
        code, lines = command_line("+experiment=mine", monkeypatch, capsys, "--config-dir", str(tmp_path))
        good = code == 2 and lines and all(line.startswith("error: ") for line in lines) and any(named in line for line in lines)
        if not good:
            wrong.append((text, code, lines[-3:]))
    assert not wrong, "\n".join(map(str, wrong))
    assert not (tmp_path / "canary").exists()
    record("malformed presets", injected=len(PRESETS), fired=len(PRESETS), refused=len(PRESETS))
