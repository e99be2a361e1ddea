"""Did distillation help? Runs against their controls, over seeds: how much of the gap to the teacher was closed.

python -m mini_distill.compare runs/a runs/a-control runs/b …        --output comparison.json

A control is a run without a teacher's signal (objective=ce) that differs from others in its objective alone, such as `control=true` makes,
or also in where the teacher's targets come from, which it does not use: a cache or the live teacher.
Runs that differ in nothing but the seed are one row; each is compared with the control of the same seed, or as it was itself (control=true)
where that is not given.
"""

from __future__ import annotations

if __name__ == "__main__":
    from mini_distill.starting import answer_signals

    answer_signals()

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .cli import report
from .config import Config, ObjectiveConfig
from .errors import ConfigError, MiniDistillError
from .run import Run
from .storage import atomic_write_text

NOT_COMPARED = ("seed", "output_dir", "resume", "resume_allow", "control", "debug", "tracking", "objective")
OF_THE_TARGETS = ("cache_dir", "cache_kind", "cache_k", "top_k", "num_requests", "timeout")
"""Settings of a teacher that only say where its targets come from, and how: of no use to who trains without them."""

Summary = dict[str, Any]


# --------------------------------------------------------------------------------------------------------------- the matched control


def control_of(config: Config) -> Config:
    """The same run without the teacher's signal: same student at the start, data order, steps and learning rates.

    The teacher, where there is one in this process, still measures it. Its folder is `<output_dir>-control`.
    """
    alone = ObjectiveConfig(kl_weight=0.0, ce_weight=1.0, logits_memory_mib=config.objective.logits_memory_mib)
    return dataclasses.replace(config, objective=alone, control=False, output_dir=f"{config.output_dir}-control")


def against_control(measured: Summary, control: Summary) -> dict[str, float]:
    """The control's figures as `control/…`, and what the teacher was worth.

    Args:
        measured: `eval/…` of the distilled student.
        control: The summary of its control.

    Returns:
        With those of the control: `control/gap_closed` = (control − student) / (control − teacher) in nats per held-out token, where
        the teacher is better than the control; `control/kl_reduction`, the share of the control's forward KL that is gone.
    """
    found = {key.replace("eval/student_", "control/student_"): value for key, value in control.items() if key.startswith("eval/student_")}
    for name in ("forward_kl", "reverse_kl", "top1_agreement", "topk_agreement", "rank_correlation"):
        if f"eval/{name}" in control:
            found[f"control/{name}"] = control[f"eval/{name}"]
    gap = gap_closed(measured, control)
    if gap is not None:
        found["control/gap_closed"] = gap
    if control.get("eval/forward_kl") and "eval/forward_kl" in measured:
        found["control/kl_reduction"] = 1 - measured["eval/forward_kl"] / control["eval/forward_kl"]
    return found


def gap_closed(measured: Summary, control: Summary) -> float | None:
    """(control − student) / (control − teacher), in nats per token; None where the teacher is unknown or no better than the control."""
    student, alone, teacher = measured.get("eval/student_nll"), control.get("eval/student_nll"), measured.get("eval/teacher_nll")
    if student is None or alone is None or teacher is None or alone <= teacher:
        return None
    return float((alone - student) / (alone - teacher))


# -------------------------------------------------------------------------------------------------------------------- several runs


@dataclass(frozen=True)
class Finished:
    """A run that has its figures.

    Attributes:
        run: It.
        summary: Its figures.
        seed: Its seed.
        setting: All that is compared but for the objective, as JSON.
        of_control: What of that has to be the same in its control.
        is_control: Whether no teacher's signal was in its loss.
    """

    run: Run
    summary: Summary
    seed: int
    setting: str
    of_control: str
    is_control: bool

    @property
    def objective(self) -> str:
        """Its loss in words, without defaults."""
        return objective_text(self.run.config["objective"])


def open_finished(path: str) -> Finished:
    """A run on disk.

    Raises:
        ConfigError: the folder is not a run, or the run has no figures yet.
    """
    run = Run(path)
    summary = run.summary
    if not summary:
        state = run.status.get("state", "unknown")
        raise ConfigError(path, f"no figures yet (the run is {state})", "Run its command again to finish it.")
    if "eval/student_nll" not in summary:
        raise ConfigError(path, "no held-out loss in summary.json", "Only runs with held-out text can be compared.")
    setting = {key: value for key, value in run.config.items() if key not in NOT_COMPARED}
    shared, alone = shared_with_control(run.config), not has_teacher_signal(run.config["objective"])
    return Finished(run, summary, int(run.config["seed"]), json.dumps(setting, sort_keys=True), shared, alone)


def shared_with_control(config: dict[str, Any]) -> str:
    """What of a configuration, as plain values, has to be the same in a run and its control, as JSON: the same student, text and steps.

    The teacher is part of it, since a student can begin with its layers and has its tokenizer; where its targets come from is not, unless
    the cache alone says which teacher it was.
    """
    kept = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    teacher = config.get("teacher") or {}
    if teacher.get("kind") != "cached":
        kept["teacher"] = {key: value for key, value in teacher.items() if key not in OF_THE_TARGETS}
    return json.dumps(kept, sort_keys=True, default=str)


def has_teacher_signal(objective: dict[str, Any]) -> bool:
    """Whether any term of an objective, as plain values, looks at a teacher."""
    return bool(objective["kl_weight"]) or any(term.get("weight", 1.0) for term in objective["terms"].values())


