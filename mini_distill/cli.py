"""From a command line to a checked configuration: Hydra composes, every user error ends in one line and an exit code."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .config import Config, build_config, did_you_mean
from .errors import ConfigError, MiniDistillError, Preempted, Problem


def config_dir() -> Path:
    """The folder of presets: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def run_command(task: str, config_name: str = "train") -> None:
    """The body of every verb: compose the command line's configuration, check it, run `task`, exit with its code.

    `task` is `module:function`, imported only once the configuration is known to be good. Does not return; raises SystemExit with the exit code of RELIABILITY (0 finished, 2 configuration, 3 data, …).
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach us whole, instead of being printed by Hydra
    exit_codes = [0]

    def job(composed: DictConfig) -> None:
        exit_codes.append(run_job(task, composed))

    try:
        sys.argv[1:] = prepare_overrides(sys.argv[1:])
        _hydra_main(job, config_name)
    except MiniDistillError as error:
        exit_codes.append(report(error))
    except KeyboardInterrupt:
        print("error: interrupted before there was anything to save.", file=sys.stderr)
        exit_codes.append(130)
    sys.exit(max(exit_codes))


def run_job(task: str, composed: DictConfig) -> int:
    """One job of a command line or of a sweep: its exit code."""
    debug = False
    try:
        config = build_config(composed)
        debug = config.debug
        if config.output_dir is None:
            config.output_dir = f"runs/{run_name(_job_overrides())}"
        module, function = task.split(":")
        getattr(importlib.import_module(module), function)(config)
        return 0
    except MiniDistillError as error:
        if debug:
            traceback.print_exc()
        return report(error)


def load_config(overrides: Sequence[str] = (), config_name: str = "train") -> Config:
    """The checked configuration that a command line with these overrides gives, for use from Python.

    Raises:
        ConfigError: with every problem found.
    """
    from hydra import compose, initialize_config_dir

    _store_contract()
    overrides = prepare_overrides(list(overrides))
    with _one_line_hydra_errors(), initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose(config_name, list(overrides))
    config: Config = build_config(composed)
    if config.output_dir is None:
        config.output_dir = f"runs/{run_name(overrides)}"
    return config


def report(error: MiniDistillError) -> int:
    """Print one `error:` line a problem, last on stderr, and give the exit code."""
    sys.stdout.flush()
    prefix = "" if isinstance(error, Preempted) else "error: "
    for problem in error.problems:
        print(f"{prefix}{problem}", file=sys.stderr)
    return error.exit_code


# ------------------------------------------------------------------------------------------------------------------- overrides


def prepare_overrides(arguments: list[str]) -> list[str]:
    """Check presets, and let every key through to `build_config`, which reports all problems together.

    Hydra stops at the first key that no YAML mentions; as "add or override" (`++key=value`) it composes, and our own check answers.

    Raises:
        ConfigError: presets that do not exist, with the ones that do.
    """
    searched = [config_dir(), *_user_config_dirs(arguments)]
    groups = {path.name for folder in searched for path in folder.iterdir() if path.is_dir()}
    prepared, problems = [], []
    for argument in arguments:
        match = re.match(r"^([A-Za-z_][\w.]*)=(.*)$", argument, flags=re.DOTALL)
        if match is None:
            prepared.append(argument)
            continue
        key, value = match.groups()
        if key in groups:
            problems += _missing_presets(key, value, searched)
        prepared.append(argument if key in groups or key.startswith("hydra.") else f"++{argument}")  # add or override
    if problems:
        raise ConfigError.from_problems(problems)
    return prepared


def _user_config_dirs(arguments: list[str]) -> list[Path]:
    given = [a.split("=", 1)[1] for a in arguments if a.startswith(("--config-dir=", "-cd="))]
    given += [b for a, b in pairwise(arguments) if a in ("--config-dir", "-cd")]
    return [Path(folder) for folder in given if Path(folder).is_dir()]


def _missing_presets(group: str, value: str, searched: list[Path]) -> list[Problem]:
    presets = sorted({path.stem for folder in searched for path in (folder / group).glob("*.yaml")})
    chosen = [v.strip() for v in value.strip("[]").split(",")]
    return [
        Problem(group, f"no preset '{name}' (choices: {', '.join(presets)})", did_you_mean(name, presets))
        for name in chosen
        if name not in presets and name != "null"
    ]


def run_name(overrides: Sequence[str]) -> str:
    """A folder name for these overrides: the same command finds its run again, another command gets another run."""
    ignored = ("output_dir=", "resume=", "resume_allow=", "debug=", "tracking", "hydra")
    kept = sorted(o.lstrip("+") for o in overrides if not o.lstrip("+").startswith(ignored))
    name = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", ",".join(kept).replace(",", "+")).strip("-.") or "default"
    if len(name) > 100 or name != "+".join(kept):  # shortened or cleaned: the hash keeps different commands apart
        name = name[:90] + "-" + hashlib.sha256("\n".join(kept).encode()).hexdigest()[:8] if kept else "default"
    return name


# ----------------------------------------------------------------------------------------------------------------------- hydra


def _hydra_main(job: Callable[[DictConfig], None], config_name: str) -> None:
    import hydra

    _store_contract()

    with _one_line_hydra_errors():
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(job)()


def _store_contract() -> None:
    """Every setting with its default, under the presets, so that --help and --cfg show them all."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="contract", node=OmegaConf.to_container(OmegaConf.structured(Config)))


class _one_line_hydra_errors:
    """Hydra's, OmegaConf's and YAML's exceptions as ConfigErrors."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
        from yaml import MarkedYAMLError

        if isinstance(error, MarkedYAMLError):
            mark = error.problem_mark
            where = f"{Path(mark.name).name}:{mark.line + 1}" if mark else "configuration"
            raise ConfigError(where, f"not valid YAML: {error.problem}") from error
        if isinstance(error, HydraException | OmegaConfBaseException):
            first = str(error).strip().split("\n")[0]
            raise ConfigError("command line", first, "See --help for the settings.") from error


def _job_overrides() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)
