"""Chat templates with a fault, each found by its own check; and sound ones, in which none is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mini_distill.config import DataConfig
from mini_distill.data.row import Row
from mini_distill.diagnosis.finding import DOUBTFUL, GOOD, WRONG, Finding
from mini_distill.diagnosis.template import check_template

TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "who is it?"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "and there?"},
    {"role": "assistant", "content": "two birds"},
]
SOUND = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FAULTS = {
    "template's beginning": SOUND.replace("'<' + m.role", "('<' if messages[-1].role == 'assistant' else '>') + m.role"),
    "generation prompt": SOUND.replace("<assistant>{% endif %}", "<answer>{% endif %}"),
    "assistant's turns": SOUND.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'user' %}"),
}


@pytest.fixture
def findings(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    """`findings(template, messages=…, others=…)`: by name."""

    def check(template: str, messages: Any = TALK, others: Any = None, **settings: Any) -> dict[str, Finding]:
        (tmp_path / "mine.jinja").write_text(template)
        config = DataConfig(source="jsonl", messages_column="messages", chat_template=str(tmp_path / "mine.jinja"), **settings)
        rows = [Row(f"rows.jsonl:{i}", {"messages": messages}) for i in range(1, 4)]
        return {found.name: found for found in check_template(config, rows, tiny_tokenizer, others or {})}

    return check


def test_in_a_sound_template_there_is_no_fault(findings: Any) -> None:
    found = findings(SOUND)
    assert list(found) == [*FAULTS] and all(finding.verdict == GOOD and "3 of 3" in finding.measured for finding in found.values())


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_by_its_own_check(findings: Any, name: str) -> None:
    finding = findings(FAULTS[name])[name]
    assert finding.verdict == WRONG and "0 of 3" in finding.measured and "rows.jsonl:1" in finding.advice


@pytest.mark.parametrize(
    ("change", "verdict", "what"),
    [
        (
            ("{{ m.content }}<end>{% endgeneration %}", "{{ m.content[:3] }}{% endgeneration %}{{ m.content[3:] }}<end>"),
            WRONG,
            "not learned whole",
        ),
        (("{% if m.role == 'assistant' %}{% generation %}", "{% if m.role != 'system' %}{% generation %}"), WRONG, "somebody else's words"),
        (("{% generation %}", "{% generation %}so: "), DOUBTFUL, "own frame"),
        (("{% generation %}", "{% generation %}<think>hm.</think>\n"), GOOD, "exactly"),
    ],
)
def test_what_is_learned_are_the_turns_of_the_assistant_and_nothing_else(findings: Any, change: Any, verdict: str, what: str) -> None:
    finding = findings(SOUND.replace(*change))["assistant's turns"]
    assert (finding.verdict, what in finding.measured) == (verdict, True)


def test_words_between_prompt_and_answer_are_doubted(findings: Any) -> None:
    finding = findings(SOUND.replace("{% generation %}", "{% generation %}<think></think>"))["generation prompt"]
    assert finding.verdict == DOUBTFUL and "'<think></think>' (rows.jsonl:1)" in finding.measured


def test_another_template_of_the_teacher_is_doubted(findings: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none of its own" in findings(SOUND, others={"teacher": tiny_tokenizer})["teacher's template"].measured
    monkeypatch.setattr(tiny_tokenizer, "chat_template", SOUND)
    assert findings(SOUND, others={"student": tiny_tokenizer})["student's template"].verdict == GOOD
    monkeypatch.setattr(tiny_tokenizer, "chat_template", SOUND.replace("<end>", "<stop>"))
    finding = findings(SOUND, others={"teacher": tiny_tokenizer})["teacher's template"]
    assert finding.verdict == DOUBTFUL and "0 of 3 conversations are written as by the teacher's own" in finding.measured


def test_conversations_without_an_answer_are_said_to_have_none(findings: Any) -> None:
    assert findings(SOUND, TALK[:2])["template"].verdict == DOUBTFUL


def test_of_text_there_is_no_template_to_check(tiny_tokenizer: Any) -> None:
    assert not list(check_template(DataConfig(), [Row("a", {"text": "b"})], tiny_tokenizer, {}))
