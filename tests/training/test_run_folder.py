from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.injection import count_operations, in_child, killed_before_operation, with_file_size_limit

from mini_distill.errors import DataError, NumericsError, Preempted, StorageError
from mini_distill.training.run_folder import RunFolder

CONFIG: dict[str, Any] = {"trainer": {"max_steps": 3}, "data": {"path": "a é.txt"}, "debug": False}


def status(path: Path) -> dict[str, Any]:
    return json.loads((path / "status.json").read_text())


def run_once(path: Path, rows: int = 2, resume: str = "auto") -> None:
    with RunFolder(path, CONFIG, resume) as run:
        for step in range(1, rows + 1):
            run.log_metrics(step, {"train/loss": 1.0 / step})
            run.set_step(step)


# --------------------------------------------------------------------------------------------------------------------- its life


def test_a_run_writes_its_configuration_and_how_it_goes(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", CONFIG) as run:
        assert (status(run.path)["state"], status(run.path)["exit_code"]) == ("running", None)
        assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
        run.set_step(7)
    assert {key: status(run.path)[key] for key in ("state", "step", "exit_code")} == {"state": "finished", "step": 7, "exit_code": 0}
    assert sorted(os.listdir(run.path)) == ["config.yaml", "metrics.jsonl", "status.json"]


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (Preempted("step 3", "stopped", exit_code=143), "preempted", 143),
        (Preempted("step 3", "stopped", exit_code=130), "preempted", 130),
        (KeyboardInterrupt(), "preempted", 130),
        (NumericsError("step 3", "not finite"), "failed", 7),
        (DataError("a.jsonl:3", "malformed"), "failed", 3),
        (SystemExit(2), "failed", 2),
        (ZeroDivisionError("ours"), "failed", 1),
    ],
)
def test_how_a_run_ended_is_in_its_status(tmp_path: Path, error: BaseException, state: str, code: int) -> None:
    with pytest.raises(type(error)), RunFolder(tmp_path / "run", CONFIG) as run:
        run.set_step(3)
        raise error
    assert {key: status(run.path)[key] for key in ("state", "step", "exit_code")} == {"state": state, "step": 3, "exit_code": code}
    assert (run.path / "error.log").exists() == isinstance(error, ZeroDivisionError)
    assert not (run.path / ".lock").exists()


@pytest.mark.parametrize(
    ("error", "line"),
    [(DataError("a.jsonl:3", "malformed"), "a.jsonl:3: malformed."), (ZeroDivisionError("ours"), "ZeroDivisionError: ours")],
)
def test_a_failed_run_says_why(tmp_path: Path, error: Exception, line: str) -> None:
    with pytest.raises(type(error)), RunFolder(tmp_path / "run", CONFIG) as run:
        raise error
    assert status(run.path)["error"] == line
    with RunFolder(tmp_path / "run", CONFIG) as run:
        pass
    assert "error" not in status(run.path)  # a later start that went well


def test_with_debug_the_users_own_mistakes_keep_their_traceback_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    with pytest.raises(DataError), RunFolder(tmp_path / "run", {**CONFIG, "debug": True}) as run:
        raise DataError("https://me:pass@host/x", "refused very-secret-value")
    log = (run.path / "error.log").read_text()
    assert "Traceback" in log and "https://***@host/x" in log and "very-secret-value" not in log


def test_no_secret_reaches_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0815-wandb-key")
    config = {
        "data": {"path": "https://me:hunter2@host/x", "api_key": "s3cr3t", "name": "0815-wandb-key"},
        "student": {"tokenizer": "org/tok"},
    }
    with RunFolder(tmp_path / "run", config) as run:
        pass
    everything = b"".join(file.read_bytes() for file in run.path.iterdir())
    assert not [secret for secret in (b"hunter2", b"s3cr3t", b"0815-wandb-key") if secret in everything]
    assert b"org/tok" in everything


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", CONFIG, is_main=False) as run:
        run.log_metrics(1, {"train/loss": 1.0})
        run.truncate_metrics(0)
        run.write_summary({"a": 1})
        run.set_step(1)
        run._updated = -1e9
        run.set_step(2)
        assert run.metrics() == []
    assert not run.path.exists()


