"""Files that somebody else wrote: nothing in them is run, and no secret of ours reaches what a run writes."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from caches import SMALL, build, from_cache, sign
from runs import TESTS, copy_of, run

from faults.answers import answer_to
from faults.record import record
from faults.twins import KINDS
from mini_distill.cli import load_config
from mini_distill.config import EvaluateCommand
from mini_distill.data import chat
from mini_distill.data.prepare import prepare_data
from mini_distill.models.loading import load_tokenizer
from mini_distill.report import report
from mini_distill.teachers.cache_identity import read_description, write_description

evaluate_module: Any = importlib.import_module("mini_distill.evaluate")


def some(cases: Iterable[Any], quick: int) -> list[Any]:
    """All of them, of which only the first few belong to the quick suite."""
    return [case if number < quick else pytest.param(case, marks=pytest.mark.slow) for number, case in enumerate(cases)]


# ------------------------------------------------------------------------------------------------------------------------- pickles


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


PICKLES = [
    *("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "state.json"),
    *("model.safetensors", "optimizer.safetensors", "model.pt", "tokenizer.pkl", "tokens.npy", "data.arrow", "projections.safetensors"),
]


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    """Proven to sing."""
    found = Canary(tmp_path / "proof")
    pickle.loads(pickle.dumps(found))
    assert found.file.exists()
    return Canary(tmp_path / "canary")


@pytest.mark.parametrize("name", some(PICKLES, 1))
def test_a_pickle_in_the_folder_of_a_model_or_a_checkpoint_is_not_opened(
    name: str, canary: Canary, tiny_command: list[str], tiny_teacher: Path, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    content = pickle.dumps(canary)
    teacher, folder = copy_of(tiny_teacher, tmp_path / "teacher"), copy_of(undisturbed("plain"), tmp_path / "run")
    (teacher / name).write_bytes(content)
    answer_to(lambda: run([*tiny_command, f"teacher.path={teacher}"], tmp_path / "anew"), 2, 4, 6)
    for part in ("checkpoints/step-00000006", "student"):
        (folder / part / name).write_bytes(content)
    answer_to(lambda: run(tiny_command, folder), 2, 4, 6)
    assert not canary.file.exists()
    record("files that would run code", injected=3, fired=3, executed=0)


@pytest.mark.parametrize("name", some(["cache.json", "MANIFEST.json", "shard-00000.safetensors", "targets.npy"], 1))
def test_a_pickle_in_a_cache_is_not_opened(name: str, canary: Canary, tiny_command: list[str], small: Path, tmp_path: Path) -> None:
    (small / name).write_bytes(pickle.dumps(canary))
    answer_to(lambda: run([*tiny_command, "teacher=cached", f"teacher.cache_dir={small}"], tmp_path / "run"), 2, 4, 5, 6)
    assert not canary.file.exists()
    record("files that would run code", injected=1, fired=1, executed=0)


def test_a_column_of_pickled_objects_is_not_opened_under_a_manifest_that_fits(
    canary: Canary, tiny_command: list[str], small: Path, tmp_path: Path
) -> None:
    columns = sorted(small.rglob("*.npy"))
    for column in columns:
        np.save(column, np.array([canary], dtype=object), allow_pickle=True)
        sign(column.parent)
    answer = answer_to(lambda: run(from_cache(tiny_command, small), tmp_path / "run"), 5)
    assert answer.error is not None and not canary.file.exists()
    record("files that would run code", injected=len(columns), fired=len(columns), executed=0)


# -------------------------------------------------------------------------------------------------------------- hostile headers


def tensor(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_with(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADERS = {
    "longer than any file": file_with({}, length=2**63 - 1),
    "longer than this file": file_with({}, length=10**6),
    "of 99 million bytes that are not there": file_with({}, length=99_000_000),
    "that is no JSON": file_with(b"\x80\x04\x95"),
    "that is a list": file_with([]),
    "nested without end": file_with(b"[" * 200_000),
    "with overlapping tensors": file_with({"a": tensor(0, 4), "b": tensor(2, 6)}),
    "with two tensors in one place": file_with({"a": tensor(0, 4), "b": tensor(0, 4)}),
    "with a tensor beyond the file": file_with({"a": tensor(0, 2**40, shape=(2**38,))}),
    "with offsets in reverse": file_with({"a": tensor(8, 4)}),
    "with an offset below zero": file_with({"a": tensor(-4, 0)}),
    "with an offset of 64 bits and more": file_with({"a": tensor(0, 2**64 + 4)}),
    "with a type that is none": file_with({"a": tensor(0, 4, dtype="PICKLE")}),
    "with a shape that does not fit": file_with({"a": tensor(0, 4, shape=(2, 2))}),
    "with a shape that overflows": file_with({"a": tensor(0, 4, shape=(2**62, 2**62, 4))}),
    "with a shape below zero": file_with({"a": tensor(0, 4, shape=(-1,))}),
    "with a hole": file_with({"a": tensor(0, 4), "b": tensor(40, 44)}),
    "with a name twice": file_with(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32"}}'),
    "without anything": file_with({}, b""),
}


@pytest.mark.parametrize("kind", some(HEADERS, 2))
def test_weights_with_a_hostile_header_are_refused_in_a_line(
    kind: str, tiny_command: list[str], tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = copy_of(tiny_teacher, tmp_path / "teacher")
    (teacher / "model.safetensors").write_bytes(HEADERS[kind])
    answer = answer_to(lambda: run([*tiny_command, f"teacher.path={teacher}"], tmp_path / "run"), 4)
    assert (answer.error is not None and "model.safetensors" in str(answer)) or "teacher.path" in answer.places
    record("hostile headers", injected=1, fired=1, refused=1)


@pytest.mark.parametrize("kind", some(reversed(HEADERS), 1))
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_checkpoint_with_a_hostile_header_under_a_manifest_that_fits_is_refused_in_a_line(
    part: str, kind: str, tiny_command: list[str], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of(undisturbed("plain"), tmp_path / "run")
    (folder / "summary.json").unlink()  # as of a run that has not finished
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / f"{part}.safetensors").write_bytes(HEADERS[kind])
        sign(checkpoint)
    answer = answer_to(lambda: run([*tiny_command, *KINDS["plain"]], folder), 6)
    assert answer.error is not None and part in str(answer)
    record("hostile headers", injected=1, fired=1, refused=1)


COLUMNS = {
    "of a shape that overflows": b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }",
    "of a shape below zero": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "that calls": b"{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').getpid(),), }",
    "nested without end": b"(" * 9000,
    "of objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
}


@pytest.mark.parametrize("kind", some(COLUMNS, 1))
def test_a_column_with_a_hostile_header_is_refused_in_a_line(kind: str, tiny_command: list[str], small: Path, tmp_path: Path) -> None:
    text = COLUMNS[kind] + b"\n"
    for column in small.rglob("*.npy"):
        column.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64))
        sign(column.parent)
    answer = answer_to(lambda: run(from_cache(tiny_command, small), tmp_path / "run"), 5)
    assert answer.error is not None
    record("hostile headers", injected=1, fired=1, refused=1)


# -------------------------------------------------------------------------------------------------------------- code in other files


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch {file}']", "!!python/object/new:os.system ['touch {file}']"])
def test_a_tag_in_the_configuration_of_a_run_makes_no_object(
    tag: str, canary: Canary, tiny_command: list[str], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of(undisturbed("plain"), tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(config.read_text() + f"\nextra: {tag.format(file=canary.file)}\n")
    answers = [
        answer_to(lambda: load_config([f"model={folder}"], "evaluate", EvaluateCommand), 2, 6),
        answer_to(lambda: report([str(folder)], output=str(tmp_path / "report.html")), 2, 6),
        answer_to(lambda: run(tiny_command, folder), 2, 6),
    ]
    assert not canary.file.exists()
    assert str(config) in str(answers[0]) and str(config) in str(answers[1])
    record("files that would run code", injected=len(answers), fired=len(answers), executed=0)


def test_a_setting_of_a_run_does_not_read_the_environment(
    undisturbed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder from a stranger would otherwise learn, in what is then written, what stands in a variable."""
    monkeypatch.setenv("PRIVATE_ADDRESS", "somewhere-private")
    folder = copy_of(undisturbed("plain"), tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("text_column: text", "text_column: ${oc.env:PRIVATE_ADDRESS}"))
    answer = answer_to(lambda: load_config([f"model={folder}"], "evaluate", EvaluateCommand), 2)
    assert answer.error is not None or "somewhere-private" not in repr(answer.value)
    record("files that would run code", injected=1, fired=1, executed=0)


