"""The configuration contract: every preset composes, every wrong value is one line, and all lines come together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mini_distill.cli import config_dir, load_config
from mini_distill.config import CacheCommand, Config, DataConfig, EvaluateCommand
from mini_distill.contract import as_it_stands, build_config, did_you_mean, known_keys, mixture_parts
from mini_distill.errors import ConfigError, Problem

NEEDED = {
    "data/text": ["data.path={file}"],
    "data/jsonl": ["data.path={file}"],
    "data/chat": ["data.path={file}"],
    "data/hub": ["data.path=some/data"],
    "data/mixture": ["data.mixture={{a: {{source: python_stdlib, weight: 2}}, b: {{source: text, path: '{file}'}}}}"],
    "sweep/optuna": ["hydra/sweeper=optuna"],
    "experiment/tinystories_75k": ["teacher.path=some/model", "data.path={file}"],
}
"""What a preset that leaves something open needs besides."""

ALL_PRESETS = sorted(path.relative_to(config_dir()).with_suffix("").as_posix() for path in config_dir().glob("*/*.yaml"))
PRESETS = [preset for preset in ALL_PRESETS if not preset.startswith(("teacher/", "student/"))]  # those: test_presets.py


def settings(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every leaf of the contract, by its full path."""
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.default_factory):
            yield from settings(f.default_factory, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


SETTINGS = dict(settings())


def nested(key: str, value: Any) -> dict[str, Any]:
    """`trainer.seed`, 1 -> {"trainer": {"seed": 1}}"""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def everywhere(value: Any) -> dict[str, Any]:
    """Every setting of the contract with this value."""
    tree: dict[str, Any] = {}
    for key in SETTINGS:
        group, _, name = key.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[name] = value
    return tree


def problems_of(values: dict[str, Any]) -> list[Problem]:
    with pytest.raises(ConfigError) as raised:
        build_config(values)
    return raised.value.problems


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


# ------------------------------------------------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes(preset: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("text")
    group, name = preset.split("/")
    config = load_config([f"{group}={name}", *(override.format(file=file) for override in NEEDED.get(preset, []))])
    assert isinstance(config, Config)


def test_the_default_composes_to_the_main_job() -> None:
    config = load_config()
    assert (config.teacher.kind, config.data.source, config.objective.divergence) == ("embedded", "python_stdlib", "forward_kl")
    assert config.output_dir == "runs/default"


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_says_what_it_means(key: str) -> None:
    text = SETTINGS[key].metadata["help"]
    assert len(text) > 10
    assert not text.endswith("."), "error lines add the full stop"


def test_every_default_is_possible() -> None:
    assert build_config({}) == Config()


def test_known_keys_are_the_paths_of_the_contract() -> None:
    keys = known_keys()
    assert {"teacher", "teacher.kind", "trainer.max_steps", "seed"} <= set(keys)
    assert set(SETTINGS) <= set(keys)
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("word", "meant"),
    [("trainer.max_step", "trainer.max_steps"), ("max_steps", "trainer.max_steps"), ("trainer.temperature", "objective.temperature")],
)
def test_the_nearest_setting_is_named(word: str, meant: str) -> None:
    assert did_you_mean(word, known_keys()) == f"Did you mean '{meant}'?"


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    assert did_you_mean("typo", known_keys()) == ""


# ------------------------------------------------------------------------------------------------------------------ wrong values

WRONG: list[Any] = [
    *([1, 2], {"x": 1}, "nonsense", True, None, b"x"),
    *(-1, -0.5, 0, math.nan, math.inf, 10**30, 1e300),
    *("", "  \n", [], [""], [[1]], [None], {}),
    *("x" * 10_000, "./" + "x" * 10_000, "./a\0b", "~nobody_of_this_name/x", "./\ud800", "../../../../../../../../x", "..x."),
    *("???", "${nosuch.key}", "${", ["???"], {"x": "${y}"}),
]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:30])
def test_a_wrong_value_is_a_line_that_names_the_setting_and_nothing_else(value: Any) -> None:
    refused = {problem.where for problem in problems_of(everywhere(value))}  # all settings at once: quick
    for key in SETTINGS.keys() - refused:  # what is possible, or was not reached
        try:
            config = build_config(nested(key, value))
        except ConfigError as error:
            assert any(key in str(problem) for problem in error.problems), error.problems
            assert all(len(str(problem)) < 1000 and "\n" not in str(problem) for problem in error.problems)
        else:
            dataclasses.asdict(config)  # whole, and of plain values
            assert type(value_at(config, key)).__name__ in (SETTINGS[key].type.replace("None", "NoneType").replace("[", " ").split()), value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**30, 1e300, True, "nonsense", "", [1], {}])
