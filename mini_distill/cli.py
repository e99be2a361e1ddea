"""From a command line to a checked configuration: Hydra composes, every user error ends in one line and an exit code."""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from .cache_to_look_at import with_settings_of_cache
from .config import CacheCommand, CacheLookCommand, Config, EvaluateCommand, GenerateCommand, PlanCommand
from .contract import build_config, resolved
from .errors import ConfigError, MiniDistillError
from .out_of_memory import is_out_of_memory, out_of_memory
from .overrides import fixed_keys, missing_preset, prepare_overrides, run_name
from .redaction import print_traceback
from .run_to_measure import with_settings_of_run
from .running_jobs import RunningJobs, end_with_the_sweep, passing_on_signals
from .starting import begin_work, told
from .targets import cache_command, default_folder
from .written import read_object

if TYPE_CHECKING:
    from hydra.errors import MissingConfigException
    from yaml import MarkedYAMLError

CONTRACTS = {
    "contract": Config,
    "cache_contract": CacheCommand,
    "evaluate_contract": EvaluateCommand,
    "generate_contract": GenerateCommand,
    "plan_contract": PlanCommand,
}
"""The settings of each verb by the name under which its YAML file takes their defaults."""

TRAIN = "mini_distill.train:train"
"""The verb whose sweeps have a process for each job; those of others run one after the other in this one."""
SWEEP_DIR = "hydra.sweep.dir="
RESULTS = {Config: "runs", EvaluateCommand: "evaluations", GenerateCommand: "generated"}
"""Where what comes out of a verb goes when `output_dir` is not given."""
RESULTS_OF_RUN = {EvaluateCommand: "evaluation", GenerateCommand: "generated"}
"""The same, within the folder of the run that the verb is about."""


def config_dir() -> Path:
    """The folder of presets: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def run_command(task: str, config_name: str = "train", schema: type = Config) -> None:
    """The body of every verb: compose the command line's configuration, check it, run `task`, exit with its code.

    The configuration is `configs/<config_name>.yaml` and has the shape of `schema`. `task` is `module:function`, imported only once the configuration is known to be good. Does not return; raises SystemExit with
    the exit code (0 finished, 2 configuration, 3 data, …; of a sweep, the highest of its jobs).
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us whole, instead of being printed by Hydra
    exit_codes, started, jobs = [0], time.time(), None

    def job(composed: DictConfig) -> float | None:
        exit_codes.append(run_job(task, composed, schema, folders, jobs))
        if exit_codes[-1] in (130, 143) and jobs is None:
            sys.exit(exit_codes[-1])  # who stops a job in this process does not want the sweep's next one to start
        return None if exit_codes[-1] else value_of(composed)

    try:
        end_with_the_sweep()  # of which this may be a job
        sys.argv[1:], folders = _prepare_arguments(sys.argv[1:])
        sweep = next((text.partition("=")[2] for text in sys.argv if text.startswith(SWEEP_DIR)), None)
        with passing_on_signals() if task == TRAIN and sweep is not None else nullcontext() as jobs:
            _hydra_main(job, config_name, folders)
            stopped = None if jobs is None else jobs.exit_code
        if sweep is not None:
            exit_codes.append(_end_of_sweep(Path(sweep.strip('"')), started, stopped))
    except MiniDistillError as error:
        exit_codes.append(report(error))
    except KeyboardInterrupt:
        print("error: interrupted. The same command goes on from what was saved, if there is anything.", file=sys.stderr)
        exit_codes.append(130)
    sys.exit(max(exit_codes))


def run_job(task: str, composed: DictConfig, schema: type = Config, folders: Sequence[Path] = (), jobs: RunningJobs | None = None) -> int:
    """One job of a command line or of a sweep: its exit code. Our own bugs are 1, with their traceback."""
    try:
        if task == TRAIN and (sweep := _sweep_folder()) is not None:
            begin_work()
            return _run_job_of_sweep(sweep, composed, folders, jobs)
        config = _checked(composed, _job_overrides, schema)
        module, name = task.split(":")
        function = getattr(importlib.import_module(module), name)
        begin_work()
        function(config)
        return 0
    except MiniDistillError as error:
        if composed.get("debug") is True:
            print_traceback()
        return report(error)
    except Exception as error:
        if is_out_of_memory(error):
            return report(out_of_memory(error))
        print_traceback()
        return 1


def value_of(composed: DictConfig) -> float | None:
    """What a sweeper that searches (Optuna) is told of a job: `evaluation.best_metric` of its run; None where there is none."""
    folder, metric = composed.get("output_dir"), OmegaConf.select(composed, "evaluation.best_metric")
    if folder is None or metric is None:
        return None
    value: float | None = read_object(Path(folder) / "summary.json").get(metric)
    return value


