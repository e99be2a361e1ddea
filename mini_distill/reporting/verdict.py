"""What the page says first: did distillation help, by how much, what was lost, what was saved."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..compare import has_teacher_signal, interval
from ..evaluation.table import percent
from .comparison import GAP, SPEEDS, Group, label_of, quotient
from .figures import Figure, Numbered, factor, points, text_of, unit_of
from .measured import Measured, finite
from .run_page import has_objective
from .sweep import Sweep
from .task_tables import further_from_half, groups_of

STUDENT, CONTROL, TEACHER, BEFORE = "eval/student_nll", "control/student_nll", "eval/teacher_nll", "before/student_nll"
SIZES = ("model/student_parameters", "model/teacher_parameters")
HELPED, MUCH, TRAINED = "Did distillation help?", "By how much?", "What did training do?"
LOST, SAVED = "What was lost?", "What was saved?"
ONE_SEED = " One seed cannot tell a small difference from chance."
INTERVAL = " ± is half a 95 % confidence interval of the difference, paired by seed"
MOST_TASKS = 3
MOST_GROUPS = 4
NO_SKILL = "stereotype"
"""The kind of a task on which more is not better."""
TOLD_APART = 2
"""Standard errors from which on a difference between student and teacher counts as one."""

Parts = tuple[str | Figure, ...]


@dataclass(frozen=True)
class Answer:
    """To one of the questions, or of one of several runs: texts and figures in turn."""

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
    lines = [Answer(group.numbered, parts) for group, parts in told]
    rest = [Answer("the others", ("In the table below.",))] if len(taught) > MOST_GROUPS else []
    return [Answer(HELPED, ()), *lines, *rest] if lines else []


def _answers(group: Group) -> list[Answer]:
    how_much = MUCH if group.mean(CONTROL) is not None else TRAINED  # without a control it is training's doing, not the teacher's
    told = [(HELPED, _helped(group)), (how_much, _how_much(group)), (LOST, _lost(group)), (SAVED, _saved(group))]
    return [Answer(question, parts) for question, parts in told if parts]


def best_of_sweep(found: Sweep) -> Parts:
    """Which it is, its figure, and how far it is ahead."""
    best = found.best.figure(found.metric)
    assert best is not None, found.metric  # what has none is not ranked
    unit = unit_of(found.metric)
    seeds = f" over {len(found.best.members)} seeds" if best.spread else ""
    behind = f"{' ' + unit if unit else ''}{seeds}{margin(found.groups, found.metric)}."
    return f"The best is {found.best_settings or found.best.name}, with {label_of(found.metric)} ", best, behind


def as_text(parts: Parts) -> str:
    """Of an answer what a terminal shows."""
    return "".join(part if isinstance(part, str) else " ".join(filter(None, (part.text, part.spread))) for part in parts)


def margin(ranked: Sequence[Group], key: str) -> str:
    """How far the best is ahead of the next by a metric, and what is to be said against it; "" of one alone."""
    if len(ranked) < 2:
        return ""
    first, second = ({run.seed: value for run, value in group.values(key)} for group in ranked[:2])
    ahead = abs((ranked[0].mean(key) or 0.0) - (ranked[1].mean(key) or 0.0))
    by_seed = [first[seed] - second[seed] for seed in first if seed in second]
    said = f", ahead of the next by {_apart(key, ahead)}"
    if len(by_seed) < 2:
        alone = min(len(first), len(second)) < 2
        return f"{said}, {'which one seed cannot tell from chance' if alone else 'over different seeds, so that it may be chance'}"
    half = interval(by_seed)
    return f"{said} ± {_apart(key, half)}, seed by seed{', which may be chance' if ahead <= half else ''}"


def _apart(key: str, value: float) -> str:
    """A difference, in the form of what it is one of."""
    return points(value) if text_of(key, value).endswith("%") else text_of(key, value)


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
    return (*told, *(part for sentence in _tasks(group) for part in sentence))


def _tasks(group: Group) -> Iterator[Parts]:
    """A sentence on each of the first tasks: those on which more is better, then bias."""
    tasks = {name: f"task/{name.replace('/', '-')}" for name in group.members[0].details.get("tasks", {})}
    biases = [name for name in tasks if group.members[0].details["tasks"][name].get("kind") == NO_SKILL]
    yield from [said for name, key in tasks.items() if name not in biases and (said := _skill(group, name, key))][:MOST_TASKS]
    yield from [said for name in biases if (said := _bias(group, name, tasks[name]))][:MOST_TASKS]


def _skill(group: Group, name: str, key: str) -> Parts:
    keys = [f"{key}/{model}" for model in ("teacher", "student")]
    student, below = group.figure(keys[1]), group.made(keys, operator.sub, points)
    if student is None or below is None or not student.text.endswith("%"):  # such as a perplexity
        return ()
    direction = "below" if (below.value or 0) >= 0 else "above"
    error = group.made([f"{key}_standard_error" for key in keys], math.hypot, points)
    doubt: Parts = () if error is None else (" (standard error ", replace(error, spread=""), ")")
    alike = error is not None and abs(below.value or 0) <= TOLD_APART * (error.value or 0)
    chance = finite(group.members[0].details["tasks"][name].get("chance"))
    guessing: Parts = (
        () if chance is None else (" (guessing: ", Figure(percent(chance), f"tasks/{name}/chance", chance, group.members[0].place), ")")
    )
    said = f"On {name} it gets ", student, *guessing, ", ", _unsigned(below), f" {direction} its teacher", *doubt
    return (*said, f"{': not told apart' * alike}. ")


def _bias(group: Group, name: str, key: str) -> Parts:
    student, teacher = (group.figure(f"{key}/{model}") for model in ("student", "teacher"))
    if student is None or teacher is None:
        return ()
    further, of = further_from_half(group.mean, groups_of(group.members[0], key))
    groups = f"; {further} of {of} groups are further from 50 % than for the teacher" if of else ""
    return (
        f"On {name} the stereotyped sentence is the likelier in ",
        student,
        " of the pairs, for its teacher in ",
        teacher,
        f"{groups}. ",
    )


def _saved(group: Group) -> Parts:
    size, speed = group.made(SIZES, quotient, percent), group.made(SPEEDS, quotient, factor)
    if size is None:
        return ()
    told: Parts = ("It has ", size, " of the teacher's parameters")
    if speed is None or not speed.value:
        return (*told, ".")
    if speed.value < 1:
        return (*told, ", but reads text at ", speed, " of the teacher's speed on the machine that measured.")
    return (*told, " and reads text ", speed, " times as fast on the machine that measured.")
