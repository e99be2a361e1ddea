"""What must fit together: settings that are each possible but not with one another, and paths that are not there."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from .config import (
    EVALUATION_METRICS,
    FINGERPRINTS,
    CacheCommand,
    CacheConfig,
    CacheLookCommand,
    ChoicesConfig,
    Config,
    DataConfig,
    EvaluateCommand,
    GenerateCommand,
    GenerateConfig,
    PairsConfig,
    PlanCommand,
    StudentConfig,
    TeacherConfig,
    TermConfig,
)
from .contract import DataOnly, build_config, did_you_mean, known_keys, named_groups, objective_terms, shown
from .errors import ConfigError, Problem
from .losses.catalogue import divergence_parameters, matching_parameters, tokens_looked_at
from .storage import read_regular
from .targets import cache_command


def check_relations(config: Config) -> list[Problem]:
    """Settings that are each possible but not together, and paths that are not there."""
    return [
        *_check_models(config.teacher, config.student),
        *_check_heads(config.student),
        *check_data(config.data, "data"),
        *_check_objective(config),
        *_check_trainer(config),
    ]


def check_cache_command(command: CacheCommand) -> list[Problem]:
    """The same for `python -m mini_distill.cache`."""
    return [
        *_check_model("teacher", command.teacher),
        *_check_server(command.teacher),
        *check_data(command.data, "data"),
        *_check_cache(command),
    ]


def check_evaluate_command(command: EvaluateCommand) -> list[Problem]:
    """The same for `python -m mini_distill.evaluate`."""
    problems = [*_check_server(command.teacher), *check_data(command.data, "data", to_measure=True)]
    if command.teacher.kind != "none":
        problems += _check_model("teacher", command.teacher)
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
    problems += [*_check_server(command.teacher), *_check_model("teacher", command.teacher)]
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


def _check_cache(command: CacheCommand) -> Iterator[Problem]:
    cache = command.cache
    if cache.dir is None:
        yield Problem("cache.dir", "missing", "Give the folder of the cache.")
    teacher = command.teacher
    if teacher.kind in ("none", "cached") or teacher.cache_dir or teacher.cache_kind or teacher.cache_k:
        yield Problem(
            "teacher", "nobody to ask", "Choose teacher=embedded, hf or server, without teacher.cache_dir, cache_kind and cache_k."
        )
    if teacher.kind == "server":
        yield from _check_cache_of_server(command)
    belongs = {
        "sampling": ["sampled"],
        "proposal": ["sampled"],
        "tail": ["topk"],
        "k": ["sampled", "topk"],
        "temperature": ["sampled", "topk", "full"],
    }
    for name, kinds in belongs.items():
        if cache.kind not in kinds and getattr(cache, name) != getattr(CacheConfig(), name):
            yield Problem(f"cache.{name}", f"given, and cache.kind is {cache.kind}", f"It belongs to {' and '.join(kinds)}.")
    if cache.proposal != 1 and cache.sampling != "draws":
        yield Problem("cache.proposal", f"got {cache.proposal}, and cache.sampling is {cache.sampling}", "Set cache.sampling=draws.")


def _check_cache_of_server(command: CacheCommand) -> Iterator[Problem]:
    cache, top_k = command.cache, command.teacher.top_k
    if cache.kind != "topk":
        what = f"got {cache.kind}, and a server gives the most likely tokens only"
        yield Problem("cache.kind", what, f"Set cache.kind=topk cache.k={top_k}.")
    elif cache.k > top_k:
        what = f"got {cache.k}, and teacher.top_k is {top_k}"
        yield Problem("cache.k", what, f"Set cache.k={top_k}, or teacher.top_k={cache.k} (vllm serve --max-logprobs {cache.k}).")
    if cache.temperature != 1:
        yield Problem("cache.temperature", f"got {cache.temperature}, and a server gives temperature 1 only", "Leave it out.")


def _check_server(teacher: TeacherConfig) -> Iterator[Problem]:
    """Settings of a teacher on a server, and of no other."""
    defaults = TeacherConfig()
    if teacher.kind != "server":
        for name in ("url", "model", "top_k", "num_requests", "timeout"):
            if getattr(teacher, name) != getattr(defaults, name):
                yield Problem(f"teacher.{name}", f"given, and teacher.kind is {teacher.kind}", "Choose teacher=server.")
        return
    if teacher.url is None:
        yield Problem("teacher.url", "missing, and teacher.kind is server", "Give its address, such as http://host:8000.")
    elif not re.match(r"https?://[^/]", teacher.url):
        yield Problem("teacher.url", "is no address, expected http://… or https://…")  # not shown: it can hold a password
    for name in ("dtype", "device", "attn_implementation"):
        if getattr(teacher, name) != getattr(defaults, name):
            yield Problem(f"teacher.{name}", "given, and the model runs on a server", "Leave it out, and set it there.")
    if teacher.cache_dir is not None:
        yield Problem("teacher.cache_dir", "given, and teacher.kind is server", "Choose teacher=cached: the cache needs no server.")
    if teacher.cache_kind is not None:
        remedy = "Write it (python -m mini_distill.cache teacher=server …), and train with teacher=cached."
        yield Problem("teacher.cache_kind", "given, and teacher.kind is server", remedy)


def _check_models(teacher: TeacherConfig, student: StudentConfig) -> Iterator[Problem]:
    yield from _check_model("teacher", teacher)
    yield from _check_server(teacher)
    yield from _check_model("student", student)
    if teacher.kind == "none" and student.kind == "from_teacher":
        yield Problem("student.kind", "from_teacher, and there is no teacher", "Choose a teacher, or student=mini_2m.")
    if teacher.kind == "cached" and student.kind == "from_teacher":
        remedy = "Choose student=mini_2m, or name the teacher itself besides teacher.cache_dir."
        yield Problem("student.kind", "from_teacher, and a cache has no layers", remedy)
    if teacher.kind == "server" and student.kind == "from_teacher":
        yield Problem("student.kind", "from_teacher, and a server gives no layers", "Choose student=mini_2m, or student=hf student.path=….")
    if teacher.kind == "cached" and teacher.cache_dir is None:
        yield Problem(
            "teacher.cache_dir", "missing, and teacher.kind is cached", "Give the folder that python -m mini_distill.cache wrote."
        )
    if teacher.kind == "none" and teacher.cache_dir is not None:
        yield Problem("teacher.cache_dir", "given, and teacher.kind is none", "Choose teacher=cached.")
    if teacher.kind in ("none", "cached") and teacher.cache_kind is not None:
        yield Problem("teacher.cache_kind", f"given, and teacher.kind is {teacher.kind}: nobody to ask", "Leave it out.")
    if teacher.cache_k is not None and teacher.cache_kind not in ("sampled", "topk"):
        what = f"given, and teacher.cache_kind is {shown(teacher.cache_kind)}"
        yield Problem("teacher.cache_k", what, "It belongs to sampled and topk.")
    if teacher.cache_dir is not None and teacher.cache_kind is None:
        yield from check_local_path("teacher.cache_dir", teacher.cache_dir, is_local=True)
    if teacher.kind == "none" and student.kind == "scratch" and student.tokenizer is None:
        yield Problem("student.tokenizer", "missing, and there is no teacher to take one from", "Give the folder or hub id of a tokenizer.")
    if teacher.kind != "none" and student.tokenizer is not None:
        yield Problem("student.tokenizer", "given, and the student uses the teacher's", "Leave it out, or set teacher=none.")


def _check_model(where: str, part: TeacherConfig | StudentConfig) -> Iterator[Problem]:
    if part.kind == "hf" and part.path is None:
        yield Problem(f"{where}.path", f"missing, and {where}.kind is hf", "Give a folder or a hub id.")
    elif part.kind == "server" and part.path is None:
        yield Problem(f"{where}.path", "missing, and the tokenizer is taken from there", "Give the folder or hub id of the served model.")
    elif part.path is not None and part.kind in ("hf", "server"):
        yield from check_local_path(f"{where}.path", part.path)
    elif part.path is not None:
        yield Problem(f"{where}.path", f"given, and {where}.kind is {part.kind}", f"Choose {where}=hf.")
    if part.trust_remote_code and part.revision is None and not os.path.isdir(os.path.expanduser(part.path or "")):
        yield Problem(f"{where}.trust_remote_code", "true without a pinned revision", f"Set {where}.revision to a commit you have read.")


def check_local_path(where: str, path: str, is_local: bool = False) -> Iterator[Problem]:
    """A path that is, or can only be, meant locally must exist; `org/name` may be a hub id, unless there is a folder `org` here."""
    parent = Path(os.path.expanduser(path)).parent
    is_local = is_local or path.startswith((".", "/", "~")) or path.count("/") > 1
    if (is_local or ("/" in path and os.path.isdir(parent))) and not _exists(path):
        found = sorted(os.listdir(parent)) if os.path.isdir(parent) and os.access(parent, os.R_OK) else []
        near = get_close_matches(Path(path).name, found, n=1, cutoff=0.7)
        remedy = f"There is a folder '{parent}' here, so it is not looked for on the hub." if not is_local else ""
        yield Problem(where, f"no such file or folder (got {shown(path)})", f"Did you mean '{parent / near[0]}'?" if near else remedy)


def _exists(path: str) -> bool:
    """Also for what cannot be a path: the functions of `os.path` answer where those of `Path` raise (too long, ~nobody)."""
    return os.path.exists(os.path.expanduser(path))


def _check_heads(student: StudentConfig) -> Iterator[Problem]:
    if student.kind != "scratch":
        own = [f.name for f in dataclasses.fields(student) if "(scratch)" in f.metadata["help"]]
        given = [name for name in own if getattr(student, name) is not None]
        if student.kind == "hf" and student.num_layers is not None:
            given.append("num_layers")
        for name in given:
            yield Problem(
                f"student.{name}",
                f"given, and a student of kind {student.kind} is shaped elsewhere",
                "Choose student=mini_2m or another scratch preset.",
            )
        return
    for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size"):
        if getattr(student, name) is None:
            yield Problem(f"student.{name}", "missing for a student from scratch", "Choose a preset such as student=mini_2m, or give it.")
    hidden, heads, kv_heads = student.hidden_size, student.num_heads, student.num_kv_heads
    if hidden and heads and hidden % (2 * heads):
        yield Problem(
            "student.hidden_size",
            f"got {hidden}, expected an even multiple of student.num_heads={heads}",
            "Rotary positions need heads of even width.",
        )
    if heads and kv_heads and heads % kv_heads:
        yield Problem("student.num_kv_heads", f"got {kv_heads}, expected a divisor of student.num_heads={heads}")


def check_data(data: DataConfig, where: str, to_measure: bool = False) -> Iterator[Problem]:
    """The data group alone; `where` is its path, so that parts of a mixture are named. `to_measure`: nobody trains on it."""
    yield from _check_belonging(data, where)
    if data.eval_fraction == 1 and not to_measure:
        yield Problem(f"{where}.eval_fraction", "got 1.0, expected below 1: nothing would be left to train on")
    if data.source == "mixture":
        yield from _check_mixture(data, where, to_measure)
        return
    if data.mixture:
        yield Problem(f"{where}.mixture", f"given, and {where}.source is {data.source}", "Choose data=mixture.")
    if data.source in ("text", "jsonl", "hub") and data.path is None and not (to_measure and data.eval_path):
        what = "a data set id" if data.source == "hub" else "a file, folder or glob"
        yield Problem(f"{where}.path", f"missing for source {data.source}", f"Give {what}.")
    if data.source in ("text", "jsonl"):
        for name in ("path", "eval_path"):
            path = getattr(data, name)
            if path is not None and not any(c in path for c in "*?["):
                yield from check_local_path(f"{where}.{name}", path, is_local=True)
    if (data.prompt_column is None) != (data.completion_column is None):
        missing = "completion_column" if data.completion_column is None else "prompt_column"
        yield Problem(f"{where}.{missing}", "missing: prompt and completion go together", "Name both columns.")
    kinds = [name for name in ("text_column", "prompt_column", "messages_column") if getattr(data, name) is not None]
    if len(kinds) > 1:
        yield Problem(
            f"{where}.{kinds[1]}",
            f"given together with {where}.{kinds[0]}",
            "A row is text, or prompt and completion, or messages: name one.",
        )
    if data.tools_column and not data.messages_column:
        yield Problem(f"{where}.tools_column", f"given without {where}.messages_column", "Tools belong to chat messages.")
    if data.eval_path and data.eval_split:
        yield Problem(f"{where}.eval_split", f"given together with {where}.eval_path", "Name one held-out source.")
    try:
        re.compile(data.document_separator or "")
    except re.error as error:
        yield Problem(f"{where}.document_separator", f"got {shown(data.document_separator)}, which is no regular expression ({error})")


_BELONGS_TO = {
    **dict.fromkeys(("path", "eval_path"), ("text", "jsonl", "hub")),
    **dict.fromkeys(("text_column", "prompt_column", "completion_column", "messages_column", "tools_column"), ("jsonl", "hub")),
    **dict.fromkeys(("name", "revision", "split", "eval_split", "streaming"), ("hub",)),
    "document_separator": ("text",),
    "max_rows": ("python_stdlib", "text", "jsonl", "hub"),
}
"""Setting -> the sources that look at it; a user's own class may look at any, a mixture leaves them to its parts."""


