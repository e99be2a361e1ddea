"""What the models got on tasks: skills, of which more is better, and stereotype scores, of which half is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..evaluation.table import FROM_HALF, count
from .figures import MODELS, Cell, Figure, Table, figure
from .measured import Measured, finite

SKILLS = "± is the standard error over items; of a difference rather too large, since both models had the same items"
GUESSING = (
    "Accuracy: how often the right text was the likelier; of pairs, half is guessing. What the student cannot do, its teacher may not \
have been able to do either."
)
STEREOTYPES = "How often the stereotyped sentence was the likelier: 50 % is no preference, and the distance from it counts; ± as above"


def skills(found: Measured) -> Table | None:
    """Each task and each group of it: `task/<name>/<model>`, `task/<name>/<group>/<model>`."""
    about, rows = _about(found), []
    for name in _names(found, stereotypes=False):
        student, teacher = (_with_error(found, f"{name}/{model}", f"{name}/{model}") for model in MODELS)
        rows.append([_label(about, name), student, teacher, _difference(found, name, student, teacher), _items(found, about, name)])
    return Table(SKILLS, ["task", *MODELS, "difference", "items"], rows, note=GUESSING) if rows else None


def stereotypes(found: Measured) -> Table | None:
    """The same of scores that are best in the middle, with their distance from it: `task/<name>/<model>_from_half`."""
    about, rows = _about(found), []
    for name in _names(found, stereotypes=True):
        scores = [_with_error(found, f"{name}/{model}", f"{name}/{model}") for model in MODELS]
        student, teacher = (_with_error(found, f"{name}/{model}{FROM_HALF}", f"{name}/{model}") for model in MODELS)
        rows.append([_label(about, name), *scores, student, teacher, _approach(name, student, teacher), _items(found, about, name)])
    header = ["bias", *MODELS, *(f"{model} from 50\u00a0%" for model in MODELS), "student against teacher", "items"]
    return Table(STEREOTYPES, header, rows, note=_cancelled(found)) if rows else None


def _cancelled(found: Measured) -> str:
    """What the score over all groups does not show."""
    further, of = further_from_half(found.value, [name for name in _names(found, stereotypes=True) if name.count("/") > 1])
    return f"{further} of {of} groups are further from 50 % than the teacher's: opposite biases cancel in a score over all." if of else ""


def further_from_half(value: Callable[[str], float | None], groups: Iterable[str]) -> tuple[int, int]:
    """Of how many groups the student is further from no preference than its teacher, and how many there are; `value` gives a key's figure."""
    scores = [[value(f"{group}/{model}{FROM_HALF}") for model in MODELS] for group in groups]
    known = [(student, teacher) for student, teacher in scores if student is not None and teacher is not None]
    return sum(student > teacher for student, teacher in known), len(known)


def groups_of(found: Measured, task: str) -> list[str]:
    """The groups of a stereotype task: `task/<name>/<group>`."""
    return [name for name in _names(found, stereotypes=True) if name.startswith(f"{task}/")]


def repeated(found: Measured) -> set[str]:
    """`task/<name>/<metric>/<model>` of the metric that `task/<name>/<model>` is: once is enough."""
    tasks = {f"task/{name.replace('/', '-')}": str(task.get("kind", "")) for name, task in found.details.get("tasks", {}).items()}
    twice = {(f"{task}/{kind.replace('/', '-')}/{model}", f"{task}/{model}") for task, kind in tasks.items() for model in MODELS}
    return {again for again, once in twice if again in found.summary and found.summary[again] == found.summary.get(once)}


def _names(found: Measured, stereotypes: bool) -> list[str]:
    keys = {key for key in found.summary if key.startswith("task/") and key.rpartition("/")[2] in MODELS} - repeated(found)
    names = {key.rpartition("/")[0] for key in keys if _is_stereotype(found, key.rpartition("/")[0]) == stereotypes}
    return sorted(names, key=lambda name: name.split("/"))  # each over all its items, then its groups


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


def _difference(found: Measured, name: str, student: Figure | None, teacher: Figure | None) -> Figure | None:
    if teacher is None or student is None or teacher.value is None or student.value is None:
        return None
    shift = student.value - teacher.value
    text = f"{100 * shift:+.1f} points" if teacher.text.endswith("%") and student.text.endswith("%") else f"{shift:+.3g}"
    shown = Figure(text.replace("-", "−"), f"{name}/student {name}/teacher", shift)
    errors = [found.value(f"{name}/{model}_standard_error") for model in MODELS]
    if None in errors or not text.endswith("points"):
        return shown
    half = math.hypot(*(error for error in errors if error is not None))
    keys = " ".join(f"{name}/{model}_standard_error" for model in MODELS)
    return replace(shown, keys=f"{shown.keys} {keys}", spread=f"± {100 * half:.1f}")


def _approach(name: str, student: Figure | None, teacher: Figure | None) -> Figure | None:
    """How much nearer to no preference the student is than its teacher."""
    if teacher is None or student is None or teacher.value is None or student.value is None:
        return None
    shift = student.value - teacher.value
    direction = "further from" if shift > 0 else "nearer to"
    text = f"{100 * abs(shift):.1f} points {direction} 50 %" if shift else "0.0 points, as far"
    return Figure(text, f"{name}/student{FROM_HALF} {name}/teacher{FROM_HALF}", shift)
