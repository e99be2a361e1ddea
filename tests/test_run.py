"""Runs as Python sees them."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import LlamaForCausalLM

import mini_distill as md
from mini_distill.contract import objective_terms
from mini_distill.errors import ConfigError, DataError, Preempted
from mini_distill.losses.divergences import forward_kl

SHORT = ["trainer.max_steps=3", "evaluation.num_samples=0"]


def test_a_run_from_python_has_everything_the_folder_has(tiny_command: list[str], tmp_path: Path) -> None:
    run = md.train([*tiny_command, *SHORT, f"output_dir={tmp_path / 'run'}"])
    assert run.path == tmp_path / "run" and run.status["state"] == "finished" and "step 3" in repr(run)
    assert run.summary["eval/student_perplexity"] > 1 and run.config["trainer"]["max_steps"] == 3
    assert list(run.metrics.index) == [0, 1, 2, 3] and run.metrics["train/loss"].notna().sum() == 3
    assert run.student.config.vocab_size >= len(run.tokenizer) - 1
    assert isinstance(run.generate("a", max_new_tokens=4), str) and run.generate("a") == run.generate("a")
    assert "perplexity" in run._repr_markdown_()
    assert len(run.plot().axes) >= 3 and len(run.plot("train/ce").axes) == 1
    assert run.plot()._repr_png_().startswith(b"\x89PNG")  # what a notebook shows, also before pyplot is imported
    again = md.load_run(run.path)
    assert again.summary == run.summary


def test_a_checked_configuration_is_taken_too(tiny_command: list[str], tmp_path: Path) -> None:
    config = md.load_config([*tiny_command, *SHORT, f"output_dir={tmp_path / 'run'}"])
    assert md.train(config).status["step"] == 3


def test_runs_in_one_process_leave_nothing_behind(tiny_command: list[str], tmp_path: Path) -> None:
    """Handlers of signals, loggers: the second run is the first one again."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), list(logging.getLogger().handlers)
    losses = [md.train([*tiny_command, *SHORT, f"output_dir={tmp_path / name}"]).metrics["train/loss"].tolist() for name in ("a", "b")]
    assert losses[0][1:] == losses[1][1:]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), list(logging.getLogger().handlers)) == before


