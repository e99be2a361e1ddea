"""One page of HTML about a run, several runs or a sweep, which opens offline.

python -m mini_distill.report runs/default                             what was kept, and where the student differs from its teacher
python -m mini_distill.report runs/seed0 runs/seed1 runs/other         beside each other, seeds together
python -m mini_distill.report multirun/<sweep> --metric eval/forward_kl   ranked, with what each swept setting did
"""

from __future__ import annotations

if __name__ == "__main__":
    from mini_distill.starting import answer_signals

    answer_signals()

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from .cli import report as report_error
from .errors import ConfigError, MiniDistillError
from .evaluation.printable import printable
from .reporting.comparison import warning_of_text
from .reporting.measured import Measured, check_something_is_measured, open_measured
from .reporting.page import page_of_run, page_of_several, page_of_sweep
from .reporting.sweep import Sweep, is_sweep, open_sweep, runs_below
from .reporting.verdict import as_text, best_of_sweep
from .storage import atomic_write_text, storage_errors


def report(paths: Sequence[Path | str] | Path | str, output: Path | str | None = None, metric: str | None = None) -> Path:
    """Write the page.

    Args:
        paths: Folders of runs or evaluations, or a sweep's folder, which holds runs; one alone need not be a list.
        output: The file; None: `report.html` in the folder, or where there are several in the current one.
        metric: Of summary.json, by which the runs of a sweep are ranked; None: their `evaluation.best_metric`.

    Returns:
        The file.

    Raises:
        ConfigError: a folder is not there, is none of these, or has nothing to show yet; or no run of a sweep has the metric.
        StorageError: a file of a folder is damaged, or the page cannot be written.
    """
    return _written(paths, output, metric)[0]


def _written(paths: Sequence[Path | str] | Path | str, output: Path | str | None, metric: str | None) -> tuple[Path, list[str]]:
    """Write the page; gives the file, and what a terminal shows of it."""
    folders = [Path(path).expanduser() for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not folders:
        raise ConfigError("folder", "none was given", "Give the output_dir of a run.")
    with storage_errors(", ".join(map(str, folders)), "read"):
        page, lines = _page(folders, metric)
    file = Path(output).expanduser() if output is not None else (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if file.is_dir():
        raise ConfigError("--output", f"'{file}' is a folder, expected a file", f"Give {file / 'report.html'}.")
    atomic_write_text(file, page)
    return file, lines


def _page(folders: list[Path], metric: str | None) -> tuple[str, list[str]]:
    if len(folders) == 1 and is_sweep(folders[0]):
        sweep = open_sweep(folders[0], metric)
        return page_of_sweep(sweep), list(_lines_of_sweep(sweep))
    if metric is not None:
        raise ConfigError(
            "--metric", "ranks the runs of a sweep, and no sweep's folder was given", "Leave it out, or give the sweep alone."
        )
    runs = _open_all(folders)
    page = page_of_run(runs[0]) if len(runs) == 1 else page_of_several(runs)
    return page, [f"Not finished: {run.path} {run.unfinished}" for run in runs if run.unfinished]


def _lines_of_sweep(sweep: Sweep) -> Iterator[str]:
    """What to do next: what is missing, which setting is the best, and how to train it again."""
    for missing in sweep.missing:
        yield f"Not finished: {missing.name}: {missing.state}, {missing.why}"
    if warning := warning_of_text(sweep.groups):
        yield warning
    yield as_text(best_of_sweep(sweep))
    if sweep.command:
        yield f"To train it again: {sweep.command}"


def _open_all(folders: list[Path]) -> list[Measured]:
    """Every run, each once; those of a sweep one by one."""
    each = [run for folder in folders for run in (runs_below(folder) if is_sweep(folder) else [folder])]
    runs = [open_measured(folder) for folder in {folder.resolve(): folder for folder in each}.values()]
    for run in runs:
        check_something_is_measured(run)
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mini_distill.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="folder", help="of a run, of an evaluation, or of a sweep")
    parser.add_argument("--output", type=Path, help="the file (default: report.html in the folder; of several, in the current folder)")
    parser.add_argument("--metric", help="a key of summary.json that ranks the runs of a sweep (default: their evaluation.best_metric)")
    given = parser.parse_args(arguments)
    try:
        file, lines = _written(given.folders, given.output, given.metric)
    except MiniDistillError as error:
        return report_error(error)
    for line in lines:
        print(printable(line))
    print(f"The page: {file}")
    return 0


class CallableReport(ModuleType):
    """The module `mini_distill.report`, which Python also binds to the package's name `report`: so that can be called, too."""

    def __call__(self, paths: Sequence[Path | str] | Path | str, output: Path | str | None = None, metric: str | None = None) -> Path:
        """As `report`."""
        return report(paths, output, metric)


if __name__ == "__main__":
    sys.exit(main())

sys.modules[__name__].__class__ = CallableReport
