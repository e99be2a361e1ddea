"""What the page says first: did distillation help, by how much, what was lost, what was saved."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..compare import has_teacher_signal
from ..evaluation.table import percent
from .comparison import GAP, Group
from .figures import Figure, Numbered, factor, points, text_of
from .measured import Measured
from .run_page import has_objective
from .task_tables import error_of_difference, further_from_half

STUDENT, CONTROL, TEACHER, BEFORE = "eval/student_nll", "control/student_nll", "eval/teacher_nll", "before/student_nll"
SIZES = ("model/student_parameters", "model/teacher_parameters")
SPEEDS = ("perf/student_tokens_per_second", "perf/teacher_tokens_per_second")
HELPED, MUCH, LOST, SAVED = "Did distillation help?", "By how much?", "What was lost?", "What was saved?"
TRAINED = "What did training do?"
ONE_SEED = " One seed cannot tell a small difference from chance."
INTERVAL = " ± is half a 95 % confidence interval of the difference, seed by seed"
SURE = 2.0
"""Standard errors that a difference on a task has to exceed to be told from chance."""
MOST_TASKS = 3
MOST_GROUPS = 4
NO_SKILL = "stereotype"
"""The kind of a task on which more is not better."""

Parts = tuple[str | Figure, ...]


@dataclass(frozen=True)
class Answer:
    """To one of the questions: texts and figures in turn."""

    question: str | Numbered
    parts: Parts


def answers_of_run(found: Measured) -> list[Answer]:
    """Of one run or evaluation, as far as it was measured."""
    if found.is_training and has_objective(found.config) and not has_teacher_signal(found.config["objective"]):
        return [Answer(HELPED, ("This run is a control: it was trained without the teacher, so that others can be compared with it.",))]
    return _answers(Group(1, found.name, (found,)))


def answers_of_groups(groups: Sequence[Group]) -> list[Answer]:
    """Of several runs: all questions where only one setting had a teacher's help, else the first for each setting."""
    taught = [group for group in groups if not group.is_control and any(member.is_training for member in group.members)]
    if len(taught) == 1:
        return _answers(taught[0])
    told = [(group, parts) for group in taught if (parts := _helped(group))][:MOST_GROUPS]
    lines = [Answer(Numbered(group.number, group.label or group.name, group.style), parts) for group, parts in told]
    rest = [Answer("the others", ("In the table below.",))] if len(taught) > MOST_GROUPS else []
    return [Answer(HELPED, ()), *lines, *rest] if lines else []


def _answers(group: Group) -> list[Answer]:
    much = MUCH if group.mean(CONTROL) is not None else TRAINED
    told = [(HELPED, _helped(group)), (much, _how_much(group)), (LOST, _lost(group)), (SAVED, _saved(group))]
    return [Answer(question, parts) for question, parts in told if parts]


def _helped(group: Group) -> Parts:
    if not any(member.is_training for member in group.members) or group.mean(STUDENT) is None:
        return ()
    lower = group.made((CONTROL, STUDENT), operator.sub, lambda value: text_of(STUDENT, abs(value)))
    if lower is None or lower.value is None:
        return ("Not measured: that takes a control, the same student trained alike but without the teacher. control=true trains one.",)
    word, doubt = _told_from_chance(lower.value, lower.half)
    direction = "lower" if lower.value >= 0 else "higher"
    control = f" nats per token {direction} than the control's, which is the same student, trained alike but without the teacher."
    return (f"{word} on held-out text the student's loss is ", _unsigned(lower), control, doubt)


def _unsigned(shown: Figure) -> Figure:
    """Where words say in which direction."""
    return replace(shown, value=abs(shown.value or 0.0))


def _told_from_chance(mean: float, half: float | None) -> tuple[str, str]:
    """The first words of an answer, and what is to be said against it."""
    if half is None:
        return ("Yes, in this run:" if mean > 0 else "No, not in this run:"), ONE_SEED
    if abs(mean) <= half:
        return "Not clear:", f"{INTERVAL}, which includes no difference at all: more seeds might tell."
    return ("Yes:" if mean > 0 else "No, it did harm:"), f"{INTERVAL}."


def _how_much(group: Group) -> Parts:
    student, control, teacher, before = (group.figure(key.replace("_nll", "_perplexity")) for key in (STUDENT, CONTROL, TEACHER, BEFORE))
    if student is None or not any(member.is_training for member in group.members):
        return ()
    if control is None:
        return () if before is None else ("Training took perplexity from ", before, " to ", student, *_way(group), ".")
    told: Parts = ("Perplexity ", student, " instead of the control's ", control)
    gap = group.figure(GAP)
    if gap is None or teacher is None:
        return (*told, ".")
    return (*told, "; the teacher's is ", teacher, ". That closes ", gap, " of the gap in loss between control and teacher.")


def _way(group: Group) -> Parts:
    """How much of the way to the teacher the training went."""
    share = group.made((BEFORE, STUDENT, TEACHER), lambda before, student, teacher: (before - student) / (before - teacher or 1), percent)
    if share is None or not 0 < (share.value or 0) < 1:
        return ()
    return (": ", share, " of the way to the teacher's, in loss")


def _lost(group: Group) -> Parts:
    higher = group.made((STUDENT, TEACHER), operator.sub, lambda value: text_of(STUDENT, abs(value)))
    agreement = group.figure("eval/top1_agreement")
    told: list[str | Figure] = []
    if higher is not None:
        told += [
            "Its loss is ",
            _unsigned(higher),
            f" nats per token {'higher' if (higher.value or 0) >= 0 else 'lower'} than the teacher's. ",
        ]
    if agreement is not None:
        told += ["Both think the same token the most likely at ", agreement, " of the places. "]
    for name, student, below in list(_skills(group))[:MOST_TASKS]:
        told += [
            f"On {name} it gets ",
            student,
            ", ",
            _unsigned(below),
            f" {'below' if (below.value or 0) >= 0 else 'above'} its teacher{_doubt(group, name, below)}. ",
        ]
    for task, further, kinds in further_from_half(group.members[0]):
        told.append(f"On {task} its preference is further from none than the teacher's in {further} of {kinds} kinds of stereotype. ")
    return tuple(told)


def _doubt(group: Group, name: str, below: Figure) -> str:
    """Behind a difference on a task that so few items, or seeds, do not tell from chance."""
    error = error_of_difference(group.members[0], f"task/{name.replace('/', '-')}")
    margin = below.half if below.half is not None else None if error is None else SURE * error
    return "" if margin is None or abs(below.value or 0.0) > margin else ", no more than chance could make"


def _skills(group: Group) -> Iterator[tuple[str, Figure, Figure]]:
    """(name, the student's figure, how far it is below its teacher's) of each task on which more is better."""
    for name, task in group.members[0].details.get("tasks", {}).items():
        keys = [f"task/{name.replace('/', '-')}/{model}" for model in ("teacher", "student")]
        student, below = group.figure(keys[1]), group.made(keys, operator.sub, points)
        is_share = student is not None and student.text.endswith("%")  # and no perplexity
        if student is not None and below is not None and is_share and task.get("kind") != NO_SKILL:
            yield name, student, below


def _saved(group: Group) -> Parts:
    size, speed = group.made(SIZES, _ratio, percent), group.made(SPEEDS, _ratio, factor)
    if size is None:
        return ()
    told: Parts = ("It has ", size, " of the teacher's parameters")
    if speed is None or not speed.value:
        return (*told, ".")
    if speed.value < 1:
        return (*told, ", but reads text at ", speed, " of the teacher's speed on the machine that measured.")
    return (*told, " and reads text ", speed, " times as fast on the machine that measured.")


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0