def test_mistakes_are_errors_and_not_exits(tiny_command: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_steps"):
        md.train([*tiny_command, "trainer.max_stpes=3"])
    with pytest.raises(ConfigError, match=r"list of overrides.*\['student=mini_2m'\]"):
        md.train("student=mini_2m")
    for wrong, shown in ((3, "3 \\(int\\)"), (None, "None"), ({"seed": 1}, "dict"), ([3], "list"), ([["seed=1"]], "list")):
        for verb in (md.train, md.cache, md.evaluate, md.plan, md.doctor):
            with pytest.raises(ConfigError, match=f"config: got .*{shown}.*expected a list of overrides"):
                verb(wrong)
    with pytest.raises(ConfigError, match="not the folder of a run"):
        md.load_run(tmp_path)


def test_an_error_in_a_cell_is_its_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped setting gave a traceback of many frames, through files that the reader of a notebook never wrote."""
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    with pytest.raises(ConfigError) as caught:
        md.train(["trainer.max_stpes=3", "seed=hf_secretsecretsecret"])
    assert caught.value._render_traceback_() == caught.value.lines()
    assert [line.partition(":")[0] for line in caught.value.lines()] == ["error", "error"] and "hf_" not in "".join(caught.value.lines())
    with pytest.raises(DataError) as caught:
        md.train(["debug=true", "data=text", f"data.path={tmp_path}", f"output_dir={tmp_path / 'run'}"])
    assert any("in open_source" in line or "prepare.py" in line for line in caught.value._render_traceback_())  # as on a command line
    assert Preempted("step 3", "saved").lines() == ["step 3: saved."]


def test_an_empty_prompt_is_one_line_where_nothing_begins_a_text(tiny_command: list[str], tmp_path: Path) -> None:
    run = md.train([*tiny_command, *SHORT, f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"^prompt: no token to go on from \(got an empty text\)"):
        run.generate("")


def test_what_is_not_there_is_named(tiny_command: list[str], tmp_path: Path) -> None:
    run = md.train([*tiny_command, *SHORT, f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"no metric called 'loss'.*train/loss"):
        run.plot("loss")
    (run.path / "student").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no student yet"):
        _ = run.student


def test_a_run_works_inside_a_running_event_loop(tiny_command: list[str], tmp_path: Path) -> None:
    """As in a notebook, whose cells run inside the loop of its kernel."""

    async def cell() -> md.Run:
        return md.train([*tiny_command, *SHORT, f"output_dir={tmp_path / 'run'}"])

    assert asyncio.run(cell()).status["state"] == "finished"


def test_runs_in_one_process_leave_no_model_and_no_hook_behind(tiny_command: list[str], tmp_path: Path) -> None:
    """Models of a run that has ended would fill the memory of a notebook; matching watches the layers of both by hooks."""

    def models() -> int:
        gc.collect()
        return sum(issubclass(type(thing), LlamaForCausalLM) for thing in gc.get_objects())

    matching = ["objective.terms.hidden_mse.weight=1", "tracking=none"]
    before = models()
    for name in ("a", "b"):
        run = md.train([*tiny_command, *SHORT, *matching, f"output_dir={tmp_path / name}"])
    assert models() == before
    assert run.student is not None and models() == before + 1


def test_what_a_cell_defines_is_used_by_its_name(tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's cells are the module `__main__`: a divergence, a data source and a hook of the user's own, without a file."""
    cell = ModuleType("__main__")
    exec(CELL, cell.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", cell)
    names = ["objective.divergence=hellinger", "data.source=Lines", "evaluation.hooks=[number_of_layers]"]
    free = [override for override in tiny_command if not override.startswith("data")]
    run = md.train([*free, "data=jsonl", *names, "data.seq_len=32", "data.path=null", *SHORT, f"output_dir={tmp_path / 'run'}"])
    assert run.metrics["train/hellinger"].iloc[-1] > 0 and run.summary["eval/layers"] == 1 and run.summary["data/rows_read"] == 40
    assert run.config["objective"]["divergence"] == "__main__.hellinger" and run.config["data"]["source"] == "__main__.Lines"


def test_names_of_ours_come_before_those_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = ModuleType("__main__")
    cell.jsd = cell.text = cell.mine = lambda *_: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", cell)
    own = md.load_config(["objective.terms.mine.weight=1", "objective.terms.second={kind: mine}", "objective.divergence=jsd"])
    assert own.objective.divergence == "jsd"
    assert {name: term.kind for name, term in objective_terms(own.objective).items()} == dict.fromkeys(["mine", "second"], "__main__.mine")
    with pytest.raises(ConfigError, match="no divergence called 'mien'"):
        md.load_config(["objective.divergence=mien"])


CELL = """
from mini_distill.data.row import Row

def hellinger(student_logits, teacher_logits, temperature=1.0):
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher_logits, student_logits))
    return 1 - (p * q).sqrt().sum(-1)

class Lines:
    def __init__(self, config):
        self.lines = [f"line {i} of my own" for i in range(40)]
    def rows(self):
        return (Row(f"line {i}", {"text": line}) for i, line in enumerate(self.lines))
    def fingerprint(self):
        return {"lines": self.lines}

def number_of_layers(context):
    return {"layers": context.student.config.num_hidden_layers}
"""


def test_a_cache_is_written_and_a_run_measured_from_python(tiny_command: list[str], tmp_path: Path) -> None:
    own = [override for override in tiny_command if override.startswith(("teacher", "data"))]
    summary = md.cache([*own, f"cache.dir={tmp_path / 'cache'}", "cache.kind=full"])
    assert summary["cache/tokens"] > 0
    run = md.train([*tiny_command, *SHORT, f"teacher.cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}"])
    assert run.teacher is not None and run.details["samples"] == []
    measured = md.evaluate([f"model={run.path}", "evaluation.speed=false", "evaluation.num_samples=0"])
    assert measured["eval/student_perplexity"] > 1
    with pytest.raises(ConfigError, match="list of overrides"):
        md.cache("cache.dir=there")


def test_public_names_lead_where_they_say() -> None:
    assert md.divergences.forward_kl is forward_kl
    assert all(getattr(md, name) is not None for name in md.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = md.trian