def test_two_runs_in_one_folder_the_second_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", CONFIG) as run:
        run.set_step(2)
        before = (run.path / "status.json").read_bytes()
        for resume in ("auto", "never"):
            with pytest.raises(StorageError, match="in use by process"), RunFolder(tmp_path / "run", CONFIG, resume):
                pass
        assert (run.path / "status.json").read_bytes() == before
        run.log_metrics(3, {"train/loss": 1.0})
    assert status(run.path)["state"] == "finished"


def test_a_disk_that_is_full_at_the_end_does_not_hide_the_first_error(tmp_path: Path) -> None:
    def fail() -> None:
        with pytest.raises(NumericsError), RunFolder(tmp_path / "run", CONFIG):
            count_operations(lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            raise NumericsError("step 3", "not finite")

    assert in_child(fail) == 0


def test_a_disk_that_is_full_at_the_end_is_no_success(tmp_path: Path) -> None:
    def finish() -> None:
        with pytest.raises(StorageError, match="No space left"), RunFolder(tmp_path / "run", CONFIG):
            count_operations(lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    assert in_child(finish) == 0
    assert status(tmp_path / "run")["state"] == "running"


# ---------------------------------------------------------------------------------------------------------- what is there already


def test_never_moves_the_old_run_aside_again_and_again(tmp_path: Path) -> None:
    for rows in (1, 2, 3):
        run_once(tmp_path / "run", rows, resume="never")
    found = {path.name: len(RunFolder(path, {}).metrics()) for path in tmp_path.iterdir()}
    assert found == {"run.old-1": 1, "run.old-2": 2, "run": 3}
    assert not list(tmp_path.glob("*/.lock"))


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in ("auto", "never"):
        with (
            pytest.raises(StorageError, match=r"holds 'thesis.tex' and is not a run of mini_distill\. Choose another output_dir"),
            RunFolder(tmp_path, CONFIG, resume),
        ):
            pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_empty_folder_and_a_fresh_disk_are_fine(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".tmp-status.json-4000000-aa").touch()
    run_once(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "lost+found", "metrics.jsonl", "status.json"]


def test_a_damaged_status_does_not_lock_its_owner_out(tmp_path: Path) -> None:
    run_once(tmp_path)
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    for damage in ("", "[]", '{"state": 3', "\0"):
        (tmp_path / "status.json").write_text(damage)
        run_once(tmp_path)


def test_killed_anywhere_in_starting_or_ending_the_same_command_works_again(tmp_path: Path) -> None:
    for number in range(200):
        path = tmp_path / str(number)
        ended = killed_before_operation(number, lambda path=path: run_once(path))
        run_once(path)
        assert [row["step"] for row in RunFolder(path, {}).metrics()] == [1, 2]
        assert sorted(os.listdir(path)) == ["config.yaml", "metrics.jsonl", "status.json"]
        if ended == 0:
            break
    assert number > 20


def test_killed_anywhere_in_moving_aside_no_run_is_lost(tmp_path: Path) -> None:
    for number in range(200):
        path = tmp_path / str(number) / "run"
        run_once(path, rows=5)
        ended = killed_before_operation(number, lambda path=path: run_once(path, rows=1, resume="never"))
        assert 5 in [len(RunFolder(other, {}).metrics()) for other in path.parent.iterdir()]
        run_once(path, rows=1)
        if ended == 0:
            break
    assert number > 20


# ----------------------------------------------------------------------------------------------------------------------- metrics


def test_rows_can_be_read_by_others_at_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", CONFIG) as run:
        run.log_metrics(1, {"train/loss": 2.5, "eval/forward_kl": 0.25})
        assert json.loads((run.path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": 2.5, "eval/forward_kl": 0.25}


def test_numbers_that_are_not_finite_are_null_and_tensors_are_numbers(tmp_path: Path) -> None:
    import torch

    with RunFolder(tmp_path / "run", CONFIG) as run:
        run.log_metrics(1, {"train/loss": float("nan"), "train/ce": torch.tensor(0.5)})  # type: ignore[dict-item]
        run.write_summary({"b": {"x": float("inf")}, "a": [torch.tensor(2)], "text": "é"})
    assert run.metrics() == [{"step": 1, "train/loss": None, "train/ce": 0.5}]
    text = (run.path / "summary.json").read_text()
    assert json.loads(text) == {"b": {"x": None}, "a": [2], "text": "é"} and text.index('"a"') < text.index('"b"')


def test_a_step_logged_again_has_one_row_of_each_kind(tmp_path: Path) -> None:
    """A run killed between logging a step and saving it logs the step again."""
    with RunFolder(tmp_path / "run", CONFIG) as run:
        run.log_metrics(1, {"train/loss": 1.0})
        run.log_metrics(1, {"eval/ce": 2.0})
        run.log_metrics(2, {"train/loss": 3.0, "eval/ce": 4.0})
    with RunFolder(tmp_path / "run", CONFIG) as run:
        run.log_metrics(2, {"train/loss": 5.0})
        run.log_metrics(1, {"train/loss": 6.0})
    assert run.metrics() == [
        {"step": 1, "eval/ce": 2.0},
        {"step": 2, "eval/ce": 4.0},
        {"step": 2, "train/loss": 5.0},
        {"step": 1, "train/loss": 6.0},
    ]


def test_going_on_from_a_step_drops_the_rows_beyond_it_and_a_torn_one(tmp_path: Path) -> None:
    run_once(tmp_path, rows=4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/lo')
    with RunFolder(tmp_path, CONFIG) as run:
        run.truncate_metrics(2)
        run.log_metrics(3, {"train/loss": 9.0})
    assert run.metrics() == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}, {"step": 3, "train/loss": 9.0}]
    with RunFolder(tmp_path, CONFIG) as run:
        run.truncate_metrics(None)
        assert run.metrics() == []


def test_what_a_checkpoint_keeps_of_the_rows_is_the_same_after_a_restart_and_a_rewriting(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as run:
        run.log_metrics(0, {})  # nothing was held out
        for step in range(1, 4):
            run.log_metrics(step, {"train/loss": 1 / 3 / step, "train/ce": float("nan")})
        sealed = run.seal_metrics(3)
        run.log_metrics(4, {"train/loss": 0.1})
    with RunFolder(tmp_path, CONFIG) as run:
        run.check_metrics(3, sealed)
        run.truncate_metrics(3)
        assert run.seal_metrics(3) == sealed and sealed["rows"] == 3
        run.log_metrics(3, {"eval/ce": 0.5})  # which a signal had cut short
        run.check_metrics(3, sealed)
        assert run.seal_metrics(4) != sealed
        run.log_metrics(3, {"train/loss": 0.2})  # in place of what was there
        assert run.seal_metrics(3) != sealed
        with pytest.raises(StorageError, match="not the rows up to step 3"):
            run.check_metrics(3, sealed)


def test_rows_are_durable_before_a_checkpoint_counts_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), original(number))[1])
    with RunFolder(tmp_path, CONFIG) as run:
        run.log_metrics(1, {"train/loss": 1.0})
        synced.clear()
        run.seal_metrics(1)
        assert synced == [str(tmp_path / "metrics.jsonl")]


def test_that_a_step_was_saved_is_in_the_status_at_once_and_stays_there(tmp_path: Path) -> None:
    """It tells a run whose checkpoints are gone from one that was killed before its first."""
    with RunFolder(tmp_path, CONFIG) as run:
        run.set_step(1)
        assert status(tmp_path)["saved_step"] == 0
        run.note_saved(2)
        assert status(tmp_path)["saved_step"] == status(tmp_path)["step"] == 2
    with RunFolder(tmp_path, CONFIG):
        assert status(tmp_path)["saved_step"] == 2


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    run_once(tmp_path, rows=1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("nonsense\n")
    with pytest.raises(StorageError, match=r"metrics.jsonl:2: not a row of metrics"), RunFolder(tmp_path, CONFIG):
        pass
    assert not (tmp_path / ".lock").exists()


def test_a_row_that_does_not_fit_on_the_disk_leaves_the_rows_before_it_whole(tmp_path: Path) -> None:
    def log() -> None:
        with pytest.raises(StorageError, match=r"metrics.jsonl: cannot write: File too large"), RunFolder(tmp_path / "run", CONFIG) as run:
            for step in range(10_000):
                run.log_metrics(step, {"train/loss": 1.0})

    assert with_file_size_limit(3001, log) == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(len(rows))) and len(rows) > 50
    assert status(tmp_path / "run")["exit_code"] == 6


def test_a_run_killed_while_it_logs_keeps_every_row_before(tmp_path: Path) -> None:
    def log() -> None:
        with RunFolder(tmp_path / "run", CONFIG) as run:
            for step in range(1, 51):
                run.log_metrics(step, {"train/loss": 1.0})
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(log) == -signal.SIGKILL
    assert len(RunFolder(tmp_path / "run", {}).metrics()) == 50
    assert status(tmp_path / "run")["state"] == "running"
