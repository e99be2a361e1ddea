"""What an input is answered with: it is accepted, or refused in well-formed lines. Anything else fails the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mini_distill.errors import MiniDistillError

LONGEST_LINE = 2000


@dataclass
class Answer:
    """Of one call.

    Attributes:
        value: What the call gave, where it was accepted.
        error: The refusal, else None.
    """

    value: Any
    error: MiniDistillError | None

    @property
    def places(self) -> list[str]:
        """The settings, files or lines that the refusal names."""
        return [problem.where for problem in self.error.problems] if self.error else []

    def __str__(self) -> str:
        return "accepted" if self.error is None else "\n".join(f"error: {problem}" for problem in self.error.problems)


def answer_to(call: Callable[[], Any], *codes: int) -> Answer:
    """The answer, with every line looked at: a place, what was found there, one line each, an exit code among `codes`."""
    try:
        return Answer(call(), None)
    except MiniDistillError as error:
        assert error.exit_code in codes, f"exit code {error.exit_code}: {error}"
        assert error.problems
        for problem in error.problems:
            line = str(problem)
            assert problem.where.strip() and problem.what.strip(), line
            assert "\n" not in line and len(line) <= LONGEST_LINE and "Traceback" not in line, line[:LONGEST_LINE]
        return Answer(None, error)