def changed_run(folder: Path, **teacher: Any) -> Path:
    """Its settings of the teacher are others."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["teacher"] |= teacher
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_the_settings_of_a_run_do_not_decide_whose_code_is_run_or_who_is_shown_a_key(
    undisturbed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever evaluated a stranger's run ran the code of the repository that it named, if it said so."""
    monkeypatch.setenv("MINI_DISTILL_API_KEY", "secret-0123456789")
    code = changed_run(copy_of(undisturbed("plain"), tmp_path / "code"), trust_remote_code=True)
    server = changed_run(copy_of(undisturbed("plain"), tmp_path / "server"), kind="server", url="http://host.invalid")
    answers = [
        answer_to(lambda folder=folder: load_config([f"model={folder}"], "evaluate", EvaluateCommand), 2) for folder in (code, server)
    ]
    assert [answer.places for answer in answers] == [["teacher.trust_remote_code"], ["teacher.url"]]
    given = load_config([f"model={code}", "teacher=embedded"], "evaluate", EvaluateCommand)
    assert not given.teacher.trust_remote_code
    record("files that would run code", injected=2, fired=2, executed=0)


def test_where_results_go_is_not_for_a_strangers_settings_to_say(
    tiny_command: list[str], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, outside = copy_of(undisturbed("plain"), tmp_path / "run"), tmp_path / "outside"
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"output_dir": str(outside)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert Path(load_config([f"model={folder}"], "evaluate", EvaluateCommand).output_dir) == folder / "evaluation"
    answer_to(lambda: run([*tiny_command, *KINDS["plain"]], folder), 2, 6)
    report([str(folder)], output=None)
    assert not outside.exists()
    record("links and names that leave a folder", injected=3, fired=3, refused=3)


@pytest.mark.parametrize("name", some(["../outside", "/tmp/outside", "train/../../outside"], 1))
def test_a_side_of_a_cache_is_not_looked_for_outside_it(name: str, tiny_command: list[str], small: Path, tmp_path: Path) -> None:
    description = read_description(small)
    description["sides"][name] = description["sides"].pop("train")
    write_description(small, description)
    answer = answer_to(lambda: run(from_cache(tiny_command, small), tmp_path / "run"), 5)
    assert answer.error is not None
    record("links and names that leave a folder", injected=1, fired=1, refused=1)


INSTRUCTIONS = ["${oc.env:HOME}", "${hydra:runtime.cwd}", "!!python/name:os.system", "_target_: os.system", "$(touch x)", "{{ 7 * 7 }}"]


def test_instructions_in_data_are_text(tiny_command: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"text": text.lower(), "_target_": "os.system", "_args_": ["touch x"]}) + "\n" for text in INSTRUCTIONS)
    )
    settings = [f"data.path={file}", "data.eval_fraction=0", "data.packing=false", f"data.cache_dir={tmp_path / 'cache'}"]
    tokenizer = load_tokenizer(str(tiny_teacher))
    train = prepare_data(load_config(["data=jsonl", "data.text_column=text", *settings]).data, tokenizer, show_progress=False).train
    expected = ["<bos>" + tokenizer.decode(tokenizer.encode(text.lower(), add_special_tokens=False)) for text in INSTRUCTIONS]
    found = [tokenizer.decode(train[i].input_ids.flatten().tolist()).partition("<eos>")[0] for i in range(len(train))]
    assert sorted(found) == sorted(expected)
    record("files that would run code", injected=len(INSTRUCTIONS), fired=len(INSTRUCTIONS), executed=0)


