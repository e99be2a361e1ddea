"""From what Hydra composed to the dataclasses of `config.py`: every key known, every value of its type and in its range.

Needs no torch, so that a mistake is named within a second. `build_config` reports *every* problem at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from .config import Config, DataConfig, ObjectiveConfig, TermConfig
from .errors import ConfigError, Problem
from .losses.catalogue import divergence_parameters, matching_parameters

UNKNOWN = "unknown setting"


def build_config(composed: Mapping[str, Any] | DictConfig, schema: type = Config) -> Any:
    """The composed configuration as plain dataclasses, every value checked.

    Raises:
        ConfigError: with one `Problem` per unknown key, wrong type, value out of range or impossible combination, all together.
    """
    from .relations import RELATIONS

    plain: Any = resolved(composed) if isinstance(composed, DictConfig) else composed
    tree = deepcopy(_typed_tree(schema))
    problems = list(_merge(tree, plain, schema, prefix="", known=known_keys(schema)))
    config: Any = resolved(tree)
    _name_what_is_in_main(config)
    wrong = {problem.where for problem in problems}
    problems += [problem for problem in _check_ranges(config, prefix="") if problem.where not in wrong]
    if schema in RELATIONS and all(problem.what == UNKNOWN for problem in problems):  # relations need good values
        problems += RELATIONS[schema](config)
    if problems:
        raise ConfigError.from_problems(problems)
    return config


@cache
def _typed_tree(schema: type) -> DictConfig:
    """Made once: it takes OmegaConf longer than all the rest."""
    return OmegaConf.structured(schema)


def resolved(tree: DictConfig) -> Any:
    """`tree` as plain objects, its `${…}` followed.

    Raises:
        ConfigError: one leads nowhere, or a value is missing that has to be given.
    """
    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        what = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).split("\n")[0]).strip('"')
        missing = isinstance(error, MissingMandatoryValue)
        remedy = "Give a value in place of '???'." if missing else "${…} takes the full path of another setting, or oc.env:NAME."
        raise ConfigError(error.full_key or "configuration", "missing" if missing else what, remedy) from error


def import_path(name: str, known: Collection[str]) -> str:
    """`__main__.mine` for `mine`, where that is none of ours and a notebook's cell has defined it, or imported it."""
    return f"__main__.{name}" if name not in known and callable(getattr(sys.modules.get("__main__"), name, None)) else name


