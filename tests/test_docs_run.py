"""What README and docs tell their readers to type is run, page by page and command by command, with models and rows of a test's size."""

from __future__ import annotations

import glob
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docs_commands import PAGES, ROOT, commands

import mini_distill as md
from mini_distill import cli
from mini_distill.config import CacheCommand

MINUTES = {"README.md", "evaluation.md", "plan.md", "recipes.md"}
"""Pages of which the default test run leaves out that their commands run (that they exist, it looks at)."""

STUDENT = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 64}
RATHER_NOT = {"teacher.path", "student.path", "data.name", "data.streaming", "data.max_rows", "data.seq_len", "data.eval_fraction"}
LARGE = {"trainer.max_steps", "trainer.micro_batch_size", "trainer.grad_accum_steps", "trainer.save_every", "trainer.eval_every"}
NOT_HERE = ("teacher=server", "evaluation.tasks", "--help", "--cfg")
"""A server, lm-evaluation-harness, and what shows and does not run: each has tests of its own."""


@pytest.fixture
def reader(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the pages suppose their reader to have."""
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    tokenizer = type(tiny_tokenizer).from_pretrained(_saved(tiny_tokenizer, tmp_path / "plain"))
    tokenizer.chat_template = (Path(md.__file__).parent / "data" / "chat_templates" / "chatml.jinja").read_text()
    tiny_llama(seed=1, num_hidden_layers=9, max_position_embeddings=1024).save_pretrained("my_teacher")
    tokenizer.save_pretrained("my_teacher")
    _write_rows(folder)
    return folder


def _saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def _write_rows(folder: Path) -> None:
    numbers = range(40)
    texts = [f"the {i} cats sat on {i} mats and saw two birds" for i in numbers]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [[{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": f"it is {i}"}] for i in numbers]
    called = [[turn[0], {"role": "assistant", "content": "", "tool_calls": [call]}] for turn in turns]
    tool = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}}
    rows = {
        "conversations.jsonl": [{"messages": turn} for turn in turns],
        "tool_calls.jsonl": [{"messages": turn, "tools": [tool]} for turn in called],
        "qa.jsonl": [{"question": f"what is {i}", "answer": f"it is {i}"} for i in numbers],
        "code.jsonl": [{"content": text} for text in texts],
        **{name: [{"text": text} for text in texts] for name in ("my_text.jsonl", "train.jsonl")},
        "held_out.jsonl": [{"text": f"{text}, again"} for text in texts],
        "blimp.jsonl": [{"sentence_good": "a cat", "sentence_bad": "cat a", "linguistics_term": "order"}],
        "quiz.jsonl": [{"question": "two", "choices": ["a", "b"], "label": 0}],
    }
    for name, found in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "crows_pairs.csv").write_text("sent_more,sent_less,stereo_antistereo,bias_type\na cat,a dog,stereo,animals\n")
    (folder / "blimp").mkdir()
    shutil.copy(folder / "blimp.jsonl", folder / "blimp" / "order.jsonl")
    for name in ("corpus", "my_text"):
        (folder / name).mkdir()
        for i, text in enumerate(texts):
            (folder / name / f"{i}.txt").write_text(text)


def verbs(page: Path, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands of this package on a page, in their order: what `python -m mini_distill.` begins, alone or below torchrun."""
    for command in commands(page, folder):
        words = [word for word in command if word.startswith("mini_distill.")]
        if words:
            yield words[0].removeprefix("mini_distill."), command[command.index(words[0]) + 1 :]


def in_small(verb: str, given: list[str], rows: Path) -> list[str]:
    """The same command about the reader's small teacher and rows; of a hub's, the reader's own stand in their place."""
    told = dict(text.split("=", 1) for text in given if "=" in text)
    kept = [text for text in given if text.partition("=")[0] not in RATHER_NOT | LARGE]
    if verb == "evaluate":
        return [*kept, "evaluation.speed=false", "evaluation.num_samples=0"]
    if told.get("teacher") not in ("cached", "none"):
        kept = [*(text for text in kept if not text.startswith("teacher=")), "teacher=hf", "teacher.path=my_teacher"]
    if "student" in told or verb == "plan":
        kind = told.get("student", "from_teacher")
        small = {"hf": ["student.path=my_teacher"], "from_teacher": []}
        kept += small.get(kind, [f"student.{name}={value}" for name, value in STUDENT.items()])
    if told.get("data") == "hub":
        kept = [*(text for text in kept if not text.startswith("data")), "data=text", "data.path=corpus"]
    elif "data" not in told:
        kept += ["data=jsonl", f"data.path={rows}", "data.text_column=text"]
    if verb == "generate":  # a random model ends no answer
        kept = [text for text in kept if not text.startswith("generate.max_new_tokens")]
        return [*kept, "data.eval_fraction=0.2", "generate.max_new_tokens=6", "generate.on_unfinished=keep"]
    kept += [f"data.seq_len={1024 if told.get('data') == 'chat' else 64}", "data.eval_fraction=0.2"]
    if verb in ("train", "plan"):
        kept += [
            "trainer.max_steps=2",
            "trainer.warmup_steps=1",
            "trainer.micro_batch_size=2",
            "trainer.save_every=1",
            "trainer.eval_every=1",
        ]
        kept += ["evaluation.max_batches=1", "evaluation.num_samples=0"]
    if verb == "train" and "output_dir" not in told:
        kept.append(f"output_dir='runs/{cli.run_name(given)}'")  # as the page calls it
    return [text.replace("/shared/", "shared/") for text in kept]


def supposed(verb: str, given: list[str]) -> list[Path]:
    """The runs that a command reads and that no command above it has made: a page may suppose that its reader has some."""
    names = given if verb in ("compare", "report") else [text.partition("=")[2] for text in given if text.startswith("model=")]
    runs = {Path(name.removesuffix("-control")) for name in names if not set("*?") & set(name)}
    return sorted(run for run in runs if not run.exists())


def run_command(verb: str, arguments: list[str]) -> None:
    action = arguments.pop(0) if arguments[:1] and arguments[0] in ("verify", "info") else ""
    if verb in ("compare", "report"):
        paths = [sorted(glob.glob(name)) if set("*?") & set(name) else [name] for name in arguments]  # the shell's part
        assert importlib.import_module(f"mini_distill.{verb}").main([*itertools.chain(*paths)]) == 0
    elif action:
        module = importlib.import_module(f"mini_distill.{verb}")
        getattr(module, action)(cli.load_config(arguments, verb, CacheCommand))
    elif verb == "doctor":
        assert list(importlib.import_module("mini_distill.doctor").examine(cli.load_config(arguments)))  # of whatever verdict
    else:
        getattr(md, verb)(arguments)


SLOWLY = [pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in MINUTES else ()) for page in PAGES]


