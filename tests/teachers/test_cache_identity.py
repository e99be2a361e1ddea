"""What a cache is a cache of: every difference is found, named, and shown from both sides."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mini_distill.config import CacheConfig
from mini_distill.errors import CacheError
from mini_distill.teachers.cache_identity import DESCRIPTION, FORMAT, check_same, digest, identity, read_description, write_description

DATA = {"source": "jsonl", "rows": "abc", "seq_len": 32, "parts": {"a": 1, "b": 2}}


def identity_of(**settings: Any) -> dict[str, Any]:
    return identity(CacheConfig(**settings), data=DATA, tokenizer="t", teacher={"weights": "w", "dtype": "float32"}, precision="no")


def refused(cached: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    with pytest.raises(CacheError) as caught:
        check_same(cached, wanted, Path("cache"), "Do something.")
    assert caught.value.exit_code == 5
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("kind", "matters"),
    [
        ("sampled", {"kind", "k", "sampling", "seed", "temperature"}),
        ("topk", {"kind", "k", "tail", "temperature"}),
        ("full", {"kind", "temperature"}),
        ("hidden", {"kind"}),
    ],
)
def test_what_matters_of_the_settings(kind: str, matters: set[str]) -> None:
    """What changes no target, such as the batch size, is no reason to refuse a cache."""
    assert set(identity_of(kind=kind)["cache"]) == matters
    assert identity_of(kind=kind, batch_size=3, shard_sequences=7, dir="x", num_verify=1) == identity_of(kind=kind)


def test_the_proposal_matters_where_tokens_are_drawn() -> None:
    assert identity_of(sampling="draws", proposal=0.8)["cache"]["proposal"] == 0.8


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"kind": "topk"}, 'cache: cache.kind: the cache has "sampled", this run "topk". Do something.'),
        ({"k": 16}, "cache: cache.k: the cache has 32, this run 16. Do something."),
        ({"temperature": 2.0}, "cache: cache.temperature: the cache has 1.0, this run 2.0. Do something."),
        ({"seed": 1}, "cache: cache.seed: the cache has 0, this run 1. Do something."),
        ({"sampling": "draws"}, 'cache: cache.sampling: the cache has "threshold", this run "draws". Do something.'),
    ],
)
def test_another_setting_is_named_with_both_values(settings: dict[str, Any], line: str) -> None:
    assert line in refused(identity_of(), identity_of(**settings))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("teacher", "weights"), "other"),
        (("teacher", "dtype"), "bfloat16"),
        (("tokenizer",), "other"),
        (("data", "rows"), "abd"),
        (("data", "seq_len"), 64),
        (("data", "parts", "b"), 3),
        (("data", "new"), True),
        (("format",), 0),
    ],
)
def test_each_difference_is_one_problem_with_its_full_path(path: tuple[str, ...], value: Any) -> None:
    ours, theirs = identity_of(), copy.deepcopy(identity_of())
    inner = theirs
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    for cached, wanted in ((ours, theirs), (theirs, ours)):
        (line,) = refused(cached, wanted)
        assert line.startswith(f"cache: {'.'.join(path)}: the cache has ") and json.dumps(value) in line


def test_all_differences_are_told_at_once() -> None:
    other = identity(
        CacheConfig(k=8, seed=3), data={**DATA, "rows": "x"}, tokenizer="u", teacher={"weights": "w", "dtype": "float32"}, precision="no"
    )
    assert [line.split(": ")[1] for line in refused(identity_of(), other)] == ["cache.k", "cache.seed", "data.rows", "tokenizer"]


def test_what_a_run_does_not_know_is_not_compared() -> None:
    check_same(identity_of(), {"tokenizer": "t", "data": DATA}, Path("cache"), "")
    check_same(identity_of(), identity_of(), Path("cache"), "")


def test_a_part_that_a_run_has_not_got_is_a_difference() -> None:
    """A mixture of two sources trained from a cache of three."""
    lines = refused({"data": {"a": {"rows": 1}, "b": {"rows": 2}}}, {"data": {"a": {"rows": 1}}})
    assert lines == ["cache: data.b.rows: the cache has 2, this run null. Do something."]


def test_long_values_are_cut() -> None:
    (line,) = refused({"tokenizer": "x" * 500}, {"tokenizer": "y" * 500})
    assert len(line) < 250 and "…" in line


# ------------------------------------------------------------------------------------------------------------------- cache.json


def describe(folder: Path, **more: Any) -> dict[str, Any]:
    description = {"identity": identity_of(), "cache": {"k": 32}, "vocab_size": 62, "sides": {}, "complete": False, **more}
    write_description(folder, description)
    return description


def test_a_description_comes_back(tmp_path: Path) -> None:
    description = describe(tmp_path, teacher={"name": "é"})
    assert read_description(tmp_path) == description


@pytest.mark.parametrize("number", [FORMAT - 1, FORMAT + 1, None, "1"])
def test_another_format_is_refused_with_both_numbers(number: Any, tmp_path: Path) -> None:
    describe(tmp_path, identity={**identity_of(), "format": number})
    with pytest.raises(CacheError, match=rf"cache.json: format {number}, expected {FORMAT}\. Build the cache again"):
        read_description(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"identity": 3}', "[" * 100_000, '{"identity": {"format": 1', "\0"])
def test_what_is_no_description_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_text(text)
    with pytest.raises(CacheError, match=r"cache.json: cannot be read"):
        read_description(tmp_path)


def test_no_description_says_how_to_build(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no cache of teacher targets. Build it: python -m mini_distill.cache"):
        read_description(tmp_path / "nothing")


@pytest.mark.parametrize(("old", "new"), [('"k": 32', '"k": 33'), ('"vocab_size": 62', '"vocab_size": 63'), ("false", "true")])
def test_a_changed_description_is_found(old: str, new: str, tmp_path: Path) -> None:
    """k decides what a stored byte weighs, the vocabulary what the entropy is: with another one every target is wrong."""
    describe(tmp_path)
    file = tmp_path / DESCRIPTION
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(CacheError, match="was changed since it was written"):
        read_description(tmp_path)


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
