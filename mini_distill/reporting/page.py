"""From what was read to one page of HTML: no script, nothing fetched, all text escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from .. import __version__
from ..evaluation.printable import printable
from . import close_look, comparison, run_page, sweep, task_tables, verdict
from .figures import Figure, Numbered, Table, figures_table
from .measured import Measured
from .settings import settings_tables


def shown_text(value: Any) -> Any:
    """Whatever a template shows: text of models and data with its control characters spelt out. Escaping is the environment's."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def breakable(path: str) -> Markup:
    """The path of a setting, escaped, that goes on in the next line behind a dot or an underscore and not within a word."""
    return Markup(re.sub(r"([._])(?=\w)", r"\1<wbr>", str(escape(printable(path)))))


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
    made.tests["numbered"] = lambda value: isinstance(value, Numbered)
    made.filters["breakable"] = breakable
    made.globals["version"] = __version__
    return made


def page_of_run(found: Measured) -> str:
    """One run or evaluation."""
    figures, efficiency, generations = figures_table(found), run_page.efficiency(found), run_page.generations(found)
    tasks = [table for table in (task_tables.skills(found), task_tables.stereotypes(found)) if table is not None]
    tiles = run_page.tiles(found)
    in_tables = {key for table in (figures, efficiency, *tasks, generations) for key in _keys(table)} | {tile.figure.keys for tile in tiles}
    in_tables |= task_tables.repeated(found)
    return (
        environment()
        .get_template("run.html.jinja")
        .render(
            title=found.name,
            found=found,
            tiles=tiles,
            about=run_page.about(found),
            answers=verdict.answers_of_run(found),
            figures=figures,
            efficiency=efficiency,
            tasks=tasks,
            generations=generations,
            held_out=run_page.held_out(found),
            drawn_items=run_page.drawn_items(found),
            decoding=run_page.decoding(found),
            timed_on=run_page.timed_on(found),
            curves=run_page.curves(found),
            reliability=close_look.reliability(found),
            slices=close_look.slices(found),
            differences=close_look.differences(found),
            heat=close_look.HEAT,
            samples=close_look.samples(found),
            settings=settings_tables(found),
            provenance=run_page.provenance(found),
            not_measured=list(run_page.not_measured(found)),
            further=run_page.further(found, in_tables),
        )
    )


def page_of_several(runs: Sequence[Measured]) -> str:
    """Runs beside each other."""
    groups = comparison.grouped(runs)
    known = (group for group in groups if group.values(sweep.BY_DEFAULT))
    ranked = sorted(known, key=lambda group: group.mean(sweep.BY_DEFAULT) or 0.0)
    return _page_of_groups(
        groups,
        title=f"{len(runs)} runs",
        sweep=None,
        leader=ranked[0] if ranked else None,
        best=ranked[0].figure(sweep.BY_DEFAULT) if ranked else None,
        margin=verdict.margin(ranked, sweep.BY_DEFAULT),
        answers=verdict.answers_of_groups(groups),
        overview=comparison.overview(groups),
        costs=comparison.costs(groups),
        differing=comparison.settings_that_differ(groups),
    )


def page_of_sweep(found: sweep.Sweep) -> str:
    """A sweep."""
    return _page_of_groups(
        found.groups,
        title=f"Sweep of {', '.join(found.columns)}" if found.columns else f"Sweep {found.path.resolve().name}",
        sweep=found,
        lead=verdict.best_of_sweep(found),
        answers=verdict.answers_of_groups([found.best]),
        overview=comparison.overview(found.groups, found.columns, first=found.metric),
        costs=comparison.costs(found.groups, found.columns),
        effects=sweep.effects(found),
        is_full_grid=sweep.is_full_grid(found),
        missing=Table("Failed and unfinished", ["run", "state", "why"], [[m.name, m.state, m.why] for m in found.missing], numeric=False),
    )


def _page_of_groups(groups: Sequence[comparison.Group], **further: Any) -> str:
    return (
        environment()
        .get_template("comparison.html.jinja")
        .render(
            groups=groups,
            runs=[run for group in groups for run in group.members],
            warning_of_text=comparison.warning_of_text(groups),
            trade_offs=comparison.trade_offs(groups),
            overlaid=comparison.overlaid(groups),
            same_objective=comparison.same_objective(groups),
            **further,
        )
    )


def _keys(table: Table | None) -> set[str]:
    cells = [cell for row in table.rows for cell in row] if table is not None else []
    return {key for cell in cells if isinstance(cell, Figure) for key in cell.keys.split()}