def _check_belonging(data: DataConfig, where: str) -> Iterator[Problem]:
    """What a source would silently pass over, such as the path of a text where the source is still the default."""
    for name, sources in _BELONGS_TO.items():
        if "." not in data.source and data.source not in sources and getattr(data, name) != getattr(DataConfig(), name):
            remedy = f"It belongs to {' or '.join(f'data={source}' for source in sources)}."
            if data.source == "mixture":
                remedy = f"Set it in the parts: {where}.mixture.<name>.{name}."
            yield Problem(f"{where}.{name}", f"given, and {where}.source is {data.source}", remedy)


def _check_mixture(data: DataConfig, where: str, to_measure: bool) -> Iterator[Problem]:
    if not data.mixture:
        yield Problem(f"{where}.mixture", "empty for source mixture", "Give name: {source: …, weight: …} for each part.")
    fixed = ("seq_len", "packing", "cache_dir", "num_workers", "mixture")
    for name, values in data.mixture.items():
        part_path = f"{where}.mixture.{name}"
        if not isinstance(values, Mapping):
            yield Problem(part_path, f"got {shown(values)}, expected a mapping", "Give {source: …, weight: …}.")
            continue
        weight = values.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            yield Problem(f"{part_path}.weight", f"got {shown(weight)}, expected a number above 0")
        for key in fixed:
            if key in values:
                yield Problem(f"{part_path}.{key}", "is a setting of the whole mixture", f"Set {where}.{key}.")
        if values.get("source") == "mixture":
            yield Problem(f"{part_path}.source", "a mixture within a mixture", "List all parts on one level.")
            continue
        try:
            part = build_config({"data": {k: v for k, v in values.items() if k not in ("weight", *fixed)}}, DataOnly).data
        except ConfigError as error:
            for p in error.problems:
                yield Problem(part_path + p.where.removeprefix("data"), p.what, p.remedy.replace("'data.", f"'{part_path}."))
        else:
            yield from check_data(part, part_path, to_measure)


