"""The errors that are the user's to mend, each with its exit code and its one line.

Everything a user can get wrong ends in one `error:` line a problem, naming the setting, file or row, what was found, what was
expected and what to do. Our own broken invariants are ordinary exceptions and keep their traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import dataclass

from .redaction import redact_text


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` (a setting's full path, or file:line), `what` was found and expected, and the `remedy`."""

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.where}: {self.what.rstrip('.')}." + (f" {self.remedy}" if self.remedy else "")
        return " ".join(line.split())  # one line, whatever a library's message held


class MiniDistillError(Exception):
    """A problem the user can mend. Holds one or more `Problem`s; `exit_code` is what the process ends with."""

    exit_code = 1
    in_full = False  # debug=true: a notebook's cell shows the traceback, too

    def __init__(self, where: str, what: str, remedy: str = "") -> None:
        self.problems: list[Problem] = [Problem(where, what, remedy)]
        super().__init__(str(self.problems[0]))

    @classmethod
    def from_problems(cls, problems: Iterable[Problem]) -> MiniDistillError:
        """Several problems in one error, reported together."""
        problems = list(problems)
        error = cls(problems[0].where, problems[0].what, problems[0].remedy)
        error.problems = problems
        error.args = ("; ".join(map(str, problems)),)
        return error

    def lines(self) -> list[str]:
        """A line a problem, as they are shown: without secrets."""
        return [redact_text(f"error: {problem}") for problem in self.problems]

    def _render_traceback_(self) -> list[str]:
        """What IPython shows below a cell: the frames within this package say nothing that the lines do not."""
        return redact_text("".join(traceback.format_exception(self))).splitlines() if self.in_full else self.lines()


class ConfigError(MiniDistillError):
    """A setting is unknown, mistyped, out of range or contradicts another."""

    exit_code = 2


class DataError(MiniDistillError):
    """A source, file or row cannot be used."""

    exit_code = 3


class ModelError(MiniDistillError):
    """A model, tokenizer or hub repository cannot be used."""

    exit_code = 4


class CacheError(MiniDistillError):
    """A cache of teacher targets is damaged, incomplete, or of something else."""

    exit_code = 5


class StorageError(MiniDistillError):
    """The output folder cannot be written, is in use, or holds damaged files."""

    exit_code = 6


class NumericsError(MiniDistillError):
    """A loss or a gradient is not finite."""

    exit_code = 7


class DistributedError(MiniDistillError):
    """A process of the group, or a data worker, is missing, wrong or dead."""

    exit_code = 8


class OutOfMemory(MiniDistillError):
    """The device's memory is too small for the step."""

    exit_code = 9


class Preempted(MiniDistillError):
    """The run was asked to stop; it has saved and can go on. Ctrl-C exits 130, SIGTERM 143."""

    def __init__(self, where: str, what: str, remedy: str = "", exit_code: int = 143) -> None:
        super().__init__(where, what, remedy)
        self.exit_code = exit_code

    def lines(self) -> list[str]:
        """Not an error: what was asked for has been done."""
        return [redact_text(str(problem)) for problem in self.problems]
