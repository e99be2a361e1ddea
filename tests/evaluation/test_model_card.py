"""The model card: true, loadable by the hub's own reader, and inert whatever its texts hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mini_distill.config import Config, DataConfig, FullEvaluationConfig, StudentConfig, TeacherConfig
from mini_distill.evaluation.model_card import CardFacts, escape, with_evaluation, write_model_card
from mini_distill.evaluation.samples import Sample

SUMMARY = {
    "eval/student_perplexity": 12.5,
    "eval/student_bits_per_byte": 1.25,
    "eval/forward_kl": 0.75,
    "eval/tokens": 4000.0,
    "model/student_parameters": 75_264,
}


def facts(config: Config | None = None, **changes: Any) -> CardFacts:
    values = {
        "config": config or Config(teacher=TeacherConfig(kind="hf", path="org/teacher", revision="abc123"), seed=7),
        "objective": "0.5 · 2² · forward_kl(T=2) + 0.5 · ce",
        "training_steps": 600,
        "training_tokens": 2_457_600,
        "summary": SUMMARY,
        "samples": [Sample("Once upon", {"teacher": " a time", "student": " a\n\ntime"})],
        "held_out_sequences": 120,
        "name": "mini",
    }
    return CardFacts(**{**values, **changes})


def card(tmp_path: Path, *args: Any, **changes: Any) -> ModelCard:
    return ModelCard.load(write_model_card(facts(*args, **changes), tmp_path))


def test_the_card_loads_back_with_its_metadata(tmp_path: Path) -> None:
    data = card(tmp_path).data
    assert data.base_model == ["org/teacher"] and data.license == "other" and data.library_name == "transformers"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"perplexity": 12.5, "bits_per_byte": 1.25}


def test_the_card_says_what_the_student_was_made_from(tmp_path: Path) -> None:
    text = card(tmp_path).text
    for fact in (
        "org/teacher, revision abc123",
        "0.5 · 2² · forward_kl(T=2) + 0.5 · ce",
        "600 optimizer steps, 2,457,600 supervised tokens",
    ):
        assert fact in text
    for fact in (
        "Python's standard library",
        "**Seed:** 7",
        "75,264 parameters",
        "| perplexity | 12.50 |",
        "4,000 supervised tokens",
        "one seed",
    ):
        assert fact in text
    assert "AutoModelForCausalLM.from_pretrained" in text and " a\n\ntime" in text


def test_markup_in_texts_of_models_and_data_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    attack = "</pre><script>alert(1)</script>\n```\n[x](javascript:alert(1)) <img src=x onerror=y> **bold**\x1b[2J"
    config = Config(
        teacher=TeacherConfig(kind="hf", path=attack, revision=attack),
        student=StudentConfig(kind="hf", path=attack),
        data=DataConfig(source="hub", path=attack, name=attack),
    )
    write_model_card(facts(config, samples=[Sample(attack, {attack: attack})], name=attack), tmp_path)
    loaded = ModelCard.load(tmp_path / "README.md")
    body = loaded.text
    assert "<script" not in body and "<img" not in body and "\x1b" not in body
    assert body.count("<pre>") == body.count("</pre>") == 2
    outside = "".join(part.split("</pre>")[-1] for part in body.split("<pre>"))
    assert "[x](" not in outside and outside.count("```") == 2  # our own three lines of code
    assert loaded.data.base_model is None and loaded.data.datasets is None


def test_metadata_cannot_be_broken_out_of(tmp_path: Path) -> None:
    loaded = card(tmp_path, name="mini\n---\nlicense: mit\n---")
    assert loaded.data.license == "other" and len(loaded.data.eval_results) == 2


def test_credentials_in_a_path_are_left_out(tmp_path: Path) -> None:
    config = Config(teacher=TeacherConfig(kind="none"), data=DataConfig(source="jsonl", path="https://user:hunter2@host/rows.jsonl"))
    write_model_card(facts(config), tmp_path)
    assert "hunter2" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_without_a_teacher_the_card_claims_none(tmp_path: Path) -> None:
    loaded = card(tmp_path, Config(teacher=TeacherConfig(kind="none"), student=StudentConfig(kind="scratch")), samples=[])
    assert "**Teacher:** none" in loaded.text and "Licence" not in loaded.text and "## Samples" not in loaded.text
    assert loaded.data.base_model is None and "knowledge-distillation" not in loaded.data.tags


def test_a_local_teacher_is_no_base_model_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    loaded = card(tmp_path, Config(teacher=TeacherConfig(kind="hf", path=str(tmp_path / "teacher"))))
    assert loaded.data.base_model is None and "teacher" in loaded.text


EVALUATED = SUMMARY | {
    "text/student_repetition": 0.5,
    "task/blimp/student": 0.75,
    "task/blimp/student_standard_error": 0.04,
    "task/crows <i>/student": 0.55,
    "task/crows <i>/student_from_half": 0.05,
}


def evaluated(card: str) -> str | None:
    config = facts().config
    return with_evaluation(
        card, config.data, config.teacher.kind, EVALUATED, 120, FullEvaluationConfig(task_limit=300, sampling_temperature=0.0)
    )


def test_a_card_learns_of_an_evaluation_and_keeps_what_else_stands_in_it(tmp_path: Path) -> None:
    """After BLiMP and CrowS-Pairs it still said that neither facts nor bias had been evaluated."""
    before = write_model_card(facts(), tmp_path).read_text(encoding="utf-8").replace("## Samples", "## My own words\n\nKept.\n\n## Samples")
    after = evaluated(before)
    assert after is not None and "safety and bias were not evaluated" in before
    loaded = ModelCard(after)
    assert "safety and bias were not evaluated" not in after and "Of bias the stereotype scores above are all" in after
    assert "| blimp | 75.0 ± 4.0 % |" in loaded.text and "| crows &lt;i&gt; | 55.0 % | 5.0 |" in loaded.text and "Kept." in loaded.text
    scores = {result.metric_type: result.metric_value for result in loaded.data.eval_results}
    assert scores == {"perplexity": 12.5, "bits_per_byte": 1.25, "score": 0.75, "stereotype_score": 0.55}
    assert loaded.data.base_model == ["org/teacher"]
    assert "Of each task at most 300 items were done" in after and "distinct tokens are those of greedy generations." in after
    assert evaluated(after) == after


def test_of_tasks_alone_a_card_does_not_say_that_bias_was_evaluated(tmp_path: Path) -> None:
    text = card(tmp_path, summary=SUMMARY | {"task/blimp/student": 0.75}).text
    assert "Beyond the tasks above, facts, instructions, safety and bias were not evaluated." in text


@pytest.mark.parametrize("card", ["# A card of my own\n", "---\n- no\n---\n", "---\na: [\n---\n", ""])
def test_a_card_that_is_none_of_ours_is_left_alone(card: str) -> None:
    assert evaluated(card) is None


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_not_finite_stay_out_of_the_metadata(tmp_path: Path, value: float) -> None:
    assert card(tmp_path, summary={**SUMMARY, "eval/student_perplexity": value, "eval/student_bits_per_byte": value}).data.eval_results in (
        None,
        [],
    )


def test_a_run_without_evaluation_still_has_a_card(tmp_path: Path) -> None:
    assert "## Limits" in card(tmp_path, summary={}, samples=[], training_tokens=None, held_out_sequences=None).text


def test_names_with_underscores_stay_readable() -> None:
    assert escape("stories_260K") == "stories_260K"
    assert escape("_x_ *y* `z` a\nb <b> & #1") == r"\_x\_ \*y\* \`z\` a b &lt;b&gt; &amp; \#1"
