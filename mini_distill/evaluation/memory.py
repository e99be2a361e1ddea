"""A process that loads a model, reads and writes, and prints the most memory it took: `python -m mini_distill.evaluation.memory <JSON>`."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from ..models.loading import load_causal_lm, weightless_causal_lm
from .efficiency import Origin, write

KILOBYTE = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in


def main(task: dict[str, Any]) -> None:
    """Print the bytes."""
    origin = Origin(**task["origin"])
    _import_its_code(origin)
    before = _start_measuring()
    model = load_causal_lm(**vars(origin), where="model").to(task["device"])
    ids = torch.zeros(1, task["prompt_tokens"], dtype=torch.long, device=task["device"])
    with torch.no_grad():
        write(model, ids, task["generation_tokens"])
    print(torch.cuda.max_memory_allocated() if task["device"].startswith("cuda") else max(0, _peak_resident() - before))


def _import_its_code(origin: Origin) -> None:
    """Python code of the architecture is no memory of the model: it is imported by making one without weights."""
    weightless_causal_lm(**vars(origin), where="model")


def _start_measuring() -> int:
    """Bytes in use now, from which the peak starts again where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return _kilobytes("VmRSS") * 1024
    return _peak_resident()


def _peak_resident() -> int:
    with contextlib.suppress(OSError):
        return _kilobytes("VmHWM") * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
