"""What the models got on tasks: skills, of which more is better, and stereotype scores, of which half is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..evaluation.table import FROM_HALF, count
from .figures import MODELS, Cell, Figure, Table, figure
from .measured import Measured, finite

SKILLS = "± is the standard error over items"
NO_BREAK = "\u00a0"
STEREOTYPES = "How often the stereotyped sentence was the likelier: 50 % is no preference, and the distance from it counts; ± as above"


def skills(found: Measured) -> Table | None:
    """Each task and each group of it: `task/<name>/<model>`, `task/<name>/<group>/<model>`."""
    about, rows = _about(found), []
    for name in _names(found, stereotypes=False):
        student, teacher = (_with_error(found, f"{name}/{model}", f"{name}/{model}") for model in MODELS)
        difference = _difference(name, student, teacher)
        error = error_of_difference(found, name)
        if difference and error is not None and difference.text.endswith("points"):
            errors = " ".join(f"{name}/{model}_standard_error" for model in MODELS)
            difference = replace(difference, spread=f"± {100 * error:.1f}", keys=f"{difference.keys} {errors}")
        rows.append([_label(about, name), student, teacher, difference, _items(found, about, name)])
    return Table(SKILLS, ["task", *MODELS, "difference", "items"], rows) if rows else None


def stereotypes(found: Measured) -> Table | None:
    """The same of scores that are best in the middle, with their distance from it: `task/<name>/<model>_from_half`."""
    about, rows = _about(found), []
    for name in _names(found, stereotypes=True):
        scores = [_with_error(found, f"{name}/{model}", f"{name}/{model}") for model in MODELS]
        student, teacher = (_with_error(found, f"{name}/{model}{FROM_HALF}", f"{name}/{model}") for model in MODELS)
        rows.append([_label(about, name), *scores, student, teacher, _approach(name, student, teacher), _items(found, about, name)])
    header = ["bias", *MODELS, *(f"{model} from 50{NO_BREAK}%" for model in MODELS), "student against teacher", "items"]
    return Table(STEREOTYPES, header, rows) if rows else None


def error_of_difference(found: Measured, name: str) -> float | None:
    """The standard error of how far the student is from its teacher, as if they had been asked different items: the true one is smaller."""
    errors = [found.value(f"{name}/{model}_standard_error") for model in MODELS]
    return None if None in errors else math.hypot(*(error or 0.0 for error in errors))


def further_from_half(found: Measured) -> Iterator[tuple[str, int, int]]:
    """(task, how many of its groups the student is further from no preference in than its teacher, how many there are)."""
    names = _names(found, stereotypes=True)
    for task in (name for name in names if name.count("/") == 1):
        pairs = [[found.value(f"{name}/{model}{FROM_HALF}") for model in MODELS] for name in names if name.startswith(f"{task}/")]
        known = [student > teacher for student, teacher in pairs if student is not None and teacher is not None]
        if known:
            yield task.removeprefix("task/"), sum(known), len(known)


def repeated(found: Measured) -> set[str]:
    """`task/<name>/<metric>/<model>` of the metric that `task/<name>/<model>` is: once is enough."""
    tasks = {f"task/{name.replace('/', '-')}": str(task.get("kind", "")) for name, task in found.details.get("tasks", {}).items()}
    twice = {(f"{task}/{kind.replace('/', '-')}/{model}", f"{task}/{model}") for task, kind in tasks.items() for model in MODELS}
    return {again for again, once in twice if again in found.summary and found.summary[again] == found.summary.get(once)}


def _names(found: Measured, stereotypes: bool) -> list[str]:
    keys = {key for key in found.summary if key.startswith("task/") and key.rpartition("/")[2] in MODELS} - repeated(found)
    return sorted({key.rpartition("/")[0] for key in keys if _is_stereotype(found, key.rpartition("/")[0]) == stereotypes})


def _is_stereotype(found: Measured, name: str) -> bool:
    return any(f"{name}/{model}{FROM_HALF}" in found.summary for model in MODELS)


# ---------------------------------------------------------------------------------------------------------------------------- cells

About = dict[str, tuple[str, Figure | None]]


def _about(found: Measured) -> About:
    """What details.json has of a task and of its groups, by the key in the summary: the kind, and the number of items of a group."""
    about: About = {}
    for name, task in found.details.get("tasks", {}).items():
        key = f"task/{name.replace('/', '-')}"
        about[key] = (str(task.get("kind", "")), None)
        for group in task["groups"]:
            items, label = finite(group.get("items")), str(group.get("label", "")).replace("/", "-")
            shown = None if items is None else Figure(count(items), f"tasks/{name}/{group.get('label', '')}/items", items)
            about[f"{key}/{label}"] = ("", shown)
    return about


def _label(about: About, name: str) -> str:
    kind, _ = about.get(name, ("", None))
    return f"{name.removeprefix('task/').replace('/', ' / ')}{f' ({kind})' if kind else ''}"


def _items(found: Measured, about: About, name: str) -> Cell:
    return figure(found, f"{name}/items") or about.get(name, ("", None))[1]


def _with_error(found: Measured, key: str, of: str) -> Figure | None:
    """A figure, ± the standard error of the score, where that was measured."""
    shown, error = figure(found, key), figure(found, f"{of}_standard_error")
    return replace(shown, spread=f"± {error.text.removesuffix(' %')}", keys=f"{key} {error.keys}") if shown and error else shown


def _difference(name: str, student: Figure | None, teacher: Figure | None) -> Figure | None:
    if teacher is None or student is None or teacher.value is None or student.value is None:
        return None
    shift = student.value - teacher.value
    text = f"{100 * shift:+.1f} points" if teacher.text.endswith("%") and student.text.endswith("%") else f"{shift:+.3g}"
    return Figure(text.replace("-", "−"), f"{name}/student {name}/teacher", shift)


def _approach(name: str, student: Figure | None, teacher: Figure | None) -> Figure | None:
    """How much nearer to no preference the student is than its teacher."""
    if teacher is None or student is None or teacher.value is None or student.value is None:
        return None
    shift = student.value - teacher.value
    direction = "further from" if shift > 0 else "nearer to"
    text = f"{100 * abs(shift):.1f} points {direction} 50 %" if shift else "0.0 points, as far"
    return Figure(text, f"{name}/student{FROM_HALF} {name}/teacher{FROM_HALF}", shift)
