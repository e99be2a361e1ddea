"""A tracker's server that cannot be reached: the run is the same, ends with 0, and ends soon."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import TESTS, status

from faults.record import record
from mini_distill.digest import digest_run

PROGRAM = """
import sys
import mini_distill as md
from mini_distill.training import tracking
tracking.SECONDS_TO_CLOSE = 1.0
if __name__ == "__main__":
    md.train(sys.argv[1:])
    print("done", flush=True)
"""


@pytest.mark.parametrize("answers", [False, True], ids=["nobody listens", "nobody answers"])
def test_a_run_whose_wandb_cannot_be_reached_ends_as_without_and_soon(
    answers: bool, tiny_command: list[str], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    """The run was finished, and its process then waited for a minute and a half for wandb's own, which tried again and again."""
    pytest.importorskip("wandb")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen(50)  # connections are taken, and nothing is ever said
        own = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "WANDB_API_KEY": 40 * "0",
            "WANDB_MODE": "online",
            "HOME": str(tmp_path / "home"),
        }
        paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **own}
        command = [sys.executable, "-c", PROGRAM, *tiny_command, "tracking=wandb", f"output_dir={tmp_path / 'run'}"]
        process = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while process.stdout.readline() not in ("done\n", ""):
            pass
        finished = time.monotonic()
        _, errors = process.communicate(timeout=200)
        seconds = time.monotonic() - finished
    assert process.returncode == 0 and status(tmp_path / "run")["state"] == "finished", errors
    said = [line for line in errors.splitlines() if line.startswith("tracking: ")]
    assert len(said) == 1 and "wandb has not finished within 1 seconds. The run goes on without it" in said[0], errors
    assert seconds < 20 and "Traceback" not in errors, (seconds, errors)
    assert digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))
    record("wandb that cannot be reached", injected=1, fired=1, exact=1)
