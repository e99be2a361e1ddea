"""A run as Python sees it: `run = mini_distill.train([...])`, or `mini_distill.load_run(path)` for one on disk."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .cli import load_config
from .config import CacheCommand, Config, EvaluateCommand, GenerateCommand
from .errors import ConfigError, MiniDistillError
from .storage import near_path
from .written import read_object, read_rows, read_settings

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Run:
    """A run's folder, opened for reading.

    Attributes:
        path: The folder.
        config: Its settings, as nested plain values.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        file = self.path / "config.yaml"
        if not os.path.exists(file):  # False also for what cannot be a path, where that of Path raises
            what = f"'{path}' is not the folder of a run (no config.yaml)"
            raise ConfigError("path", what, near_path(self.path) or "Give the output_dir of a run.")
        self.config: dict[str, Any] = read_settings(file)

    @property
    def status(self) -> dict[str, Any]:
        """`state` (running, finished, preempted, failed), `step`, `exit_code`."""
        return read_object(self.path / "status.json")

    @property
    def summary(self) -> dict[str, Any]:
        """Every final number, keyed like the metrics; empty while the run is not finished."""
        return read_object(self.path / "summary.json")

    @property
    def metrics(self) -> pandas.DataFrame:
        """One row per logged step, indexed by it."""
        import pandas

        rows = read_rows(self.path / "metrics.jsonl")
        return pandas.DataFrame(rows).set_index("step") if rows else pandas.DataFrame()

    @cached_property
    def student(self) -> PreTrainedModel:
        """The finished student, in eval mode on the CPU."""
        from .models.loading import load_causal_lm

        return load_causal_lm(str(self._student_folder), where="path")

    @cached_property
    def teacher(self) -> PreTrainedModel | None:
        """The run's teacher, in eval mode on the CPU; None where it had none of its own (cached, server, none)."""
        import torch

        from .config import TeacherConfig
        from .teachers.load import load_teacher

        model = load_teacher(TeacherConfig(**self.config["teacher"]), torch.device("cpu"))
        return None if model is None else model.eval()

    @cached_property
    def details(self) -> dict[str, Any]:
        """`slices`, `reliability`, `differences` and `samples`: what is measured and is not a flat number."""
        return read_object(self.path / "details.json")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's."""
        from .models.loading import load_tokenizer

        return load_tokenizer(str(self._student_folder), where="path")

    def generate(self, prompt: str, max_new_tokens: int = 48, temperature: float = 0.0) -> str:
        """What the student writes after `prompt`.

        Args:
            prompt: Text.
            max_new_tokens: At most this many tokens.
            temperature: 0: greedy; above: sampled from torch's global generator.

        Raises:
            ConfigError: nothing to go on from: no text, and a tokenizer that begins none with a token of its own.
        """
        import torch

        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        if not ids.numel():
            raise ConfigError("prompt", "no token to go on from (got an empty text)", "Give the beginning of a text.")
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        pad = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        with torch.no_grad():
            written = self.student.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling
            )
        return str(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))

    def plot(self, *metrics: str) -> Figure:
        """Metrics against optimizer steps, one panel each.

        Args:
            metrics: Names of columns of `metrics`; none: the loss and its terms, and what was evaluated of the student.

        Raises:
            ConfigError: there is no such metric, or nothing has been logged.
        """
        frame = self.metrics
        wanted = list(metrics) or [name for name in PLOTTED if name in frame and frame[name].notna().any()]
        if unknown := [name for name in wanted if name not in frame]:
            raise ConfigError("metrics", f"no metric called '{unknown[0]}'", f"Known: {', '.join(frame.columns)}.")
        if not wanted:
            raise ConfigError(str(self.path), "nothing has been logged yet")
        figure = _figure(3.6 * len(wanted), 2.8)
        for axes, name in zip(figure.subplots(1, len(wanted), squeeze=False)[0], wanted, strict=True):
            values = frame[name].dropna()
            axes.plot(values.index, values, color="#0b6e99", lw=1.4, marker="o" if len(values) < 30 else "", ms=3)
            teacher = self.summary.get(name.replace("student_", "teacher_")) if "student_" in name else None
            if teacher is not None:
                axes.axhline(teacher, color="#c4500c", lw=1, ls="--", label="teacher")
                axes.legend(frameon=False)
            axes.set(title=name, xlabel="optimizer step")
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def report(self, output: Path | str | None = None) -> Path:
        """Write the page that `python -m mini_distill.report` makes, and give its path.

        Args:
            output: The file; None: `report.html` in the run's folder.
        """
        from .report import report

        return report([self.path], output)

    def __repr__(self) -> str:
        status = self.status
        return f"<Run {self.path} ({status.get('state', 'unknown')}, step {status.get('step', 0)})>"

    def _repr_markdown_(self) -> str:
        """The final table, in a notebook."""
        from .evaluation.table import markdown_table

        return markdown_table(self.summary) if self.summary else repr(self)

    @property
    def _student_folder(self) -> Path:
        folder = self.path / "student"
        if not folder.exists():
            raise ConfigError(
                str(self.path), f"no student yet ({self.status.get('state', 'unknown')})", "Run the same command again to finish it."
            )
        return folder


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot, which would keep it for ever, and which alone would teach a notebook to show it."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    return Shown(figsize=(width, height), layout="constrained")


