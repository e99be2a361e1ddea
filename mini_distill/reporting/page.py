"""From what was read to one page of HTML: no script, nothing fetched, all text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..evaluation.printable import printable
from . import comparison, run_page, sweep
from .figures import Figure, Table, figures_table, text_of
from .measured import Measured
from .settings import settings_tables


def shown_text(value: Any) -> Any:
    """Whatever a template shows: text of models and data with its control characters spelt out. Escaping is the environment's."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def environment() -> Environment:
    """The templates; an unknown name in one is an error, not an empty text."""
    made = Environment(
        loader=PackageLoader("mini_distill.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.tests["figure"] = lambda value: isinstance(value, Figure)
    made.globals["version"] = __version__
    return made


def page_of_run(found: Measured) -> str:
    """One run or evaluation."""
    figures, efficiency, tasks, generations = (
        figures_table(found),
        run_page.efficiency(found),
        run_page.tasks(found),
        run_page.generations(found),
    )
    tiles = run_page.tiles(found)
    in_tables = {key for table in (figures, efficiency, tasks, generations) for key in _keys(table)} | {tile.figure.keys for tile in tiles}
    return (
        environment()
        .get_template("run.html.jinja")
        .render(
            title=found.name,
            found=found,
            tiles=tiles,
            sentences=list(run_page.in_words(found)),
            figures=figures,
            efficiency=efficiency,
            tasks=tasks,
            generations=generations,
            curves=run_page.curves(found),
            reliability=run_page.reliability(found),
            slices=run_page.slices(found),
            differences=run_page.differences(found),
            heat=run_page.HEAT,
            samples=run_page.samples(found),
            settings=settings_tables(found),
            provenance=run_page.provenance(found),
            not_measured=list(run_page.not_measured(found)),
            further=run_page.further(found, in_tables),
        )
    )


def page_of_several(runs: Sequence[Measured]) -> str:
    """Runs beside each other."""
    groups = comparison.grouped(runs)
    return (
        environment()
        .get_template("comparison.html.jinja")
        .render(
            title=f"{len(runs)} runs",
            sweep=None,
            runs=runs,
            overview=comparison.overview(groups),
            trade_offs=comparison.trade_offs(groups),
            overlaid=comparison.overlaid(groups),
            differing=comparison.settings_that_differ(groups),
        )
    )


def page_of_sweep(found: sweep.Sweep) -> str:
    """A sweep."""
    best = found.best.figure(found.metric)
    return (
        environment()
        .get_template("comparison.html.jinja")
        .render(
            title=f"Sweep {found.path.resolve().name}",
            sweep=found,
            runs=[run for group in found.groups for run in group.members],
            best=best,
            overview=comparison.overview(found.groups, [factor.keys[0] for factor in found.factors[:4]], first=found.metric),
            effects=list(sweep.effects(found)),
            is_full_grid=sweep.is_full_grid(found),
            trade_offs=comparison.trade_offs(found.groups),
            overlaid=comparison.overlaid(found.groups),
            differing=None,
            missing=Table(
                "Failed and unfinished", ["run", "state", "why"], [[m.name, m.state, m.why] for m in found.missing], numeric=False
            ),
            text_of=text_of,
        )
    )


def _keys(table: Table | None) -> set[str]:
    cells = [cell for row in table.rows for cell in row] if table is not None else []
    return {key for cell in cells if isinstance(cell, Figure) for key in cell.keys.split()}
