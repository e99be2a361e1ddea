"""Repetition and diversity, counted by hand."""

from __future__ import annotations

import pytest

from mini_distill.evaluation.diversity import diversity


def test_a_loop_is_nearly_all_repetition() -> None:
    found = diversity(["a b c d " * 10])
    assert found["words"] == 40 and found["repetition"] == pytest.approx(1 - 4 / 37)
    assert found["distinct_1"] == 4 / 40 and found["distinct_2"] == 4 / 39


def test_a_text_of_different_words_repeats_nothing() -> None:
    assert diversity(["one two three four five six"]) == {"words": 6, "repetition": 0.0, "distinct_1": 1.0, "distinct_2": 1.0}


def test_repetition_is_within_a_text_and_distinctness_over_all() -> None:
    found = diversity(["a b c d", "a b c d"])
    assert found["repetition"] == 0.0 and found["distinct_1"] == 0.5


def test_texts_too_short_for_a_figure_have_none() -> None:
    assert diversity(["", "a"]) == {"words": 0.5, "distinct_1": 1.0}