def test_a_number_is_finite_and_a_number(value: Any) -> None:
    whole = {key for key, f in SETTINGS.items() if "int" in f.type}
    numbers = whole | {key for key, f in SETTINGS.items() if "float" in f.type}
    refused = {problem.where for problem in problems_of(everywhere(value))}
    assert (whole if value in (10**30, 1e300) else numbers) <= refused


@pytest.mark.parametrize("key", [key for key, f in SETTINGS.items() if {"at_least", "above"} & set(f.metadata)])
def test_a_number_below_its_limit_is_refused(key: str) -> None:
    limits = SETTINGS[key].metadata
    value = limits["at_least"] - 1 if "at_least" in limits else limits["above"]
    (problem,) = problems_of(nested(key, value))
    assert problem.where == key
    assert f"got {float(value) if 'float' in SETTINGS[key].type else value}, expected" in problem.what


@pytest.mark.parametrize("key", [key for key, f in SETTINGS.items() if {"at_most", "below"} & set(f.metadata)])
def test_a_number_above_its_limit_is_refused(key: str) -> None:
    limits = SETTINGS[key].metadata
    assert problems_of(nested(key, limits.get("below", limits.get("at_most", 0) + 1)))[0].where == key


@pytest.mark.parametrize("key", [key for key, f in SETTINGS.items() if "choices" in f.metadata])
def test_a_choice_that_is_none_lists_the_choices_and_the_nearest(key: str) -> None:
    choices = SETTINGS[key].metadata["choices"]
    (problem,) = problems_of(nested(key, choices[0] + "x"))
    assert problem.where == key
    assert all(choice in problem.what for choice in choices)
    assert problem.remedy.startswith("Did you mean")


@pytest.mark.parametrize("key", [key for key, f in SETTINGS.items() if f.type == "str" or f.type == "str | None"])
@pytest.mark.parametrize("value", [5e12, True])
def test_a_commit_that_reads_as_a_number_is_not_silently_another_text(key: str, value: Any) -> None:
    """`teacher.revision=5e12` is the number 5000000000000.0 to Hydra and to YAML: the hub would have been asked for that."""
    (problem,) = problems_of(nested(key, value))
    assert (problem.where, "Quote" in problem.remedy) == (key, True)


@pytest.mark.parametrize("key", ["objective.divergence", "data.source"])
@pytest.mark.parametrize("path", ["..x", "a.", "a b.c", ".", "a-b.c"])
def test_an_import_path_is_made_of_names(key: str, path: str) -> None:
    assert "import path" in problems_of(nested(key, path))[0].what


@pytest.mark.parametrize("group", [f.name for f in dataclasses.fields(Config) if f.name not in SETTINGS])
@pytest.mark.parametrize("value", [None, "x", 3, ["a"]])
def test_a_group_is_a_group(group: str, value: Any) -> None:
    (problem,) = problems_of({group: value})
    assert (problem.where, "group of settings" in problem.what) == (group, True)


def test_an_unknown_key_names_the_near_one() -> None:
    (problem,) = problems_of({"trainer": {"max_step": 3}})
    assert str(problem) == "trainer.max_step: unknown setting. Did you mean 'trainer.max_steps'?"


def test_an_unknown_key_with_nothing_near_lists_what_is_known() -> None:
    (problem,) = problems_of({"tracking": {"zzz": 3}})
    assert "Known here: kind, project" in problem.remedy


@pytest.mark.parametrize(
    ("schema", "settings", "remedy"),
    [
        (CacheCommand, {"seed": 1}, "Did you mean 'cache.seed'?"),
        (CacheCommand, {"trainer": {"max_steps": 3}}, "It belongs to python -m mini_distill.train. Known here: teacher, data, cache,"),
        (EvaluateCommand, {"control": True}, "It belongs to python -m mini_distill.train. Known here: model, teacher,"),
        (Config, {"objective": {"terms": {"jsd": {"wieght": 1}}}}, "Did you mean 'objective.terms.jsd.weight'?"),
    ],
)
def test_the_near_name_is_one_of_the_same_verb(schema: type, settings: dict[str, Any], remedy: str) -> None:
    """They were all looked for among the settings of a training: `mini_distill.cache seed=1` gave "Did you mean 'seed'?"."""
    with pytest.raises(ConfigError) as caught:
        build_config(settings, schema)
    assert caught.value.problems[0].remedy.startswith(remedy)


def test_a_preset_without_its_package_line_is_told_about_it() -> None:
    """A user's experiment without `# @package _global_` lands under the key `experiment`, which nobody would look for."""
    (problem,) = problems_of({"experiment": {"trainer": {"max_steps": 3}}})
    assert "# @package _global_" in problem.remedy


def test_all_problems_are_reported_together() -> None:
    values = {
        "typo": 1,
        "trainer": {"max_step": 3, "learning_rate": "high", "warmup_steps": -1},
        "data": {"seq_len": 1.5, "on_bad_row": "skipp"},
        "seed": math.nan,
    }
    expected = {"typo", "trainer.max_step", "trainer.learning_rate", "trainer.warmup_steps", "data.seq_len", "data.on_bad_row", "seed"}
    problems = problems_of(values)
    assert sorted(problem.where for problem in problems) == sorted(expected)