def _check_objective(config: Config) -> Iterator[Problem]:
    objective = config.objective
    try:
        terms = objective_terms(objective)
    except ConfigError as error:
        yield from error.problems
        return
    weights = {"kl_weight": objective.kl_weight, **{f"terms.{name}.weight": term.weight for name, term in terms.items()}}
    if not any(weights.values()) and objective.ce_weight == 0:
        yield Problem("objective.kl_weight", "0, and objective.ce_weight is 0 too: nothing would be learnt", "Give one of them a weight.")
    for name, weight in weights.items():
        if weight > 0 and config.teacher.kind == "none":
            yield Problem(f"objective.{name}", f"got {weight}, and there is no teacher", "Choose a teacher, or objective=ce.")
    if "." not in objective.divergence:  # the user's own function is checked when it is imported
        known = divergence_parameters()
        yield from _check_kind(objective.divergence, "objective.divergence", "divergence", known)
        yield from _check_options(objective.divergence_options, objective.divergence, "objective.divergence_options", known)
    for name, term in terms.items():
        yield from _check_term(term, f"objective.terms.{name}", config)
    first = objective.divergence.rpartition(".")[2]
    if taken := set(terms) & {"ce", "loss", first}:
        yield Problem(f"objective.terms.{min(taken)}", "has the name of another term", "Choose a name of its own, and set its kind.")
    if config.teacher.kind == "server":
        yield from _check_served(config)
    elif config.teacher.cache_kind is not None:
        yield from _check_targets(config, cache_command(config).cache)
    elif config.teacher.cache_dir is not None:
        yield from _check_cached(config)
    for name, points in objective.schedules.items():
        yield from _check_schedule(name, points, [first, "ce", *terms])


