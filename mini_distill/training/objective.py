"""The loss of a configuration: its functions found, tried out, and put together."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import ObjectiveConfig, TrainerConfig
from ..contract import objective_terms
from ..errors import ConfigError
from ..losses import divergences
from ..losses.catalogue import FALL_AS_ONE_OVER_T, matching_parameters
from ..losses.objective import DivergenceTerm, Objective
from ..models.head import LanguageModel
from ..teachers.matching import Matching

TRIAL_VOCABULARY = 1024

logger = logging.getLogger(__name__)


def build_objective(config: ObjectiveConfig, trainer: TrainerConfig, on_gpu: bool) -> Objective:
    """The loss, without what only the models and the tokenizer can tell: the size of the vocabulary, the matching of inner states.

    Raises:
        ConfigError: an import path leads nowhere, or a function does not take its options or what a divergence is given.
    """
    own = config.divergence.rpartition(".")[2]
    further = []
    for name, term in objective_terms(config).items():
        assert term.kind is not None and term.temperature is not None
        if term.kind not in matching_parameters() and term.weight > 0:
            where = f"objective.terms.{name}"
            function = load_divergence(term.kind, term.options, f"{where}.kind", f"{where}.options")
            factors = (term.weight, term.temperature, term.options, config.scale_by_temperature_squared)
            further.append(DivergenceTerm(name, function, *factors))
    main = "objective.divergence", "objective.divergence_options"
    return Objective(
        load_divergence(config.divergence, config.divergence_options, *main) if config.kl_weight > 0 else None,
        own,
        config.divergence_options,
        temperature=config.temperature,
        scale_by_temperature_squared=config.scale_by_temperature_squared,
        kl_weight=config.kl_weight,
        ce_weight=config.ce_weight,
        further=further,
        schedules={name: {int(step): factor for step, factor in points.items()} for name, points in config.schedules.items()},
        memory_mib=config.logits_memory_mib,
        compile=_compiles(config, trainer, on_gpu),
    )


def divergences_in_use(config: ObjectiveConfig) -> list[str]:
    """The divergences of the loss, by name or import path, as its settings have them."""
    main = [config.divergence] if config.kl_weight > 0 else []
    kinds = [term.kind for term in objective_terms(config).values() if term.kind is not None and term.weight > 0]
    return [*main, *(kind for kind in kinds if kind not in matching_parameters())]


def _compiles(config: ObjectiveConfig, trainer: TrainerConfig, on_gpu: bool) -> bool:
    """Whether the terms are compiled: as told, else where it can be expected to work and to be worth its while."""
    if config.compile is not None:
        return config.compile
    terms = [(config.divergence, config.kl_weight), *((str(term.kind), term.weight) for term in objective_terms(config).values())]
    return (trainer.compile or (on_gpu and _has_triton())) and not any("." in kind for kind, weight in terms if weight > 0)


def warn_of_growing_gradients(config: ObjectiveConfig) -> None:
    """Say in one line of which terms T² does not keep the gradient's size, but makes it grow with the temperature."""
    terms = {config.divergence: (config.divergence, config.temperature, config.kl_weight)}
    terms |= {name: (str(term.kind), term.temperature or 1.0, term.weight) for name, term in objective_terms(config).items()}
    growing = [f"{name} (T={t:g})" for name, (kind, t, weight) in terms.items() if kind in FALL_AS_ONE_OVER_T and t != 1 and weight > 0]
    if growing and config.scale_by_temperature_squared:
        what = "with T² the gradient of %s grows as T, since it falls as 1/T alone; set it to false, or divide the weight by T"
        logger.warning(f"objective.scale_by_temperature_squared: {what}", ", ".join(growing))


def add_matching(objective: Objective, config: ObjectiveConfig, student: LanguageModel, teacher: PreTrainedModel | None, seed: int) -> None:
    """The matching of inner states, where the configuration asks for it; its projections join the student's parameters.

    Raises:
        ConfigError: blocks that are not there, or that cannot be compared.
        ModelError: an architecture whose states cannot be watched.
    """
    terms = {name: term for name, term in objective_terms(config).items() if term.kind in matching_parameters() and term.weight > 0}
    if not terms:
        return
    assert teacher is not None  # anything else was refused with the configuration
    matching = Matching(terms, student.model, teacher, seed)
    student.projections.update(dict(matching.projections.items()))
    objective.matching = matching


def load_divergence(name: str, options: Mapping[str, Any], where: str, where_options: str) -> Callable[..., Tensor]:
    """The divergence by name, or a user's own by import path, tried out on a few numbers.

    Raises:
        ConfigError: it cannot be imported, refuses its options, or does not give a number per token.
    """
    function = getattr(divergences, name) if "." not in name else _import(name, where)
    size = (2, TRIAL_VOCABULARY)
    student = torch.linspace(-1, 1, math.prod(size)).view(size).requires_grad_()
    teacher = torch.linspace(1, -2, math.prod(size)).view(size)
    try:
        value = function(student, teacher, 1.0, **options)
    except Exception as error:  # whatever it raises, it would raise in the first step
        option, _, what = str(error).partition(": ")
        if option in options:  # which is how those of this package begin
            raise ConfigError(f"{where_options}.{option}", what) from error
        refused = where_options if options else where
        raise ConfigError(refused, f"{name} refuses it ({type(error).__name__}: {error})", "See its docstring.") from error
    if not isinstance(value, Tensor) or value.shape != (2,):
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            where, f"{name} gives {shape} for logits of {list(size)}, expected a value per token, [2]", "Sum over the last axis only."
        )
    if not value.requires_grad:
        raise ConfigError(where, f"{name} gives values without a gradient to the student's logits", "Compute it from the student's logits.")
    return function


def _import(path: str, where: str) -> Callable[..., Tensor]:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(where, f"cannot import '{path}' ({error})", "Give package.module.function.") from error


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