@pytest.mark.parametrize("page", SLOWLY)
@pytest.mark.timeout(900)
def test_the_commands_of_a_page_run_one_after_the_other(page: Path, reader: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """Everything but the sizes, and what only shows, as it stands on the page. (A sweep's jobs are composed elsewhere.)"""
    parsed = tmp_path / "parsed"
    parsed.mkdir()
    for verb, given in verbs(page, parsed):
        if "-m" in given or any(word.startswith(NOT_HERE) for word in given):
            continue
        small = given if verb in ("compare", "report") else in_small(verb, given, tiny_corpus)
        try:
            for run in supposed(verb, given):
                seed = [f"seed={run.name[-1]}"] if run.name[-1].isdigit() else []
                run_command("train", in_small("train", [f"output_dir={run}", "control=true", *seed], tiny_corpus))
            run_command(verb, small)
        except Exception as error:
            raise AssertionError(f"{page.name}: {verb} {' '.join(given)}: {error}\nin small: {' '.join(small)}") from error


# ------------------------------------------------------------------------------------------------------------------------ scripts

PEERS = {"trl_gkd", "trl_gkd_liger", "trl_distillation", "liger_jsd"}
"""They are installed by the page in an environment of their own."""

RUNS = [
    *("trainer.max_steps=2", "trainer.warmup_steps=1", "trainer.micro_batch_size=2", "data.seq_len=64", "data.eval_fraction=0.2"),
    *("teacher.kind=hf", "teacher.path=my_teacher", "data.source=text", "data.path=corpus", "evaluation.max_batches=1"),
]


def script_in_small(arguments: list[str]) -> list[str]:
    """The same command of a script, over numbers of a test's size and without peers."""
    script, *given = arguments
    own, runs = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    name = Path(script).name
    if name in ("compare_arms.py", "compare_caches.py"):
        kept = [text for text in runs if text.partition("=")[0] not in ("experiment", "teacher", "teacher.path", "data", "data.path")]
        own += ["--seeds", "0", "1", "--jobs", "1"]
        return [script, *own, "--", *(text for text in kept if "eval_every" not in text), *RUNS, "trainer.eval_every=1"]
    if name == "benchmark_cache.py":
        return [script, *own, "--rounds", "1", "--", *RUNS]
    if name != "benchmark_step.py" or "--markdown" in own:
        return arguments
    own = [word for word in own if word not in PEERS]
    if "--sweep" in own:
        place = own.index("--sweep") + 2
        own[place:] = ["0.5", "0.9"] if own[place - 1] == "supervised" else ["64", "128"]
        own += ["--output", given[given.index("--output") + 1]]
    small = {"--vocab": "256", "--batch": "1", "--seq": "64", "--rounds": "1", "--warmup": "0"}
    return [script, *own, *(word for pair in small.items() for word in pair)]


SCRIPTS = [page for page in PAGES if "scripts/" in page.read_text(encoding="utf-8")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: page.name)
def test_the_scripts_of_a_page_run_one_after_the_other(page: Path, reader: Path, tmp_path: Path) -> None:
    parsed = tmp_path / "parsed"
    parsed.mkdir()
    for command in commands(page, parsed):
        if not command[1:] or not command[1].startswith("scripts/") or "cuda" in command:
            continue
        small = script_in_small(command[1:])
        ended = subprocess.run(
            [sys.executable, str(ROOT / small[0]), *small[1:]], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert ended.returncode == 0, (
            f"{page.name}: {' '.join(command)}\nin small: {' '.join(small)}\n{ended.stdout}\n{ended.stderr[-3000:]}"
        )
