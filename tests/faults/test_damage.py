"""Damaged files: named, skipped or made again, and never used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import (
    run,
)

from faults.twins import Twins, crash_before
from mini_distill.digest import digest_run
from mini_distill.errors import StorageError


def test_damaged_newest_checkpoint_is_skipped_and_the_end_is_the_same(
    twins: Twins, tmp_path: Path, undisturbed: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    command = twins.command("plain")
    crash_before(5, command, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        run(command, tmp_path / "run")
    assert "step-00000004" in caplog.text and "skipped" in caplog.text
    assert digest_run(tmp_path / "run") == digest_run(undisturbed("plain"))


def test_run_whose_checkpoints_are_all_damaged_is_not_silently_begun_anew(tiny_command: list[str], tmp_path: Path) -> None:
    crash_before(4, tiny_command, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(StorageError, match="resume=never"):
        run(tiny_command, tmp_path / "run")