class _Compared(NamedTuple):
    """A term of the objective, and where its parts are set."""

    name: str
    name_at: str
    options: Mapping[str, Any]
    options_at: str
    temperature: float
    temperature_at: str


def _compared(config: Config) -> Iterator[_Compared]:
    """The terms of the objective that have a weight."""
    objective, terms = config.objective, objective_terms(config.objective)
    if objective.kl_weight > 0:
        options = objective.divergence_options, "objective.divergence_options"
        yield _Compared(objective.divergence, "objective.divergence", *options, objective.temperature, "objective.temperature")
    for name, term in terms.items():
        if term.weight > 0:
            where, temperature = f"objective.terms.{name}", term.temperature or 1.0
            yield _Compared(str(term.kind), f"{where}.kind", term.options, f"{where}.options", temperature, f"{where}.temperature")


def _check_served(config: Config) -> Iterator[Problem]:
    """What a server cannot give."""
    top_k = config.teacher.top_k
    for term in _compared(config):
        if term.name in matching_parameters():
            what = f"{term.name} looks into the teacher, and a server gives its most likely tokens only"
            yield Problem(term.name_at, what, "Load the teacher here: teacher=hf.")
        elif term.temperature != 1:
            what = f"got {term.temperature}, and a server gives temperature 1 only"
            yield Problem(term.temperature_at, what, f"Set {term.temperature_at}=1, or load the teacher here: teacher=hf.")
        else:
            yield from _check_listed(term, top_k, "teacher.top_k", is_whole=False)


