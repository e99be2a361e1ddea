from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_distill.digest import digest_run
from mini_distill.errors import ConfigError, StorageError
from mini_distill.training.checkpoint import Checkpoints
from mini_distill.training.run_folder import RunFolder


def make_run(
    path: Path,
    *,
    weight: float = 1.0,
    moment: float = 2.0,
    best: float = 3.0,
    loss: float = 4.0,
    student: float = 5.0,
    seconds: float = 6.0,
) -> Path:
    with RunFolder(path, {"output_dir": str(path)}) as run:
        tensors = {"model": {"w": torch.tensor([weight, 0.0])}, "optimizer": {"w.step": torch.tensor(moment)}}
        for step in (1, 2):
            run.log_metrics(step, {"train/loss": loss / step, "perf/tokens_per_second": seconds})
        Checkpoints(run.path / "checkpoints", keep=2).save(2, tensors, {"step": 2, "best": best, "fingerprints": {"output_dir": str(path)}})
    (path / "student").mkdir()
    save_file({"w": torch.tensor([student])}, path / "student" / "model.safetensors")
    return path


def test_two_runs_that_went_the_same_way_have_the_same_digest(tmp_path: Path) -> None:
    digests = {digest_run(make_run(tmp_path / name, seconds=seconds)) for name, seconds in (("a", 1.0), ("b", 2.0))}
    assert len(digests) == 1 and len(digests.pop()) == 64


@pytest.mark.parametrize("change", ["weight", "moment", "best", "loss", "student"])
def test_one_changed_bit_anywhere_in_the_result_changes_the_digest(tmp_path: Path, change: str) -> None:
    changed: dict[str, Any] = {change: 1.0000001192092896}  # the next float32 after 1
    before = digest_run(make_run(tmp_path / "a", **{change: 1.0}))
    assert digest_run(make_run(tmp_path / "b", **changed)) != before


def test_rows_spread_over_lines_digest_as_one(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    with RunFolder(one, {}) as run:
        run.log_metrics(3, {"train/loss": 1.0, "eval/ce": 2.0})
    with RunFolder(two, {}) as run:
        run.log_metrics(3, {"eval/ce": 2.0})
        run.log_metrics(3, {"train/loss": 1.0})
    assert digest_run(one) == digest_run(two)


def test_the_student_counts_once_the_run_has_finished(tmp_path: Path) -> None:
    """A run that was made longer still holds the student of its first end."""
    digests = set()
    for name, student in (("a", 1.0), ("b", 2.0)):
        run = make_run(tmp_path / name, student=student)
        (run / "status.json").write_text('{"state": "running", "step": 2}')
        digests.add(digest_run(run))
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda path: None, 2, "no such folder"),
        (lambda path: path.mkdir(), 6, "holds no checkpoint"),
        (lambda path: _damage(make_run(path)), 6, "the only checkpoint is damaged"),
        (
            lambda path: (make_run(path) / "student" / "model.safetensors").write_bytes(b"\x80\x04pickle"),
            6,
            "model.safetensors: cannot be read",
        ),
    ],
)
def test_a_bad_path_is_one_line(tmp_path: Path, make: Callable[[Path], Any], code: int, words: str) -> None:
    make(tmp_path / "run")
    with pytest.raises((ConfigError, StorageError), match=words) as caught:
        digest_run(tmp_path / "run")
    assert caught.value.exit_code == code and "\n" not in str(caught.value)


def test_the_command_prints_one_line_and_ends_with_the_right_code(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    good = _command(str(run))
    assert (good.returncode, good.stdout, good.stderr) == (0, digest_run(run) + "\n", "")
    missing = _command(str(tmp_path / "nowhere"))
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith(f"error: {tmp_path}/nowhere: no such folder") and missing.stderr.count("\n") == 1
    assert _command().returncode == 2


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mini_distill.digest", *arguments], capture_output=True, text=True, check=False)


def _damage(run: Path) -> None:
    file = run / "checkpoints" / "step-00000002" / "model.safetensors"
    save_file({**load_file(file), "more": torch.zeros(1)}, file)