PLOTTED = ("train/loss", "eval/student_nll", "eval/forward_kl", "eval/top1_agreement")


def load_run(path: Path | str) -> Run:
    """A run on disk.

    Raises:
        ConfigError: the folder is not one.
    """
    return Run(path)


def checked(config: Any, config_name: str, schema: type) -> Any:
    """A checked configuration of a verb, from one or from overrides as on the command line.

    Raises:
        ConfigError: with every problem found.
    """
    if isinstance(config, schema):
        return config
    if isinstance(config, str):
        raise ConfigError("config", f"got the text '{config}', expected a list of overrides", f"Give ['{config}'].")
    if not isinstance(config, Sequence) or not all(isinstance(text, str) for text in config):
        what = f"got {config!r:.60} ({type(config).__name__}), expected a list of overrides or a checked {schema.__name__}"
        raise ConfigError("config", what, "Give texts as on the command line, such as ['trainer.max_steps=200'].")
    return load_config(config, config_name, schema)


def called(verb: Callable[[Any], Any], settings: Any) -> Any:
    """What a verb gives; with debug=true its errors keep their traceback in a notebook's cell, too."""
    try:
        return verb(settings)
    except MiniDistillError as error:
        error.in_full = settings.debug
        raise


class CallableTrain(ModuleType):
    """The module `mini_distill.train`, which Python also binds to the package's name `train`: so that can be called, too."""

    def __call__(self, config: Config | Sequence[str] = ()) -> Run:
        """Distil, and give the run.

        Args:
            config: Overrides as on the command line (`["student=mini_2m", "trainer.max_steps=200"]`), or a checked configuration.

        Raises:
            MiniDistillError: any problem that is the user's to mend.
        """
        settings: Config = checked(config, "train", Config)
        called(self.train, settings)
        return Run(str(settings.output_dir))


class CallableCache(ModuleType):
    """The module `mini_distill.cache`, which can be called in the same way."""

    def __call__(self, config: CacheCommand | Sequence[str] = ()) -> dict[str, Any]:
        """Write a teacher's targets down, and give the summary: tokens, bytes per token, captured mass, seconds.

        Args:
            config: Overrides as on the command line (`["cache.dir=targets", "cache.k=16"]`), or a checked configuration.

        Raises:
            MiniDistillError: any problem that is the user's to mend.
        """
        summary: dict[str, Any] = called(self.build, checked(config, "cache", CacheCommand))
        return summary


class CallableEvaluate(ModuleType):
    """The module `mini_distill.evaluate`, which can be called in the same way."""

    def __call__(self, config: EvaluateCommand | Sequence[str] = ()) -> dict[str, Any]:
        """Measure a model, and give every number, keyed like the metrics.

        Args:
            config: Overrides as on the command line (`["model=runs/default"]`), or a checked configuration.

        Raises:
            MiniDistillError: any problem that is the user's to mend.
        """
        summary: dict[str, Any] = called(self.evaluate, checked(config, "evaluate", EvaluateCommand))
        return summary


class CallableGenerate(ModuleType):
    """The module `mini_distill.generate`, which can be called in the same way."""

    def __call__(self, config: GenerateCommand | Sequence[str] = ()) -> dict[str, Any]:
        """Let a model go on from the prompts of the data, and give the summary: prompts, rows, tokens, cut off, left out, seconds.

        Args:
            config: Overrides as on the command line (`["output_dir=answers"]`), or a checked configuration.

        Raises:
            MiniDistillError: any problem that is the user's to mend.
        """
        summary: dict[str, Any] = called(self.generate, checked(config, "generate", GenerateCommand))
        return summary
