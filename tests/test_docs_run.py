"""What README and docs tell their readers to type is run, page by page and command by command, with models and rows of a test's size."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_commands import NOT_RUN, PAGES, ROOT, commands, why_not
from teachers.server_double import ServerDouble
from transformers import AutoModelForCausalLM, AutoTokenizer

import mini_distill as md
from mini_distill import cli
from mini_distill.config import CacheCommand

MINUTES = {"README.md", "evaluation.md", "plan.md", "recipes.md"}
"""Pages of which the default test run leaves out that their commands run (that they exist, it looks at)."""
IN_PROCESSES = ("-m", "--help", "--cfg")
"""Sweeps, and what only shows, are processes of their own, as is what torchrun starts: for the slow run."""

STUDENT = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 64}
RATHER_NOT = {"teacher.path", "student.path", "data.name", "data.streaming", "data.max_rows", "data.seq_len", "data.eval_fraction"}
LARGE = {"trainer.max_steps", "trainer.micro_batch_size", "trainer.grad_accum_steps", "trainer.save_every", "trainer.eval_every"}
PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit_slurm": "hydra_submitit_launcher", "optuna": "hydra_optuna_sweeper"}


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
    task = {"task": "my_task", "dataset_path": "json", "dataset_kwargs": {"data_files": "quiz.jsonl"}, "output_type": "multiple_choice"}
    task |= {"test_split": "train", "doc_to_text": "{{question}}", "doc_to_target": "label", "doc_to_choice": "choices"}
    (folder / "my_task.yaml").write_text(yaml.safe_dump(task | {"metric_list": [{"metric": "acc"}]}))
    (folder / "blimp").mkdir()
    shutil.copy(folder / "blimp.jsonl", folder / "blimp" / "order.jsonl")
    (folder / "parts").mkdir()
    for number in ("00", "11"):
        shutil.copy(folder / "my_text.jsonl", folder / "parts" / f"{number}.jsonl")
    for name in ("corpus", "my_text"):
        (folder / name).mkdir()
        for i, text in enumerate(texts):
            (folder / name / f"{i}.txt").write_text(text)


def in_small(verb: str, given: list[str], rows: Path) -> list[str]:
    """The same command about the reader's small teacher and rows; of a hub's, the reader's own stand in their place."""
    told = dict(text.split("=", 1) for text in given if "=" in text)
    kept = [text for text in given if text.partition("=")[0] not in RATHER_NOT | LARGE]
    if verb == "evaluate":
        kept = [text for text in kept if not text.startswith("evaluation.tasks") or importlib.util.find_spec("lm_eval")]
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
    names = given if verb in READERS else [text.partition("=")[2] for text in given if text.startswith("model=")]
    runs = {Path(name.removesuffix("-control")) for name in names if not set("*?") & set(name)}
    return sorted(run for run in runs if not run.exists())


READERS = ("compare", "report", "digest")
"""Verbs that take folders."""


# ------------------------------------------------------------------------------------------------------------- one command of each kind


def run_here(verb: str, arguments: list[str]) -> None:
    """In this process."""
    action = arguments.pop(0) if arguments[:1] and arguments[0] in ("verify", "info") else ""
    if verb in READERS:
        paths = [sorted(glob.glob(name)) if set("*?") & set(name) else [name] for name in arguments]  # the shell's part
        assert importlib.import_module(f"mini_distill.{verb}").main([*itertools.chain(*paths)]) == 0
    elif action:
        module = importlib.import_module(f"mini_distill.{verb}")
        getattr(module, action)(cli.load_config(arguments, verb, CacheCommand))
    elif verb == "doctor":
        assert list(importlib.import_module("mini_distill.doctor").examine(cli.load_config(arguments)))  # of whatever verdict
    else:
        getattr(md, verb)(arguments)