@pytest.mark.parametrize("key", ["_target_", "teacher._target_", "data._target_", "objective._target_", "trainer._target_"])
def test_no_setting_makes_an_object_of_a_class(key: str) -> None:
    answer = answer_to(lambda: load_config([f"+{key}=os.system"]), 2)
    assert answer.error is not None and "_target_" in str(answer)
    record("files that would run code", injected=1, fired=1, executed=0)


def test_code_beside_a_teacher_is_not_run_unless_asked_for(
    canary: Canary, tiny_command: list[str], tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = copy_of(tiny_teacher, tmp_path / "teacher")
    code = f"from pathlib import Path\nPath({str(canary.file)!r}).touch()\n"
    for name in ("modeling_mine.py", "configuration_mine.py", "tokenization_mine.py", "conftest.py", "sitecustomize.py"):
        (teacher / name).write_text(code)
    for name, auto in (
        ("config.json", {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_mine.Mine", None]}),
    ):
        whole = json.loads((teacher / name).read_text()) | {"auto_map": auto} | ({"model_type": "mine"} if name == "config.json" else {})
        (teacher / name).write_text(json.dumps(whole))
    answer = answer_to(lambda: run([*tiny_command, f"teacher.path={teacher}"], tmp_path / "run"), 4)
    assert "trust_remote_code" in str(answer) and not canary.file.exists()
    record("files that would run code", injected=5, fired=5, executed=0)


ESCAPES = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ ''['__class__']['__base__']['__subclasses__']() }}",
    "{{ messages|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
    "{% import os %}{{ os.system('touch CANARY') }}",
    "{% include '/etc/hostname' %}",
    "{{ raise_exception.__globals__['__builtins__']['eval']('open(\"CANARY\", \"w\")') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{{ c.__init__.__globals__ }}{% endfor %}",
    "{{ messages.append('x') }}",
]
CONVERSATION = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]}


