"""What a fault test tried, found and saw, for the report of `python -m tests.faults`."""

from __future__ import annotations

import json
import os

VARIABLE = "MINI_DISTILL_FAULT_REPORT"
"""Names the file that the lines are appended to; nothing is written without it."""


def record(family: str, *, injected: int, fired: int, **counts: int) -> None:
    """Note the outcome of one test; may be called from any process, forked ones too.

    Args:
        family: what was tried, for people: "kill -9 at random moments". Lines of the same family are summed.
        injected: faults that were set up.
        fired: faults of which it is proven that they happened.
        counts: what came of them (`exact=12, stuck=0`), summed key by key.
    """
    if file := os.environ.get(VARIABLE):
        line = json.dumps({"family": family, "injected": injected, "fired": fired, **counts}) + "\n"
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)  # one write: lines of two processes do not mix
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
