"""Minimal pairs: which of two sentences a model finds likelier. Grammar (BLiMP) and stereotypes (CrowS-Pairs) as they come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..config import PairsConfig
from ..data.row import Row, RowError
from ..data.sources import find_files
from ..data.tables import TABLE_SUFFIXES, Tables
from ..errors import DataError


@dataclass(frozen=True)
class Form:
    """How a data set writes its pairs: columns of the better sentence, the worse one and the group; what is put before a sentence; what a score is."""

    better: str
    worse: str
    group: str | None
    prefix: str
    kind: str


BLIMP = Form("sentence_good", "sentence_bad", "UID", " ", "accuracy")
"""Warstadt et al. 2020, arXiv 1912.00582; the blank is the harness's."""

CROWS_PAIRS = Form("sent_more", "sent_less", "bias_type", "", "stereotype")
"""Nangia et al. 2020, arXiv 2010.00133. `sent_more` stereotypes more, also where the pair is marked `antistereo`. The pairs were made for
masked models, and many are flawed (Blodgett et al. 2021, "Stereotyping Norwegian Salmon"): read a score beside the teacher's."""


@dataclass(frozen=True)
class Pair:
    """Two sentences, the first of which should be the likelier one (or stereotypes more), and the group they belong to."""

    better: str
    worse: str
    group: str


def read_rows(path: str, where: str, limit: int | None = None, seed: int = 0) -> list[Row]:
    """The rows of some tables; where there are more than `limit`, so many of them, drawn over all files, in their order.

    The first ones would be those of a few groups: files of BLiMP are a paradigm each.

    Raises:
        DataError: there is no such file, a row is malformed, or there is none.
    """
    rows = list(_good(Tables(find_files(path, TABLE_SUFFIXES, where)).rows()))
    if not rows:
        raise DataError(where, f"no row in '{path}'", "Name a file with rows.")
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(Random(seed).sample(range(len(rows)), limit))]


def _good(rows: Iterable[Row | RowError]) -> Iterable[Row]:
    for row in rows:
        if isinstance(row, RowError):
            raise row
        yield row


def read_pairs(config: PairsConfig, where: str, limit: int | None = None, seed: int = 0) -> tuple[list[Pair], str]:
    """The pairs of a task (`limit` of them), and its kind: accuracy or stereotype.

    Raises:
        DataError: a file cannot be read, has no such columns, or a sentence is empty.
    """
    rows = read_rows(str(config.path), f"{where}.path", limit, seed)
    form = _form(config, rows[0], where)
    pairs = [Pair(form.prefix + text_of(row, form.better), form.prefix + text_of(row, form.worse), _group(row, form.group)) for row in rows]
    return pairs, form.kind


def _form(config: PairsConfig, row: Row, where: str) -> Form:
    known = next((form for form in (BLIMP, CROWS_PAIRS) if form.better in row.columns and form.worse in row.columns), None)
    if known is None and (config.better_column is None or config.worse_column is None):
        what = f"neither BLiMP's columns nor those of CrowS-Pairs in {row.origin} (there are: {', '.join(map(str, row.columns))})"
        raise DataError(f"{where}.better_column", what, "Name better_column and worse_column.")
    form = known or Form("", "", None, BLIMP.prefix, BLIMP.kind)
    group = form.group if form.group in row.columns else None
    return Form(
        config.better_column or form.better,
        config.worse_column or form.worse,
        config.group_column or group,
        config.prefix if config.prefix is not None else form.prefix,
        config.kind or form.kind,
    )


def _group(row: Row, column: str | None) -> str:
    if column is None:
        return Path(row.origin.rpartition(":")[0] or row.origin).stem
    return str(row.columns[column]) if column in row.columns else "(none)"


def text_of(row: Row, column: str) -> str:
    """A column's text.

    Raises:
        DataError: it is missing, no text, or empty.
    """
    value = row.columns.get(column)
    if not isinstance(value, str) or not value.strip():
        there = f"there are: {', '.join(map(str, row.columns))}" if column not in row.columns else f"got {value!r}"
        raise DataError(row.origin, f"no text in the column '{column}' ({there})", "Name another column, or mend the row.")
    return value


def preferred(better: Sequence[float], worse: Sequence[float]) -> list[float]:
    """1 where the better sentence is likelier, 0 where the worse one is, ½ where they are equally likely."""
    return [1.0 if b > w else 0.5 if b == w else 0.0 for b, w in zip(better, worse, strict=True)]


def standard_error(mean: float, items: int) -> float:
    """Of a share of right answers."""
    return math.sqrt(mean * (1 - mean) / items)


def mean_of_groups(groups: Sequence[str], scores: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Group -> mean score and number of items, in the order of their first item."""
    members: dict[str, list[float]] = {}
    for group, score in zip(groups, scores, strict=True):
        members.setdefault(group, []).append(score)
    return {group: (sum(of_group) / len(of_group), len(of_group)) for group, of_group in members.items()}
