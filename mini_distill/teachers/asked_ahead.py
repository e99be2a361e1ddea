"""Teachers that are asked about the batches of the next step while the student takes this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..data.batch import Batch
from .targets import Teacher


class AskableTeacher(Teacher, Protocol):
    """One whose answers are read or waited for: `CachedTeacher`, `ServerTeacher`. (One that computes would compete with the student.)

    Called with a batch that it was asked about it gives the answer, or raises what came of it; called with another it answers there
    and then. So nothing but the time of a step depends on being asked.
    """

    def ask(self, batch: Batch) -> Any:
        """Begin to find the targets of a batch, which will be called for in the order of asking; nothing is waited for."""
        ...

    def give_up(self) -> None:
        """Forget what was asked, and leave no thread."""
        ...


@contextmanager
def asked_ahead(teacher: AskableTeacher, steps: Iterator[list[Batch]]) -> Iterator[Iterator[list[Batch]]]:
    """The same steps, each given out when the teacher has been asked about the one after it too."""
    try:
        yield _asked_ahead(teacher, steps)
    finally:
        teacher.give_up()


def _asked_ahead(teacher: AskableTeacher, steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    step = _asked_about(teacher, steps)
    while step:
        following = _asked_about(teacher, steps)
        yield step
        step = following


def _asked_about(teacher: AskableTeacher, steps: Iterator[list[Batch]]) -> list[Batch]:
    """The next step's batches; none at the end."""
    step = next(steps, [])
    for batch in step:
        teacher.ask(batch)
    return step
