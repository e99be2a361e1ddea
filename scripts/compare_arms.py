"""Train several arms over several seeds and compare what the students learnt, on held-out text.

    python scripts/compare_arms.py --arm distilled= --arm "control=objective=ce" --out runs/default_comparison
    python scripts/compare_arms.py --arm ce=objective=ce --arm kl=objective=forward_kl --out runs/stories -- teacher=hf teacher.path=…

What follows `--` goes to every arm; an arm is NAME=overrides, separated by blanks. Each run is the ordinary command in its own
folder, so a killed comparison goes on where it stopped. Prints a Markdown table (mean and range over the seeds) and, with --plot,
draws the held-out loss of every run against its steps.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

METRICS = {
    "eval/student_nll": "held-out loss (nats/token)",
    "eval/student_perplexity": "perplexity",
    "eval/forward_kl": "KL to the teacher",
    "eval/top1_agreement": "top-1 agreement",
    "eval/student_ece": "calibration error",
}


def main() -> None:
    """Run what is missing, then compare."""
    own, common = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", action="append", required=True, metavar="NAME=OVERRIDES")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; give each its share of the cores with trainer.num_threads")
    parser.add_argument("--plot", type=Path, help="an .svg or .png of the curves")
    parser.add_argument("--title", default="")
    arguments = parser.parse_args(own)

    arms = {name: shlex.split(overrides) for name, _, overrides in (arm.partition("=") for arm in arguments.arm)}
    with ThreadPoolExecutor(arguments.jobs) as jobs:
        begun = {
            name: [
                jobs.submit(train, [*common, *overrides, f"seed={seed}"], arguments.out / f"{name}-seed{seed}") for seed in arguments.seeds
            ]
            for name, overrides in arms.items()
        }
        runs = {name: [job.result() for job in of_seeds] for name, of_seeds in begun.items()}
    print(table(runs))
    if arguments.plot:
        plot(runs, arguments.plot, arguments.title)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def train(overrides: list[str], folder: Path) -> Path:
    """The run's folder; does nothing when it has finished before."""
    command = [sys.executable, "-m", "mini_distill.train", *overrides, f"output_dir={folder}"]
    print(shlex.join(command[1:]), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def summary(folder: Path) -> dict[str, Any]:
    """The run's final numbers."""
    numbers: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return numbers


def table(runs: dict[str, list[Path]]) -> str:
    """Mean and range over the seeds of each arm, in Markdown."""
    shown = {key: label for key, label in METRICS.items() if all(key in summary(f) for folders in runs.values() for f in folders)}
    lines = ["| arm | " + " | ".join(shown.values()) + " |", "|:--|" + "--:|" * len(shown)]
    for name, folders in runs.items():
        cells = []
        for key in shown:
            values = [summary(folder)[key] for folder in folders]
            cells.append(f"{mean(values):.3f} ({min(values):.3f}–{max(values):.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    first = summary(next(iter(runs.values()))[0])
    if "eval/teacher_nll" in first:
        lines.append(f"\nTeacher: {first['eval/teacher_nll']:.3f} nats/token, perplexity {first['eval/teacher_perplexity']:.2f}.")
    return "\n".join(lines)


def plot(runs: dict[str, list[Path]], path: Path, title: str) -> None:
    """Held-out loss against steps: one thin line a seed, one colour an arm, the teacher as a dashed floor."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for colour, (name, folders) in zip(("#0b6e99", "#c4500c", "#5a7d2a", "#7b4b94", "#555555"), runs.items(), strict=False):
        for i, folder in enumerate(folders):
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            points = [(row["step"], row["eval/student_nll"]) for row in rows if "eval/student_nll" in row]
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.4, alpha=0.85, label=name if i == 0 else None)
    first = summary(next(iter(runs.values()))[0])
    if "eval/teacher_nll" in first:
        axes.axhline(first["eval/teacher_nll"], color="black", lw=1, ls="--", label="teacher")
    axes.set(xlabel="optimizer step", ylabel="held-out loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
