"""Random configurations: each is refused in lines, or means the same after it was written and read again."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faults.answers import answer_to
from faults.record import record
from faults.test_malformed_configuration import CASES, NEEDED, ODD, leaves, value_at
from mini_distill.cli import CONTRACTS, config_dir, load_config
from mini_distill.config import Config
from mini_distill.contract import build_config

QUICK, ALL = 150, 1500
PROFILE: dict[str, Any] = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

SCALARS = (
    st.sampled_from([value for value in ODD.values() if not isinstance(value, bytes | dict | list)])
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)
SETTINGS = st.sampled_from([key for command, key in CASES if command == "contract"])
PATHS = SETTINGS | st.text(max_size=15) | st.tuples(SETTINGS, st.text(max_size=4)).map("".join)


def plausible() -> list[tuple[str, Any]]:
    """Settings with values of their type: the default, and numbers a little larger."""
    found = []
    for key in leaves(Config):
        value = value_at(Config(), key)
        more = [value + 1, 2 * value] if isinstance(value, int | float) and not isinstance(value, bool) else [value]
        found += [(key, entry) for entry in [value, *more]]
    return found


PAIRS = st.sampled_from(plausible()) | st.tuples(SETTINGS, SCALARS) | st.tuples(PATHS, VALUES)


@st.composite
def trees(draw: Any) -> dict[str, Any]:
    """Nested mappings, mostly of settings that exist."""
    tree: dict[str, Any] = {}
    for key, value in draw(st.lists(PAIRS, max_size=3)):
        *groups, name = key.split(".")
        at = tree
        for group in groups:
            at = at[group] if isinstance(at.get(group), dict) else at.setdefault(group, {}) if group not in at else {}
        at[name] = value
    return tree


def same(left: Any, right: Any) -> bool:
    """Equal, where a value that is not a number equals itself."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right))


def check_tree(tree: dict[str, Any], counts: Counter[str]) -> None:
    answer = answer_to(lambda: build_config(tree), 2)
    counts["refused" if answer.error else "accepted"] += 1
    if answer.error is None:
        written = yaml.safe_dump(dataclasses.asdict(answer.value), allow_unicode=True)
        again = build_config(yaml.safe_load(written))
        assert same(dataclasses.asdict(again), dataclasses.asdict(answer.value)), tree


@pytest.mark.parametrize("cases", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])
def test_a_random_configuration_is_refused_in_lines_or_read_back_as_it_is(cases: int) -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=cases, **PROFILE)
    @given(trees())
    def fuzz(tree: dict[str, Any]) -> None:
        check_tree(tree, counts)

    fuzz()
    assert counts["refused"] and counts["accepted"]
    record("random configurations", injected=sum(counts.values()), fired=sum(counts.values()), **counts)


PRESETS = sorted(path.relative_to(config_dir()).with_suffix("").as_posix().replace("/", "=") for path in config_dir().glob("*/*.yaml"))
PLAIN = st.sampled_from(
    ["1", "-1", "0.5", "1e-3", "null", "true", "nan", "abc", "[1,2]", "{a: 1}", "'a b'", '"x"', "${seed}", "???", "1,2", ""]
)
TEXTS = (
    st.tuples(
        st.sampled_from(["", "+", "++", "~"]), SETTINGS, st.sampled_from(["=", "==", "", ":", " ="]), PLAIN | st.text(max_size=12)
    ).map("".join)
    | st.sampled_from(PRESETS)
    | st.text(max_size=25)
    | st.text(alphabet="[]{}()'\"\\$=,:.@~+ ab1\n\t", max_size=15)
)


@pytest.mark.parametrize("cases", [QUICK // 5, pytest.param(ALL // 3, marks=pytest.mark.slow)])
def test_random_overrides_are_refused_in_lines_or_give_a_configuration(cases: int) -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=cases, **PROFILE)
    @given(st.lists(TEXTS, min_size=1, max_size=3))
    def fuzz(overrides: list[str]) -> None:
        answer = answer_to(lambda: load_config(overrides), 2)
        assert answer.error is not None or isinstance(answer.value, Config)
        counts["refused" if answer.error else "accepted"] += 1

    fuzz()
    assert counts["refused"] and counts["accepted"]
    record("random overrides", injected=sum(counts.values()), fired=sum(counts.values()), **counts)


def test_the_cases_are_of_every_command() -> None:
    assert set(NEEDED) <= set(CONTRACTS) == {command for command, _ in CASES}
    assert len(set(leaves(Config))) > 80
