"""Whether two folders were measured on the same text and beside the same teacher: only then do their figures belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .config import DataConfig, TeacherConfig
from .contract import shown

GROUPS = {"data": DataConfig, "teacher": TeacherConfig}
OF_THE_MACHINE = {
    "data": ("num_workers", "cache_dir"),
    "teacher": ("device", "gated", "cache_dir", "cache_kind", "num_requests", "timeout"),
}
"""Settings on which no figure depends."""


def what_differs(of_run: Mapping[str, Any], of_other: Mapping[str, Any]) -> str:
    """The first setting of data or teacher in which two configurations (plain values) differ, with both values; "" where none does.

    What an older version did not write is as it is by default.
    """
    for group, schema in GROUPS.items():
        first, second = ({**dataclasses.asdict(schema()), **(config.get(group) or {})} for config in (of_run, of_other))
        for name, value in first.items():
            if name not in OF_THE_MACHINE[group] and second.get(name) != value:
                return f"{group}.{name} is {shown(second.get(name))}, and {shown(value)} in the run"
    return ""
