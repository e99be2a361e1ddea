"""What a run does, so that something can happen in the midst of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from runs import train_module

from mini_distill import distillation, result, storage
from mini_distill.distillation import Distillation
from mini_distill.evaluation import hooks
from mini_distill.evaluation.evaluator import Evaluator


@contextmanager
def in_midst(of: str, action: Callable[[], object]) -> Iterator[None]:
    """Call `action` once while this is going on."""
    owner, name, call = {**PLACES, **OF_EVERY_RANK}[of]()
    original, calls = getattr(owner, name), 0

    def watched(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return original(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield


PLACES: dict[str, Callable[[], tuple[Any, str, int]]] = {
    "loading": lambda: (train_module, "prepare", 1),
    "first evaluation": lambda: (Evaluator, "__call__", 1),
    "step": lambda: (train_module, "distill_step", 3),
    "save": lambda: (storage, "_write_manifest", 2),
    "evaluation": lambda: (Evaluator, "__call__", 2),
    "batch of an evaluation": lambda: (Evaluator, "_measure", 3),
    "export": lambda: (result, "write_student", 1),
    "hook": lambda: (hooks, "_call", 2),
}
"""What a run does, as a function that does it, and which of its calls is meant."""
OF_EVERY_RANK: dict[str, Callable[[], tuple[Any, str, int]]] = {
    "step 0 (loading)": lambda: (distillation, "load_shared_tokenizer", 1),
    "step 0 (evaluation)": lambda: (Evaluator, "__call__", 1),
    "step 3": lambda: (train_module, "distill_step", 3),
    "step 2 (evaluation)": lambda: (Evaluator, "__call__", 2),
    "step 2 (saving)": lambda: (Distillation, "save", 1),
    "step 6 (result)": lambda: (result, "metrics_at", 1),
}
"""What each of several processes does, in its own words, in a run of six steps that evaluates and saves every two."""
