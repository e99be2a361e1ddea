"""Which texts are kept as those in which the student differs most."""

from __future__ import annotations

from typing import Any

import pytest

from mini_distill.evaluation.differences import Differences, runs_of_letters

OPENING = "Once upon a time, there was a "


def kept(texts: list[tuple[float, str, str]], count: int, tokenizer: Any = None) -> list[tuple[float, str]]:
    """(score, row) of what is kept of windows (score, row, text) that come in this order."""
    differences = Differences(count, tokenizer)
    for score, row, text in texts:
        if differences._would_keep(score, row):
            differences._keep(score, {"row": row, "forward_kl": score, "tokens": [{"text": text}]})
    return [(entry["forward_kl"], entry["row"]) for entry in differences.worst_first()]


def test_of_texts_that_begin_alike_only_the_worst_is_kept() -> None:
    """Seven of eight passages of a page read `Once upon a time, there was a little`."""
    texts = [(1.0, "a", f"{OPENING}cat."), (3.0, "b", f"… {OPENING.upper()}dog."), (2.0, "c", f"{OPENING}bird."), (0.5, "d", "Another.")]
    assert kept(texts, 3) == kept(texts[::-1], 3) == [(3.0, "b"), (0.5, "d")]


def test_each_document_has_its_worst_text_before_any_has_a_second() -> None:
    """Six of eight passages were from one file of two hundred."""
    texts = [(score, "long", f"text number {score}, all its own") for score in (5.0, 7.0, 6.0, 4.0)]
    texts += [(1.0, "short", "quite another text"), (2.0, "third", "and one more of its own")]
    assert kept(texts, 4) == kept(texts[::-1], 4) == [(7.0, "long"), (6.0, "long"), (2.0, "third"), (1.0, "short")]
    assert kept(texts[:4], 3) == [(7.0, "long"), (6.0, "long"), (5.0, "long")]
    assert kept(texts, 0) == []


@pytest.mark.parametrize(("text", "runs"), [("", 1), ("short", 1), ("12345678901234567890", 1), ("a " * 22, 3), ("漢" * 21, 2)])
def test_a_text_has_a_run_of_letters_wherever_one_begins(text: str, runs: int) -> None:
    assert len(runs_of_letters(text)) <= runs
    assert runs_of_letters(f"¿{text}!") == runs_of_letters(text.upper())