def _name_what_is_in_main(config: Any) -> None:
    """Every setting that takes an import path has one."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            _name_what_is_in_main(value)
        elif f.metadata.get("importable"):
            known = f.metadata.get("choices") or {**divergence_parameters(), **matching_parameters()}
            many = [import_path(text, known) for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
            setattr(config, f.name, many if isinstance(value, list) else (many or [value])[0])


def as_it_stands(value: Any) -> Any:
    """Plain values in OmegaConf's words, in which a `${…}` is text and refers to nothing: what is plain has been resolved already."""
    if isinstance(value, dict):
        return {key: as_it_stands(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_it_stands(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def known_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every full path of the contract: `trainer.max_steps`, …"""
    keys: list[str] = []
    for f in dataclasses.fields(schema):
        keys.append(prefix + f.name)
        if f.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(f.default_factory):
            keys += known_keys(f.default_factory, prefix + f.name + ".")
    return keys


def did_you_mean(word: str, known: list[str]) -> str:
    """`Did you mean 'x'?`, or the empty string when nothing is near. Siblings come first, then the same name elsewhere."""
    if len(word) > 100:
        return ""
    group, _, name = word.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == group]
    by_path = {key: key for key in known}
    for wanted, keys, cutoff in ((name, _by_name(siblings), 0.7), (name, _by_name(known), 0.7), (word, by_path, 0.85)):
        if near := get_close_matches(wanted, list(keys), n=1, cutoff=cutoff):
            return f"Did you mean '{keys[near[0]]}'?"
    return ""


def _by_name(keys: list[str]) -> dict[str, str]:
    return {key.rpartition(".")[2]: key for key in reversed(keys)}


def _merge(tree: DictConfig, values: Mapping[str, Any], schema: type, prefix: str, known: list[str]) -> Iterator[Problem]:
    """Write `values` into the typed `tree`, leaf by leaf, so that one bad value does not hide the next; `known` are all paths there are."""
    by_name = {f.name: f for f in dataclasses.fields(schema)}
    for name, value in values.items():
        where = prefix + (str(name) if str(name).strip() else shown(name))
        if name not in by_name:
            yield Problem(where, UNKNOWN, _unknown_remedy(where, value, list(by_name), known))
            continue
        nested = by_name[name].default_factory
        if nested is dataclasses.MISSING or not dataclasses.is_dataclass(nested):
            yield from _write(tree, by_name[name], value, where)
        elif isinstance(value, Mapping):
            yield from _merge(tree[name], value, nested, where + ".", known)
        else:
            yield Problem(where, f"got {shown(value)}, expected a group of settings", f"Set {where}.<name>=… or choose a preset.")


def _write(tree: DictConfig, setting: dataclasses.Field[Any], value: Any, where: str) -> Iterator[Problem]:
    expected, remedy = _type_name(setting.type), setting.metadata["help"] + "."
    if value == "???":  # OmegaConf's sign for what someone has to give
        yield Problem(where, f"missing, expected {expected}", remedy)
    elif _is_of_another_type(value, setting.type):
        yield Problem(where, f"got {shown(value)}, expected {expected}", remedy)
    elif _was_text(value, setting.type):
        yield Problem(where, f"got {shown(value)}, expected {expected}", f"Quote a text that reads as something else: '{where}=\"…\"'.")
    else:
        try:
            tree[setting.name] = as_it_stands(value)
        except OmegaConfBaseException:
            yield Problem(where, f"got {shown(value)}, expected {expected}", remedy)


def _unknown_remedy(where: str, value: Any, known_here: list[str], known: list[str]) -> str:
    if near := did_you_mean(where, known):
        return near
    if where in known_keys():
        return f"It belongs to python -m mini_distill.train. Known here: {', '.join(known_here)}."
    if isinstance(value, Mapping) and "." not in where:
        return "A preset of your own that sets several groups begins with the line '# @package _global_'."
    return f"Known here: {', '.join(known_here)}."


def _was_text(value: Any, annotation: Any) -> bool:
    """Whether a text was meant and something else was read: the commit 5e12 is a number to YAML and to Hydra, and `on` is true."""
    return isinstance(value, bool | float) and "str" in _parts(annotation)


def _is_of_another_type(value: Any, annotation: Any) -> bool:
    """What OmegaConf would let pass: a number for true, and a text with `${` for anything. 1 and 0 may stand for true and false."""
    if isinstance(value, str) and "${" in value:
        return "str" not in _parts(annotation)
    is_digits = str(value).lstrip("+-").isdigit() and str(value) not in ("0", "1")
    return "bool" in _parts(annotation) and not isinstance(value, bool) and is_digits


def shown(value: Any) -> str:
    """As the user would have written it, shortened to fit in a line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]}…{text[-20:]}"


def _parts(annotation: Any) -> list[str]:
    """`int | None` -> ["int", "None"]. Annotations are texts here: `from __future__ import annotations`."""
    return [part.strip() for part in str(annotation).split("|")]


def _type_name(annotation: Any) -> str:
    words = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "None": "null"}
    words |= {"list[str]": "a list of texts, such as [a,b]", "dict[str, Any]": "a mapping, such as {name: value}"}
    words |= {"dict[Any, Any]": "a mapping, such as {0: 3}"}
    return " or ".join(words[part] for part in _parts(annotation))


def _check_ranges(config: Any, prefix: str) -> Iterator[Problem]:
    for f in dataclasses.fields(config):
        value, limits, where = getattr(config, f.name), f.metadata, prefix + f.name
        if dataclasses.is_dataclass(value):
            yield from _check_ranges(value, where + ".")
        elif any(isinstance(text, str) and not text.strip() for text in (value if isinstance(value, list) else [value])):
            yield Problem(where, "got an empty text", "Give a value, or null for none." if "None" in _parts(f.type) else "")
        elif isinstance(value, str) and "\0" in value:
            yield Problem(where, "got a text with a NUL character")
        elif isinstance(value, float) and not math.isfinite(value):
            yield Problem(where, f"got {value}, expected a finite number")
        elif isinstance(value, int) and abs(value) >= 2**63:
            yield Problem(where, f"got {value}, expected a number of at most 64 bits")
        elif value is not None:
            yield from _check_limits(where, value, limits)


