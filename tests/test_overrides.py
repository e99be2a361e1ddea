"""The words of a command line: read, checked all together, and turned into a folder's name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_distill.cli import config_dir, load_config
from mini_distill.errors import ConfigError
from mini_distill.overrides import prepare_overrides, run_name

# ------------------------------------------------------------------------------------------------------------------------- lines


def lines(*overrides: str, folder: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        prepare_overrides(overrides, [config_dir(), *([folder] if folder else [])])
    return [str(problem) for problem in raised.value.problems]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("max_steps", "command line: got 'max_steps', expected group=preset or key=value. --help lists them."),
        ("=4", "command line: got '=4', expected group=preset or key=value. --help lists them."),
        ("trainer.max_steps=[1,", "trainer.max_steps: cannot read '[1,'. A list is [a,b], a mapping is {name: value}."),
        ("data.path=a=b", "data.path: cannot read 'a=b'. Quote a text of special characters: 'data.path=\"a=b\"'."),
        ("data.path=a,b", "data.path: got several values (a,b), expected one. Sweep with -m, or quote a text: 'data.path=\"a,b\"'."),
        ("tracking=wanb", "tracking: no preset 'wanb' (choices: none, tensorboard, wandb). Did you mean 'wandb'?"),
        ("tracking=", "tracking: got no preset's name (choices: none, tensorboard, wandb)."),
        ("tracking=null", "tracking: got no preset's name (choices: none, tensorboard, wandb)."),
        ("tracking=[wandb,none,x]", "tracking: no preset 'x' (choices: none, tensorboard, wandb)."),
        ("tracking=../tracking/none.yml", "tracking: no preset '../tracking/none.yml' (choices: none, tensorboard, wandb)."),
        ("~teacher", "teacher: cannot be left out (got '~'). Choose teacher=none."),
        ("~trainer", "trainer: cannot be left out (got '~'). Choose one of default."),
    ],
)
def test_an_override_that_cannot_be_used_is_one_line_that_says_what_to_write(override: str, line: str) -> None:
    assert lines(override) == [line]


def test_all_overrides_are_reported_together() -> None:
    found = lines("teacher=lama3", "trainer.max_steps=[1", "seed", "data.path=a,b", "student=mini_2m")
    assert [line.split(":")[0] for line in found] == ["teacher", "trainer.max_steps", "command line", "data.path"]


@pytest.mark.parametrize("path", ["it's.txt", "my file (1).txt", "a=b", "a,b", "~/x", 'say "x".txt', "[draft].txt"])
def test_the_quoting_that_is_proposed_gives_the_path_that_was_meant(path: str, tmp_path: Path) -> None:
    (line,) = lines(f"data.path={path}")
    if "Quote" in line or "quote" in line:
        proposed = line.rsplit(": ", 1)[1].removesuffix(".")
        (override,) = shlex.split(proposed)
        with pytest.raises(ConfigError, match=re.escape(path)):  # it is not there, but it is this path
            load_config(["data=text", override])


def test_the_folder_of_a_run_can_be_typed_as_it_stands() -> None:
    """`runs/seed=1` is what a run with that override is called, and Hydra's grammar has no `=` within a value."""
    folder = "runs/control=true+seed=0"
    assert load_config([f"output_dir={folder}-again"]).output_dir == f"{folder}-again"
    assert prepare_overrides([f"+student.path={folder}"], [config_dir()]) == [f'++student.path="{folder}"']


def test_overrides_of_hydra_itself_pass_unchanged() -> None:
    overrides = ["hydra.verbose=true", "hydra/launcher=basic", "~objective.divergence_options.jsd_beta"]
    assert prepare_overrides(overrides, [config_dir()]) == overrides


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_plus_changes_nothing(plus: str) -> None:
    """Hydra's tutorials write +experiment=…, and without the plus others fail: here both are the same command."""
    given = [f"{plus}objective=jsd", f"{plus}trainer.max_steps=30", f"{plus}tracking.project=x"]
    config = load_config(given)
    assert (config.objective.divergence, config.trainer.max_steps, config.tracking.project) == ("jsd", 30, "x")
    assert config.output_dir == "runs/objective=jsd+trainer.max_steps=30"


