from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mini_distill.config import TrackingConfig
from mini_distill.errors import ConfigError
from mini_distill.training import tracking
from mini_distill.training.tracking import BackgroundTracker, Sink, open_tracker

METRICS = {"train/loss": 1.5}


class FakeSink(Sink):
    """Notes its calls; may raise in one of them, or hang in it until released."""

    name = "fake"

    def __init__(self, raises: str = "", hangs: str = "") -> None:
        self.calls: list[Any] = []
        self.raises, self.hangs = raises, hangs
        self.release = threading.Event()
        self.abandoned = 0

    def _do(self, name: str, call: Any) -> None:
        if name == self.raises:
            raise RuntimeError("no route to host\nhttps://me:pass@host/x")
        if name == self.hangs:
            self.release.wait(30)
        self.calls.append(call)

    def open(self) -> None:
        self._do("open", "open")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._do("log", (step, metrics))

    def close(self) -> None:
        self._do("close", "close")

    def abandon(self) -> None:
        self.abandoned += 1


def test_rows_arrive_in_order_and_all_of_them_before_the_end() -> None:
    sink = FakeSink()
    tracker = BackgroundTracker(sink)
    for step in range(100):
        tracker.log(step, METRICS)
    tracker.close()
    tracker.close()
    assert sink.calls == ["open", *((step, METRICS) for step in range(100)), "close"] and not sink.abandoned


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_raises_costs_one_warning(where: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = BackgroundTracker(FakeSink(raises=where))
    for step in range(100):
        tracker.log(step, METRICS)
        time.sleep(0.0005)
    tracker.close()
    (record,) = caplog.records
    assert "fake failed (RuntimeError: no route to host https://***@host/x). The run goes on" in record.getMessage()


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_hangs_costs_one_warning_and_little_time(
    where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SECONDS_TO_CLOSE", 0.2)
    monkeypatch.setattr(tracking, "MAX_WAITING", 50)
    sink = FakeSink(hangs=where)
    tracker = BackgroundTracker(sink)
    start = time.monotonic()
    for step in range(60 if where != "close" else 10):
        tracker.log(step, METRICS)
    tracker.close()
    assert time.monotonic() - start < 5
    assert len(caplog.records) == 1 and sink.abandoned == 1
    sink.release.set()


def test_no_tracker_and_other_processes_track_nothing(tmp_path: Path) -> None:
    for config, is_main in ((TrackingConfig(), True), (TrackingConfig(kind="wandb"), False)):
        tracker = open_tracker(config, tmp_path, {}, is_main)
        tracker.log(1, METRICS)
        tracker.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_wandb_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name))


@pytest.mark.usefixtures("no_wandb_account")
def test_wandb_online_without_a_key_is_one_line_and_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking.mode: online, and wandb has no API key\. Run `wandb login`.*offline"):
        open_tracker(TrackingConfig(kind="wandb"), tmp_path, {})


@pytest.mark.usefixtures("no_wandb_account")
def test_wandb_offline_goes_on_in_the_same_run_and_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf-token-from-environment")
    monkeypatch.setattr(sys, "argv", ["train.py", "data.token=given-on-the-command-line"])
    run = tmp_path / "run"
    run.mkdir()
    config = {"data": {"token": "given-on-the-command-line", "path": "https://me:hunter2@host/x"}, "note": "hf-token-from-environment"}
    ids = []
    for step in (1, 2):
        tracker = open_tracker(TrackingConfig(kind="wandb", mode="offline"), run, config)
        tracker.log(step, {"train/loss": 0.123456})
        tracker.close()
        ids.append((run / "wandb_id").read_text())
    assert not [record for record in caplog.records if record.name.startswith("mini_distill")]
    assert ids[0] == ids[1]
    folders = list((run / "wandb").glob("offline-run-*"))
    assert folders and all(f"-{ids[0].strip()}" in folder.name for folder in folders)
    written = b"".join(file.read_bytes() for file in run.rglob("*") if file.is_file())
    assert b"train/loss" in written
    assert not [s for s in (b"given-on-the-command-line", b"hunter2", b"hf-token-from-environment") if s in written]


def test_tensorboard_has_the_numbers_and_a_resumed_run_hides_what_it_repeats(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in ((1, 2, 3), (2, 3, 4)):
        tracker = open_tracker(TrackingConfig(kind="tensorboard"), tmp_path, {"data": {"token": "hidden"}})
        for step in steps:
            tracker.log(step, {"train/loss": 10.0 * steps[0] + step})
        tracker.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 11.0), (2, 22.0), (3, 23.0), (4, 24.0)]
    assert b"hidden" not in b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [("wandb", "wandb", "pip install wandb"), ("tensorboard", "torch.utils.tensorboard", r"mini_distill\[tensorboard\]")],
)
def test_a_missing_package_is_one_line_with_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"tracking.kind: {kind} is not installed.*{extra}"):
        open_tracker(TrackingConfig(kind=kind), tmp_path, {})
