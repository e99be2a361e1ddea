"""What README and docs tell their readers to type: every command is composed or run, every snippet executed, every link followed."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from docs_commands import PAGES, ROOT, Block, blocks, commands, mentions

import mini_distill as md
from mini_distill import run
from mini_distill.cli import CONTRACTS, config_dir, load_config
from mini_distill.contract import build_config
from mini_distill.errors import ConfigError
from mini_distill.overrides import prepare_overrides

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
HYDRA_VERBS = {
    "train": "contract",
    "cache": "cache_contract",
    "evaluate": "evaluate_contract",
    "generate": "generate_contract",
    "plan": "plan_contract",
}
ACTIONS = {"cache": ("build", "verify", "info")}
SHOWN = ("--help", "--cfg")  # flags of Hydra that show and do not run
VALUES_OF_TORCHRUN = ("--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--master_port")
THERE_LATER = re.compile(r"no such file or folder|no cache|is not a cache|not the folder of")
"""What is wrong with a command only because what it reads has not been made on this machine."""

Command = list[str]


# ------------------------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_exists(page: Path, tmp_path: Path) -> None:
    for command in commands(page, tmp_path):
        try:
            check(command)
        except (AssertionError, ConfigError) as error:
            raise AssertionError(f"{page.name}: {' '.join(command)}: {error}") from error
    for command in mentions(page, tmp_path):
        program = command[2].replace(".", "/") + ".py" if command[1] == "-m" else command[1]
        assert (ROOT / program).is_file(), f"{page.name}: {' '.join(command)}"


def check(command: Command) -> None:
    """A command by its kind.

    Raises:
        AssertionError, ConfigError: it is of no kind that is known here, or would be refused.
    """
    program, *arguments = command
    program = program.removeprefix(".venv/bin/")
    if program == "peers/bin/pip":
        assert arguments[0] == "install" and all(re.fullmatch(r"[a-z-]+==[\d.]+", name) for name in arguments[1:]), arguments
    elif program == "pip":
        check_pip(arguments)
    elif program == "torchrun":
        check_python(after_launcher(arguments))
    elif program in ("python", "python3"):
        check_python(arguments)
    elif program == "mkdocs":
        assert arguments[0] in ("build", "serve"), arguments
    elif program == "pytest":
        check_pytest(arguments)
    elif program == "ruff":
        assert arguments[0] in ("check", "format"), arguments
    elif program == ".ci/run":
        assert (ROOT / program).exists() and not arguments, arguments
    elif program in ("hf", "vllm"):
        assert arguments[0] in ("auth", "serve"), arguments  # programs of others
    elif program == "jupyter":
        assert arguments[0] == "lab" and all((ROOT / name).exists() for name in arguments[1:])
    else:
        raise AssertionError(f"nobody checks a command that begins with {program}")


def after_launcher(arguments: Command) -> Command:
    """What torchrun starts."""
    rest = list(arguments)
    while rest[0] in VALUES_OF_TORCHRUN or rest[0].partition("=")[0] in VALUES_OF_TORCHRUN:
        del rest[: 1 if "=" in rest[0] else 2]
    return rest


def check_pip(arguments: Command) -> None:
    assert arguments[:3] == ["install", "-c", "constraints.txt"], arguments
    wanted = [name for name in arguments[3:] if name != "-e"]
    for name in wanted:
        if name.startswith("."):
            extras = re.fullmatch(r"\.(?:\[(.*)\])?", name)
            assert extras and all(extra in EXTRAS for extra in (extras[1] or "").split(",") if extra), f"no extra {name}"
        else:
            assert re.fullmatch(r"[a-z_-]+", name), name


def check_pytest(arguments: Command) -> None:
    markers = [line.partition(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    assert not arguments or (arguments[0] == "-m" and arguments[1] in markers and not arguments[2:]), arguments


def check_python(arguments: Command) -> None:
    if arguments[0] != "-m":
        check_script(arguments)
    elif arguments[1] == "pytest":
        check_pytest(arguments[2:])
    elif arguments[1] in ("venv", "pip"):
        assert arguments[1] != "pip" or check_pip(arguments[2:]) is None
    elif arguments[1].startswith("tests."):
        module = ROOT / arguments[1].replace(".", "/")
        check_flags(module / "__main__.py" if module.is_dir() else module.with_suffix(".py"), arguments[2:])
    else:
        package, _, verb = arguments[1].partition(".")
        assert package == "mini_distill", arguments
        check_verb(verb, arguments[2:])


def check_verb(verb: str, arguments: Command) -> None:
    if verb not in HYDRA_VERBS:
        check_flags(ROOT / "mini_distill" / f"{verb}.py", arguments)
        return
    if arguments[:1] and arguments[0] in ACTIONS.get(verb, ()):
        arguments = arguments[1:]
    sweep = "-m" in arguments or "--multirun" in arguments
    overrides = [text for text in arguments if "=" in text and not text.startswith("-")]
    flags = [text for text in arguments if text not in overrides]
    assert set(flags) <= {"-m", "--multirun", "--help", "--cfg", "job"}, flags
    for job in jobs(overrides) if sweep else [overrides]:
        if "--help" not in flags:
            compose(verb, job)


def jobs(overrides: Command) -> list[Command]:
    """Of the command lines that a sweep runs as many as have every swept value."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    prepared = OverridesParser.create().parse_overrides(prepare_overrides(overrides, [config_dir()], sweep=True))
    seen: set[str] = set()
    chosen = []
    for job in itertools.chain(*BasicSweeper.split_arguments(prepared, None)):
        if not seen.issuperset(job):
            chosen.append(job)
            seen |= set(job)
    return chosen


