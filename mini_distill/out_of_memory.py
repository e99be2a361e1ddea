"""Memory that is not there: one line with the settings that take less of it, the most harmless first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .errors import MiniDistillError, OutOfMemory

ANYWHERE = (
    "load the teacher with teacher.dtype=bfloat16 or on another teacher.device",
    "lower evaluation.batch_size and trainer.micro_batch_size",
    "shorten data.seq_len",
    "choose a smaller student",
)
"""What helps wherever memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the computer; told by names, since torch may not have been imported."""
    if isinstance(error, MiniDistillError):
        return False
    of_device = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    of_computer = isinstance(error, MemoryError) or "can't allocate memory" in str(error)  # torch has no class of its own for this
    return of_device or of_computer


def out_of_memory(error: BaseException, where: str = "memory", size: str = "", remedies: Sequence[str] = ANYWHERE) -> OutOfMemory:
    """The line for `error`: `size` says what took so much, `remedies` stand in the order in which to try them."""
    (cause,) = str(error).splitlines()[:1] or [type(error).__name__]
    what = " ".join(filter(None, ["out of memory", size, f"({cause[:120]})"]))
    return OutOfMemory(where, what, "In this order: " + "; ".join(remedies) + ".")


@contextmanager
def memory_errors(where: str, size: str, remedies: Sequence[str]) -> Iterator[None]:
    """Raise `out_of_memory` in place of what torch raises; other errors pass.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, where, size, remedies) from error
        raise
