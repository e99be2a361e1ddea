"""A user's own measurements: one function, named in the configuration, called at every evaluation."""

from __future__ import annotations

import importlib
import numbers
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batch import Batch
from ..errors import ConfigError, MiniDistillError


@dataclass(frozen=True)
class EvaluationContext:
    """What a hook may look at.

    Models are in eval mode and gradients are off; random numbers that a hook draws do not change the training. With several
    processes every one of them calls the hook with its own batches: add sums with `gather_sum` and divide afterwards. What
    the first process returns is recorded.

    Attributes:
        student: The model being trained; not to be changed.
        teacher: Its teacher, or None.
        tokenizer: The tokenizer of both.
        step: Optimizer steps taken so far.
        batches: Makes a fresh iterator over this process's batches of held-out text.
        device: Where the student is.
        output_dir: The folder of the run, or None outside of one.
        gather_sum: Sums a float64 tensor over all processes.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    tokenizer: Any
    step: int
    batches: Callable[[], Iterable[Batch]]
    device: torch.device
    output_dir: Path | None
    gather_sum: Callable[[Tensor], Tensor]


Hook = Callable[[EvaluationContext], dict[str, float]]


def load_hooks(paths: list[str]) -> list[Hook]:
    """The functions that `evaluation.hooks` names.

    Args:
        paths: Import paths, `package.module.function`.

    Raises:
        ConfigError: a path cannot be imported, or what it names cannot be called; names `evaluation.hooks[i]`.
    """
    return [_load_hook(f"evaluation.hooks[{i}]", path) for i, path in enumerate(paths)]


def _load_hook(where: str, path: str) -> Hook:
    module_name, _, function_name = path.rpartition(".")
    if not module_name or path.startswith("."):
        raise ConfigError(where, f"got '{path}', expected an import path such as my_package.my_module.my_hook")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        remedy = "It has to be importable from where you start Python: install it, or set PYTHONPATH."
        raise ConfigError(where, f"cannot import '{module_name}' ({type(error).__name__}: {error})", remedy) from error
    hook = getattr(module, function_name, None)
    if not callable(hook):
        what = "has no function" if hook is None else "has something that cannot be called under the name"
        raise ConfigError(where, f"module '{module_name}' {what} '{function_name}'", "Name a function hook(context) -> {metric: number}.")
    return hook


def run_hooks(
    hooks: list[Hook], context: EvaluationContext, taken: Collection[str] = (), before_each: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Every hook's metrics, as floats; names without a `/` get the prefix `eval/`.

    Args:
        hooks: Called in this order.
        context: What they look at.
        taken: Names that are no longer free.
        before_each: May raise, so that no further hook is called.

    Raises:
        ConfigError: a hook raises, returns something other than `{name: number}`, or uses a name that another one has used.
    """
    found: dict[str, float] = {}
    for i, hook in enumerate(hooks):
        where = f"evaluation.hooks[{i}]"
        before_each()
        for name, value in _call(where, hook, context).items():
            key = name if "/" in name else f"eval/{name}"
            if key in found or key in taken:
                raise ConfigError(where, f"the hook returned '{key}', which is another metric already", "Give it another name.")
            found[key] = value
    return found


def _call(where: str, hook: Hook, context: EvaluationContext) -> dict[str, float]:
    try:
        returned = hook(context)
    except MiniDistillError:
        raise
    except Exception as error:
        raise ConfigError(where, f"the hook raised {type(error).__name__}: {error}", "debug=true shows the traceback.") from error
    if not isinstance(returned, dict):
        raise ConfigError(where, f"the hook returned {type(returned).__name__}, expected a dict of metric: number")
    return {_name(where, name): _number(where, name, value) for name, value in returned.items()}


def _name(where: str, name: object) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigError(where, f"the hook returned the metric name {name!r}, expected a text")
    return name


def _number(where: str, name: str, value: object) -> float:
    """Python's and NumPy's numbers and tensors of one element; not bools and texts, which are more often a mistake."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(where, f"the hook returned {type(value).__name__} for '{name}', expected a number")
    return float(value)