def test_presets_of_a_users_folder_are_known_and_offered(tmp_path: Path) -> None:
    (tmp_path / "student" / "odd").mkdir(parents=True)
    (tmp_path / "student" / "tall.yaml").touch()
    (tmp_path / "student" / "odd" / "flat.yaml").touch()
    folders = [config_dir(), tmp_path]
    assert prepare_overrides(["student=tall", "experiment=null"], folders) == ["student=tall", "experiment=null"]
    assert prepare_overrides(["student=odd/flat"], folders) == ["student=odd/flat"]
    (line,) = lines("student=tal", folder=tmp_path)
    assert "tall" in line and "mini_2m" in line and line.endswith("Did you mean 'tall'?")


@pytest.mark.parametrize("sweep", ["teacher=hf,none", "teacher=choice(hf,none)", "teacher=glob(gemma*)", "seed=range(1,4)"])
def test_several_values_pass_in_a_sweep_only(sweep: str) -> None:
    assert len(prepare_overrides([sweep], [config_dir()], sweep=True)) == 1
    assert "-m" in lines(sweep)[0]


def test_a_preset_misspelt_within_a_sweep_is_found() -> None:
    with pytest.raises(ConfigError, match="no preset 'nope'"):
        prepare_overrides(["teacher=choice(hf,nope)"], [config_dir()], sweep=True)


# ------------------------------------------------------------------------------------------------------------- the folder's name

OVERRIDES = st.lists(
    st.builds("{}={}".format, st.sampled_from(["seed", "data.path", "teacher", "a+b", "x"]), st.text(max_size=120)),
    max_size=4,
    unique_by=lambda text: text.partition("=")[0],
)


@given(OVERRIDES)
def test_a_run_name_is_one_safe_path_component_of_bounded_length(overrides: list[str]) -> None:
    name = run_name(overrides)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*", name)
    assert len(name) <= 100
    assert not name.endswith(".") and name == Path(name).name


@given(OVERRIDES, st.randoms(use_true_random=False))
def test_a_run_name_is_the_same_in_any_order(overrides: list[str], random: object) -> None:
    shuffled = overrides.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert run_name(shuffled) == run_name(overrides)


@given(OVERRIDES, OVERRIDES)
def test_different_overrides_have_different_run_names(one: list[str], other: list[str]) -> None:
    assert (run_name(one) == run_name(other)) == (sorted(one) == sorted(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["data.path=a/b"], ["data.path=a-b"]),
        (["data.path=a b"], ["data.path=a  b"]),
        (["x=1+y=2"], ["x=1", "y=2"]),
        (["data.path=" + "x" * 200 + "a"], ["data.path=" + "x" * 200 + "b"]),
        (["seed=1", "seed=2"], ["seed=2", "seed=1"]),
        ([], ["x=default"]),
        (["data.path=é"], ["data.path=è"]),
        (["data.path=.."], ["data.path=."]),
    ],
)
def test_commands_that_look_alike_have_different_run_names(one: list[str], other: list[str]) -> None:
    assert run_name(one) != run_name(other)


def test_a_plain_command_has_a_readable_run_name() -> None:
    assert run_name(["trainer.max_steps=300", "student=mini_2m"]) == "student=mini_2m+trainer.max_steps=300"


def test_what_does_not_change_the_run_does_not_change_its_name() -> None:
    besides = [
        "output_dir=x",
        "resume=never",
        "resume_allow=[data]",
        "debug=true",
        "tracking=wandb",
        "tracking.mode=offline",
        "hydra.verbose=true",
    ]
    assert run_name(["seed=1", *besides]) == "seed=1"
    assert run_name(besides) == "default"


def test_a_run_name_cannot_leave_the_folder_of_runs() -> None:
    for value in ("../../etc", "/etc/passwd", "..", ".", "a/../..", "\\..\\x", "\0", "~"):
        name = run_name([f"data.path={value}"])
        assert not {"/", "\\", "\0"} & set(name) and name not in (".", "..")
