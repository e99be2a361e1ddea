"""Everything that is decided by likelihood: minimal pairs, multiple choice, tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
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
from .pairs import Pair, mean_of_groups, preferred, read_pairs, standard_error

Details = dict[str, Any]


def check_tasks(config: FullEvaluationConfig, seed: int = 0) -> None:
    """Files are there and hold what they have to, and the harness knows its tasks: before any model is loaded.

    Raises:
        ConfigError: a task is unknown, or two have the same name.
        DataError: a file cannot be read.
    """
    pairs, choices = _pairs(config, seed), _choices(config, seed)
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
    seed: int = 0,
) -> Iterator[tuple[dict[str, float], Details]]:
    """Every task on every model, one after the other; `seed` draws the items where `config.task_limit` leaves some out.

    Yields:
        Of a task `task/<name>/<model>`, of each of its groups `task/<name>/<group>/<model>`, both with `…<model>_standard_error`, for
        stereotypes with `…<model>_from_half` (the distance from no preference), and `task/<name>/items`; and the same as tables, for
        `details.json`.
    """
    wrapped = {name: LanguageModel(model, name) for name, model in models.items()}

    def score(texts: Sequence[Continuation], name: str) -> dict[str, list[float]]:
        return {
            model_name: log_likelihoods(
                model, tokenizer, texts, batch_size=config.batch_size, autocast=autocast, show_progress=show_progress, name=name
            )
            for model_name, model in wrapped.items()
        }

    for name, (pairs, kind) in _pairs(config, seed).items():
        better = score([encode(tokenizer, "", pair.better) for pair in pairs], name)
        worse = score([encode(tokenizer, "", pair.worse) for pair in pairs], name)
        scores = {model: preferred(better[model], worse[model]) for model in wrapped}
        yield _figures(name, kind, [pair.group for pair in pairs], scores, chance=0.5)
    for name, (questions, normalise) in _choices(config, seed).items():
        texts = [encode(tokenizer, question.question, f" {choice}") for question in questions for choice in question.choices]
        scores = {model: _right(questions, values, normalise) for model, values in score(texts, name).items()}
        chance = fmean(1 / len(question.choices) for question in questions)
        yield _figures(name, "accuracy", [question.group for question in questions], scores, chance)
    for task, metrics in run_harness(config.tasks, models, tokenizer, batch_size=config.batch_size, limit=config.task_limit).items():
        main = main_metric(metrics)
        found = {f"task/{_key(task)}/{model}": value for model, value in metrics[main].items()}
        found |= {f"task/{_key(task)}/{_key(metric)}/{model}": value for metric in metrics for model, value in metrics[metric].items()}
        yield found, {task: {"kind": main, "groups": [{"label": metric, **metrics[metric]} for metric in metrics]}}


def _pairs(config: FullEvaluationConfig, seed: int) -> dict[str, tuple[list[Pair], str]]:
    given: dict[str, PairsConfig] = named_groups(config.pairs, PairsConfig, "evaluation.pairs")
    return {name: read_pairs(group, f"evaluation.pairs.{name}", config.task_limit, seed) for name, group in given.items()}


def _choices(config: FullEvaluationConfig, seed: int) -> dict[str, tuple[list[Question], str]]:
    given: dict[str, ChoicesConfig] = named_groups(config.choices, ChoicesConfig, "evaluation.choices")
    return {
        name: (read_questions(group, f"evaluation.choices.{name}", config.task_limit, seed), group.normalise)
        for name, group in given.items()
    }


def _right(questions: Sequence[Question], scores: Sequence[float], normalise: str) -> list[float]:
    right, at = [], 0
    for question in questions:
        right.append(is_right(question, scores[at : at + len(question.choices)], normalise))
        at += len(question.choices)
    return right


def _figures(
    name: str, kind: str, groups: Sequence[str], scores: Mapping[str, Sequence[float]], chance: float
) -> tuple[dict[str, float], Details]:
    """Of a task, over all its items and by group, flat and as tables; with what guessing gets."""
    items, task = len(groups), f"task/{_key(name)}"
    found = {f"{task}/items": float(items)}
    rows: dict[str, dict[str, Any]] = {}
    for model, of_model in scores.items():
        by_group = mean_of_groups(groups, of_model)
        found |= _with_error(f"{task}/{model}", sum(of_model) / items, items, kind)
        for group, (mean, count) in by_group.items():
            rows.setdefault(group, {"label": group, "items": count})[model] = mean
            if len(by_group) > 1:
                found |= _with_error(f"{task}/{_key(group)}/{model}", mean, count, kind)
    return found, {name: {"kind": kind, "items": items, "chance": chance, "groups": list(rows.values())}}


def _with_error(key: str, mean: float, items: int, kind: str) -> dict[str, float]:
    """A score with its standard error; one of stereotypes with its distance from no preference, which has the same."""
    distance = {f"{key}_from_half": abs(mean - 0.5)} if kind == "stereotype" else {}
    return {key: mean, f"{key}_standard_error": standard_error(mean, items), **distance}


def _key(name: str) -> str:
    """A name as part of a metric's key, in which `/` separates."""
    return name.replace("/", "-")
