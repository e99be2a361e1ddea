"""Repetition and diversity, counted by hand; a token is a character here."""

from __future__ import annotations

from typing import Any

import pytest

from mini_distill.evaluation.diversity import diversity


def test_a_loop_is_nearly_all_repetition(tiny_tokenizer: Any) -> None:
    found = diversity(["abcd" * 10], tiny_tokenizer)
    assert found["tokens"] == 40 and found["repetition"] == pytest.approx(1 - 4 / 37)
    assert found["distinct_1"] == 4 / 40 and found["distinct_2"] == 4 / 39


def test_a_letter_for_ever_is_no_diversity(tiny_tokenizer: Any) -> None:
    """Words were counted, and `eeee…` is one word: all words of the most degenerate text were different, and none was repeated."""
    found = diversity(["e" * 48], tiny_tokenizer)
    assert found["distinct_1"] == 1 / 48 and found["repetition"] == pytest.approx(1 - 1 / 45)


def test_languages_without_blanks_are_counted_too() -> None:
    class Characters:
        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return type("Encoded", (), {"input_ids": [ord(c) for c in text]})

    assert diversity(["天地玄黄天地玄黄"], Characters())["distinct_1"] == 0.5


def test_a_text_of_different_tokens_repeats_nothing(tiny_tokenizer: Any) -> None:
    assert diversity(["abcdef"], tiny_tokenizer) == {"tokens": 6, "repetition": 0.0, "distinct_1": 1.0, "distinct_2": 1.0}


def test_repetition_is_within_a_text_and_distinctness_over_all(tiny_tokenizer: Any) -> None:
    found = diversity(["abcd", "abcd"], tiny_tokenizer)
    assert found["repetition"] == 0.0 and found["distinct_1"] == 0.5


def test_texts_too_short_for_a_figure_have_none(tiny_tokenizer: Any) -> None:
    assert diversity(["", "a"], tiny_tokenizer) == {"tokens": 0.5, "distinct_1": 1.0}