def compose(verb: str, overrides: Command) -> Any:
    """The configuration of a command, or None where all that is wrong with it is a file that is not here."""
    try:
        return load_config(overrides, verb, CONTRACTS[HYDRA_VERBS[verb]])
    except ConfigError as error:
        assert all(THERE_LATER.search(str(problem)) for problem in error.problems), error
        return None


def check_script(arguments: Command) -> None:
    script = ROOT / arguments[0]
    assert script.is_file(), f"no script {arguments[0]}"
    own, _, overrides = " ".join(arguments[1:]).partition(" -- ")
    check_flags(script, own.split())
    compose_loosely(overrides.split())


def compose_loosely(overrides: Command) -> None:
    """Overrides that a script passes on: the settings exist, whatever else the script adds."""
    known = {*md_known_keys(), *(folder.name for folder in config_dir().iterdir() if folder.is_dir())}
    for text in overrides:
        if "=" in text:
            assert text.partition("=")[0].lstrip("+") in known, text


def md_known_keys() -> list[str]:
    from mini_distill.contract import known_keys

    return [key for schema in CONTRACTS.values() for key in known_keys(schema)]


def check_flags(script: Path, arguments: Command) -> None:
    """Each flag of a program with argparse stands in its source, as a text or as a field that becomes one."""
    assert script.is_file(), f"no program {script.name}"
    source = script.read_text(encoding="utf-8")
    for flag in (text.partition("=")[0] for text in arguments if text.startswith("--")):
        field = flag.removeprefix("--").replace("-", "_")
        assert f'"{flag}"' in source or re.search(rf"^    {field}: ", source, re.MULTILINE), f"{script.name} has no flag {flag}"


def test_a_command_of_no_known_kind_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nmake install\n```\n")
    (tmp_path / "there").mkdir()
    with pytest.raises(AssertionError, match="make"):
        commands(page, tmp_path / "there")
    for wrong in (
        "python -m mini_distill.train trainer.max_stpes=3",
        "python -m mini_distill.trian",
        "python scripts/none.py",
        "accelerate launch x",
    ):
        with pytest.raises((AssertionError, ConfigError)):
            check(wrong.split())


def test_loops_variables_and_placeholders_are_expanded_as_the_shell_does(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('```bash\nmany="a b"\nfor x in 1 2; do\n  python -m y seed=$x $many z=<the file>\ndone\npython -m end "c d" …\n```\n')
    (tmp_path / "there").mkdir()
    expected = [["python", "-m", "y", f"seed={x}", "a", "b", "z=PLACEHOLDER"] for x in (1, 2)]
    assert commands(page, tmp_path / "there") == [*expected, ["python", "-m", "end", "c d"]]


# ------------------------------------------------------------------------------------------------------- the tutorial, for real


@pytest.fixture
def shrunk(tiny_command: list[str], tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that make any command of the embedded default a matter of a second; the test is in an empty folder."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(seed=1, num_hidden_layers=4).save_pretrained("teacher")
    tiny_tokenizer.save_pretrained("teacher")
    quick = [text for text in tiny_command if not text.startswith(("student.", "teacher", "data="))]
    return [*quick, "teacher.kind=hf", "teacher.path=teacher", "data.source=jsonl", *(f"trainer.{name}" for name in QUICK)]


QUICK = ("max_steps=2", "eval_every=1", "save_every=1")


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_python_snippet_runs(block: Block, shrunk: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder that has the default's run in it; runs are as small as a test's."""
    small = [text for text in shrunk if not text.startswith(("output_dir", "student"))]
    plain = run.load_config
    monkeypatch.setattr(run, "load_config", lambda overrides, *rest: plain([*overrides, *small], *rest))
    if "runs/default" in block.text:
        md.train(["output_dir=runs/default"])
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    exec(compile(block.text, str(block), "exec"), main.__dict__)


# -------------------------------------------------------------------------------------------------------- other blocks, and links


def test_every_other_block_is_of_a_kind_that_is_checked() -> None:
    for block in blocks():
        assert block.language in ("bash", "python", "json", "yaml", "text", ""), f"{block}: {block.language}"


@pytest.mark.parametrize("block", blocks("json", "yaml"), ids=str)
def test_examples_of_files_can_be_read(block: Block) -> None:
    if block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
    else:
        settings = yaml.safe_load(block.text)
        for key, values in settings.pop("hydra", {}).get("sweeper", {}).get("params", {}).items():
            for value in str(values).split(","):
                load_config([f"{key}={value}"])
        build_config(settings)


def test_links_and_images_lead_somewhere() -> None:
    generated = {"configuration.md", *(f"notebooks/{script.stem}.md" for script in (ROOT / "notebooks").glob("*.py"))}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path = target.partition("#")[0]
            if "://" in target or not path:
                continue
            there = (page.parent / path).exists() or (page.parent.name == "docs" and path in generated)
            assert there, f"{page.name}: {target}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra mini_distill[docs]")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)],
        capture_output=True,
        text=True,
        env={"NO_MKDOCS_2_WARNING": "1", "PATH": ""},
    )
    assert built.returncode == 0, built.stdout + built.stderr
    reference = (tmp_path / "configuration" / "index.html").read_text(encoding="utf-8")
    missing = [key for key in itertools.chain(md_known_keys()) if key.count(".") and f"<code>{key}</code>" not in reference]
    assert not missing, missing