@pytest.mark.parametrize("escape", some(ESCAPES, 4))
def test_a_chat_template_stays_in_its_sandbox(escape: str, canary: Canary, tiny_teacher: Path, tmp_path: Path) -> None:
    template, rows = tmp_path / "template.jinja", tmp_path / "rows.jsonl"
    template.write_text(escape.replace("CANARY", str(canary.file)) + "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    rows.write_text(json.dumps(CONVERSATION) + "\n")
    settings = [f"data.path={rows}", f"data.chat_template={template}", "data.eval_fraction=0", f"data.cache_dir={tmp_path / 'cache'}"]
    config = load_config(["data=chat", *settings])
    tokenizer = load_tokenizer(str(tiny_teacher))
    answer = answer_to(lambda: prepare_data(config.data, tokenizer, show_progress=False), 2, 3)
    assert not canary.file.exists()
    if answer.error is None:  # the sandbox gives nothing in place of what is not to be seen
        (tokens,) = [answer.value.train[0].input_ids.tolist()]
        assert tokenizer.decode(tokens).partition("<pad>")[0].replace("<eos>", "").rstrip() == "user: hi\nassistant: good day"
    record("templates that leave their sandbox", injected=1, fired=1, **{"refused" if answer.error else "harmless": 1})


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ range(10**12) | list }}",
]


