"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass

GOOD, DOUBTFUL, WRONG = "good", "doubtful", "wrong"
MARKS = {GOOD: "✓", DOUBTFUL: "!", WRONG: "✗"}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        name: What was checked.
        verdict: `good`, `doubtful` (it may be meant) or `wrong`.
        measured: What was found, with its number and what it is expected to be.
        advice: What to do; empty where all is well.
    """

    name: str
    verdict: str
    measured: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{MARKS[self.verdict]} {self.name:<24} {self.measured}" + (f"\n  {'':<24} → {self.advice}" if self.advice else "")


def judged(name: str, good: bool, measured: str, advice: str, otherwise: str = WRONG) -> Finding:
    """Good, or `otherwise` with the advice."""
    return Finding(name, GOOD, measured) if good else Finding(name, otherwise, measured, advice)
