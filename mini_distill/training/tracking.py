"""Where the metrics go besides metrics.jsonl: wandb or tensorboard. Nothing that happens there stops or slows a run."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import secrets
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import TrackingConfig
from ..errors import ConfigError
from ..processes import children_of
from ..redaction import redact, redact_text
from ..storage import atomic_write_text, read_regular, storage_errors

MAX_WAITING = 10_000  # rows that a slow tracker may lag behind before new ones are dropped
SECONDS_TO_CLOSE = 30.0
SECONDS_TO_END = 2.0

logger = logging.getLogger(__name__)

Row = tuple[int, dict[str, float]]


class Tracker:
    """No tracker at all, and the interface of the others."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass on the metrics of `step`; never raises, never waits."""

    def close(self) -> None:
        """Pass on what is left, waiting for it at most half a minute; may be called twice."""


def open_tracker(config: TrackingConfig, run_path: Path | str, plain_config: Mapping[str, Any], is_main: bool = True) -> Tracker:
    """The tracker of a run, on the main process; none on the others.

    Args:
        config: Which one.
        run_path: The run's folder, where trackers keep their files; a resumed run goes on in the same wandb run.
        plain_config: The run's settings, sent without their secrets.
        is_main: Whether this process tracks.

    Raises:
        ConfigError: the tracker's package is not installed, or wandb is online and has no key.
    """
    if config.kind == "none" or not is_main:
        return Tracker()
    settings = redact(plain_config)
    sink = WandbSink(config, Path(run_path), settings) if config.kind == "wandb" else TensorboardSink(Path(run_path), settings)
    return BackgroundTracker(sink)


class Sink(ABC):
    """What a tracker does, one call after the other in a thread of its own; may raise and may take long."""

    name: str

    @abstractmethod
    def open(self) -> None:
        """Connect, create files."""

    @abstractmethod
    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Pass on one row."""

    @abstractmethod
    def close(self) -> None:
        """Finish."""

    def abandon(self) -> None:  # noqa: B027 - most have nothing of the kind
        """See to it that nothing keeps this process from ending; called in any thread, and perhaps while another call does not return."""


class BackgroundTracker(Tracker):
    """Feeds a sink from a thread, so that one that raises, hangs or cannot be reached costs a warning and no training time."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._rows: queue.Queue[Row | None] = queue.Queue(MAX_WAITING)
        self._gave_up = False
        self._thread = threading.Thread(target=self._work, name=f"tracking-{sink.name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a run that fails still passes on what it had logged

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._gave_up:
            try:
                self._rows.put_nowait((step, dict(metrics)))
            except queue.Full:
                self._give_up(f"does not answer, {MAX_WAITING} rows are waiting")

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._gave_up or not self._thread.is_alive():
            return
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
            self._thread.join(SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._give_up(f"has not finished within {SECONDS_TO_CLOSE:.0f} seconds")

    def _work(self) -> None:
        try:
            self._sink.open()
            while (row := self._rows.get()) is not None:
                self._sink.log(*row)
            self._sink.close()
        except BaseException as error:  # SystemExit too: some clients call exit
            self._give_up(f"failed ({type(error).__name__}: {error})")

    def _give_up(self, why: str) -> None:
        if not self._gave_up:
            self._gave_up = True
            text = " ".join(redact_text(why).split())
            logger.warning("tracking: %s %s. The run goes on without it; metrics.jsonl has every row.", self._sink.name, text)
            self._sink.abandon()


class WandbSink(Sink):
    """Weights & Biases. The id of its run lies in the run's folder as `wandb_id`."""

    name = "wandb"

    def __init__(self, config: TrackingConfig, run_path: Path, settings: Any) -> None:
        """Raises ConfigError where wandb is missing or, online, has no key: its own prompt would wait for an answer."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("tracking.kind", "wandb is not installed", "pip install wandb, or set tracking=none.") from error
        self._wandb = wandb
        self._mode: Any = os.environ.get("WANDB_MODE") or config.mode
        if self._mode == "online" and not wandb.login(prompt=False, verify=False):
            remedy = "Run `wandb login`, set WANDB_API_KEY, or use tracking.mode=offline and synchronise later."
            raise ConfigError("tracking.mode", "online, and wandb has no API key", remedy)
        self._arguments: dict[str, Any] = {
            "project": config.project,
            "name": redact_text(config.run_name or run_path.resolve().name),
            "id": _wandb_id(run_path),
            "resume": "allow" if self._mode == "online" else None,
            "dir": str(run_path),
            "config": settings,
        }

    def open(self) -> None:
        """Without the command line, source code and environment that wandb would collect: they may hold secrets."""
        private = self._wandb.Settings(
            silent=True,
            console="off",
            x_disable_meta=True,
            x_disable_machine_info=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
        )
        self._run = self._wandb.init(mode=self._mode, settings=private, **self._arguments)
        if self._mode == "online":
            logger.warning("tracking: %s", self._run.url)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()

    def abandon(self) -> None:
        """When this process ends it tells wandb's own to end too, and waits for it; which tries for hours to reach its server."""
        threading.Thread(target=_kill_at_the_end, args=("wandb-core",), name="tracking-end", daemon=True).start()


class TensorboardSink(Sink):
    """TensorBoard event files in the run's `tensorboard/`."""

    name = "tensorboard"

    def __init__(self, run_path: Path, settings: Any) -> None:
        """Raises ConfigError where tensorboard is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            remedy = "pip install 'mini_distill[tensorboard]', or set tracking=none."
            raise ConfigError("tracking.kind", "tensorboard is not installed", remedy) from error
        self._make = SummaryWriter
        self._folder = run_path / "tensorboard"
        self._settings = settings
        self._writer: Any = None

    def open(self) -> None:
        pass  # at the first row: only then is the step known that a resumed run goes on from

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=step)  # hides what an interrupted run wrote beyond
            self._writer.add_text("config", f"```\n{json.dumps(self._settings, indent=2)}\n```", step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _kill_at_the_end(name: str) -> None:
    """Kill the processes called `name` that this one has started, once it has finished and has told them to end."""
    threading.main_thread().join()
    time.sleep(SECONDS_TO_END)
    for pid in children_of(os.getpid(), name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _wandb_id(run_path: Path) -> str:
    file = run_path / "wandb_id"
    with storage_errors(file, "read"):
        if not file.exists():
            atomic_write_text(file, secrets.token_hex(4) + "\n")
        return read_regular(file).decode().strip()