def _run_job_of_sweep(sweep: Path, composed: DictConfig, folders: Sequence[Path], jobs: RunningJobs | None) -> int:
    from hydra.core.hydra_config import HydraConfig

    from .sweep import run_as_job

    overrides, hydra = _job_overrides(), HydraConfig.get()
    _check_direction(str(hydra.sweeper.get("direction", "")), composed)
    if composed.get("output_dir") is None:
        same = set(hydra.job.config.override_dirname.exclude_keys)
        composed["output_dir"] = str(sweep / run_name([text for text in overrides if text.lstrip("+~").partition("=")[0] not in same]))
    config = _checked(composed, lambda: overrides, Config)
    flags = [argument for folder in folders if folder != config_dir() for argument in ("--config-dir", str(folder))]
    flags += [text for text in hydra.overrides.hydra if text.startswith("hydra/")]  # the sweeper that a preset has settings for
    return run_as_job(config, overrides, hydra.job.num, int(hydra.launcher.get("n_jobs") or 1), flags, jobs)


def _check_direction(direction: str, composed: DictConfig) -> None:
    """A search (Optuna) that prefers what the runs call worse would find the worst."""
    best = OmegaConf.select(composed, "evaluation.best_is")
    wrong = {"lowest": "maximize", "highest": "minimize"}.get(best, "")
    if wrong and direction.lower().endswith(wrong):
        what = f"{wrong}, and the best evaluation.best_metric is the {best}"
        raise ConfigError("hydra.sweeper.direction", what, "Set it to the other, or set evaluation.best_is.")


def _sweep_folder() -> Path | None:
    """Of the sweep that is going on, if one is."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir)


def _end_of_sweep(sweep: Path, started: float, stopped: int | None) -> int:
    """Say how the jobs ended, and give the exit code: that of a sweep that was stopped, or else the highest."""
    from .sweep import exit_code_of, summary_of

    if summary := summary_of(sweep, was_stopped=stopped is not None):
        print(summary, flush=True)
    if stopped is not None:
        sys.exit(stopped)
    return exit_code_of(sweep, started)


def load_config(overrides: Sequence[str] = (), config_name: str = "train", schema: type = Config) -> Any:
    """The checked configuration that a command line with these overrides gives, for use from Python.

    Raises:
        ConfigError: with every problem found.
    """
    from hydra import compose, initialize_config_dir

    _store_contract()
    overrides = prepare_overrides(overrides, [config_dir()])
    with _one_line_errors([config_dir()]), initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose(config_name, overrides)
    return _checked(composed, lambda: list(overrides), schema)


def _checked(composed: DictConfig, overrides: Callable[[], Sequence[str]], schema: type) -> Any:
    """The configuration, complete, with folders for what comes out."""
    resolved(composed)  # a ${…} that leads nowhere is named before anything follows it
    if schema in RESULTS_OF_RUN:
        composed = with_settings_of_run(composed, overrides(), RESULTS_OF_RUN[schema])
    if schema is CacheLookCommand:
        composed = with_settings_of_cache(composed, overrides())
    config = build_config(composed, schema)
    if schema in RESULTS and config.output_dir is None:
        config.output_dir = f"{RESULTS[schema]}/{run_name(overrides())}"
    if isinstance(config, Config) and config.teacher.cache_kind is not None and config.teacher.cache_dir is None:
        config.teacher.cache_dir = str(default_folder(cache_command(config)))
    return config


def report(error: MiniDistillError) -> int:
    """Print one `error:` line a problem, last on stderr, and give the exit code."""
    sys.stdout.flush()
    for line in error.lines():
        print(line, file=sys.stderr)
    told(error.exit_code)
    return error.exit_code


# ------------------------------------------------------------------------------------------------------------------- arguments


def _prepare_arguments(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """The command line with its overrides made ready for Hydra, wherever they stand among the flags; and the folders of presets."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _refuse_arguments  # type: ignore[method-assign]
    given = parser.parse_intermixed_args(arguments)
    flags = list(arguments)
    for text in given.overrides:
        flags.remove(text)
    folders = [config_dir(), *_user_folders(given.config_dir)]
    if given.shell_completion:
        return arguments, folders
    overrides = prepare_overrides(given.overrides, folders, sweep=given.multirun)
    if given.multirun:
        fixed = ",".join(f'"{key}"' for key in fixed_keys(overrides))
        if not any(text.startswith(SWEEP_DIR) for text in overrides):
            overrides.append(f'{SWEEP_DIR}"multirun/{run_name(overrides)}"')  # the same command finds its sweep again
        overrides.append(f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]")  # and its jobs, named after what is swept
    return [*overrides, *flags], folders


