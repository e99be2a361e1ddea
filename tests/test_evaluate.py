"""`python -m mini_distill.evaluate`: a run's figures again, any model's, and what is refused."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mini_distill.cli import load_config
from mini_distill.config import EvaluateCommand
from mini_distill.errors import MiniDistillError

module: Any = importlib.import_module("mini_distill.evaluate")
QUICK = ["evaluation.speed=false", "evaluation.sample_tokens=4", "evaluation.num_samples=2"]


def evaluate(*overrides: str) -> dict[str, Any]:
    """In this process, as the command line would."""
    return module.evaluate(load_config(overrides, "evaluate", EvaluateCommand))


@pytest.fixture(scope="module")
def finished(tiny_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(tiny_command, folder)
    return folder


@pytest.fixture(scope="module")
def measured(finished: Path) -> dict[str, Any]:
    """The run's student, measured over the batches that its training measured."""
    return evaluate(f"model={finished}", "evaluation.max_batches=2", "evaluation.batch_size=4", *QUICK)


def test_a_run_is_measured_with_its_own_teacher_and_data(finished: Path, measured: dict[str, Any]) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    same = [key for key in summary if key.startswith("eval/")]
    assert len(same) > 12
    assert {key: measured[key] for key in same} == pytest.approx({key: summary[key] for key in same}, rel=1e-6)
    assert measured["model/student_parameters"] == summary["model/student_parameters"]
    written = json.loads((finished / "evaluation" / "summary.json").read_text())
    assert written == measured


def test_perplexity_is_that_of_ten_lines(finished: Path, tiny_corpus: Path) -> None:
    found = evaluate(
        f"model={finished}", "data.packing=false", *_data(tiny_corpus), f"teacher.path={_teacher(finished)}", "teacher=hf", *QUICK
    )
    model, tokenizer = (kind.from_pretrained(finished / "student") for kind in (AutoModelForCausalLM, AutoTokenizer))
    config = load_config([f"model={finished}", "data.packing=false", *_data(tiny_corpus)], "evaluate", EvaluateCommand)
    held_out = module.prepare_data(config.data, tokenizer).held_out
    nll = tokens = 0
    for index in range(len(held_out)):
        batch = held_out.batch([index])
        length = int((batch.labels[0] != -100).nonzero().max()) + 1
        ids = batch.input_ids[:, :length]
        with torch.no_grad():
            loss = model(ids, labels=batch.labels[:, :length]).loss  # padding columns of the vocabulary have weights of their own here
        nll, tokens = nll + float(loss) * (length - 1), tokens + length - 1
    assert found["eval/tokens"] == tokens
    assert found["eval/student_nll"] == pytest.approx(nll / tokens, abs=0.05)  # two columns of 64 only pad the embedding
    assert found["eval/student_perplexity"] == pytest.approx(math.exp(found["eval/student_nll"]))


def _data(corpus: Path) -> list[str]:
    return ["data=jsonl", f"data.path={corpus}", "data.text_column=text", "data.eval_fraction=0.2", "data.seq_len=64"]


def _teacher(finished: Path) -> str:
    import yaml

    return str(yaml.safe_load((finished / "config.yaml").read_text())["teacher"]["path"])


def test_details_hold_what_is_no_flat_number(finished: Path, measured: dict[str, Any]) -> None:
    details = json.loads((finished / "evaluation" / "details.json").read_text())
    assert set(details) == {"reliability", "slices", "differences", "samples"}
    assert set(details["reliability"]) == {"student", "teacher"} and len(details["samples"]) == 2
    assert {"position", "teacher_entropy"} == set(details["slices"])
    whole = json.loads((finished / "summary.json").read_text())
    of_run = json.loads((finished / "details.json").read_text())
    assert sum(part["tokens"] for part in of_run["slices"]["position"]) == whole["eval/tokens"]


def test_the_command_line_wins_over_the_run(finished: Path) -> None:
    found = evaluate(f"model={finished}", "teacher=none", f"output_dir={finished / 'alone'}", *QUICK)
    assert not any("teacher" in key or "kl" in key for key in found)
    assert (finished / "alone" / "config.yaml").exists()


