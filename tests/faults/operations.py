"""One file operation after the other goes wrong: killed before it, half of it done and killed, the disk is full from there on, or it
alone fails with an input/output error.

    LD_PRELOAD=operations.so python -m faults.operations < plan.json

imports the package once and forks a process for each point, so that a point costs two short runs. The plan says where, the lines
that are printed say what came of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

MODES = {"kill": 1, "half and kill": 2, "full": 3, "fails once": 4}
WORK = ("save", "retention", "export", "tokenising", "cache build")
TESTS = Path(__file__).parent.parent


@dataclass
class Plan:
    """What a sweep does.

    Attributes:
        work: One of WORK.
        command: Overrides of the run.
        folder: Where everything goes.
        points: How many operations, drawn by lot, go wrong in each mode; null for every one.
    """

    work: str
    command: list[str]
    folder: str
    points: int | None = None


@dataclass
class Point:
    """What came of one fault.

    Attributes:
        work: What was going on.
        mode: How the operation went wrong.
        number: Which one, from 0.
        code: How the process ended: its exit code, or minus the signal.
        lines: Lines of `error: …` that it printed; a traceback counts for a hundred.
        torn: What was found half written under a final name.
        outcome: Of the next run: exact, differs, stuck, or what it left lying about.
        fired: Whether the fault happened: who was killed cannot say so, the others are told by the injector.
    """

    work: str
    mode: str
    number: int
    code: int
    lines: int
    torn: list[str]
    outcome: str
    fired: bool

    @property
    def good(self) -> bool:
        """As promised: killed, or one line and the code of storage; nothing torn; the next run ends as its twin.

        One failure that does no harm, of a deletion say, ends nothing.
        """
        endings = {"full": [(6, 1)], "fails once": [(6, 1), (0, 0)]}
        ended = (self.code, self.lines) in endings[self.mode] if self.mode in endings else self.code == -9
        return ended and not self.torn and self.outcome == "exact"


def sweep(plan: Plan, timeout: float) -> list[Point]:
    """Carry out a plan in a process of its own, under the injector."""
    library = build_injector()
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    environment["MINI_DISTILL_CACHE"] = f"{plan.folder}/tokens"
    done = subprocess.run(
        [sys.executable, "-m", "faults.operations"],
        input=json.dumps(asdict(plan)),
        env=environment,
        timeout=timeout,
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, "the sweep itself failed"
    return [Point(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith('{"work"')]


def build_injector() -> Path:
    """Compile operations.c; skips the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    source = Path(__file__).with_suffix(".c")
    target = Path(tempfile.mkdtemp()) / "operations.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", target, source, "-ldl"], check=True)
    return target


# ------------------------------------------------------------------------------------------------- in the process under the injector


