"""One run that is punished for minutes: killed, stopped, its disk full, its workers dead, bits of its newest checkpoint flipped.

python -m tests.faults.soak --minutes 5 --seed 0
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS_PER_MINUTE = 1500
"""Of the run: about as many as it gets done between faults."""
SETTINGS = "MINI_DISTILL_SOAK"
"""Minutes and seed, for the test that does the work: it has the tiny teacher and corpus."""


@dataclass
class Punisher:
    """Does harm to one run again and again, until the time is up; then it is left alone until it has finished.

    Attributes:
        train: Trains into `folder`; called in a forked process.
        folder: The run's.
        seed: Of the faults.
        events: What was done, and how the run ended each time.
        flipped: The checkpoints in which a bit was flipped.
    """

    train: Callable[[], object]
    folder: Path
    seed: int
    events: list[dict[str, Any]] = field(default_factory=list)
    flipped: list[str] = field(default_factory=list)

    def punish(self, seconds: float) -> None:
        """Fault after fault, each drawn by lot, for so long or until the run has finished."""
        draw, until = random.Random(self.seed), time.monotonic() + seconds
        while time.monotonic() < until and not self.finished:
            name = draw.choice(list(FAULTS))
            before = self.newest
            code = FAULTS[name](self, draw)
            self._note(name, code, before)
        self._note("left alone", self._left_alone(), self.newest)

    @property
    def finished(self) -> bool:
        """Whether the run says so."""
        from runs import status

        return (self.folder / "status.json").exists() and status(self.folder)["state"] == "finished"

    @property
    def newest(self) -> int:
        """The step of its newest checkpoint."""
        from runs import checkpoint_steps

        return max([0, *checkpoint_steps(self.folder)])

    def counts(self) -> dict[str, int]:
        """How many faults there were, and how many showed: the run ended early, or named the checkpoint with the bit and skipped it.

        A fault that meets a run in its very last moments does not show.
        """
        done = [event for event in self.events if event["event"] != "left alone"]
        skipped = [name for name in self.flipped if name in self.skipped]
        fired = sum(event["code"] != 0 for event in done) + len(skipped)
        return {"injected": len(done) + len(self.flipped), "fired": fired, "flipped": len(self.flipped), "skipped": len(skipped)}

    @property
    def skipped(self) -> set[str]:
        """The checkpoints that a run found damaged and passed over."""
        text = self.folder.with_suffix(".log").read_text(errors="replace")
        return set(re.findall(r"(step-\d{8}): damaged: .* is skipped", text))

    def _note(self, name: str, code: int, before: int) -> None:
        event = {"event": name, "code": code, "from_step": before, "to_step": self.newest}
        self.events.append(event)
        print(json.dumps(event), flush=True)
        assert code in EXPECTED[name], event

    def start(self) -> None:
        """Train, with what it prints beside the run instead of between the events."""
        with open(self.folder.with_suffix(".log"), "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)  # pytest has put something of its own in its place
        logging.basicConfig(force=True, stream=sys.stderr)  # warnings too, and not to the test's own handlers
        self.train()

    def _left_alone(self) -> int:
        from runs import fork, wait

        return wait(fork(self.start))

    # ---------------------------------------------------------------------------------------------------------------- the faults

    def signalled(self, draw: random.Random, number: signal.Signals, to_worker: bool = False) -> int:
        """A signal to the run, or to its data worker, at a random moment: while it starts, or some saves later."""
        from runs import fork, wait

        wanted, pause = self.newest + draw.choice([0, 0, 5, 10, 20]), draw.uniform(0, 0.5)
        child = fork(self.start)
        while self.newest < wanted and _lives(child):
            time.sleep(0.02)
        time.sleep(pause)
        targets = _children(child) if to_worker else [child]
        for target in targets:
            if _lives(target):
                os.kill(target, number)
        if to_worker and not targets:  # it had none yet
            os.kill(child, signal.SIGKILL)
        return wait(child)

    def disk_full(self, draw: random.Random) -> int:
        """No file may grow beyond a limit that the next checkpoint does not keep."""
        from runs import fork, wait

        sizes = [file.stat().st_size for file in self.folder.glob("checkpoints/*/*.safetensors")]
        limit = draw.randrange(1, max([2, *sizes]))

        def limited() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            self.start()

        return wait(fork(limited))

    def bit_flipped(self, draw: random.Random) -> int:
        """A bit of the newest checkpoint, if there is another to fall back on; then the run is killed a little later."""
        folders = sorted((self.folder / "checkpoints").glob("step-????????"))
        if len(folders) > 1:
            file = draw.choice(sorted(folders[-1].iterdir()))  # weights, optimizer, state.json or the manifest itself
            content = bytearray(file.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            self.flipped.append(folders[-1].name)
        return self.signalled(draw, signal.SIGKILL)


FAULTS: dict[str, Callable[[Punisher, random.Random], int]] = {
    "kill": lambda p, draw: p.signalled(draw, signal.SIGKILL),
    "SIGTERM": lambda p, draw: p.signalled(draw, signal.SIGTERM),
    "Ctrl-C": lambda p, draw: p.signalled(draw, signal.SIGINT),
    "dead worker": lambda p, draw: p.signalled(draw, signal.SIGKILL, to_worker=True),
    "disk full": Punisher.disk_full,
    "bit flipped": Punisher.bit_flipped,
}
EXPECTED: dict[str, set[int]] = {
    "kill": {-9, 0},  # 0: it had just finished
    "SIGTERM": {143, -15, 0},  # -15: before it could answer
    "Ctrl-C": {130, 1, 0},
    "dead worker": {8, -9, 0},
    "disk full": {6},
    "bit flipped": {-9, 0},
    "left alone": {0},
}
"""How the run may end."""


def _lives(pid: int) -> bool:
    from mini_distill.processes import is_alive

    return is_alive(pid)


def _children(pid: int) -> list[int]:
    """The processes that a process has forked."""
    try:
        return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def main() -> None:
    """Run the soak test; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "-n", "0", "-s", "-q", "-m", "slow", f"--timeout={arguments.minutes * 240 + 600:.0f}"]
    settings = {**os.environ, SETTINGS: f"{arguments.minutes} {arguments.seed}"}
    sys.exit(subprocess.run([*command, str(Path(__file__).with_name("test_soak.py"))], env=settings).returncode)


if __name__ == "__main__":
    main()
