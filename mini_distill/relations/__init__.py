"""What must fit together: settings that are each possible but not with one another, and paths that are not there. A check for each verb."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..config import (
    EVALUATION_METRICS,
    FINGERPRINTS,
    CacheCommand,
    CacheLookCommand,
    ChoicesConfig,
    Config,
    EvaluateCommand,
    GenerateCommand,
    GenerateConfig,
    PairsConfig,
    PlanCommand,
)
from ..contract import did_you_mean, known_keys, named_groups, shown
from ..errors import ConfigError, Problem
from .data import check_data
from .models import check_heads, check_local_path, check_model, check_models, check_server, exists
from .objective import check_objective
from .targets import check_cache, compared


def check_relations(config: Config) -> list[Problem]:
    """Settings that are each possible but not together, and paths that are not there."""
    return [
        *check_models(config.teacher, config.student),
        *check_heads(config.student),
        *check_data(config.data, "data"),
        *check_objective(config),
        *_check_trainer(config),
    ]


def check_cache_command(command: CacheCommand) -> list[Problem]:
    """The same for `python -m mini_distill.cache`."""
    return [
        *check_model("teacher", command.teacher),
        *check_server(command.teacher),
        *check_data(command.data, "data"),
        *check_cache(command),
    ]


def check_evaluate_command(command: EvaluateCommand) -> list[Problem]:
    """The same for `python -m mini_distill.evaluate`."""
    problems = [*check_server(command.teacher), *check_data(command.data, "data", to_measure=True)]
    if command.teacher.kind != "none":
        problems += check_model("teacher", command.teacher)
    if command.model is None:
        problems.append(Problem("model", "missing", "Give the folder of a model or of a run, or a hub id."))
    else:
        problems += check_local_path("model", command.model)
    if command.teacher.kind == "cached" or command.teacher.cache_dir or command.teacher.cache_kind:
        problems.append(Problem("teacher", "a cache cannot be asked for new text", "Give the live teacher, or teacher=none."))
    for name, schema in (("pairs", PairsConfig), ("choices", ChoicesConfig)):
        try:
            groups = named_groups(getattr(command.evaluation, name), schema, f"evaluation.{name}")
        except ConfigError as error:
            problems += error.problems
            continue
        problems += [
            Problem(f"evaluation.{name}.{key}.path", "missing", "Give a file.") for key, group in groups.items() if group.path is None
        ]
    return problems


def check_generate_command(command: GenerateCommand) -> list[Problem]:
    """The same for `python -m mini_distill.generate`."""
    problems = check_data(command.data, "data") if command.data.source != "mixture" else []
    if command.data.source == "mixture":
        problems = [Problem("data.source", "a mixture, and prompts come from one source", "Go through its parts, one after the other.")]
    problems = [*problems, *_check_generate(command.generate)]
    if command.model is not None:
        return [*problems, *check_local_path("model", command.model)]
    problems += [*check_server(command.teacher), *check_model("teacher", command.teacher)]
    if command.teacher.kind in ("none", "cached", "server") or command.teacher.cache_dir or command.teacher.cache_kind:
        remedy = "Choose teacher=embedded or hf, without a cache, or give a model."
        problems.append(Problem("teacher", "nobody here who could write", remedy))
    return problems


def _check_generate(generate: GenerateConfig) -> Iterator[Problem]:
    if generate.num_beams > 1 and generate.sampling_temperature > 0:
        what = f"got {generate.num_beams}, and generate.sampling_temperature is {generate.sampling_temperature}"
        yield Problem("generate.num_beams", what, "Beam search looks for the likeliest, sampling does not: leave one out.")
    for name in ("top_p", "num_samples"):
        if generate.sampling_temperature == 0 and (value := getattr(generate, name)) != 1:
            remedy = "Set generate.sampling_temperature, such as 1."
            yield Problem(f"generate.{name}", f"got {value}, and nothing is sampled", remedy)


def check_plan_command(command: PlanCommand) -> list[Problem]:
    """The same for `python -m mini_distill.plan`."""
    problems, plan = check_relations(command), command.plan
    if (plan.matmul_tflops is None) != (plan.memory_gb_per_second is None):
        missing = "matmul_tflops" if plan.matmul_tflops is None else "memory_gb_per_second"
        problems.append(Problem(f"plan.{missing}", "missing: the two rates of a device go together", "Give both, or none to measure here."))
    return problems


def _uses_teacher(config: Config) -> bool:
    return any(True for _ in compared(config))


def _check_trainer(config: Config) -> Iterator[Problem]:
    trainer = config.trainer
    if trainer.warmup_steps is not None and trainer.warmup_steps >= trainer.max_steps:
        yield Problem("trainer.warmup_steps", f"got {trainer.warmup_steps}, expected less than trainer.max_steps={trainer.max_steps}")
    if trainer.export == "best" and trainer.eval_every is None:
        yield Problem("trainer.export", "best, and only the last step is evaluated", "Set trainer.eval_every, or trainer.export=last.")
    best = config.evaluation.best_metric
    if not config.evaluation.hooks and best not in EVALUATION_METRICS:
        remedy = did_you_mean(best, list(EVALUATION_METRICS)) or f"Known: {', '.join(EVALUATION_METRICS)}, and those of your hooks."
        yield Problem("evaluation.best_metric", f"no metric called {shown(best)}", remedy)
    flash = [
        w for w, part in (("teacher", config.teacher), ("student", config.student)) if (part.attn_implementation or "").startswith("flash")
    ]
    if flash and trainer.micro_batch_size > 1:
        yield Problem(
            f"{flash[0]}.attn_implementation",
            "flash attention keeps packed documents apart only with trainer.micro_batch_size=1",
            "Use sdpa, or micro_batch_size=1 with more grad_accum_steps.",
        )
    if config.control and not _uses_teacher(config):
        yield Problem("control", "true, and nothing of the objective looks at a teacher", "Leave it out: this run is the control.")
    if config.resume not in ("auto", "never") and not exists(config.resume):
        yield Problem("resume", f"got {shown(config.resume)}, expected auto, never or a checkpoint folder")
    keys = [*known_keys(), *FINGERPRINTS]
    for key in config.resume_allow:
        if key not in keys:
            yield Problem("resume_allow", f"unknown setting {shown(key)}", did_you_mean(key, keys))


RELATIONS: dict[type, Callable[[Any], list[Problem]]] = {
    Config: check_relations,
    CacheCommand: check_cache_command,
    CacheLookCommand: check_cache_command,
    EvaluateCommand: check_evaluate_command,
    GenerateCommand: check_generate_command,
    PlanCommand: check_plan_command,
}
"""What is checked of the settings of each verb."""
