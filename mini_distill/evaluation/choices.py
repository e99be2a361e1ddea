"""Multiple choice by likelihood: the answer that a model finds likeliest after the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import ChoicesConfig
from ..data.row import Row
from ..errors import DataError
from .pairs import read_rows, text_of


@dataclass(frozen=True)
class Question:
    """A question, its answers, which of them is right, and the group it belongs to."""

    question: str
    choices: tuple[str, ...]
    answer: int
    group: str


def read_questions(config: ChoicesConfig, where: str, limit: int | None = None, seed: int = 0) -> list[Question]:
    """The questions of a task (`limit` of them).

    Raises:
        DataError: a file cannot be read, or a row has not what it needs.
    """
    return [_question(row, config) for row in read_rows(str(config.path), f"{where}.path", limit, seed)]


def _question(row: Row, config: ChoicesConfig) -> Question:
    choices = _choices(row, config.choices_column)
    group = str(row.columns.get(config.group_column, "(none)")) if config.group_column else ""
    return Question(text_of(row, config.question_column), choices, _answer(row, config.answer_column, choices), group)


def _choices(row: Row, column: str) -> tuple[str, ...]:
    value: Any = row.columns.get(column)
    if isinstance(value, dict):  # {"text": […], "label": […]}, as ARC has it
        value = value.get("text")
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) and text.strip() for text in value):
        there = f" (there are: {', '.join(map(str, row.columns))})" if column not in row.columns else ""
        raise DataError(
            row.origin, f"no list of two answers or more in the column '{column}'{there}", "Name another column, or mend the row."
        )
    return tuple(value)


def _answer(row: Row, column: str, choices: tuple[str, ...]) -> int:
    value: Any = row.columns.get(column)
    found = -1
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str) and value in choices:
        found = choices.index(value)
    elif isinstance(value, str) and value.strip().isdigit():
        found = int(value)
    elif isinstance(value, str) and len(value.strip()) == 1 and value.strip().isalpha():
        found = ord(value.strip().upper()) - ord("A")
    if not 0 <= found < len(choices):
        what = f"got {value!r} in the column '{column}', expected the right answer: its index from 0, its letter, or its text"
        raise DataError(row.origin, what, "Name another column, or mend the row.")
    return found


def is_right(question: Question, scores: Sequence[float], normalise: str) -> float:
    """1 where the likeliest answer is the right one: by the sum of its tokens, or per character (`acc` and `acc_norm`)."""
    lengths = [len(choice) if normalise == "characters" else 1 for choice in question.choices]
    values = [score / length for score, length in zip(scores, lengths, strict=True)]
    return float(values.index(max(values)) == question.answer)
