from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mini_distill.config import Config
from mini_distill.contract import known_keys
from mini_distill.errors import ConfigError
from mini_distill.training.fingerprints import HARMLESS, compare_fingerprints


def fingerprints(**changes: Any) -> dict[str, Any]:
    """Of a run with the settings `changes` (dots as double underscores); `data` etc. without a group are fingerprints."""
    config = dataclasses.asdict(Config())
    tree = {"config": config, "data": {"path": "hash of rows", "rows": 10}, "tokenizer": "t", "teacher": "w"}
    for name, value in changes.items():
        *groups, last = name.split("__")
        place: dict[str, Any] = tree
        for group in groups:
            place = place[group]
        place[last] = value
    return tree


def refused(old: dict[str, Any], new: dict[str, Any], *allow: str) -> list[str]:
    try:
        compare_fingerprints(old, new, list(allow))
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_the_same_command_may_go_on() -> None:
    assert refused(fingerprints(), fingerprints()) == []
    assert refused(fingerprints(config__evaluation__hooks=("a.b",)), fingerprints(config__evaluation__hooks=["a.b"])) == []


def test_every_difference_is_named_with_both_values_and_what_to_do() -> None:
    lines = refused(fingerprints(), fingerprints(config__trainer__learning_rate=0.5, tokenizer="u", data__rows=11))
    remedy = "to go on with the new one, or start anew with resume=never or another output_dir."
    assert sorted(lines) == [
        f"data.rows: got 11, and the run to be resumed has 10. Give the old value back, add resume_allow=[data] {remedy}",
        f'tokenizer: got "u", and the run to be resumed has "t". Give the old value back, add resume_allow=[tokenizer] {remedy}',
        f"trainer.learning_rate: got 0.5, and the run to be resumed has 0.001. Give the old value back, add resume_allow=[trainer.learning_rate] {remedy}",
    ]


def test_code_that_is_another_is_named_without_its_digests() -> None:
    """And that there was none before is no difference of its own."""
    (line,) = refused(fingerprints(code={"a.loss": "0f"}), fingerprints(code={"a.loss": "1e"}))
    assert line.startswith("code.a.loss: not the code that the run to be resumed has. Give the old value back, add resume_allow=[code] ")
    (line,) = refused(fingerprints(code={}), fingerprints(code={"a.loss": "1e"}))
    assert line.startswith('code.a.loss: got "1e", and the run to be resumed has nothing.')


def test_of_a_finished_run_no_new_value_is_offered_as_there_is_no_step_to_use_it_in() -> None:
    with pytest.raises(ConfigError) as caught:
        compare_fingerprints(fingerprints(), fingerprints(tokenizer="u"), finished=True)
    line = 'tokenizer: got "u", and the run, which has finished, has "t". Give the old value back, or start anew with resume=never or another output_dir.'
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "key",
    [
        "seed",
        "trainer.max_steps",
        "trainer.micro_batch_size",
        "trainer.learning_rate",
        "trainer.precision",
        "objective.temperature",
        "data.seq_len",
        "data.path",
        "student.num_layers",
        "teacher.dtype",
    ],
)
def test_what_changes_the_student_is_refused_unless_allowed(key: str) -> None:
    """A framework's trainer accepted other data, batch size and seed on resume, and silently ignored a new learning rate."""
    changed = fingerprints(**{"config__" + key.replace(".", "__"): "other"})
    assert [line.partition(":")[0] for line in refused(fingerprints(), changed)] == [key]
    assert refused(fingerprints(), changed, key) == []


@pytest.mark.parametrize("key", HARMLESS)
def test_what_cannot_change_the_student_is_not_compared(key: str) -> None:
    assert key in known_keys()  # a renamed setting would be compared again
    assert refused(fingerprints(), fingerprints(**{"config__" + key.replace(".", "__"): "other"})) == []


def test_a_group_may_be_allowed_as_a_whole() -> None:
    changed = fingerprints(config__data__path="b.txt", data__rows=12, data__path="other hash")
    assert refused(fingerprints(), changed, "data") == []
    assert [line.partition(":")[0] for line in refused(fingerprints(), changed, "data.path")] == ["data.rows"]


def test_a_fingerprint_is_not_hidden_by_a_setting_of_the_same_name() -> None:
    assert len(refused(fingerprints(), fingerprints(data__path="other hash"))) == 1
    assert len(refused(fingerprints(), fingerprints(config__data__path="other", data__path="other hash"))) == 2


def test_a_key_that_only_one_side_has_differs() -> None:
    old, new = fingerprints(), fingerprints(config__data__mixture={"a": {"weight": 1}})
    assert "data.mixture" in refused(old, new)[0]
    assert "got nothing" in "".join(refused(fingerprints(extra=3), fingerprints()))


def test_the_remedy_is_a_key_that_resume_allow_takes() -> None:
    old, new = (fingerprints(config__data__mixture={"a": {"weight": w}}) for w in (1, 2))
    (line,) = refused(old, new)
    assert line.startswith("data.mixture.a.weight: got 2") and "resume_allow=[data.mixture]" in line
    assert refused(old, new, "data.mixture") == []