def _check_cached(config: Config) -> Iterator[Problem]:
    """What the targets of a cache cannot give, as far as its description tells."""
    folder = config.teacher.cache_dir
    try:
        cache = json.loads(read_regular(Path(os.path.expanduser(str(folder))) / "cache.json"))["cache"]
        settings = CacheConfig(**cache)
    except (OSError, ValueError, KeyError, TypeError):
        return  # said, with what to do, where the cache is opened
    yield from _check_targets(config, settings)


SAME_GRADIENT = "Use forward_kl, which has the same gradient on average and less noise"

OTHER_TEMPERATURE = {
    "sampled": "what was drawn at one temperature is biased at another",
    "topk": "the mass of what is not listed is known at that one only",
}
"""Why targets of a kind hold at one temperature; the other kinds have the whole distribution."""


def _check_targets(config: Config, cache: CacheConfig) -> Iterator[Problem]:
    """What the objective wants and a cache of these settings does not hold."""
    for term in _compared(config):
        if term.name in matching_parameters():
            yield Problem(term.name_at, f"{term.name} looks into the teacher, and there is only a cache", "Leave the cache out.")
        elif cache.kind == "sampled" and tokens_looked_at(term.name, term.options) == math.inf:
            what = f"{term.name} draws from the teacher, and the weights of a sample are no distribution: some can be negative"
            yield Problem(term.name_at, what, f"{SAME_GRADIENT}, or a cache of kind hidden or full.")
        elif cache.kind == "sampled" and term.name != "forward_kl":
            what = f"{term.name} from sampled targets is biased: only the forward KL is linear in the teacher's distribution"
            yield Problem(term.name_at, what, "Use objective=forward_kl, or a cache of kind hidden, full or topk.")
        elif cache.kind in OTHER_TEMPERATURE and term.temperature != cache.temperature:
            what = f"got {term.temperature}, and the cache's temperature is {cache.temperature}: {OTHER_TEMPERATURE[cache.kind]}"
            remedy = f"Train at {cache.temperature}, or from a cache written at {term.temperature}; kinds hidden and full hold at any."
            yield Problem(term.temperature_at, what, remedy)
        elif cache.kind == "topk":
            k = "teacher.cache_k" if config.teacher.cache_kind else "cache.k"
            yield from _check_listed(term, cache.k, k, is_whole=cache.tail == "spread")


def _check_listed(term: _Compared, listed: int, setting: str, is_whole: bool) -> Iterator[Problem]:
    """A divergence of single tokens against a list of so many; whole: those that are not listed have a probability each."""
    needed = tokens_looked_at(term.name, term.options)
    if needed == math.inf and not is_whole:
        what = f"{term.name} draws a token, and of those that are not listed only the mass is known"
        yield Problem(term.name_at, what, f"{SAME_GRADIENT}, or a teacher whose whole distribution is known.")
    elif listed < needed < math.inf:
        what = f"{term.name} ranks {needed} of the teacher's tokens, and {listed} are listed"
        yield Problem(f"{term.options_at}.top_k", what, f"Rank at most {listed}, or list more: {setting}={needed}.")


