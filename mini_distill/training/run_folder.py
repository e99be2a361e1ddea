"""The folder of a run: its lock, its configuration, its state and its metrics."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from ..errors import MiniDistillError, Preempted, StorageError
from ..folder_lock import LOCK, FolderLock
from ..redaction import redact, redact_text
from ..storage import (
    atomic_write_text,
    check_writable,
    free_name,
    open_regular,
    read_regular,
    remove_stale_temporaries,
    storage_errors,
)

JOB_LOG = "job.log"
"""What a job of a sweep printed; it is there before the run is."""
STATES = ("running", "finished", "preempted", "failed")
SECONDS_BETWEEN_UPDATES = 30.0

logger = logging.getLogger(__name__)


class RunFolder:
    """`with RunFolder(path, config, resume) as run: …` holds a run's folder, which is this process's alone.

    On entering, the folder is made, tried out and locked, and `status.json` says `running`. On leaving it says how the run ended:
    `finished`, `preempted` or `failed`, with step and exit code. `config.yaml` gets the resolved configuration without secrets: of a new
    run on entering, of one that is there with `note_begun`. Before that a command that is refused, since its settings are others, leaves
    the configuration of the run alone, and of a finished one the state as well.

    Only the main process writes; on the others every method that writes does nothing.

    Attributes:
        path: The folder.

    Raises:
        StorageError: on entering: the folder cannot be written, is in use, is too full, or holds something that is not a run.
    """

    def __init__(
        self,
        path: Path | str,
        config: Mapping[str, Any],
        resume: str = "auto",
        is_main: bool = True,
        needed_bytes: int = 0,
    ) -> None:
        """
        Args:
            path: The folder, made if need be.
            config: The resolved configuration as plain values; `debug: true` keeps the traceback of every error.
            resume: `never` moves a run that is there aside (`<name>.old-1`, …); anything else goes on in it.
            is_main: Whether this process writes.
            needed_bytes: Free space that must be there.
        """
        self.path = Path(path).expanduser()
        self._config = config
        self._resume = resume
        self._is_main = is_main
        self._needed_bytes = needed_bytes
        self._step = self._saved_step = 0
        self._updated = 0.0
        self._has_begun = False
        self._logged: set[tuple[int, str]] = set()
        self._metrics_file = -1
        self._written = MetricsRecord()
        self._held = contextlib.ExitStack()

    # ------------------------------------------------------------------------------------------------------------ its life

    def __enter__(self) -> RunFolder:
        if not self._is_main:
            return self
        with contextlib.ExitStack() as held:
            self._take(held)
            remove_stale_temporaries(self.path)
            self._step, self._saved_step = (self.status().get(name, 0) for name in ("step", "saved_step"))
            self._write_status("running", None)
            if not (self.path / "config.yaml").exists():
                self._write_config()
            self._open_metrics()
            held.callback(self._close_metrics)
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._is_main:
            return
        with self._held:
            state, exit_code = _ending(error)
            try:
                self._write_error_log(error)
                self._write_status(state, exit_code, error)
            except StorageError:
                if error is None:
                    raise  # otherwise the first error is the one to tell

    def _take(self, held: contextlib.ExitStack) -> None:
        """The folder, ours and locked; with resume=never a new one, the old run moved aside."""
        check_writable(self.path, self._needed_bytes)
        lock = held.enter_context(FolderLock(self.path))
        entries = _entries(self.path)
        if entries and not _is_run(self.path):
            raise StorageError(str(self.path), f"holds '{entries[0]}' and is not a run of mini_distill", "Choose another output_dir.")
        if entries and self._resume == "never":
            with storage_errors(self.path, "move the old run aside"):
                aside = free_name(self.path)
                os.rename(self.path, aside)
                lock.file = aside / LOCK
            logger.warning("%s: the old run is now %s", self.path, aside.name)
            check_writable(self.path, self._needed_bytes)
            held.enter_context(FolderLock(self.path))
            lock.__exit__()

    def note_begun(self) -> None:
        """The run is this command's: it begins, or goes on with these settings."""
        if self._is_main:
            self._has_begun = True
            self._write_config()
            self._write_status("running", None)

    def _write_config(self) -> None:
        atomic_write_text(self.path / "config.yaml", yaml.safe_dump(redact(self._config), sort_keys=False, allow_unicode=True))

    # -------------------------------------------------------------------------------------------------------------- status

    def status(self) -> dict[str, Any]:
        """What status.json says: state, step, saved_step, exit_code, updated, pid, of a failed run the error; empty when it is damaged."""
        return _read_status(self.path)

    def set_step(self, step: int) -> None:
        """Note the optimizer step that is reached; status.json follows at most every 30 seconds, and at the end."""
        self._step = step
        if time.monotonic() - self._updated > SECONDS_BETWEEN_UPDATES:
            self._write_status("running", None)

    def note_saved(self, step: int) -> None:
        """Note that there is a checkpoint of `step`; that there is one at all is in status.json at once."""
        is_first, self._saved_step = self._saved_step == 0, step
        self.set_step(step)
        if is_first:
            self._write_status("running", None)

    def fail(self, error: BaseException) -> None:
        """Say that the run ended with `error`, where the process ends without leaving the folder."""
        state, exit_code = _ending(error)
        self._write_status(state, exit_code, error)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Every final number to summary.json, sorted by key; a number that is not finite becomes null."""
        if self._is_main:
            atomic_write_text(self.path / "summary.json", json.dumps(_finite(summary), indent=2, sort_keys=True) + "\n")

    def _write_status(self, state: str, exit_code: int | None, error: BaseException | None = None) -> None:
        if not self._is_main or (not self._has_begun and self.status().get("state") == "finished"):
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        steps = {"step": self._step, "saved_step": self._saved_step}
        status = {"state": state, **steps, "exit_code": exit_code, "updated": now, "pid": os.getpid()}
        if state == "failed" and error is not None:
            status["error"] = _one_line(error)
        atomic_write_text(self.path / "status.json", json.dumps(status) + "\n")
        self._updated = time.monotonic()

    def _write_error_log(self, error: BaseException | None) -> None:
        """The traceback of our own mistakes; of the user's only with debug=true."""
        expected = error is None or isinstance(error, MiniDistillError | KeyboardInterrupt | SystemExit)
        if error is None or (expected and not self._config.get("debug")):
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        text = f"{now}, step {self._step}\n" + redact_text("".join(traceback.format_exception(error)))
        file = self.path / "error.log"
        with storage_errors(file, "write"), open(open_regular(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:
            log.write((text + "\n").encode(errors="backslashreplace"))

    # ------------------------------------------------------------------------------------------------------------- metrics

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row `{"step": step, …}` to metrics.jsonl, at once in the hands of the operating system.

        A file has one row per step and kind (what stands before the slash: train, eval, …). Logged again, as by a run that goes
        on from an earlier step, the new numbers replace the old. A number that is not finite is written as null. No numbers are no row.

        Raises:
            StorageError: the row cannot be written; the file is as it was.
        """
        if not self._is_main or not metrics:
            return
        kinds = {(step, key.partition("/")[0]) for key in metrics}
        if kinds & self._logged:
            self._rewrite_metrics(_without(row, kinds) for row in self.metrics())
        line = json.dumps({"step": step, **_finite(metrics)}) + "\n"
        with storage_errors(self.path / "metrics.jsonl", "write"):
            self._append(line.encode())
        self._written.add(json.loads(line))
        self._logged |= kinds

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl. A last line that was cut short by a kill does not count.

        Raises:
            StorageError: a line is not a row.
        """
        file = self.path / "metrics.jsonl"
        with storage_errors(file, "read"):
            lines = read_regular(file).split(b"\n")[:-1] if file.exists() else []
        return [_parse_row(file, number, line) for number, line in enumerate(lines, start=1) if line.strip()]

    def seal_metrics(self, step: int) -> dict[str, Any]:
        """Make the rows so far durable, and give what the checkpoint of `step` keeps of them: how many there are, and their SHA-256."""
        with storage_errors(self.path / "metrics.jsonl", "write"):
            os.fsync(self._metrics_file)
        return self._written.until(step)

    def check_metrics(self, step: int, sealed: Mapping[str, Any], allowed: bool = False) -> None:
        """See that metrics.jsonl still has the rows that were sealed when `step` was saved.

        Args:
            step: The step.
            sealed: What `seal_metrics` gave.
            allowed: Rows that are missing cost a warning only.

        Raises:
            StorageError: a row is missing, is another, or has been added.
        """
        record = MetricsRecord()
        for row in self.metrics():
            if row["step"] <= step:
                record.add(row)
        there = record.until(step)
        if there == sealed:
            return
        what = f"{there['rows']} rows up to step {step}, and the run had written {sealed['rows']}"
        if there["rows"] == sealed["rows"]:
            what = f"not the rows up to step {step} that the run had written"
        if not allowed:
            remedy = "Bring back a copy of the file, or add resume_allow=[metrics] to go on with what is there."
            raise StorageError(str(self.path / "metrics.jsonl"), what, remedy)
        logger.warning("%s: %s; the run goes on with what is there", self.path / "metrics.jsonl", what)

    def truncate_metrics(self, step: int | None) -> None:
        """Drop the rows beyond `step`, from which the run goes on; None: it begins anew, drop all."""
        if self._is_main:
            self._rewrite_metrics(row for row in self.metrics() if step is not None and row["step"] <= step)

    def _open_metrics(self) -> None:
        file = self.path / "metrics.jsonl"
        with storage_errors(file, "write"):
            self._metrics_file = open_regular(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            whole = read_regular(file).rpartition(b"\n")
            os.ftruncate(self._metrics_file, len(whole[0] + whole[1]))  # a row torn by a kill
        self._logged, self._written = set(), MetricsRecord()
        for row in self.metrics():
            self._logged |= {(row["step"], key.partition("/")[0]) for key in row if key != "step"}
            self._written.add(row)

    def _close_metrics(self) -> None:
        if self._metrics_file >= 0:
            os.close(self._metrics_file)
            self._metrics_file = -1

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._metrics_file).st_size
        try:
            while line:
                line = line[os.write(self._metrics_file, line) :]
        except OSError:
            os.ftruncate(self._metrics_file, size)
            raise

    def _rewrite_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        lines = [json.dumps(row) + "\n" for row in rows if len(row) > 1]
        self._close_metrics()
        atomic_write_text(self.path / "metrics.jsonl", "".join(lines))
        self._open_metrics()


class MetricsRecord:
    """What the rows of a metrics.jsonl are, row after row: how many, and their SHA-256. One without numbers does not count."""

    def __init__(self) -> None:
        self._rows, self._digest = 0, hashlib.sha256()
        self._last: list[Mapping[str, Any]] = []  # those of one step

    def add(self, row: Mapping[str, Any]) -> None:
        """The next row."""
        if self._last and self._last[0]["step"] != row["step"]:
            self._rows += _digested(self._last, self._digest)
            self._last = []
        self._last.append(row)

    def until(self, step: int) -> dict[str, Any]:
        """As JSON values. Of `step` itself what was trained counts alone: an evaluation may be made, or made again, by the run that goes on."""
        last = [_trained(row) if row["step"] == step else row for row in self._last]
        digest = self._digest.copy()
        return {"rows": self._rows + _digested(last, digest), "sha256": digest.hexdigest()}


def _trained(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key == "step" or key.startswith("train/")}


def _digested(rows: Sequence[Mapping[str, Any]], digest: Any) -> int:
    """How many rows have been added to a digest."""
    lines = [json.dumps(row).encode() + b"\n" for row in rows if len(row) > 1]
    digest.update(b"".join(lines))
    return len(lines)


# ------------------------------------------------------------------------------------------------------------- what is in a folder


def _entries(path: Path) -> list[str]:
    """What stands in a folder, leaving out our own lock and temporaries and what a fresh disk holds."""
    with storage_errors(path, "read the folder"):
        names = sorted(entry.name for entry in path.iterdir())
    return [name for name in names if name not in (LOCK, JOB_LOG, "lost+found") and not name.startswith((".tmp-", ".old-"))]


def _is_run(path: Path) -> bool:
    """Whether the folder is a run of ours; a damaged status.json alone does not lock its owner out."""
    return _read_status(path).get("state") in STATES or any((path / "checkpoints").glob("step-*"))


def _read_status(path: Path) -> dict[str, Any]:
    try:
        status = json.loads(read_regular(path / "status.json"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) and isinstance(status.get("step"), int) else {}


# ---------------------------------------------------------------------------------------------------------------- ends and values


def _ending(error: BaseException | None) -> tuple[str, int]:
    """State and exit code of a run that ends with `error`."""
    if error is None:
        return "finished", 0
    if isinstance(error, Preempted):
        return "preempted", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "preempted", 130
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return ("failed" if error.code else "finished"), error.code
    return "failed", error.exit_code if isinstance(error, MiniDistillError) else 1


def _one_line(error: BaseException) -> str:
    """What went wrong, as the last line of the terminal had it, without secrets."""
    name = "" if isinstance(error, MiniDistillError) else f"{type(error).__name__}: "
    return " ".join(redact_text(f"{name}{error}").split())


def _without(row: dict[str, Any], kinds: set[tuple[int, str]]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key == "step" or (row["step"], key.partition("/")[0]) not in kinds}


def _parse_row(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    except ValueError:
        pass
    remedy = "Bring back a copy of the file, or delete this line and add resume_allow=[metrics]."
    raise StorageError(f"{file}:{number}", "not a row of metrics (expected a JSON object with a step)", remedy)


def _finite(value: Any) -> Any:
    """Plain JSON: tensors and NumPy scalars as numbers, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
