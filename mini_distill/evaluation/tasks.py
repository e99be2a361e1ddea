"""Everything that is decided by likelihood: minimal pairs, multiple choice, tasks of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import ChoicesConfig, FullEvaluationConfig, PairsConfig
from ..contract import named_groups
from ..errors import ConfigError
from ..models.head import LanguageModel
from .choices import Question, is_right, read_questions
from .harness import check_harness, main_metric, run_harness
from .likelihood import Autocast, Continuation, encode, log_likelihoods
from .pairs import Pair, mean_of_groups, preferred, read_pairs

Details = dict[str, Any]


def check_tasks(config: FullEvaluationConfig) -> None:
    """Files are there and hold what they have to, and the harness knows its tasks: before any model is loaded.

    Raises:
        ConfigError: a task is unknown, or two have the same name.
        DataError: a file cannot be read.
    """
    pairs, choices = _pairs(config), _choices(config)
    if twice := sorted(set(pairs) & set(choices)):
        raise ConfigError(f"evaluation.choices.{twice[0]}", "evaluation.pairs has a task of that name", "Choose another name.")
    check_harness(config.tasks)


def run_tasks(
    config: FullEvaluationConfig,
    models: Mapping[str, PreTrainedModel],
    tokenizer: Any,
    device: torch.device,
    autocast: Autocast,
    show_progress: bool = False,
) -> tuple[dict[str, float], Details]:
    """Every task on every model.

    Returns:
        `task/<name>/<model>`, of each group of a task `task/<name>/<group>/<model>`, `task/<name>/<model>_standard_error` and
        `task/<name>/items`; and the same as tables, for `details.json`.
    """
    found: dict[str, float] = {}
    details: Details = {}
    wrapped = {name: LanguageModel(model, name) for name, model in models.items()}

    def score(texts: Sequence[Continuation], name: str) -> dict[str, list[float]]:
        return {
            model_name: log_likelihoods(
                model, tokenizer, texts, batch_size=config.batch_size, autocast=autocast, show_progress=show_progress, name=name
            )
            for model_name, model in wrapped.items()
        }

    for name, (pairs, kind) in _pairs(config).items():
        better = score([encode(tokenizer, "", pair.better) for pair in pairs], name)
        worse = score([encode(tokenizer, "", pair.worse) for pair in pairs], name)
        scores = {model: preferred(better[model], worse[model]) for model in wrapped}
        _add(found, details, name, kind, [pair.group for pair in pairs], scores)
    for name, (questions, normalise) in _choices(config).items():
        texts = [encode(tokenizer, question.question, f" {choice}") for question in questions for choice in question.choices]
        scores = {model: _right(questions, values, normalise) for model, values in score(texts, name).items()}
        _add(found, details, name, "accuracy", [question.group for question in questions], scores)
    for task, metrics in run_harness(config.tasks, models, tokenizer, batch_size=config.batch_size, limit=config.task_limit).items():
        main = main_metric(metrics)
        found |= {f"task/{_key(task)}/{model}": value for model, value in metrics[main].items()}
        found |= {f"task/{_key(task)}/{_key(metric)}/{model}": value for metric in metrics for model, value in metrics[metric].items()}
        details[task] = {"kind": main, "groups": [{"label": metric, **metrics[metric]} for metric in metrics]}
    return found, details


def _pairs(config: FullEvaluationConfig) -> dict[str, tuple[list[Pair], str]]:
    given: dict[str, PairsConfig] = named_groups(config.pairs, PairsConfig, "evaluation.pairs")
    return {name: read_pairs(group, f"evaluation.pairs.{name}", config.task_limit) for name, group in given.items()}


def _choices(config: FullEvaluationConfig) -> dict[str, tuple[list[Question], str]]:
    given: dict[str, ChoicesConfig] = named_groups(config.choices, ChoicesConfig, "evaluation.choices")
    return {
        name: (read_questions(group, f"evaluation.choices.{name}", config.task_limit), group.normalise) for name, group in given.items()
    }


def _right(questions: Sequence[Question], scores: Sequence[float], normalise: str) -> list[float]:
    right, at = [], 0
    for question in questions:
        right.append(is_right(question, scores[at : at + len(question.choices)], normalise))
        at += len(question.choices)
    return right


def _add(
    found: dict[str, float], details: Details, name: str, kind: str, groups: Sequence[str], scores: Mapping[str, Sequence[float]]
) -> None:
    """The figures of a task, over all its items and by group."""
    items = len(groups)
    by_model = {model: mean_of_groups(groups, of_model) for model, of_model in scores.items()}
    for model, of_model in scores.items():
        mean = sum(of_model) / items
        found[f"task/{_key(name)}/{model}"] = mean
        found[f"task/{_key(name)}/{model}_standard_error"] = math.sqrt(mean * (1 - mean) / items)
        if len(set(groups)) > 1:
            found |= {f"task/{_key(name)}/{_key(group)}/{model}": value for group, (value, _) in by_model[model].items()}
    found[f"task/{_key(name)}/items"] = float(items)
    first = next(iter(by_model.values()))
    details[name] = {
        "kind": kind,
        "items": items,
        "groups": [{"label": group, "items": count, **{m: by_model[m][group][0] for m in by_model}} for group, (_, count) in first.items()],
    }


def _key(name: str) -> str:
    """A name as part of a metric's key, in which `/` separates."""
    return name.replace("/", "-")