def _check_term(term: TermConfig, where: str, config: Config) -> Iterator[Problem]:
    assert term.kind is not None
    divergences, matching = divergence_parameters(), matching_parameters()
    if "." not in term.kind:
        yield from _check_kind(term.kind, f"{where}.kind", "term", divergences | matching)
        yield from _check_options(term.options, term.kind, f"{where}.options", divergences | matching)
    if term.kind in matching:
        yield from _check_matching(term, where, config)
        return
    for name in ("layers", "layer_map"):
        if getattr(term, name):
            yield Problem(f"{where}.{name}", f"given, and {term.kind} compares what comes out of the models", "Leave it out.")


_MATCHING_OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_relation_heads": ("a whole number of at least 1", lambda value: _is_whole(value) and not isinstance(value, str) and value >= 1),
    "normalise": ("true or false", lambda value: isinstance(value, bool)),
}
"""Option of a function that matches -> what it may be."""


def _check_matching(term: TermConfig, where: str, config: Config) -> Iterator[Problem]:
    for name, value in term.options.items():
        expected, is_good = _MATCHING_OPTIONS.get(name, ("", lambda _: True))
        if not is_good(value):
            yield Problem(f"{where}.options.{name}", f"got {shown(value)}, expected {expected}")
    if term.layers and term.layer_map:
        yield Problem(f"{where}.layer_map", f"given together with {where}.layers", "Name one.")
    for student, teacher in term.layer_map.items():
        if not _is_whole(student) or not _is_whole(teacher):
            yield Problem(
                f"{where}.layer_map", f"got {shown({student: teacher})}, expected whole numbers", "Give {student block: teacher block}."
            )
    trainer = config.trainer
    if trainer.compile and trainer.gradient_checkpointing and term.weight > 0 and not str(term.kind).startswith("hidden"):
        what = f"true with trainer.gradient_checkpointing=true, and {where} looks into the blocks, which are not seen in compiled recomputation"
        yield Problem("trainer.compile", what, "Leave one of the two out; hidden_mse and hidden_cosine go with both.")
    if str(term.kind).startswith("attention"):
        for group, part in (("teacher", config.teacher), ("student", config.student)):
            if part.attn_implementation != "eager":
                yield Problem(
                    f"{group}.attn_implementation",
                    f"got {shown(part.attn_implementation)}, and {where} looks at attention probabilities",
                    f"Set {group}.attn_implementation=eager; relation_kl needs no such thing.",
                )


def _check_kind(kind: str, where: str, what: str, known: Mapping[str, tuple[str, ...]]) -> Iterator[Problem]:
    if kind not in known:
        yield Problem(where, f"no {what} called {shown(kind)}", did_you_mean(kind, list(known)) or f"Known: {', '.join(known)}.")


def _check_options(options: Mapping[str, object], kind: str, where: str, known: Mapping[str, tuple[str, ...]]) -> Iterator[Problem]:
    for name in options:
        if kind in known and name not in known[kind]:
            yield Problem(
                f"{where}.{name}", f"{kind} takes {', '.join(known[kind]) or 'no options'}", did_you_mean(name, list(known[kind]))
            )


def _check_schedule(name: str, points: object, terms: list[str]) -> Iterator[Problem]:
    where = f"objective.schedules.{name}"
    if name not in terms:
        yield Problem(where, "no term of that name", did_you_mean(name, terms) or f"Terms: {', '.join(terms)}.")
    if not isinstance(points, Mapping) or not points:
        yield Problem(where, f"got {shown(points)}, expected a mapping", "Give {step: factor}, such as {0: 1, 1000: 0.1}.")
        return
    for step, factor in points.items():
        good_factor = isinstance(factor, int | float) and not isinstance(factor, bool) and 0 <= factor < math.inf
        if not _is_whole(step) or int(step) < 0 or not good_factor:
            yield Problem(where, f"got {shown({step: factor})}, expected a step and a factor of at least 0", "Give {0: 1, 1000: 0.1}.")


def _uses_teacher(config: Config) -> bool:
    return any(True for _ in _compared(config))


def _is_whole(value: object) -> bool:
    """Also for the keys of a mapping typed on the command line, which are texts."""
    return isinstance(value, int | str) and not isinstance(value, bool) and re.fullmatch(r"-?\d{1,9}", str(value)) is not None


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
    if config.resume not in ("auto", "never") and not _exists(config.resume):
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
