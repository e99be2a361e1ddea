"""Tasks of lm-evaluation-harness, by name or as a YAML file, for teacher and student alike. Needs the extra mini_distill[eval]."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..contract import did_you_mean
from ..errors import ConfigError

MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity")
SETTING = "evaluation.tasks"


def check_harness(tasks: list[str]) -> None:
    """The package is there, and knows the tasks.

    Raises:
        ConfigError: it is not, or does not.
    """
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(SETTING, "lm-evaluation-harness is not installed", "Install it: pip install 'mini_distill[eval]'.")
    known: list[str] | None = None
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            _task_of_file(task)
        else:
            known = known if known is not None else _known_tasks()
            if task not in known:
                raise ConfigError(SETTING, f"no task called '{task}'", did_you_mean(task, known) or "lm-eval ls tasks lists them.")


def run_harness(
    tasks: list[str], models: Mapping[str, PreTrainedModel], tokenizer: Any, *, batch_size: int, limit: int | None
) -> dict[str, dict[str, dict[str, float]]]:
    """Task -> metric -> model -> value, each model on the same items.

    Raises:
        ConfigError: the harness cannot run a task, for instance because its data set cannot be reached.
    """
    if not tasks:
        return {}
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_task_of_file(task) if task in files else task for task in tasks]
    manager = TaskManager(include_path=sorted({str(Path(file).expanduser().resolve().parent) for file in files}) or None)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model_name, model in models.items():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            results = lm_eval.simple_evaluate(
                model=wrapped, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
            )
        except Exception as error:  # of the harness, its data sets and the network: many
            raise ConfigError(SETTING, f"lm-evaluation-harness cannot run {', '.join(names)} ({type(error).__name__}: {error})") from error
        for task, values in results["results"].items():
            for key, value in values.items():
                metric, _, kind = key.partition(",")
                if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                    found.setdefault(task, {}).setdefault(metric, {})[model_name] = float(value)
    return found


def main_metric(metrics: Mapping[str, Any]) -> str:
    """The one that stands for a task."""
    return next((name for name in MAIN_METRICS if name in metrics), next(iter(metrics)))


def _task_of_file(path: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(SETTING, f"no such file '{path}'", "Name a task of lm-evaluation-harness or its YAML file.")
    name = next((line.partition(":")[2].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("task:")), "")
    if not name:
        raise ConfigError(SETTING, f"'{path}' has no line 'task: name'", "See the task guide of lm-evaluation-harness.")
    return name.strip("'\"")


def _known_tasks() -> list[str]:
    from lm_eval.tasks import TaskManager

    return list(TaskManager().all_tasks)