def _refuse_arguments(message: str) -> NoReturn:
    raise ConfigError("command line", message, "--help shows how it is used.")


def _user_folders(config_dir: str | None) -> list[Path]:
    if config_dir is None:
        return []
    if not Path(config_dir).is_dir():
        raise ConfigError("--config-dir", f"no such folder (got '{config_dir}')")
    return [Path(config_dir)]


# ----------------------------------------------------------------------------------------------------------------------- hydra


def _hydra_main(job: Callable[[DictConfig], Any], config_name: str, folders: list[Path]) -> None:
    import hydra

    _store_contract()
    with _one_line_errors(folders):
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(job)()


@cache
def _store_contract() -> None:
    """Every setting with its default, under the presets, so that --help and --cfg show them all; once in a process."""
    from hydra.core.config_store import ConfigStore

    for name, schema in CONTRACTS.items():
        ConfigStore.instance().store(name=name, node=OmegaConf.to_container(OmegaConf.structured(schema)))


def _job_overrides() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))  # type: ignore[arg-type]


@contextmanager
def _one_line_errors(folders: list[Path]) -> Iterator[None]:
    """What goes wrong while YAML files are read and composed, as ConfigErrors that name the file."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError, YAMLError

    try:
        yield
    except MarkedYAMLError as error:
        raise _invalid_yaml(error) from error
    except YAMLError as error:  # a character that no YAML file may hold
        what, _, place = str(error).partition('\n  in "')
        raise ConfigError(place.partition('"')[0] or "configuration", f"not valid YAML: {what}") from error
    except MissingConfigException as error:
        raise _missing_file(error, folders) from error
    except UnicodeDecodeError as error:
        raise ConfigError(_first_not_utf8(folders), "not UTF-8 text", "Save the file as UTF-8.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _not_composed(str(error)) from error
    except (ValueError, RuntimeError) as error:
        if str(error).startswith("No trials are completed"):
            return  # of a search: each job has said why it failed
        if (match := re.match(r"Invalid defaults list in '(.+?)', (.*)", str(error))) is not None:
            raise ConfigError(f"{match[1]}.yaml", match[2], "A list has a line '- group: preset' for each.") from error
        if "you indeed on a slurm cluster" in str(error):
            raise ConfigError(
                "hydra/launcher", "there is no srun here", "Start from a node of the cluster, or take submitit_local."
            ) from error
        raise


def _invalid_yaml(error: MarkedYAMLError) -> ConfigError:
    mark, begun = error.problem_mark, error.context_mark
    where = f"{mark.name}:{mark.line + 1}" if mark else "configuration"
    context = f" ({error.context} of line {begun.line + 1})" if begun and error.context else ""
    return ConfigError(where, f"not valid YAML: {error.problem}{context}")


def _missing_file(error: MissingConfigException, folders: list[Path]) -> ConfigError:
    """A preset that a defaults list names, and the line that names it."""
    group, _, preset = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return _not_composed(str(error))
    problem = missing_preset(group, preset, error.options or [])
    pattern = re.compile(rf"\b{re.escape(group)}(@\S+)?\s*:\s*['\"]?{re.escape(preset)}\b")
    for path in (path for folder in folders for path in sorted(folder.rglob("*.yaml"))):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if pattern.search(line):
                return ConfigError(f"{path}:{number}", f"{group}: {problem.what}", problem.remedy)
    return ConfigError(problem.where, problem.what, problem.remedy)


def _first_not_utf8(folders: list[Path]) -> str:
    for path in (path for folder in folders for path in sorted(folder.rglob("*.yaml"))):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return str(path)
    return "configuration"


def _not_composed(message: str) -> ConfigError:
    """Hydra's words without its object dump; `In 'experiment/mine': …` names the file."""
    noise = ("full_key:", "object_type=", "reference_type=", "See http")
    text = " ".join(line.strip() for line in message.splitlines() if not line.strip().startswith(noise))
    text = text.replace("Cannot merge DictConfig with ListConfig", "got a list, expected settings (name: value)")
    match = re.match(r"In '(.+?)': (?:\w+ raised while composing config: *)?(.*)", text)
    return ConfigError(f"{match[1]}.yaml", match[2]) if match else ConfigError("command line", text, "--help lists groups and settings.")
