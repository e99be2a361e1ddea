"""Every figure on the pages of real runs, recomputed from the files of their folders."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from runs import run
from test_page import Page

from mini_distill.cli import load_config
from mini_distill.compare import interval
from mini_distill.config import EvaluateCommand
from mini_distill.report import report

UNITS = {"": 1, "%": 0.01, "points": 0.01, "×": 1, "k": 1e3, "M": 1e6, "B": 1e9, "bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
UNITS |= {"ms": 1e-3, "s": 1, "min": 60, "h": 3600}
NUMBER = re.compile(r"([+−-]?)([\d,]*\.?\d+)(e[+-]\d+)? ?(\S*)( .*)?")  # words behind it may say in which direction


@pytest.fixture(scope="module")
def runs(tiny_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two seeds of a run with its control, the first measured by `evaluate` too: names of folders in the current one."""
    folder = tmp_path_factory.mktemp("traced")
    pairs = [("the cat sat", "the cat sta", "a"), ("two birds", "two brids", "b"), ("a mat", "a tam", "a")]
    rows = [{"sentence_good": good, "sentence_bad": bad, "kind": kind} for good, bad, kind in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"evaluation.pairs={{words: {{path: {folder / 'pairs.jsonl'}, group_column: kind}}}}"
    quick = [
        "evaluation.prompt_tokens=8",
        "evaluation.generation_tokens=4",
        "evaluation.sample_tokens=4",
        "evaluation.num_samples=1",
        "evaluation.max_batches=2",
        "evaluation.batch_size=4",
    ]
    evaluate: Any = importlib.import_module("mini_distill.evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in (0, 1):
            run(tiny_command, Path(f"s{seed}"), f"seed={seed}", "control=true", "trainer.eval_every=2")
        evaluate.evaluate(load_config(["model=s0", task, *quick], "evaluate", EvaluateCommand))
        yield ["s0", "s0-control", "s1", "s1-control"]


def known(folder: Path) -> dict[str, set[float]]:
    """What the files of a run have under each key of the page: of its own and of its evaluation."""
    found: dict[str, set[float]] = {}
    for place in (folder, folder / "evaluation"):
        for key, value in _figures(place):
            if isinstance(value, int | float):
                found.setdefault(key, set()).add(float(value))
    return found


def _figures(folder: Path) -> Iterator[tuple[str, Any]]:
    for name in ("summary.json", "details.json"):
        if not (folder / name).is_file():
            return
    yield from json.loads((folder / "summary.json").read_text()).items()
    look = json.loads((folder / "details.json").read_text())
    for name, parts in look["slices"].items():
        for part in parts:
            yield from ((f"slices/{name}/{part['label']}/{key}", value) for key, value in part.items())
    for i, entry in enumerate(look["differences"]):
        yield f"differences/{i}/forward_kl", entry["forward_kl"]
        for j, token in enumerate(entry["tokens"]):
            yield from ((f"differences/{i}/tokens/{j}/{key}", value) for key, value in token.items())
    for name, task in look.get("tasks", {}).items():
        yield from ((f"tasks/{name}/{group['label']}/items", group.get("items")) for group in task["groups"])
        yield f"tasks/{name}/chance", task.get("chance")


def made_of(values: tuple[float, ...]) -> set[float]:
    """What the page makes of the figures whose keys it names: itself, a ratio, a difference, its error, a share of a way."""
    if len(values) == 1:
        return {values[0]}
    first, second, *more = values
    if more:
        return {(first - second) / (first - more[0])}
    return {first - second, abs(first - second), math.hypot(first, second), *([first / second] if second else [])}


def possible(files: list[dict[str, set[float]]], keys: list[str]) -> list[list[float]]:
    """Every list of what the page can have made of these keys, one entry a folder."""
    each = [{made for values in itertools.product(*(of_folder[key] for key in keys)) for made in made_of(values)} for of_folder in files]
    return [list(values) for values in itertools.product(*each)]


def rounded(text: str, value: float) -> bool:
    """Whether a text is the value, rounded to its last digit."""
    match = NUMBER.fullmatch(text)
    assert match is not None, text
    sign, digits, exponent, unit, direction = match.groups()
    value = abs(value) if direction else value
    scale = UNITS[unit] * float(f"1{exponent or 'e0'}")
    shown = float(digits.replace(",", "")) * (-1 if sign in ("−", "-") else 1) * scale
    significant = digits.replace(",", "").replace(".", "").lstrip("0")
    last = scale * 10.0 ** -len(digits.partition(".")[2])
    coarse = 10.0 ** (math.floor(math.log10(abs(shown))) - 2) if shown and len(significant) <= 3 else last  # `1.04 MB`: three digits
    return abs(shown - value) <= max(last, coarse if unit.endswith("B") or exponent else 0) / 2 * (1 + 1e-6) + 1e-12


def check(page: Path, usual: str) -> int:
    """Every `<data>` of a page; gives how many."""
    text = page.read_text(encoding="utf-8")
    figures = re.findall(
        r'<data value="([^"]*)" data-key="([^"]*)"(?: data-of="([^"]*)")?>([^<]*)</data>(?: <span class="spread">([^<]*))?', text
    )
    assert len(figures) == len(Page(text).all("data"))
    for value, key, of, shown, spread in figures:
        files = [known(Path(folder)) for folder in (of or usual).split("\n")]
        keys = [key] if key in files[0] else key.split()  # a label such as `below 0.1` has a blank
        errors = [key for key in keys[1:] if key.endswith("_standard_error")] if spread else []
        keys = [key for key in keys if key not in errors]
        made = possible(files, keys)
        fitting = [values for values in made if math.isclose(fmean(values), float(value), rel_tol=1e-9, abs_tol=1e-12)]
        fitting += [values for values in made if math.isclose(abs(fmean(values)), float(value), rel_tol=1e-9, abs_tol=1e-12)]
        assert fitting, f"{key} of {of or usual}: {value} is none of {made}"
        assert rounded(shown, float(value)), f"{key}: '{shown}' is not {value}"
        if spread:
            halves = (
                {math.hypot(*values) for values in itertools.product(*(files[0][key] for key in errors))}
                if errors
                else {interval(values) for values in fitting if len(values) > 1}
            )
            halves = {min(fitting[0]), max(fitting[0])} if "–" in spread else halves
            parts = (
                spread.split(" – ")
                if "–" in spread
                else [spread.removeprefix("± ") + next((unit for unit in (" %", " points") if shown.endswith(unit)), "")]
            )
            assert all(any(rounded(part, half) for half in halves) for part in parts), f"{key}: '{spread}' is none of {halves}"
    return len(figures)


def test_every_figure_of_a_run_is_what_its_keys_have(runs: list[str]) -> None:
    assert check(report(runs[0], "one.html"), runs[0]) > 150


def test_every_figure_of_several_runs_is_the_mean_of_what_its_keys_have(runs: list[str]) -> None:
    assert check(report(runs, "several.html"), "") > 30


def test_every_chart_names_keys_that_are_there(runs: list[str]) -> None:
    logged = {key for line in Path(runs[0], "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    look = json.loads(Path(runs[0], "evaluation", "details.json").read_text())
    there = {*known(Path(runs[0])), *logged, "reliability", *(f"slices/{name}" for name in look["slices"])}
    for page in (report(runs[0], "one.html"), report(runs, "several.html")):
        charts = [attributes["data-key"].split() for attributes, _ in Page(page.read_text(encoding="utf-8")).all("figure")]
        assert len(charts) >= 3 and {key for keys in charts for key in keys} <= there


@pytest.mark.parametrize(("text", "value", "is_it"), [("26.1 %", 0.2612, True), ("26.1 %", 0.2621, False), ("1.04 MB", 1_043_000, True)])
def test_a_text_is_held_against_its_number(text: str, value: float, is_it: bool) -> None:
    assert rounded(text, value) is is_it
