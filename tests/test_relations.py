"""Settings that are each possible but not together: each relation has the smallest configuration that breaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mini_distill.config import EvaluateCommand
from mini_distill.contract import build_config
from mini_distill.errors import ConfigError

SCRATCH = {"kind": "scratch", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}
SERVER = {"kind": "server", "url": "http://127.0.0.1:1", "path": "some/model"}
COMPILED_AGAIN = {"compile": True, "gradient_checkpointing": True}
NO_TEACHER = {"teacher": {"kind": "none"}, "objective": {"kl_weight": 0}}

CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    # where, settings, words of the line
    ("teacher.path", {"teacher": {"kind": "hf"}}, "missing"),
    ("teacher.cache_kind", {"teacher": {"kind": "cached", "cache_dir": ".", "cache_kind": "topk"}, "student": SCRATCH}, "nobody to ask"),
    ("teacher.cache_kind", {"teacher": {**SERVER, "cache_kind": "topk"}, "student": SCRATCH}, "train with teacher=cached"),
    ("objective.divergence", {"teacher": {"cache_kind": "sampled"}, "objective": {"divergence": "reverse_kl"}}, "biased"),
    ("objective.divergence", {"teacher": {"cache_kind": "sampled"}, "objective": {"divergence": "teacher_sample_ce"}}, "can be negative"),
    (
        "objective.terms.a.temperature",
        {"teacher": {"cache_kind": "topk"}, "objective": {"terms": {"a": {"kind": "jsd", "weight": 1.0, "temperature": 2.0}}}},
        "the mass of what is not listed is known at that one only. Train at 1.0",
    ),
    (
        "objective.terms.a.temperature",
        {"teacher": {"cache_kind": "sampled"}, "objective": {"terms": {"a": {"kind": "forward_kl", "temperature": 2.0}}}},
        "what was drawn at one temperature is biased at another",
    ),
    (
        "objective.divergence",
        {"teacher": {"cache_kind": "topk"}, "objective": {"divergence": "teacher_sample_ce"}},
        "only the mass is known",
    ),
    ("objective.divergence", {"teacher": SERVER, "student": SCRATCH, "objective": {"divergence": "teacher_sample_ce"}}, "same gradient"),
    (
        "objective.divergence_options.top_k",
        {"teacher": {"cache_kind": "topk", "cache_k": 8}, "objective": {"divergence": "ranking_hinge"}},
        "ranks 16 of the teacher's tokens, and 8 are listed. Rank at most 8, or list more: teacher.cache_k=16.",
    ),
    (
        "objective.terms.ranking_logistic.options.top_k",
        {"teacher": SERVER, "student": SCRATCH, "objective": {"terms": {"ranking_logistic": {"options": {"top_k": 21}}}}},
        "teacher.top_k=21",
    ),
    ("teacher.cache_k", {"teacher": {"cache_k": 8}}, "teacher.cache_kind is null"),
    ("teacher.cache_k", {"teacher": {"cache_kind": "hidden", "cache_k": 8}}, "It belongs to sampled and topk"),
    ("teacher.path", {"teacher": {"path": "some/model"}}, "Choose teacher=hf"),
    ("teacher.path", {"teacher": {"kind": "hf", "path": "/no/such/folder"}}, "no such file or folder"),
    ("teacher.path", {"teacher": {"kind": "hf", "path": "./no_such_folder"}}, "no such file or folder"),
    ("teacher.path", {"teacher": {"kind": "hf", "path": "a/b/c"}}, "no such file or folder"),
    ("teacher.trust_remote_code", {"teacher": {"kind": "hf", "path": "some/model", "trust_remote_code": True}}, "revision"),
    ("student.path", {"student": {"kind": "hf"}}, "missing"),
    ("student.path", {"student": {"path": "some/model"}}, "Choose student=hf"),
    ("student.path", {"student": {"kind": "hf", "path": "~/no_such_folder"}}, "no such file or folder"),
    ("student.trust_remote_code", {"student": {"kind": "hf", "path": "some/model", "trust_remote_code": True}}, "revision"),
    ("student.kind", {**NO_TEACHER}, "there is no teacher"),
    ("student.tokenizer", {**NO_TEACHER, "student": SCRATCH}, "missing"),
    ("student.tokenizer", {"student": {**SCRATCH, "tokenizer": "some/model"}}, "the teacher's"),
    *((f"student.{name}", {"student": {name: 8}}, "mini_2m") for name in ("hidden_size", "num_heads", "num_kv_heads", "max_positions")),
    *((f"student.{name}", {"student": {name: 0.5}}, "mini_2m") for name in ("rope_theta", "initializer_range", "dropout")),
    ("student.intermediate_size", {"student": {"intermediate_size": 8}}, "mini_2m"),
    ("student.tie_embeddings", {"student": {"tie_embeddings": True}}, "mini_2m"),
    ("student.num_layers", {"student": {"kind": "hf", "path": "some/model", "num_layers": 2}}, "mini_2m"),
    *((f"student.{name}", {"student": {**SCRATCH, name: None}}, "missing") for name in SCRATCH if name != "kind"),
    ("student.hidden_size", {"student": {**SCRATCH, "hidden_size": 36}}, "multiple of student.num_heads=4"),
    ("student.num_kv_heads", {"student": {**SCRATCH, "num_kv_heads": 3}}, "divisor of student.num_heads=4"),
    *(("data.path", {"data": {"source": source}}, "missing") for source in ("text", "jsonl", "hub")),
    *(("data.path", {"data": {"source": source, "path": "no_such_file"}}, "no such file") for source in ("text", "jsonl")),
    ("data.eval_path", {"data": {"source": "text", "path": ".", "eval_path": "no_such_file"}}, "no such file"),
    ("data.path", {"data": {"path": "."}}, "data=text or data=jsonl or data=hub"),
    ("data.streaming", {"data": {"streaming": True}}, "data=hub"),
    ("data.eval_split", {"data": {"eval_split": "test"}}, "data=hub"),
    ("data.document_separator", {"data": {"source": "jsonl", "path": ".", "document_separator": "x"}}, "data=text"),
    ("data.document_separator", {"data": {"source": "text", "path": ".", "document_separator": "("}}, "regular expression"),
    ("data.mixture", {"data": {"mixture": {"a": {}}}}, "Choose data=mixture"),
    ("data.mixture", {"data": {"source": "mixture"}}, "empty"),
    ("data.completion_column", {"data": {"source": "jsonl", "path": ".", "prompt_column": "q"}}, "go together"),
    ("data.prompt_column", {"data": {"source": "jsonl", "path": ".", "completion_column": "a"}}, "go together"),
    ("data.messages_column", {"data": {"source": "jsonl", "path": ".", "text_column": "t", "messages_column": "m"}}, "data.text_column"),
    ("data.tools_column", {"data": {"source": "jsonl", "path": ".", "tools_column": "t"}}, "data.messages_column"),
    ("data.eval_split", {"data": {"source": "hub", "path": "some/data", "eval_path": "x/y", "eval_split": "t"}}, "data.eval_path"),
    ("objective.kl_weight", {"objective": {"kl_weight": 0, "ce_weight": 0}}, "nothing would be learnt"),
    ("objective.kl_weight", {"teacher": {"kind": "none"}, "student": {"kind": "hf", "path": "some/model"}}, "there is no teacher"),
    ("objective.divergence", {"objective": {"divergence": "forward_lk"}}, "Did you mean 'forward_kl'?"),
    ("objective.divergence", {"objective": {"divergence": "zzz"}}, "Known: forward_kl, reverse_kl"),
    ("objective.divergence_options.jsd_bta", {"objective": {"divergence": "jsd", "divergence_options": {"jsd_bta": 0.5}}}, "'jsd_beta'"),
    ("objective.divergence_options.jsd_beta", {"objective": {"divergence_options": {"jsd_beta": 0.5}}}, "forward_kl takes no options"),
    ("objective.terms.jsd", {"objective": {"terms": {"jsd": 3}}}, "expected a mapping"),
    ("objective.terms.jsd.wieght", {"objective": {"terms": {"jsd": {"wieght": 3}}}}, "weight"),
    ("objective.terms.jsd.weight", {"objective": {"terms": {"jsd": {"weight": -1}}}}, "at least 0"),
    ("objective.terms.x.kind", {"objective": {"terms": {"x": {}}}}, "Known: forward_kl"),
    ("objective.terms.x.kind", {"objective": {"terms": {"x": {"kind": "hidden_msc"}}}}, "Did you mean 'hidden_mse'?"),
    ("objective.terms.jsd.options.jsd_bta", {"objective": {"terms": {"jsd": {"options": {"jsd_bta": 1}}}}}, "jsd_beta"),
    ("objective.terms.jsd.layers", {"objective": {"terms": {"jsd": {"layers": "last"}}}}, "what comes out of the models"),
    ("objective.terms.forward_kl", {"objective": {"terms": {"forward_kl": {}}}}, "name of another figure or term"),
    ("objective.terms.ce", {"objective": {"terms": {"ce": {"kind": "jsd"}}}}, "name of another figure or term"),
    *(
        (f"objective.terms.{name}", {"objective": {"terms": {name: {"kind": "jsd"}}}}, "name of another figure")
        for name in ("loss", "grad_norm", "learning_rate", "tokens")
    ),
    *(
        ("objective.divergence", {"objective": {"divergence": f"mine.{name}"}}, f"the name '{name}' is that of another figure")
        for name in ("ce", "loss", "grad_norm", "learning_rate", "tokens")
    ),
    ("objective.schedules.ce", {"objective": {"ce_weight": 0.0, "schedules": {"ce": {0: 1, 10: 0}}}}, "weight is 0 at every step"),
    (
        "objective.schedules.jsd",
        {"objective": {"terms": {"jsd": {"weight": 0.0}}, "schedules": {"jsd": {0: 1}}}},
        "weight is 0 at every step",
    ),
    ("objective.terms.hidden_mse.layer_map", {"objective": {"terms": {"hidden_mse": {"layers": "last", "layer_map": {0: 1}}}}}, "Name one"),
    ("objective.terms.hidden_mse.layer_map", {"objective": {"terms": {"hidden_mse": {"layer_map": {"a": 1}}}}}, "whole numbers"),
    (
        "student.attn_implementation",
        {"teacher": {"attn_implementation": "eager"}, "objective": {"terms": {"attention_kl": {}}}},
        "relation_kl",
    ),
    *(
        (f"objective.terms.{kind}.options.{name}", {"objective": {"terms": {kind: {"options": {name: value}}}}}, f"expected {expected}")
        for kind, name, value, expected in (
            ("relation_kl", "num_relation_heads", "abc", "a whole number of at least 1"),
            ("relation_kl", "num_relation_heads", 2.5, "a whole number of at least 1"),
            ("relation_kl", "num_relation_heads", 0, "a whole number of at least 1"),
            ("hidden_mse", "normalise", "abc", "true or false"),
        )
    ),
    ("trainer.compile", {"trainer": COMPILED_AGAIN, "objective": {"terms": {"relation_kl": {}}}}, "objective.terms.relation_kl looks into"),
    (
        "objective.terms.jsd.weight",
        {**NO_TEACHER, "student": {"kind": "hf", "path": "a/b"}, "objective": {"kl_weight": 0, "terms": {"jsd": {}}}},
        "no teacher",
    ),
    ("objective.schedules.jsd", {"objective": {"schedules": {"jsd": {0: 1}}}}, "Terms: forward_kl, ce"),
    ("objective.schedules.ce", {"objective": {"schedules": {"ce": 0.5}}}, "expected a mapping"),
    ("objective.schedules.ce", {"objective": {"schedules": {"ce": {0: -1}}}}, "factor of at least 0"),
    ("objective.schedules.ce", {"objective": {"schedules": {"ce": {"x": 1}}}}, "expected a step"),
    ("evaluation.best_metric", {"evaluation": {"best_metric": "eval/student_perplexiti"}}, "Did you mean 'eval/student_perplexity'?"),
    ("trainer.warmup_steps", {"trainer": {"max_steps": 5, "warmup_steps": 5}}, "less than trainer.max_steps=5"),
    ("trainer.export", {"trainer": {"export": "best"}}, "trainer.eval_every"),
    ("teacher.attn_implementation", {"teacher": {"attn_implementation": "flash_attention_2"}}, "trainer.micro_batch_size=1"),
    ("student.attn_implementation", {"student": {"attn_implementation": "flash_attention_2"}}, "trainer.micro_batch_size=1"),
    ("resume", {"resume": "/no/such/checkpoint"}, "auto, never or a checkpoint folder"),
    ("resume_allow", {"resume_allow": ["trainer.max_step"]}, "Did you mean 'trainer.max_steps'?"),
]


@pytest.mark.parametrize(
    ("where", "settings", "words"), CONTRADICTIONS, ids=[f"{i}-{where}" for i, (where, *_) in enumerate(CONTRADICTIONS)]
)
def test_what_does_not_fit_together_is_one_line(where: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build_config(settings)
    (problem,) = raised.value.problems
    assert problem.where == where
    assert words in str(problem)


GOOD: list[dict[str, Any]] = [
    {"teacher": {"kind": "hf", "path": "some/model", "trust_remote_code": True, "revision": "abc"}},
    {"teacher": {"kind": "hf", "path": ".", "trust_remote_code": True}},  # a folder: one's own code
    {**NO_TEACHER, "student": {**SCRATCH, "tokenizer": "some/model"}},
    {"student": {**SCRATCH, "num_kv_heads": 2}},
    {"student": {"num_layers": 3}},
    {"data": {"source": "text", "path": "./no/such/*.txt"}},  # a glob is looked at when it is read
    {"data": {"source": "jsonl", "path": ".", "prompt_column": "q", "completion_column": "a"}},
    {"data": {"source": "jsonl", "path": ".", "messages_column": "m", "tools_column": "t"}},
    {"data": {"source": "hub", "path": "some/data", "streaming": True, "eval_split": "test"}},
    {"data": {"source": "my_package.Source", "path": "anything", "split": "mine"}},
    {"objective": {"divergence": "my_package.divergence", "divergence_options": {"anything": 1}}},
    {"objective": {"kl_weight": 0}},
    {"objective": {"terms": {"jsd": {"weight": 0.1, "options": {"jsd_beta": 0.2}}, "mine": {"kind": "my_package.divergence"}}}},
    {"objective": {"kl_weight": 0, "ce_weight": 0, "terms": {"hidden_mse": {"layers": "uniform"}, "r": {"kind": "relation_kl"}}}},
    {"objective": {"terms": {"hidden_mse": {"layer_map": {0: 3, "1": -1}}}, "schedules": {"ce": {0: 1, "100": 0}, "hidden_mse": {5: 0.5}}}},
    {"teacher": {"cache_kind": "topk"}, "objective": {"divergence": "teacher_argmax_ce", "terms": {"ranking_hinge": {}}}},
    {"teacher": {"cache_kind": "topk", "cache_k": 4}, "objective": {"divergence": "ranking_hinge", "divergence_options": {"top_k": 4}}},
    {"teacher": {"cache_kind": "full"}, "objective": {"divergence": "teacher_sample_ce", "temperature": 2.0}},
    {"teacher": SERVER, "student": SCRATCH, "objective": {"divergence": "teacher_argmax_ce"}},
    {"evaluation": {"best_metric": "mine", "hooks": ["my_package.hook"]}},
    {"trainer": {"max_steps": 1}},
    {"trainer": {"export": "best", "eval_every": 10}},
    {"trainer": COMPILED_AGAIN, "objective": {"terms": {"hidden_mse": {}}}},
    {"trainer": {"compile": True}, "objective": {"terms": {"relation_kl": {}}}},
    {"trainer": COMPILED_AGAIN, "objective": {"terms": {"relation_kl": {"weight": 0}}}},
    {"trainer": {"micro_batch_size": 1}, "student": {"attn_implementation": "flash_attention_2"}},
    {"resume_allow": ["trainer.max_steps", "data", "tokenizer", "global_batch_size"]},
    {"resume": "."},
]


@pytest.mark.parametrize("settings", GOOD, ids=str)
def test_what_fits_together_is_let_through(settings: dict[str, Any]) -> None:
    build_config(settings)


def test_contradictions_of_several_groups_are_reported_together() -> None:
    settings = {
        "teacher": {"kind": "hf"},
        "data": {"source": "text"},
        "trainer": {"max_steps": 1, "warmup_steps": 1},
        "objective": {"divergence": "kl"},
    }
    with pytest.raises(ConfigError) as raised:
        build_config(settings)
    assert {p.where for p in raised.value.problems} == {"teacher.path", "data.path", "trainer.warmup_steps", "objective.divergence"}


def test_a_path_below_a_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model=runs/nope` has the form of a hub id: the hub was asked for it, for a minute."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "stories1").mkdir(parents=True)
    for settings in ({"teacher": {"kind": "hf", "path": "runs/nope"}}, {"student": {"kind": "hf", "path": "runs/nope"}}):
        with pytest.raises(ConfigError, match=r"path: no such file or folder \(got 'runs/nope'\)\. There is a folder 'runs' here"):
            build_config(settings)
    with pytest.raises(ConfigError, match=r"model: no such file or folder \(got 'runs/stories2'\)\. Did you mean 'runs/stories1'\?"):
        build_config({"model": "runs/stories2"}, EvaluateCommand)
    build_config({"model": "another/name"}, EvaluateCommand)


def test_all_rows_are_held_out_where_nobody_trains_on_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_fraction: got 1\.0, expected below 1: nothing would be left to train on"):
        build_config({"data": {"eval_fraction": 1.0}})
    rows = str(tmp_path / "rows.jsonl")
    Path(rows).touch()
    for data in ({"eval_fraction": 1.0}, {"source": "jsonl", "eval_path": rows}, {"source": "jsonl", "path": rows, "eval_fraction": 1.0}):
        build_config({"model": "some/model", "data": data}, EvaluateCommand)
    with pytest.raises(ConfigError, match=r"data\.path: missing for source jsonl"):
        build_config({"data": {"source": "jsonl", "eval_path": rows}})


def test_a_misspelt_path_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").touch()
    with pytest.raises(ConfigError, match=r"Did you mean '.*stories\.txt'\?"):
        build_config({"data": {"source": "text", "path": str(tmp_path / "storys.txt")}})
