"""`python -m mini_distill.evaluate`: a run's figures again, any model's, and what is refused."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import copy_of, run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mini_distill.cli import load_config
from mini_distill.config import DataConfig, EvaluateCommand, FullEvaluationConfig, TeacherConfig
from mini_distill.errors import ConfigError, MiniDistillError
from mini_distill.evaluation import efficiency
from mini_distill.storage import verify_folder

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
    """The run's student, measured as it comes: with no setting of how much."""
    return evaluate(f"model={finished}", *QUICK)


def test_a_run_is_measured_as_it_measured_itself(finished: Path, measured: dict[str, Any]) -> None:
    """A run measures some batches of its held-out text, `evaluate` measured all of it: none of the run's figures came out again."""
    summary = json.loads((finished / "summary.json").read_text())
    same = [key for key in summary if key.startswith("eval/")]
    assert len(same) > 12
    assert {key: measured[key] for key in same} == pytest.approx({key: summary[key] for key in same}, rel=1e-6)
    assert measured["eval/tokens"] < measured["data/held_out_supervised_tokens"]
    assert measured["model/student_parameters"] == summary["model/student_parameters"]
    written = json.loads((finished / "evaluation" / "summary.json").read_text())
    assert written == measured


def test_all_of_the_held_out_text_is_measured_where_that_is_asked_for(finished: Path, tmp_path: Path) -> None:
    found = evaluate(f"model={finished}", "teacher=none", "evaluation.max_batches=null", f"output_dir={tmp_path / 'out'}", *QUICK)
    assert found["eval/tokens"] == found["data/held_out_supervised_tokens"]


def settings_of(*overrides: str) -> EvaluateCommand:
    return load_config(overrides, "evaluate", EvaluateCommand)


def test_a_single_override_changes_that_setting_of_the_run_and_no_other(finished: Path) -> None:
    """`data.seq_len=64` alone swapped the run's whole data group for the embedded default, and measured the perplexity of another text."""
    of_run = settings_of(f"model={finished}")
    given = settings_of(f"model={finished}", "data.seq_len=64", "teacher.dtype=bfloat16", "+data.max_rows=50")
    assert given.data == replace(of_run.data, seq_len=64, max_rows=50) and given.data.source == "jsonl"
    assert given.teacher == replace(of_run.teacher, dtype="bfloat16") and given.teacher.kind == "hf"
    assert (of_run.evaluation.max_batches, of_run.evaluation.batch_size) == (2, 4) and given.evaluation.max_batches is None
    assert of_run.precision == given.precision == "fp32" and of_run.num_threads == 1
    assert settings_of(f"model={finished}", "seed=3", "evaluation.max_batches=5").evaluation.max_batches == 5


def test_a_group_replaces_that_of_the_run(finished: Path, tiny_corpus: Path) -> None:
    given = settings_of(f"model={finished}", "data=jsonl", f"data.path={tiny_corpus}", "teacher=embedded")
    assert given.data == DataConfig(source="jsonl", path=str(tiny_corpus)) and given.teacher == TeacherConfig()


def test_parts_of_a_runs_mixture_can_be_changed(finished: Path, tmp_path: Path, tiny_corpus: Path) -> None:
    mixture = {"a": {"source": "jsonl", "path": str(tiny_corpus)}}
    run = _with(finished, tmp_path / "run", data={"source": "mixture", "mixture": mixture, "path": None, "text_column": None})
    given = settings_of(f"model={run}", "data.mixture.a.weight=2").data
    assert given.mixture == {"a": {"source": "jsonl", "path": str(tiny_corpus), "weight": 2}}


def test_a_setting_of_the_teacher_does_not_make_a_strangers_run_trusted(finished: Path, tmp_path: Path) -> None:
    run = _with(finished, tmp_path / "run", teacher={"trust_remote_code": True})
    with pytest.raises(ConfigError, match="asks to run code"):
        settings_of(f"model={run}", "teacher.dtype=float32")
    assert settings_of(f"model={run}", "teacher.trust_remote_code=true").teacher.trust_remote_code
    assert not settings_of(f"model={run}", "teacher.trust_remote_code=false").teacher.trust_remote_code