def _check_limits(where: str, value: Any, limits: Mapping[str, Any]) -> Iterator[Problem]:
    if limits.get("importable") and "." in value:
        if not all(part.isidentifier() for part in value.split(".")):
            yield Problem(where, f"got {shown(value)}, expected an import path such as my_package.my_module.name")
    elif "choices" in limits and value not in limits["choices"]:
        also = " or an import path" if limits.get("importable") else ""
        yield Problem(
            where, f"got {shown(value)}, expected one of {', '.join(limits['choices'])}{also}", did_you_mean(value, list(limits["choices"]))
        )
    for name, words, holds in (
        ("at_least", "at least", lambda limit: value >= limit),
        ("above", "above", lambda limit: value > limit),
        ("at_most", "at most", lambda limit: value <= limit),
        ("below", "below", lambda limit: value < limit),
    ):
        if name in limits and not holds(limits[name]):
            yield Problem(where, f"got {value}, expected {words} {limits[name]}")


# -------------------------------------------------------------------------------------------- groups within a mapping of names


SETTINGS_OF_FORM = (
    "chat_template",
    "add_bos",
    "seq_len",
    "packing",
    "on_long_row",
    "on_bad_row",
    "eval_fraction",
    "cache_dir",
    "num_workers",
)


def named_groups(given: Mapping[str, Any], schema: type, where: str) -> dict[str, Any]:
    """A mapping of names to settings of one kind, each complete: the terms of an objective, the tasks of an evaluation.

    Args:
        given: name -> its settings.
        schema: The dataclass of them.
        where: Full path of the mapping, for errors.

    Raises:
        ConfigError: with every problem in any of them.
    """
    groups, problems = {}, []
    one = dataclasses.make_dataclass("Group", [("group", schema, field(default_factory=schema))])
    for name, values in given.items():
        if not isinstance(values, Mapping):
            known = ", ".join(f"{f.name}: …" for f in dataclasses.fields(schema)[:2])
            problems.append(Problem(f"{where}.{name}", f"got {shown(values)}, expected a mapping", f"Give {{{known}}}."))
            continue
        try:
            groups[str(name)] = build_config({"group": values}, one).group
        except ConfigError as error:
            here = f"{where}.{name}"
            problems += [
                Problem(here + p.where.removeprefix("group"), p.what, p.remedy.replace("'group.", f"'{here}.")) for p in error.problems
            ]
    if problems:
        raise ConfigError.from_problems(problems)
    return groups


def objective_terms(objective: ObjectiveConfig) -> dict[str, TermConfig]:
    """The further terms of an objective, each complete.

    Raises:
        ConfigError: with every problem in any of them.
    """
    terms = named_groups(objective.terms, TermConfig, "objective.terms")
    known = {**divergence_parameters(), **matching_parameters()}
    return {
        name: dataclasses.replace(term, kind=term.kind or import_path(name, known), temperature=term.temperature or objective.temperature)
        for name, term in terms.items()
    }


@dataclass
class DataOnly:
    """A data group by itself, as the parts of a mixture are."""

    data: DataConfig = field(default_factory=DataConfig)


def mixture_parts(data: DataConfig) -> dict[str, tuple[DataConfig, float]]:
    """The parts of a mixture: name -> (its own complete settings, its weight).

    A part takes seq_len, packing, chat_template and the other settings of form from the mixture unless it names its own.
    """
    shared = {name: getattr(data, name) for name in SETTINGS_OF_FORM}
    parts = {}
    for name, values in data.mixture.items():
        own = {key: value for key, value in values.items() if key != "weight"}
        parts[name] = (build_config({"data": {**shared, **own}}, DataOnly).data, float(values.get("weight", 1.0)))
    return parts