class Sweep:
    """The points of a plan, one after the other.

    Attributes:
        start: A folder from which every point begins: a run that is about to do the work; absent for one that begins with it.
        wanted: What the undisturbed twin came to.
    """

    def __init__(self, plan: Plan) -> None:
        from caches import build
        from runs import run

        from faults.twins import without_timing

        without_timing()
        self.plan, self.root = plan, Path(plan.folder)
        self.root.mkdir(parents=True, exist_ok=True)
        self.injector = ctypes.CDLL(os.environ["LD_PRELOAD"])
        small = ["cache.kind=topk", "cache.k=8", "cache.shard_sequences=30", "cache.batch_size=8"]
        self.run_once: Callable[[Path], Any] = lambda folder: run(plan.command, folder)
        if plan.work == "cache build":
            self.run_once = lambda folder: build(plan.command, folder, *small)
        self.start = self.root / "start"
        self.run_once(self.root / "twin")
        self.wanted = self.content(self.root / "twin")
        self._stop_before_the_work()

    def points(self) -> Iterator[Point]:
        """Every point of the plan."""
        for mode in MODES:
            count = self._count(mode)
            draw = random.Random(f"{self.plan.work} {mode}")
            numbers = range(count) if self.plan.points is None else sorted(draw.sample(range(count), min(count, self.plan.points)))
            yield from (self._point(mode, number) for number in numbers)

    def content(self, folder: Path) -> Any:
        """What two folders are compared by."""
        import caches

        from mini_distill.digest import digest_run

        return caches.content(folder) if self.plan.work == "cache build" else digest_run(folder)

    # ---------------------------------------------------------------------------------------------------------------- one point

    def _point(self, mode: str, number: int) -> Point:
        from runs import wait

        folder, told = self._fresh(), self.root / "fired"
        told.unlink(missing_ok=True)
        with tempfile.TemporaryFile("w+") as errors:
            code = wait(self._fork(lambda: self._disturbed(mode, number, folder), errors))
            errors.seek(0)
            text = errors.read()
        lines = sum(line.startswith("error: ") for line in text.splitlines()) + 100 * text.count("Traceback")
        torn, newest = self._torn(folder), self._newest(folder)
        outcome = self._next_run(folder, newest)
        fired = code == -9 or (told.exists() and told.read_text() == "1")
        return Point(self.plan.work, mode, number, code, lines, torn, outcome, fired)

    def _next_run(self, folder: Path, newest: int) -> str:
        from runs import wait

        seen = self.root / "went-on-from"
        seen.unlink(missing_ok=True)
        with tempfile.TemporaryFile("w+") as errors:
            if code := wait(self._fork(lambda: self._undisturbed(folder, seen), errors)):
                errors.seek(0)
                return f"stuck ({code}): {(errors.read().splitlines() or ['?'])[-1]}"
        if left := [path.name for path in folder.rglob(".*")]:
            return f"left {left[0]}"
        if seen.exists() and int(seen.read_text()) != newest:
            return f"went on from {seen.read_text()}, not from {newest}"
        return "exact" if self.content(folder) == self.wanted else "differs"

    def _disturbed(self, mode: str, number: int, folder: Path) -> None:
        with self._watching(MODES[mode], number, folder):
            self.run_once(folder)

    def _undisturbed(self, folder: Path, seen: Path) -> None:
        from runs import train_module

        original = train_module.training_loop

        def noting(d: Any, last_step: int) -> None:
            seen.write_text(str(last_step))
            original(d, last_step)

        train_module.training_loop = noting
        self.run_once(folder)

    def _fork(self, body: Callable[[], object], errors: Any) -> int:
        from runs import fork

        def redirected() -> None:
            os.dup2(errors.fileno(), 2)
            os.dup2(errors.fileno(), 1)
            body()

        return fork(redirected)

    def _torn(self, folder: Path) -> list[str]:
        """Folders and files that are not whole under their final names."""
        from mini_distill.storage import MANIFEST, verify_folder

        where = [folder, self.root / "tokens"] if self.plan.work == "tokenising" else [folder]
        found = [file for top in where for file in top.rglob("*") if not any(p.startswith(".") for p in file.relative_to(top).parts)]
        shards = [path for path in found if path.is_dir() and path.name.startswith(("step-", "shard-", "student", "tokenizer"))]
        shards += [path.parent for path in found if path.name == MANIFEST and path.parent not in shards]
        torn = [f"{path.name}: {problems[0]}" for path in shards if (problems := verify_folder(path))]
        return torn + [file.name for file in found if file.suffix == ".json" and not _is_json(file)]

    def _newest(self, folder: Path) -> int:
        from runs import checkpoint_steps

        return max([0, *checkpoint_steps(folder)])

    # -------------------------------------------------------------------------------------------------------------- the injector

    def _fresh(self) -> Path:
        """A folder in the state in which the work begins."""
        folder = self.root / "point"
        shutil.rmtree(folder, ignore_errors=True)
        if self.plan.work == "tokenising":
            shutil.rmtree(self.root / "tokens", ignore_errors=True)
        if self.start.exists():
            shutil.copytree(self.start, folder)
        return folder

    def _count(self, mode: str) -> int:
        """How many operations there are to go wrong."""
        from runs import wait

        told = self.root / "count"
        folder = self._fresh()

        def body() -> None:
            with self._watching(MODES[mode], 10**9, folder) as counted:
                self.run_once(folder)
            told.write_text(str(counted[0]))

        with tempfile.TemporaryFile("w+") as errors:
            code = wait(self._fork(body, errors))
        assert code == 0 and int(told.read_text()) > 0
        return int(told.read_text())

    @contextmanager
    def _watching(self, fault: int, number: int, folder: Path) -> Iterator[list[int]]:
        """The operations of the work are counted, and one goes wrong."""
        counted: list[int] = []
        owner, name, which = self._place()
        original, calls = getattr(owner, name), 0
        watched = self.root / "tokens" if self.plan.work == "tokenising" else folder

        def around(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != which:
                return original(*args, **kwargs)
            self.injector.faults_watch(str(watched).encode(), fault, ctypes.c_long(number))
            try:
                return original(*args, **kwargs)
            finally:
                counted.append(self.injector.faults_count())
                (self.root / "fired").write_text(str(self.injector.faults_fired()))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, around)
            yield counted

    def _place(self) -> tuple[Any, str, int]:
        """The function that does the work, and which of its calls is watched."""
        from caches import cache_module
        from runs import train_module

        from mini_distill.data import prepare
        from mini_distill.training.checkpoint import Checkpoints

        return {
            "save": (Checkpoints, "save", 1),
            "retention": (Checkpoints, "_delete_old", 1),
            "export": (train_module, "write_result", 1),
            "tokenising": (prepare, "_build", 1),
            "cache build": (cache_module, "build", 1),
        }[self.plan.work]

    def _stop_before_the_work(self) -> None:
        """Make the state in which every point begins."""
        from runs import train_module

        from faults.twins import Crash, crash, crash_before

        if self.plan.work in ("save", "retention"):
            crash_before(3, self.plan.command, self.start)
        elif self.plan.work == "export":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
                patch.setattr(train_module, "write_result", lambda d, control: crash())
                self.run_once(self.start)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    for found in Sweep(Plan(**json.load(sys.stdin))).points():
        print(json.dumps(asdict(found)), flush=True)