def _with(finished: Path, folder: Path, **groups: dict[str, Any]) -> Path:
    """A copy of a run with other settings."""
    copy_of(finished, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for group, settings in groups.items():
        config[group] |= settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_figures_of_another_text_go_to_a_folder_of_their_own(finished: Path) -> None:
    """They replaced those of the run's own text in `<run>/evaluation`, which the report shows."""
    assert settings_of(f"model={finished}", "data.num_workers=1", "evaluation.top_k=3").output_dir == str(finished / "evaluation")
    for override in ("data.seq_len=64", "teacher=none", "teacher.path=other"):
        assert str(settings_of(f"model={finished}", override).output_dir).startswith("evaluations/")


def test_a_run_that_is_still_running_is_measured_with_a_warning(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = copy_of(finished, tmp_path / "run")
    (run / "status.json").write_text(json.dumps({"state": "running", "step": 3}))
    settings_of(f"model={run}")
    (line,) = caplog.messages
    assert line.startswith(f"{run}: its status is 'running'")


def test_all_rows_of_a_file_are_measured_by_naming_it_alone(finished: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    named = ["data=jsonl", "data.seq_len=32", "teacher=none", *QUICK]
    alone = evaluate(f"model={finished}", f"data.eval_path={tiny_corpus}", *named, f"output_dir={tmp_path / 'a'}")
    share = evaluate(f"model={finished}", f"data.path={tiny_corpus}", "data.eval_fraction=1", *named, f"output_dir={tmp_path / 'b'}")
    assert alone["eval/student_nll"] == share["eval/student_nll"] and alone["eval/tokens"] == share["eval/tokens"]
    rows = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()]
    assert alone["eval/tokens"] >= sum(map(len, rows))  # each character is a token here


def test_a_share_of_the_rows_is_called_so(finished: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(f"model={finished}", "teacher=none", f"output_dir={tmp_path / 'out'}", *QUICK)
    assert f"They are those of 20 % of the rows of {tiny_corpus} (data.eval_fraction=1: all rows)." in capsys.readouterr().out


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
    return str(yaml.safe_load((finished / "config.yaml").read_text())["teacher"]["path"])


def test_details_hold_what_is_no_flat_number(finished: Path, measured: dict[str, Any]) -> None:
    details = json.loads((finished / "evaluation" / "details.json").read_text())
    assert set(details) == {"reliability", "slices", "differences", "samples", "device"} and details["device"]
    assert set(details["reliability"]) == {"student", "teacher"} and len(details["samples"]) == 2
    assert {"position", "teacher_entropy"} == set(details["slices"])
    whole = json.loads((finished / "summary.json").read_text())
    of_run = json.loads((finished / "details.json").read_text())
    assert sum(part["tokens"] for part in of_run["slices"]["position"]) == whole["eval/tokens"]
    assert of_run["device"] == details["device"]


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


def test_what_was_measured_before_a_late_failure_is_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures were written at the end alone: an evaluation of hours that failed while it timed left nothing."""

    def fail(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(module, "timings", fail)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"sentence_good": "a", "sentence_bad": "b"}\n')
    with pytest.raises(MemoryError):
        evaluate(
            *(f"model={finished}", f"output_dir={tmp_path / 'out'}", "evaluation.num_samples=1", "evaluation.sample_tokens=4"),
            *(f"evaluation.pairs={{p: {{path: {pairs}}}}}", "evaluation.prompt_tokens=8"),
        )
    summary, details = (json.loads((tmp_path / "out" / name).read_text()) for name in ("summary.json", "details.json"))
    assert {"eval/student_nll", "text/student_distinct_1", "task/p/student", "model/student_weight_bytes"} <= summary.keys()
    assert {"slices", "tasks", "samples"} <= details.keys() and len(details["samples"]) == 1
    assert capsys.readouterr().err.strip().endswith(f"What was measured before: {tmp_path / 'out' / 'summary.json'}")


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed (SIGKILL), for want of memory most likely"),
        ("raise MemoryError('no room')", "ended with 'MemoryError: no room'"),
    ],
)
def test_a_peak_of_memory_that_cannot_be_measured_is_left_out_with_a_line(
    finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: str, line: str
) -> None:
    """The process that loads the model once more found no memory, and the evaluation ended in a traceback of CalledProcessError."""
    real = subprocess.run
    monkeypatch.setattr(efficiency.subprocess, "run", lambda command, **options: real([command[0], "-c", code], **options))
    found = efficiency.peak_memory("teacher", efficiency.Origin(str(finished / "student")), FullEvaluationConfig(), "cpu")
    assert found is None and caplog.messages == [f"the peak memory of the teacher is left out: the process that measures it {line}"]


def test_the_model_cards_of_the_run_and_its_student_learn_of_an_evaluation(finished: Path, tmp_path: Path) -> None:
    run, pairs = copy_of(finished, tmp_path / "run"), tmp_path / "pairs.jsonl"
    pairs.write_text('{"sentence_good": "a", "sentence_bad": "b"}\n')
    cards = [run / "README.md", run / "student" / "README.md"]
    before = [card.read_text() for card in cards]
    tasks = [f"model={run}", f"evaluation.pairs={{pairs: {{path: {pairs}}}}}", *QUICK]
    for elsewhere in ("data.seq_len=64", "teacher=none"):
        evaluate(*tasks, elsewhere, f"output_dir={run / 'evaluation'}")
    evaluate(*tasks, f"output_dir={tmp_path / 'out'}")
    assert [card.read_text() for card in cards] == before
    evaluate(*tasks)
    for card, old in zip(cards, before, strict=True):
        assert "| pairs |" in card.read_text() and "safety and bias were not evaluated" in old
    assert not verify_folder(run / "student")
    mine = [card.write_text("My own words.\n") for card in cards[:1]]
    evaluate(*tasks)
    assert mine and cards[0].read_text() == "My own words.\n"


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
