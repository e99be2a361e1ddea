"""Files that somebody else wrote: nothing in them is run, and no secret of ours reaches what a run writes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import TESTS, copy_of, run

from faults.answers import answer_to
from faults.record import record
from mini_distill.cli import load_config
from mini_distill.config import EvaluateCommand
from mini_distill.data.prepare import prepare_data
from mini_distill.models.loading import load_tokenizer
from mini_distill.report import report

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


@pytest.mark.parametrize("name", PICKLES)
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


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "cache.json", "MANIFEST.json", "targets.npy"])
def test_a_pickle_in_a_cache_is_not_opened(name: str, canary: Canary, tiny_command: list[str], small: Path, tmp_path: Path) -> None:
    (small / name).write_bytes(pickle.dumps(canary))
    answer_to(lambda: run([*tiny_command, "teacher=cached", f"teacher.cache_dir={small}"], tmp_path / "run"), 2, 4, 5, 6)
    assert not canary.file.exists()
    record("files that would run code", injected=1, fired=1, executed=0)


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


@pytest.mark.parametrize("escape", ESCAPES)
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


@pytest.mark.parametrize("debug", ["debug=false", "debug=true"])
def test_no_secret_reaches_what_a_failing_command_writes(debug: str, tiny_command: list[str], tmp_path: Path) -> None:
    """A library, or a user's function, puts them into its exception."""
    environment = {**os.environ, **SECRETS, "LEAK": " ".join([*SECRETS.values(), IN_URL]), "PYTHONPATH": str(TESTS)}
    command = [*tiny_command, debug, "objective.divergence=user_functions.raises_what_leaks", f"output_dir={tmp_path / 'run'}"]
    ended = subprocess.run([sys.executable, "-m", "mini_distill.train", *command], env=environment, capture_output=True, timeout=120)
    assert ended.returncode and b"could not connect" in ended.stderr
    found = leaked(everything_in(tmp_path / "run") + ended.stdout + ended.stderr)
    assert not found
    record("secrets in outputs", injected=len(SECRETS) + 1, fired=len(SECRETS) + 1, found=len(found))
