from __future__ import annotations

import os
import subprocess

from mini_distill.processes import children_of


def test_children_are_found_by_their_name() -> None:
    with subprocess.Popen(["sleep", "60"]) as one, subprocess.Popen(["sleep", "60"]) as other:
        assert set(children_of(os.getpid(), "sleep")) == {one.pid, other.pid}
        assert children_of(os.getpid(), "slee") == [] == children_of(one.pid, "sleep")
        for process in (one, other):
            process.kill()
