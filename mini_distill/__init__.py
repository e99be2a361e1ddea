"""Distil an open language model into a mini one that people can afford to run, and prove what was kept.

The public names are imported on first use, so that `import mini_distill` costs nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import Any

__version__ = "0.1.0"

# torch asks Linux for huge pages then, from its first tensor on: less of the memory of a CPU is lost in gaps (docs/plan.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if "ipykernel" in sys.modules:  # transformers looks for widgets as it is imported, and bars here need none
    warnings.filterwarnings("ignore", message="IProgress not found")

_HOMES = {
    "Config": "config",
    "load_config": "cli",
    "distill_step": "train",
    "Objective": "losses.objective",
    "Run": "run",
    "load_run": "run",
    "Batch": "data.batch",
    "prepare_data": "data.prepare",
    "build_student": "students.build",
    "OnlineTeacher": "teachers.online",
    "Evaluator": "evaluation.evaluator",
    "MiniDistillError": "errors",
}
_VERBS = ("train", "cache", "evaluate", "generate", "plan", "report", "doctor")
_MODULES = {"divergences": ".losses.divergences"} | {verb: f".{verb}" for verb in _VERBS}
"""Modules; the verbs among them can be called with overrides: `md.train(["student=mini_2m"])`."""
__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name], __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'mini_distill' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
