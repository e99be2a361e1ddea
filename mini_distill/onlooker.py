"""Whether somebody looks on: a terminal or a notebook gets live bars, a log file does not."""

from __future__ import annotations

import sys


def in_notebook() -> bool:
    """Whether what is written to stderr appears under a cell, where a line is overwritten as in a terminal."""
    kernel = sys.modules.get("ipykernel.iostream")  # not imported for this: elsewhere it is not there
    return kernel is not None and isinstance(sys.stderr, kernel.OutStream)


def is_watched() -> bool:
    """Whether a line on stderr can be overwritten, and somebody may see it."""
    return in_notebook() or sys.stderr.isatty()
