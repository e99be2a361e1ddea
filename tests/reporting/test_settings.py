"""From settings back to the command that gives them."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from measured_folders import settings

from mini_distill.overrides import override
from mini_distill.reporting.settings import command_of, presets


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["student=mini_15m", "objective.temperature=2", "seed=3"],
        ["objective=hidden_mse", "objective.terms.hidden_mse.weight=0.25"],
        ["objective=attention_kl"],
        ["objective=kl_ce", "objective.terms={hidden_mse: {layers: last}}", "objective.schedules={ce: {0: 1.0, 50: 0.5}}"],
        ["objective=jsd", "objective.divergence_options={jsd_beta: 0.25}", "trainer.learning_rate=1e-5", "trainer.max_grad_norm=null"],
        ["teacher=gemma_2b", "teacher.revision=abc", "student.num_layers=3", "data=chat", "data.path=README.md", "data.seq_len=64"],
        ["data=text", "data.path=README.md", "data.document_separator='\\n\\n(?=\"|$)'"],
        ["evaluation.prompts=[\"it's\", \"a \\\"b\\\" \\\\\", '1.5', 'null', 'x, y: {z}', 'two\nlines', 'é 漢']"],
    ],
    ids=lambda overrides: " ".join(overrides)[:30],
)
def test_the_command_gives_the_settings_again(overrides: list[str]) -> None:
    wanted = settings(*overrides)
    arguments = shlex.split(command_of(dataclasses.asdict(wanted)))
    assert arguments[:3] == ["python", "-m", "mini_distill.train"]
    given = settings(*arguments[3:])
    assert dataclasses.replace(given, output_dir=None) == dataclasses.replace(wanted, output_dir=None)


def test_the_command_is_short_where_presets_say_it() -> None:
    assert command_of(dataclasses.asdict(settings("student=mini_15m", "teacher=llama3_8b"))) == (
        "python -m mini_distill.train teacher=llama3_8b student=mini_15m"
    )
    assert (
        command_of(dataclasses.asdict(settings("trainer.num_threads=3", "tracking=wandb"))) == "python -m mini_distill.train tracking=wandb"
    )


@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00"))),
    )
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_a_value_is_read_by_hydra_as_it_was(value: object) -> None:
    parsed = OverridesParser.create().parse_override(override("key", value)).value()
    texts = [str(text) for text in parsed] if isinstance(parsed, list) else parsed
    assert texts == value and isinstance(texts, type(value))


def test_presets_that_reach_beyond_their_group_are_spelt_out() -> None:
    assert "attention_kl" not in presets("objective") and "jsd" in presets("objective")