@pytest.mark.parametrize("number", some(range(3), 1))
def test_a_template_without_end_is_ended(number: int, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MOST_SECONDS", 0.3)
    template, rows = tmp_path / "template.jinja", tmp_path / "rows.jsonl"
    template.write_text(ENDLESS[number])
    rows.write_text(json.dumps(CONVERSATION) + "\n")
    settings = [f"data.path={rows}", f"data.chat_template={template}", "data.eval_fraction=0", f"data.cache_dir={tmp_path / 'cache'}"]
    tokenizer = load_tokenizer(str(tiny_teacher))
    answer = answer_to(lambda: prepare_data(load_config(["data=chat", *settings]).data, tokenizer, show_progress=False), 3)
    assert answer.places == [f"{rows}:1"] and "chat template cannot render it" in str(answer)
    record("templates that leave their sandbox", injected=1, fired=1, refused=1)


# -------------------------------------------------------------------------------------------------------------------- secrets


SECRETS = {
    "HF_TOKEN": "hf_" + "q" * 30,
    "WANDB_API_KEY": "wandb-0123456789abcdef",
    "OPENAI_API_KEY": "sk-" + "w" * 40,
    "AWS_SECRET_ACCESS_KEY": "aws-secret-0123456789",
    "DATABASE_PASSWORD": "correct-horse-battery",
    "MY_ACCESS_TOKEN": "token-of-the-house-42",
}
IN_URL = "https://someone:hunter2-hunter2@host.invalid/v1"


def everything_in(folder: Path) -> bytes:
    return b"".join(str(file).encode() + file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def leaked(written: bytes) -> list[str]:
    """The secrets that stand in it."""
    assert len(written) > 500
    return [name for name, value in {**SECRETS, "URL": "hunter2-hunter2"}.items() if value.encode() in written]


def test_no_secret_reaches_what_a_run_writes(
    tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They stand in the environment, and in settings where somebody might have put them."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "run"))
    settings = [f"tracking.run_name={SECRETS['OPENAI_API_KEY']}", f"data.cache_dir={tmp_path / SECRETS['DATABASE_PASSWORD']}"]
    run([*tiny_command, "tracking=wandb", *settings, f"teacher.revision={SECRETS['HF_TOKEN']}"], tmp_path / "run")
    report([str(tmp_path / "run")], output=str(tmp_path / "run" / "report.html"))
    assert list((tmp_path / "run").rglob("*.wandb"))
    found = leaked(everything_in(tmp_path / "run") + "".join(capfd.readouterr()).encode())
    assert not found
    record("secrets in outputs", injected=len(SECRETS), fired=len(SECRETS), found=len(found))


def test_no_secret_reaches_what_a_cache_an_evaluation_and_a_report_hold(
    tiny_command: list[str],
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    finished = copy_of(undisturbed("plain"), tmp_path / "finished")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    tokens = f"data.cache_dir={tmp_path / SECRETS['DATABASE_PASSWORD']}"
    build([*tiny_command, tokens, f"teacher.revision={SECRETS['HF_TOKEN']}"], tmp_path / "out" / "cache", *SMALL)
    settings = [
        f"model={finished}",
        tokens,
        f"output_dir={tmp_path / 'out' / 'evaluation'}",
        "evaluation.max_batches=1",
        "evaluation.speed=false",
    ]
    data = [text for text in tiny_command if text.startswith("data")]
    evaluate_module.evaluate(load_config([*settings, *data], "evaluate", EvaluateCommand))
    report([str(tmp_path / "out" / "evaluation")], output=str(tmp_path / "out" / "report.html"))
    found = leaked(everything_in(tmp_path / "out") + "".join(capfd.readouterr()).encode())
    assert not found
    record("secrets in outputs", injected=len(SECRETS), fired=len(SECRETS), found=len(found))


MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def test_markup_in_data_and_in_what_models_write_reaches_card_and_page_as_text(
    tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mini_distill.evaluation.samples._continue", lambda *_: MARKUP)
    run([*tiny_command, f'evaluation.prompts=["{MARKUP}"]'], tmp_path / "run")
    report([str(tmp_path / "run")], output=str(tmp_path / "report.html"))
    for file in (tmp_path / "run" / "README.md", tmp_path / "run" / "student" / "README.md", tmp_path / "report.html"):
        text = file.read_text() if file.exists() else ""
        assert "<script>alert" not in text and "<img" not in text
    assert "&lt;script&gt;alert(1)" in (tmp_path / "report.html").read_text()
    record("markup in texts", injected=2, fired=2, escaped=2)


@pytest.mark.parametrize("debug", some(["debug=true", "debug=false"], 0))
def test_no_secret_reaches_what_a_failing_command_writes(debug: str, tiny_command: list[str], tmp_path: Path) -> None:
    """A library, or a user's function, puts them into its exception."""
    environment = {**os.environ, **SECRETS, "LEAK": " ".join([*SECRETS.values(), IN_URL]), "PYTHONPATH": str(TESTS)}
    command = [*tiny_command, debug, "objective.divergence=user_functions.raises_what_leaks", f"output_dir={tmp_path / 'run'}"]
    ended = subprocess.run([sys.executable, "-m", "mini_distill.train", *command], env=environment, capture_output=True, timeout=120)
    assert ended.returncode and b"could not connect" in ended.stderr
    found = leaked(everything_in(tmp_path / "run") + ended.stdout + ended.stderr)
    assert not found
    record("secrets in outputs", injected=len(SECRETS) + 1, fired=len(SECRETS) + 1, found=len(found))