def test_figures_are_split_by_a_column(finished: Path, tmp_path: Path) -> None:
    rows = [{"text": f"the cat {i} sat", "lang": "en"} for i in range(30)] + [
        {"text": f"die katze {i} sitzt", "lang": "de"} for i in range(30)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(f"model={finished}", "teacher=none", *_data(file), "evaluation.group_by=lang", f"output_dir={tmp_path / 'out'}", *QUICK)
    parts = json.loads((tmp_path / "out" / "details.json").read_text())["slices"]["lang"]
    assert {part["label"] for part in parts} == {"en", "de"} and all(part["tokens"] > 20 for part in parts)


def test_speed_memory_and_cost_are_measured(finished: Path) -> None:
    found = evaluate(
        *(f"model={finished}", f"output_dir={finished / 'speed'}", "evaluation.num_samples=0"),
        *("evaluation.prompt_tokens=8", "evaluation.generation_tokens=4", "evaluation.generation_batch_size=2"),
        *("evaluation.price_per_hour=3.6", "evaluation.watts=10", "evaluation.task_limit=1"),
    )
    for name in ("teacher", "student"):
        speed = found[f"perf/{name}_generation_tokens_per_second_batch2"]
        assert speed > 0 and found[f"perf/{name}_time_to_first_token"] > 0
        assert found[f"perf/{name}_peak_memory_bytes"] >= found[f"model/{name}_file_bytes"] > 0
        assert found[f"cost/{name}_per_million_tokens"] == pytest.approx(1000 / speed)
        assert found[f"energy/{name}_joules_per_million_tokens_estimate"] == pytest.approx(1e7 / speed)
    assert found["model/student_flops_per_token"] < found["model/teacher_flops_per_token"]


def test_operations_are_those_of_the_matrix_products(tiny_llama: Callable[..., Any]) -> None:
    from mini_distill.evaluation.efficiency import flops_per_token

    model = tiny_llama(seed=0)  # hidden 32, feed-forward 64, 2 of 4 heads for keys and values, 2 layers, vocabulary 64
    projections = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    attention = 2 * 10 * 32  # scores and values over 10 positions
    assert flops_per_token(model, 10) == 2 * (2 * (projections + attention) + 32 * 64)


@pytest.fixture
def refused(finished: Path) -> Iterator[Callable[..., str]]:
    """`refused(*overrides)`: the error lines."""

    def build(*overrides: str) -> str:
        with pytest.raises(MiniDistillError) as error:
            evaluate(*overrides)
        return "\n".join(map(str, error.value.problems))

    yield build


def test_what_cannot_be_measured_is_one_line(finished: Path, tmp_path: Path, refused: Callable[..., str], tiny_corpus: Path) -> None:
    assert refused() == "model: missing. Give the folder of a model or of a run, or a hub id."
    assert refused(f"model={tmp_path / 'nowhere'}").startswith("model: ")
    assert "no student yet" in refused(f"model={_unfinished(tmp_path)}")
    assert "there is nothing to measure on" in refused(f"model={finished}", *_data(tiny_corpus), "data.eval_fraction=0")
    assert "no row has a column 'lang'" in refused(f"model={finished}", "evaluation.group_by=lang", *QUICK)
    assert "a cache cannot be asked" in refused(f"model={finished}", "teacher.cache_dir=x")
    assert "128 positions" in refused(f"model={finished}", "evaluation.prompt_tokens=9999", "evaluation.num_samples=0")


def _unfinished(folder: Path) -> Path:
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.yaml").write_text("teacher: {}\n")
    return folder / "unfinished"


def test_another_tokenizer_than_the_teachers_is_refused(finished: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(finished / "student").save_pretrained(other)
    tokenizer = json.loads((finished / "student" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    PreTrainedTokenizerFast.from_pretrained(finished / "student").save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refused(f"model={other}", "teacher=hf", f"teacher.path={_teacher(finished)}", *QUICK)
    assert line.startswith("model: ") and "tokenizer" in line