def objective_text(objective: dict[str, Any]) -> str:
    """An objective in a few words: its weights, but for the 1 of a single term, and what is not as usual."""
    if not has_teacher_signal(objective):
        return "ce (control)"
    terms = [(objective["kl_weight"], objective["divergence"].rpartition(".")[2]), (objective["ce_weight"], "ce")]
    terms = [(weight, name) for weight, name in terms if weight]
    terms += [(term.get("weight", 1.0), name) for name, term in objective["terms"].items()]
    alone = len(terms) == 1 and terms[0][0] == 1  # `1 jsd` behind the number of a run read as if it were part of it
    text = terms[0][1] if alone else " + ".join(f"{weight:g} {name}" for weight, name in terms)
    return text if objective["temperature"] == 1 else f"{text}, T = {objective['temperature']:g}"


def compare(paths: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each group of runs that differ in the seed alone.

    Returns:
        `label`, `runs`, `seeds`, and for `student_nll`, `forward_kl`, `top1_agreement`, `student_ece`, `gap_closed` the mean, and with two
        seeds or more `<name>_interval`, half the width of its 95 % confidence interval (Student's t over seeds).

    Raises:
        ConfigError: a folder is not a finished run, or a seed is there twice.
    """
    runs = [open_finished(path) for path in paths]
    controls = {(run.of_control, run.seed): run for run in runs if run.is_control}
    groups: dict[tuple[str, str], list[Finished]] = {}
    for run in runs:
        groups.setdefault((run.setting, json.dumps(run.run.config["objective"], sort_keys=True)), []).append(run)
    rows = []
    for members in groups.values():
        if len({member.seed for member in members}) < len(members):
            raise ConfigError(str(members[1].run.path), "a run of the same settings and seed is given twice", "Give each once.")
        rows.append(_row(members, controls, distinguish=len({setting for setting, _ in groups}) > 1))
    return rows


def _row(members: list[Finished], controls: dict[tuple[str, int], Finished], distinguish: bool) -> dict[str, Any]:
    first = members[0]
    name = first.run.path.name if distinguish or len(members) == 1 else ""
    row: dict[str, Any] = {
        "label": f"{first.objective}{f' ({name})' if name else ''}",
        "runs": [str(member.run.path) for member in members],
        "seeds": [member.seed for member in members],
    }
    for key in ("student_nll", "forward_kl", "top1_agreement", "student_ece", "student_bits_per_byte"):
        values = [member.summary[f"eval/{key}"] for member in members if f"eval/{key}" in member.summary]
        row |= _with_interval(key, values)
    gaps = [_gap_of(member, controls.get((member.of_control, member.seed))) for member in members if not member.is_control]
    return row | _with_interval("gap_closed", [gap for gap in gaps if gap is not None])


def _gap_of(run: Finished, control: Finished | None) -> float | None:
    """Against the control among the runs; where there is none, as the run found it itself (`control=true`)."""
    found: float | None = run.summary.get("control/gap_closed")
    return found if control is None else gap_closed(run.summary, control.summary)


def _with_interval(name: str, values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {name: mean(values)} | ({f"{name}_interval": interval(values)} if len(values) > 1 else {})


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean: t · s / √n, for independent normal values, two at least."""
    return student_t(0.95, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def student_t(confidence: float, freedom: int) -> float:
    """The t between whose negative and itself Student's distribution holds `confidence`, by halving an interval."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), exact for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(odd, freedom - 1, 2):  # the powers of the cosine below freedom - 1
        total += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, ± half a confidence interval where there are several seeds."""
    columns = {
        "student_nll": "held-out loss",
        "forward_kl": "KL to the teacher",
        "top1_agreement": "top-1 agreement",
        "student_ece": "calibration error",
        "gap_closed": "gap closed",
    }
    percent = ("top1_agreement", "student_ece", "gap_closed")
    lines = [["objective", "seeds", *columns.values()], [":--", *["--:"] * (len(columns) + 1)]]
    for row in rows:
        cells = [_cell(row, name, 100 if name in percent else 1) for name in columns]
        lines.append([row["label"], ", ".join(map(str, row["seeds"])), *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = ["Gap closed: (control − student) / (control − teacher), nats per held-out token, seed by seed."]
    if any("_interval" in key for row in rows for key in row):
        notes.append("±: half a 95 % confidence interval over seeds (Student's t).")
    else:
        notes.append("One seed says little: give runs with several.")
    return f"{table}\n\n{' '.join(notes)}"


def _cell(row: dict[str, Any], name: str, factor: int) -> str:
    if name not in row:
        return "–"
    digits, unit = (1, " %") if factor == 100 else (4, "")
    text = f"{factor * row[name]:.{digits}f}"
    half = row.get(f"{name}_interval")
    return f"{text}{f' ± {factor * half:.{digits}f}' if half is not None else ''}{unit}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mini_distill.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders of finished runs")
    parser.add_argument("--output", type=Path, help="also write the rows there, as JSON")
    given = parser.parse_args(arguments)
    try:
        rows = compare(given.runs)
        if given.output is not None:
            atomic_write_text(given.output, json.dumps(rows, indent=2) + "\n")
        print(markdown(rows))
        return 0
    except MiniDistillError as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
