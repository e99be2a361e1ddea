"""The settings of the data: what belongs to which source, and the parts of a mixture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from ..config import DataConfig
from ..contract import DataOnly, build_config, shown
from ..errors import ConfigError, Problem
from .models import check_local_path


def check_data(data: DataConfig, where: str, to_measure: bool = False) -> Iterator[Problem]:
    """The data group alone; `where` is its path, so that parts of a mixture are named. `to_measure`: nobody trains on it."""
    yield from _check_belonging(data, where)
    if data.eval_fraction == 1 and not to_measure:
        yield Problem(f"{where}.eval_fraction", "got 1.0, expected below 1: nothing would be left to train on")
    if data.source == "mixture":
        yield from _check_mixture(data, where, to_measure)
        return
    if data.mixture:
        yield Problem(f"{where}.mixture", f"given, and {where}.source is {data.source}", "Choose data=mixture.")
    if data.source in ("text", "jsonl", "hub") and data.path is None and not (to_measure and data.eval_path):
        what = "a data set id" if data.source == "hub" else "a file, folder or glob"
        yield Problem(f"{where}.path", f"missing for source {data.source}", f"Give {what}.")
    if data.source in ("text", "jsonl"):
        for name in ("path", "eval_path"):
            path = getattr(data, name)
            if path is not None and not any(c in path for c in "*?["):
                yield from check_local_path(f"{where}.{name}", path, is_local=True)
    if (data.prompt_column is None) != (data.completion_column is None):
        missing = "completion_column" if data.completion_column is None else "prompt_column"
        yield Problem(f"{where}.{missing}", "missing: prompt and completion go together", "Name both columns.")
    kinds = [name for name in ("text_column", "prompt_column", "messages_column") if getattr(data, name) is not None]
    if len(kinds) > 1:
        yield Problem(
            f"{where}.{kinds[1]}",
            f"given together with {where}.{kinds[0]}",
            "A row is text, or prompt and completion, or messages: name one.",
        )
    if data.tools_column and not data.messages_column:
        yield Problem(f"{where}.tools_column", f"given without {where}.messages_column", "Tools belong to chat messages.")
    if data.eval_path and data.eval_split:
        yield Problem(f"{where}.eval_split", f"given together with {where}.eval_path", "Name one held-out source.")
    try:
        re.compile(data.document_separator or "")
    except re.error as error:
        yield Problem(f"{where}.document_separator", f"got {shown(data.document_separator)}, which is no regular expression ({error})")


_BELONGS_TO = {
    **dict.fromkeys(("path", "eval_path"), ("text", "jsonl", "hub")),
    **dict.fromkeys(("text_column", "prompt_column", "completion_column", "messages_column", "tools_column"), ("jsonl", "hub")),
    **dict.fromkeys(("name", "revision", "split", "eval_split", "streaming"), ("hub",)),
    "document_separator": ("text",),
    "max_rows": ("python_stdlib", "text", "jsonl", "hub"),
}
"""Setting -> the sources that look at it; a user's own class may look at any, a mixture leaves them to its parts."""


def _check_belonging(data: DataConfig, where: str) -> Iterator[Problem]:
    """What a source would silently pass over, such as the path of a text where the source is still the default."""
    for name, sources in _BELONGS_TO.items():
        if "." not in data.source and data.source not in sources and getattr(data, name) != getattr(DataConfig(), name):
            remedy = f"It belongs to {' or '.join(f'data={source}' for source in sources)}."
            if data.source == "mixture":
                remedy = f"Set it in the parts: {where}.mixture.<name>.{name}."
            yield Problem(f"{where}.{name}", f"given, and {where}.source is {data.source}", remedy)


def _check_mixture(data: DataConfig, where: str, to_measure: bool) -> Iterator[Problem]:
    if not data.mixture:
        yield Problem(f"{where}.mixture", "empty for source mixture", "Give name: {source: …, weight: …} for each part.")
    fixed = ("seq_len", "packing", "cache_dir", "num_workers", "mixture")
    for name, values in data.mixture.items():
        part_path = f"{where}.mixture.{name}"
        if not isinstance(values, Mapping):
            yield Problem(part_path, f"got {shown(values)}, expected a mapping", "Give {source: …, weight: …}.")
            continue
        weight = values.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            yield Problem(f"{part_path}.weight", f"got {shown(weight)}, expected a number above 0")
        for key in fixed:
            if key in values:
                yield Problem(f"{part_path}.{key}", "is a setting of the whole mixture", f"Set {where}.{key}.")
        if values.get("source") == "mixture":
            yield Problem(f"{part_path}.source", "a mixture within a mixture", "List all parts on one level.")
            continue
        try:
            part = build_config({"data": {k: v for k, v in values.items() if k not in ("weight", *fixed)}}, DataOnly).data
        except ConfigError as error:
            for p in error.problems:
                yield Problem(part_path + p.where.removeprefix("data"), p.what, p.remedy.replace("'data.", f"'{part_path}."))
        else:
            yield from check_data(part, part_path, to_measure)
