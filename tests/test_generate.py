"""`python -m mini_distill.generate`: what is written, that it ends the same however it was stopped, and what is refused."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TESTS, fork, forks, in_processes, run, wait
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import mini_distill as md
from mini_distill.cli import load_config
from mini_distill.config import GenerateCommand
from mini_distill.errors import MiniDistillError, Preempted

module: Any = importlib.import_module("mini_distill.generate")
CHATML = Path(md.__file__).parent / "data" / "chat_templates" / "chatml.jinja"
SAMPLED = ("generate.sampling_temperature=1", "generate.num_samples=2", "generate.batch_size=3", "seed=5")


@pytest.fixture(scope="module")
def command(tiny_teacher: Path, tiny_corpus: Path) -> list[str]:
    """The tiny teacher goes on from the beginnings of the corpus."""
    data = ["data=jsonl", f"data.path={tiny_corpus}", "data.text_column=text", "data.eval_fraction=0.2", "data.max_rows=24"]
    short = ["generate.max_new_tokens=12", "generate.prompt_tokens=4", "num_threads=1"]
    return ["teacher=hf", f"teacher.path={tiny_teacher}", *data, *short]


def generate(command: list[str], folder: Path, *more: str) -> dict[str, Any]:
    """In this process, as the command line would."""
    return module.generate(load_config([*command, f"output_dir={folder}", *more], "generate", GenerateCommand))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples of each prompt, in several parts."""
    folder = tmp_path_factory.mktemp("generated") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCHES_OF_A_PART", 3)
        generate(command, folder, *SAMPLED)
    return folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCHES_OF_A_PART", 3)


# ---------------------------------------------------------------------------------------------------------------- what is written


def test_greedy_rows_are_what_transformers_writes(command: list[str], tmp_path: Path, tiny_teacher: Path, tiny_corpus: Path) -> None:
    summary = generate(command, tmp_path / "out")
    model, tokenizer = (kind.from_pretrained(tiny_teacher) for kind in (AutoModelForCausalLM, AutoTokenizer))
    config = GenerationConfig(max_new_tokens=12, eos_token_id=2, pad_token_id=2, suppress_tokens=[62, 63])
    found = rows(tmp_path / "out")
    for row in found:
        ids = torch.tensor([[1, *tokenizer(row["text"]).input_ids[:4]]])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0]
        assert row["text"] == tokenizer.decode(written, skip_special_tokens=True)
        assert row["finished"] == (2 in written[5:])
    originals = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()]
    assert {row["text"][:4] for row in found} <= {text[:4] for text in originals}
    assert summary["generate/rows"] == len(found) == summary["generate/prompts"] - summary["generate/left_out"] < 24  # rows in all
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert (tmp_path / "out" / "config.yaml").exists() and not (tmp_path / "out" / "parts").exists()


def test_a_student_is_trained_on_what_was_written(command: list[str], tiny_command: list[str], tmp_path: Path, undisturbed: Path) -> None:
    own = [text for text in tiny_command if not text.startswith("data.")]
    summary = run(own, tmp_path / "run", f"data.path={undisturbed / 'rows.jsonl'}", "data.seq_len=32", "objective=ce")
    read = summary["data/rows_read"]
    assert read == len(rows(undisturbed)) and summary["data/rows_used"] + summary.get("data/rows_dropped_empty", 0) == read


def test_each_row_is_drawn_by_itself(command: list[str], tmp_path: Path, undisturbed: Path) -> None:
    """Of the same seed and row comes the same text, in whatever batch."""
    generate(command, tmp_path / "out", *SAMPLED, "generate.batch_size=50")
    assert rows(tmp_path / "out") == rows(undisturbed)
    pairs = [(row["row"], row["sample"]) for row in rows(undisturbed)]
    assert pairs == sorted(set(pairs)) and {sample for _, sample in pairs} == {0, 1}
    texts = [row["text"] for row in rows(undisturbed)]
    assert len(set(texts)) > 0.9 * len(texts)
    generate(command, tmp_path / "other", *SAMPLED, "seed=6")
    assert (tmp_path / "other" / "rows.jsonl").read_text() != (undisturbed / "rows.jsonl").read_text()


