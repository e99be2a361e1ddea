"""One SHA-256 over what a run has come to: two runs that went the same way give the same digest.

python -m mini_distill.digest <run folder>
"""

from __future__ import annotations

if __name__ == "__main__":
    from mini_distill.starting import answer_signals

    answer_signals()

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import report
from .errors import ConfigError, MiniDistillError, StorageError
from .storage import near_path

if TYPE_CHECKING:
    from torch import Tensor

NOT_RESULTS = ("perf/", "time/")
"""Metrics that differ between two runs that went the same way: they measure the machine."""
ABOUT_THE_RUN = ("fingerprints", "metrics")
"""Of a checkpoint's state: where and when the run ran, and the checksum of rows that say so too."""


def digest_run(path: Path | str) -> str:
    """SHA-256 (hex) over weights, optimizer, counters and data position of the newest good checkpoint, the metrics, and the weights
    of the finished student.

    Random numbers and learning rate of a step are functions of the seed and the step, which the checkpoint holds. Left out is what
    tells where and when a run ran: fingerprints, `perf/*`, times.

    Raises:
        ConfigError: there is no such folder.
        StorageError: it is not a run, or every checkpoint is damaged.
    """
    from .training.checkpoint import Checkpoints
    from .training.run_folder import RunFolder

    path = Path(path)
    if not path.is_dir():
        raise ConfigError(str(path), "no such folder (expected the output_dir of a run)", near_path(path))
    checkpoint = Checkpoints(path / "checkpoints", keep=1).newest()
    if checkpoint is None:
        raise StorageError(str(path), "holds no checkpoint (expected the output_dir of a run)")
    digest = hashlib.sha256()
    for name in checkpoint.names:
        _add_tensors(digest, name, checkpoint.tensors(name))
    _add_value(digest, "state", {key: value for key, value in checkpoint.state.items() if key not in ABOUT_THE_RUN})
    run = RunFolder(path, {})
    _add_value(digest, "metrics", _results(run.metrics()))
    for file in sorted((path / "student").glob("*.safetensors")) if run.status().get("state") == "finished" else []:
        _add_tensors(digest, file.name, _load(file))
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the digest; gives the exit code: 2 for a folder that is not there, 6 for one that is not a run."""
    parser = argparse.ArgumentParser(prog="python -m mini_distill.digest", description="One SHA-256 over the state of a run.")
    parser.add_argument("run", help="the output_dir of the run")
    try:
        print(digest_run(parser.parse_args(arguments).run))
    except MiniDistillError as error:
        return report(error)
    return 0


def _results(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Step -> its metrics, however they were spread over rows."""
    by_step: dict[str, dict[str, Any]] = {}
    for row in rows:
        kept = {key: value for key, value in row.items() if key != "step" and not key.startswith(NOT_RESULTS)}
        by_step.setdefault(str(row["step"]), {}).update(kept)
    return by_step


def _add_tensors(digest: Any, name: str, tensors: dict[str, Tensor]) -> None:
    import torch

    for key, tensor in sorted(tensors.items()):
        digest.update(f"{name} {key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _add_value(digest: Any, name: str, value: Any) -> None:
    digest.update(f"{name} {json.dumps(value, sort_keys=True)}\n".encode())


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise StorageError(str(file), f"cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