def run_program(*words: str) -> str:
    """In a process of its own; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, start_new_session=True)
    assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


def run_sweep(given: list[str], rows: Path) -> None:
    """By its command line: two jobs."""
    plugin = next((PLUGINS[name] for text in given if (name := text.partition("=")[2]) in PLUGINS), None)
    if plugin is not None and importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
        return  # without the extra mini_distill[sweep] it is composed alone
    small = in_small("train", [text for text in given if not text.startswith("hydra.")], rows)
    small = [text for text in small if not text.startswith("output_dir")]
    printed = run_program(
        "-m", "mini_distill.train", *two_jobs(small), *(text for text in given if text.startswith("hydra.launcher.n_jobs"))
    )
    assert "2 jobs: 2 finished" in printed, printed


def two_jobs(given: list[str]) -> list[str]:
    """The same sweep over two values of what it sweeps first, and one of all else; the jobs of SLURM as processes of this machine."""
    short, left = [], 2
    for text in given:
        key, _, value = text.partition("=")
        if key == "sweep" and value != "optuna":
            params = yaml.safe_load((cli.config_dir() / "sweep" / f"{value}.yaml").read_text())["hydra"]["sweeper"]["params"]
            few = {name: str(values).split(",")[: left if i == 0 else 1] for i, (name, values) in enumerate(params.items())}
            short += [text, "hydra.sweeper.params={" + ",".join(f'{name}:"{",".join(values)}"' for name, values in few.items()) + "}"]
            left = 1
        elif "," in value and not value.startswith(("{", "[", "'")):
            short.append(f"{key}={','.join(value.split(',')[:left])}")
            left = 1
        else:
            short.append(text.replace("submitit_slurm", "submitit_local"))
    return [*short, *(["hydra.sweeper.n_trials=2"] if "hydra/sweeper=optuna" in given else [])]


def run_under_torchrun(verb: str, arguments: list[str]) -> None:
    """Two processes, gloo between them; a run goes into a folder of its own, since that of one process may have finished."""
    arguments = [re.sub(r"^output_dir=['\"]?(.*?)['\"]?$", r'output_dir="\1-2"', text) for text in arguments]
    run_program("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", f"mini_distill.{verb}", *arguments)


def run_beside_a_server(verb: str, given: list[str], rows: Path) -> None:
    """The reader's own teacher, as a server that speaks as vLLM does."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained("my_teacher"), AutoTokenizer.from_pretrained("my_teacher")
    with ServerDouble(model, tokenizer, max_logprobs=50, max_model_len=1024).running() as server:
        small = [text for text in in_small(verb, given, rows) if not text.startswith(("teacher=", "teacher.url", "cache.dir"))]
        run_here(verb, [*small, "teacher=server", f"teacher.url={server.url}", "cache.dir=served"])


def run_command(command: list[str], rows: Path, quick: bool) -> None:
    """A command of a page by its kind; with `quick` only what needs no further process.

    Raises:
        AssertionError: it fails, or nobody knows how to run it.
    """
    word = next((word for word in command if word.startswith("mini_distill.")), None)
    assert word is not None, "neither run nor among NOT_RUN"
    verb, given = word.removeprefix("mini_distill."), command[command.index(word) + 1 :]
    launched = command[0] == "torchrun"
    if quick and (launched or any(flag in given for flag in IN_PROCESSES)):
        return
    for run in supposed(verb, given):
        seed = [f"seed={run.name[-1]}"] if run.name[-1].isdigit() else []
        run_here("train", in_small("train", [f"output_dir={run}", "control=true", *seed], rows))
    if "-m" in given:
        run_sweep(given, rows)
    elif {"--help", "--cfg"} & set(given):
        assert "student" in run_program("-m", f"mini_distill.{verb}", *given)
    elif "teacher=server" in given:
        run_beside_a_server(verb, given, rows)
    else:
        small = given if verb in READERS else in_small(verb, given, rows)
        run_under_torchrun(verb, small) if launched else run_here(verb, small)


def run_page(page: Path, rows: Path, folder: Path, quick: bool) -> None:
    folder.mkdir()
    for command in commands(page, folder):
        if why_not(command) or any(word.startswith("scripts/") for word in command):
            continue
        try:
            run_command(command, rows, quick)
        except Exception as error:
            raise AssertionError(f"{page.name}: {shlex.join(command)}: {error}") from error


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in MINUTES], ids=lambda page: page.name)
def test_the_commands_of_a_page_run_one_after_the_other(page: Path, reader: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """Everything but the sizes, as it stands on the page."""
    run_page(page, tiny_corpus, tmp_path / "parsed", quick=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_with_sweeps_and_several_processes(page: Path, reader: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    run_page(page, tiny_corpus, tmp_path / "parsed", quick=False)


def test_whatever_is_not_run_has_its_reason(tmp_path: Path) -> None:
    """And no reason outlives its command."""
    every = [" ".join(command) for page in PAGES for command in commands(page, tmp_path)]
    assert all(any(re.search(pattern, command) for command in every) for pattern in NOT_RUN)
    assert sum(why_not(command.split()) is None for command in every) > 80


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
    if name == "check_plan.py":
        return [script, "--steps", "4", "--repeats", "2", "--only", "embedded default"]
    if name == "plan_recipes.py":
        return [script, *(own or ["--only", "1"])]
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
        if why_not(command) is None and command[1].startswith("scripts/"):
            script, *given = script_in_small(command[1:])
            run_program(str(ROOT / script), *given)