@pytest.fixture
def chats(tmp_path: Path, tiny_teacher: Path) -> list[str]:
    """Overrides: conversations, and the tiny teacher with a template."""
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.chat_template = CHATML.read_text()
    tokenizer.save_pretrained(tmp_path / "teacher")
    turns = [[{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": f"it is {i}"}] for i in range(12)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return ["teacher=hf", f"teacher.path={tmp_path / 'teacher'}", "data=chat", f"data.path={tmp_path / 'chats.jsonl'}"]


def test_answers_are_written_into_the_conversations(chats: list[str], tmp_path: Path) -> None:
    quick = ("data.eval_fraction=0", "generate.max_new_tokens=20", "generate.on_unfinished=keep", "generate.sampling_temperature=1")
    generate(chats, tmp_path / "out", *quick)
    found = rows(tmp_path / "out")
    assert len(found) > 8
    for row in found:
        question, answer = row["messages"]
        assert question == {"role": "user", "content": f"add {row['row']}"} and answer["role"] == "assistant"
        assert answer["content"] != f"it is {row['row']}"


def test_half_an_answer_is_left_out_unless_it_is_asked_for(chats: list[str], tmp_path: Path) -> None:
    """Each row ends with the end-of-sequence token: a student of answers that were cut off learns to stop in the middle."""
    quick = ("data.eval_fraction=0", "generate.max_new_tokens=40", "generate.sampling_temperature=1")
    summaries = {choice: generate(chats, tmp_path / choice, *quick, f"generate.on_unfinished={choice}") for choice in ("auto", "keep")}
    assert 0 < summaries["auto"]["generate/cut_off"] == summaries["keep"]["generate/cut_off"] < 12
    assert all(row["finished"] for row in rows(tmp_path / "auto"))
    assert [row for row in rows(tmp_path / "keep") if row["finished"]] == rows(tmp_path / "auto")
    assert summaries["auto"]["generate/left_out"] >= summaries["auto"]["generate/cut_off"]


def test_a_runs_student_goes_on_from_the_runs_own_data(tiny_command: list[str], tmp_path: Path) -> None:
    run(tiny_command, tmp_path / "run")
    summary = md.generate([f"model={tmp_path / 'run'}", "generate.max_new_tokens=4", "generate.num_beams=2"])
    assert summary["generate/rows"] == len(rows(tmp_path / "run" / "generated"))
    assert 0 < summary["generate/prompts"] < json.loads((tmp_path / "run" / "summary.json").read_text())["data/rows_read"]


# ------------------------------------------------------------------------------------------------------------------ stopped, and on


@contextmanager
def killed_at(number: int) -> Iterator[None]:
    """SIGKILL in place of the n-th renaming of a file or folder: what was written aside stays there."""
    renamed = 0
    originals = {name: getattr(os, name) for name in ("rename", "replace")}

    def counted(name: str) -> Callable[..., None]:
        def around(*arguments: Any) -> None:
            nonlocal renamed
            renamed += 1
            if renamed == number:
                os.kill(os.getpid(), signal.SIGKILL)
            originals[name](*arguments)

        return around

    with pytest.MonkeyPatch.context() as patch:
        for name in originals:
            patch.setattr(os, name, counted(name))
        yield


@forks
def test_a_run_that_was_killed_anywhere_ends_as_one_that_was_not(
    command: list[str], tmp_path: Path, undisturbed: Path, small_parts: None
) -> None:
    """No row twice, none lost, byte for byte."""
    config = load_config([*command, *SAMPLED], "generate", GenerateCommand)

    def body(number: int, folder: Path) -> None:
        config.output_dir = str(folder)
        with killed_at(number):
            module.generate(config)

    ended, number = -signal.SIGKILL, 0
    while ended == -signal.SIGKILL:
        number += 1
        folder = tmp_path / str(number)
        ended = wait(fork(lambda number=number, folder=folder: body(number, folder)))
        assert ended in (0, -signal.SIGKILL)
        config.output_dir = str(folder)
        module.generate(config)
        assert (folder / "rows.jsonl").read_bytes() == (undisturbed / "rows.jsonl").read_bytes(), number
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "identity.json", "rows.jsonl", "summary.json"]
    assert number > 6


def test_sigterm_ends_it_between_batches_and_the_same_command_goes_on(
    command: list[str], tmp_path: Path, undisturbed: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = module.complete, []

    def signalled(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(module, "complete", signalled)
    with pytest.raises(Preempted) as stopped:
        generate(command, tmp_path / "out", *SAMPLED)
    assert stopped.value.exit_code == 143 and len(list((tmp_path / "out" / "parts").iterdir())) == 1
    first = len(calls)
    generate(command, tmp_path / "out", *SAMPLED)
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == (undisturbed / "rows.jsonl").read_bytes()
    total = len(calls)
    assert first == 7 and generate(command, tmp_path / "out", *SAMPLED)["generate/rows"] and len(calls) == total  # nothing is left to do


def test_a_damaged_part_is_written_again(
    command: list[str],
    tmp_path: Path,
    undisturbed: Path,
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        generate(command, tmp_path / "out", *SAMPLED)
    part = tmp_path / "out" / "parts" / "part-000001" / "rows.jsonl"
    part.write_bytes(part.read_bytes().replace(b"the", b"tha"))
    generate(command, tmp_path / "out", *SAMPLED)
    assert "part-000001: rows.jsonl: wrong checksum; it is written again" in caplog.text
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == (undisturbed / "rows.jsonl").read_bytes()


@forks
def test_two_processes_write_what_one_does(command: list[str], tmp_path: Path, undisturbed: Path, small_parts: None) -> None:
    assert in_processes(2, lambda rank: generate(command, tmp_path / "out", *SAMPLED)) == [0, 0]
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == (undisturbed / "rows.jsonl").read_bytes()


# ------------------------------------------------------------------------------------------------------------------------- refused


REFUSED: list[tuple[tuple[str, ...], int, str]] = [
    # overrides, exit code, words
    (("generate.top_p=0.9",), 2, "generate.top_p: got 0.9, and nothing is sampled"),
    (("generate.num_samples=4",), 2, "generate.num_samples: got 4, and nothing is sampled"),
    (("generate.num_beams=4", "generate.sampling_temperature=1"), 2, "generate.num_beams: got 4, and generate.sampling_temperature"),
    (("generate.max_new_tokens=128",), 2, "generate.max_new_tokens: got 128, and the model has 128 positions"),
    (("generate.max_new_tokens=127", "generate.prompt_tokens=60"), 3, "corpus.jsonl:1: has a prompt of"),
    (("teacher=none", "teacher.path=null"), 2, "teacher: nobody here who could write"),
    (("teacher.cache_kind=topk",), 2, "teacher: nobody here who could write"),
    (("model=/no/such/folder",), 2, "model: no such file or folder"),
    (("data.text_column=body",), 3, "corpus.jsonl:1: no column 'body'"),
    (("data.text_column=null", "data.messages_column=text", "data.chat_template=chatml"), 3, "corpus.jsonl:1: column 'text' holds str"),
    (("data=mixture", "data.path=null", "data.text_column=null"), 2, "data.source: a mixture, and prompts come from one source"),
]


@pytest.mark.parametrize(("overrides", "code", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_what_cannot_be_written_is_one_line(command: list[str], tmp_path: Path, overrides: tuple[str, ...], code: int, words: str) -> None:
    with pytest.raises(MiniDistillError) as raised:
        generate(command, tmp_path / "out", *overrides)
    assert raised.value.exit_code == code and len(raised.value.problems) == 1
    assert words in str(raised.value.problems[0])
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_other_settings_models_and_data_are_refused_by_name(
    command: list[str], tmp_path: Path, tiny_llama: Any, tiny_teacher: Path
) -> None:
    generate(command, tmp_path / "out")
    other = shutil.copytree(tiny_teacher, tmp_path / "other")
    tiny_llama(seed=9).save_pretrained(other)
    for overrides, place in (
        (("generate.max_new_tokens=13",), "generate.max_new_tokens: got 13, and what is in the folder was begun with 12"),
        (("seed=1",), "seed: got 1"),
        ((f"teacher.path={other}",), "model.weights: got "),
        (("data.max_rows=9",), "data.max_rows: got 9"),
    ):
        with pytest.raises(MiniDistillError) as raised:
            generate(command, tmp_path / "out", *overrides)
        assert raised.value.exit_code == 2 and place in str(raised.value.problems[0])


def test_the_folder_of_something_else_is_left_alone(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rows.jsonl").write_text("mine\n")
    with pytest.raises(MiniDistillError, match="holds something else already"):
        generate(command, tmp_path / "out")
    assert (tmp_path / "out" / "rows.jsonl").read_text() == "mine\n"


def test_completions_of_which_none_ends_are_refused(chats: list[str], tmp_path: Path) -> None:
    with pytest.raises(MiniDistillError, match=r"none of 12 prompts has a completion that ends within .*=1\.") as raised:
        generate(chats, tmp_path / "out", "data.eval_fraction=0", "generate.max_new_tokens=1")
    assert raised.value.exit_code == 3


def test_it_answers_from_the_command_line(command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    arguments = [sys.executable, "-m", "mini_distill.generate", *command, f"output_dir={tmp_path / 'out'}"]
    ended = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "Train on them: python -m mini_distill.train objective=ce data=jsonl" in ended.stdout, ended.stderr
