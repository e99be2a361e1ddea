"""A cache of another teacher, tokenizer, data or setting is refused, with the name of what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import caches as helpers
import pytest
from caches import (
    KINDS,
    SMALL,
    build,
    cache_config,
    cache_module,
    content,
    from_cache,
    one_weight_changed,
    without,
)
from runs import copy_of, run

from faults.record import record
from mini_distill.errors import CacheError, ConfigError, MiniDistillError
from mini_distill.teachers.cache_identity import read_description, write_description


def two_tokens_swapped(teacher: Path) -> None:
    """The vocabulary is as large as before."""
    file = teacher / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["q"], vocab["z"] = vocab["z"], vocab["q"]
    file.write_text(json.dumps(tokenizer))


def another_epsilon(teacher: Path) -> None:
    """Every weight is as before, every logit is not."""
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.01}))


def refused(body: Callable[[], object], kind: type[MiniDistillError] = CacheError) -> str:
    """The lines of the refusal, noted for the report."""
    lines = helpers.refused(body, kind)
    record("wrong caches", injected=1, fired=1, refused=1)
    return lines


TEACHERS: dict[str, tuple[Callable[[Path], None] | None, list[str], str]] = {
    "one weight": (one_weight_changed, [], "teacher.weights"),
    "epsilon": (another_epsilon, [], "teacher.config.rms_norm_eps: the cache has 1e-06, this run 0.01"),
    "dtype": (None, ["teacher.dtype=bfloat16"], 'teacher.dtype: the cache has "float32", this run "bfloat16"'),
    "permuted vocabulary": (two_tokens_swapped, [], "tokenizer: the cache has"),
}
SETTINGS = {
    "kind": ("cache.kind=full", 'cache.kind: the cache has "topk", this run "full"'),
    "k": ("cache.k=9", "cache.k: the cache has 8, this run 9"),
    "temperature": ("cache.temperature=2", "cache.temperature: the cache has 1.0, this run 2.0"),
    "tail": ("cache.tail=spread", 'cache.tail: the cache has "bucket", this run "spread"'),
}
DATA = {
    "length": ("data.seq_len=24", "seq_len: the cache has 32, this run 24"),
    "packing": ("data.packing=false", "packing: the cache has"),
    "fewer rows": ("data.max_rows=50", "the cache has"),
    "held-out share": ("data.eval_fraction=0.1", "the cache has 0.2, this run 0.1"),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_another_teacher_or_tokenizer_is_refused(
    case: str, tiny_command: list[str], tiny_teacher: Path, caches: Callable[[str], Path], tmp_path: Path
) -> None:
    change, more, words = TEACHERS[case]
    other = copy_of(tiny_teacher, tmp_path / "teacher")
    if change is not None:
        change(other)
    command = [*tiny_command, f"teacher.path={other}", *more]
    before = content(caches("small"))
    assert words in refused(lambda: build(command, caches("small"), *SMALL))
    assert words in refused(lambda: run([*command, f"teacher.cache_dir={caches('small')}"], tmp_path / "run"))
    assert words in refused(lambda: cache_module.verify(cache_config(command, caches("small"), *SMALL)))
    assert content(caches("small")) == before and CacheError.exit_code == 5


@pytest.mark.parametrize("case", SETTINGS)
def test_other_settings_of_the_cache_are_refused(case: str, tiny_command: list[str], caches: Callable[[str], Path]) -> None:
    override, words = SETTINGS[case]
    more = [text for text in SMALL if "full" not in override or "cache.k=" not in text]
    lines = refused(lambda: build(tiny_command, caches("small"), *more, override))
    assert words in lines and "Choose another cache.dir" in lines


def test_another_seed_is_refused_where_tokens_are_drawn(tiny_command: list[str], caches: Callable[[str], Path]) -> None:
    lines = refused(lambda: build(tiny_command, caches("sampled"), *KINDS["sampled"], "cache.seed=1"))
    assert lines.splitlines()[0].startswith(f"{caches('sampled')}: cache.seed: the cache has 0, this run 1.")
    build(tiny_command, caches("small"), *SMALL, "cache.seed=1")  # nothing is drawn


@pytest.mark.parametrize("case", DATA)
def test_other_data_is_refused(case: str, tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path) -> None:
    override, words = DATA[case]
    assert words in refused(lambda: run([*from_cache(tiny_command, caches("small")), override], tmp_path / "run"))
    assert words in refused(lambda: build([*tiny_command, override], caches("small"), *SMALL))


@pytest.mark.parametrize(
    "change", [lambda lines: lines[::-1], lambda lines: [lines[0].replace("a", "e", 1), *lines[1:]]], ids=["order", "row"]
)
def test_other_rows_or_another_order_of_them_are_refused(
    change: Callable[[list[str]], list[str]], tiny_command: list[str], tiny_corpus: Path, caches: Callable[[str], Path], tmp_path: Path
) -> None:
    other = tmp_path / tiny_corpus.name
    lines = tiny_corpus.read_text().splitlines(keepends=True)
    assert change(lines) != lines
    other.write_text("".join(change(lines)))
    command = [*tiny_command, f"data.path={other}"]
    assert "data." in refused(lambda: run(from_cache(command, caches("small")), tmp_path / "run"))


def test_another_chat_template_is_refused(tiny_command: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 20)
    template = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
    command = [*without(tiny_command, "data"), "data=jsonl", f"data.path={chats}", "data.messages_column=messages"]
    command += ["data.seq_len=32", "data.eval_fraction=0"]
    for name, text in (("one", template), ("other", template.replace(": ", "- "))):
        (copy_of(tiny_teacher, tmp_path / name) / "chat_template.jinja").write_text(text)
    build([*command, f"teacher.path={tmp_path / 'one'}"], tmp_path / "cache", *SMALL)
    other = [*command, f"teacher.path={tmp_path / 'other'}"]
    assert "the cache has" in refused(lambda: build(other, tmp_path / "cache", *SMALL))
    assert "the cache has" in refused(lambda: run([*other, f"teacher.cache_dir={tmp_path / 'cache'}"], tmp_path / "run"))


@pytest.mark.parametrize("number", [2, 4])
def test_another_format_is_refused(number: int, tiny_command: list[str], small: Path, tmp_path: Path) -> None:
    """The second one had the numbers of head and tail in two files."""
    description = read_description(small)
    description["identity"]["format"] = number
    write_description(small, description)
    for body in (
        lambda: run(from_cache(tiny_command, small), tmp_path / "run"),
        lambda: build(tiny_command, small, *SMALL),
        lambda: cache_module.info(cache_config(tiny_command, small)),
    ):
        assert f"cache.json: format {number}, expected 3" in refused(body)


IMPOSSIBLE = {
    "reverse KL from samples": ("sampled", "objective=reverse_kl", "objective.divergence: reverse_kl from sampled targets is biased"),
    "another temperature": (
        "topk",
        "objective.temperature=2",
        "objective.temperature: got 2.0, and the cache's temperature is 1.0",
    ),
    "a draw of the tail": ("topk", "objective=teacher_sample_ce", "objective.divergence: teacher_sample_ce draws a token"),
    "more ranks than tokens": (
        "topk",
        "objective=ranking_hinge",
        "objective.divergence_options.top_k: ranking_hinge ranks 16 of the teacher's tokens, and 8 are listed. Rank at most 8, or list more: cache.k=16",
    ),
    "a term": (
        "sampled",
        "objective.terms={second: {kind: jsd, weight: 0.5}}",
        "objective.terms.second.kind: jsd from sampled targets is biased",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_pairs_are_refused_with_the_configuration(
    case: str, tiny_command: list[str], caches: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, override, words = IMPOSSIBLE[case]
    assert words in refused(lambda: run([*from_cache(tiny_command, caches(kind)), override], tmp_path / "run"), ConfigError)
    assert ConfigError.exit_code == 2 and not (tmp_path / "run").exists()