def test_an_unknown_key_does_not_hide_what_does_not_fit() -> None:
    assert {p.where for p in problems_of({"typo": 1, "teacher": {"kind": "hf"}})} == {"typo", "teacher.path"}


def test_a_wrong_value_brings_no_second_problem_about_its_default() -> None:
    """warmup_steps=200 is fine for the max_steps that were meant, not for the default that stands in for "many"."""
    assert [p.where for p in problems_of({"trainer": {"max_steps": "many", "warmup_steps": 200}})] == ["trainer.max_steps"]


def test_interpolations_are_followed() -> None:
    composed = OmegaConf.create({"trainer": {"max_steps": 7, "save_every": "${trainer.max_steps}", "warmup_steps": 1}})
    assert build_config(composed).trainer.save_every == 7


def test_an_interpolation_that_leads_nowhere_names_setting_and_target() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.save_every: .*nosuch\.key"):
        build_config(OmegaConf.create({"trainer": {"save_every": "${nosuch.key}"}}))


# ---------------------------------------------------------------------------------------------------------------------- mixtures


def test_parts_of_a_mixture_take_settings_of_form_from_the_whole() -> None:
    data = DataConfig(source="mixture", seq_len=64, on_bad_row="skip")
    data.mixture = {"a": {"source": "python_stdlib", "weight": 3}, "b": {"source": "jsonl", "path": "x", "on_bad_row": "error"}}
    parts = mixture_parts(data)
    assert {name: weight for name, (_, weight) in parts.items()} == {"a": 3.0, "b": 1.0}
    assert [part.seq_len for part, _ in parts.values()] == [64, 64]
    assert [part.on_bad_row for part, _ in parts.values()] == ["skip", "error"]


def test_values_of_a_part_have_the_types_of_the_contract() -> None:
    data = DataConfig(source="mixture", mixture={"a": {"max_rows": "5"}})
    assert mixture_parts(data)["a"][0].max_rows == 5


def test_a_good_mixture_composes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    parts = {"a": {"source": "text", "path": str(tmp_path / "a.txt"), "weight": 0.5}, "b": {"source": "python_stdlib"}}
    config = build_config({"data": {"source": "mixture", "mixture": parts}})
    assert list(mixture_parts(config.data)) == ["a", "b"]


@pytest.mark.parametrize(
    ("part", "where"),
    [
        (3, "a"),
        ({"weight": 0}, "a.weight"),
        ({"weight": -1}, "a.weight"),
        ({"weight": math.nan}, "a.weight"),
        ({"weight": math.inf}, "a.weight"),
        ({"weight": True}, "a.weight"),
        ({"weight": "much"}, "a.weight"),
        ({"sourc": "text"}, "a.sourc"),
        ({"source": "txt"}, "a.source"),
        ({"source": "text"}, "a.path"),
        ({"source": "text", "path": "/no/such/file"}, "a.path"),
        ({"source": "mixture"}, "a.source"),
        ({"max_rows": 0}, "a.max_rows"),
        ({"seq_len": 8}, "a.seq_len"),
        ({"packing": False}, "a.packing"),
        ({"mixture": {}}, "a.mixture"),
    ],
)
def test_what_is_wrong_in_a_part_is_named_with_the_part(part: Any, where: str) -> None:
    problems = problems_of({"data": {"source": "mixture", "mixture": {"a": part}}})
    assert [problem.where for problem in problems] == [f"data.mixture.{where}"]


def test_all_parts_are_reported_together() -> None:
    parts = {"a": {"sourc": "text"}, "b": {"weight": -1}, "c": None}
    assert [p.where for p in problems_of({"data": {"source": "mixture", "mixture": parts}})] == [
        "data.mixture.a.sourc",
        "data.mixture.b.weight",
        "data.mixture.c",
    ]


def test_the_near_name_in_a_part_is_the_parts_own() -> None:
    (problem,) = problems_of({"data": {"source": "mixture", "mixture": {"a": {"max_row": 3}}}})
    assert problem.remedy == "Did you mean 'data.mixture.a.max_rows'?"


@pytest.mark.parametrize("text", ["${a}", "\\${a}", "\\\\${a}", "${", "a\\$b", "x}${oc.env:HOME}\\\\\\${y}'"])
def test_a_plain_text_stays_as_it_is_whatever_it_would_mean_to_omegaconf(text: str) -> None:
    """Plain values are resolved; a config.yaml of a stranger's run would otherwise read our environment."""
    assert build_config({"output_dir": text}).output_dir == text
    assert OmegaConf.to_object(OmegaConf.create({"x": [as_it_stands(text)]})) == {"x": [text]}
