"""How much of what the full teacher gives over cross-entropy is kept by each kind of cache, and at how many bytes per token.

    python scripts/compare_caches.py --out runs/caches -- experiment=tinystories_75k teacher.path=… data.path=…

Trains the same student, over several seeds, with cross-entropy alone, with the whole of the teacher's distribution (forward KL,
online), from each cache, and with renormalised top-k. What is kept of the gain: (KL of CE − KL of the arm) / (KL of CE − KL of the full
teacher), both KL to the live teacher on held-out text. Prints a Markdown table and draws it. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from compare_arms import _split, summary, train

CACHES = {
    "threshold, k = 4": "cache.kind=sampled cache.k=4",
    "threshold, k = 8": "cache.kind=sampled cache.k=8",
    "threshold, k = 16": "cache.kind=sampled cache.k=16",
    "threshold, k = 32": "cache.kind=sampled cache.k=32",
    "threshold, k = 64": "cache.kind=sampled cache.k=64",
    "12 draws": "cache.kind=sampled cache.sampling=draws cache.k=12",
    "50 draws": "cache.kind=sampled cache.sampling=draws cache.k=50",
    "50 draws from p^0.8": "cache.kind=sampled cache.sampling=draws cache.k=50 cache.proposal=0.8",
    "top 8, tail in a bucket": "cache.kind=topk cache.k=8",
    "top 8, tail spread": "cache.kind=topk cache.k=8 cache.tail=spread",
    "top 32, tail in a bucket": "cache.kind=topk cache.k=32",
}
RENORMALISED = {f"top {k}, renormalised": k for k in (8, 32)}
BYTES_OF_ENTRY = 3  # of renormalised top-k: a token number in two bytes, its probability in one
NAIVE = "objective.divergence=scripts.renormalised_top_k.renormalised_top_k"


def main() -> None:
    """Build the caches, train the arms, compare."""
    own, common = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; give each its share of the cores with trainer.num_threads")
    parser.add_argument("--caches", nargs="*", default=list(CACHES), help="which of them")
    parser.add_argument("--plot", type=Path, help="an .svg or .png")
    parser.add_argument("--title", default="")
    arguments = parser.parse_args(own)

    with ThreadPoolExecutor(arguments.jobs) as jobs:
        folders = {name: arguments.out / "caches" / _slug(name) for name in arguments.caches}
        list(jobs.map(lambda name: build(CACHES[name], folders[name], common), folders))
        arms = {"cross-entropy alone": ["objective=ce"], "the full teacher": ["objective=forward_kl"]}
        arms |= {name: ["objective=forward_kl", f"teacher.cache_dir={folder}"] for name, folder in folders.items()}
        for name, k in RENORMALISED.items():
            arms[name] = ["objective=forward_kl", NAIVE, f"objective.divergence_options={{k: {k}}}"]
        begun = {
            name: [
                jobs.submit(train, [*common, *arm, f"seed={seed}"], arguments.out / f"{_slug(name)}-seed{seed}") for seed in arguments.seeds
            ]
            for name, arm in arms.items()
        }
        runs = {name: [job.result() for job in of_seeds] for name, of_seeds in begun.items()}
    rows = compare(runs, folders)
    print(table(rows))
    if arguments.plot:
        plot(rows, arguments.plot, arguments.title)


def build(spec: str, folder: Path, common: list[str]) -> None:
    """Score the corpus, or find that it is scored. The cache command knows only the teacher and the data."""
    own = [text for text in common if text.startswith(("teacher", "data"))]
    command = [sys.executable, "-m", "mini_distill.cache", *own, *spec.split(), f"cache.dir={folder}", "num_threads=1"]
    print(shlex.join(command[1:]), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def compare(runs: dict[str, list[Path]], caches: dict[str, Path]) -> list[dict[str, Any]]:
    """Each arm's means over the seeds; what is kept of the gain is taken seed by seed."""
    kl = {name: [summary(folder)["eval/forward_kl"] for folder in folders] for name, folders in runs.items()}
    ce, full = kl["cross-entropy alone"], kl["the full teacher"]
    rows = []
    for name, folders in runs.items():
        kept = [(c - own) / (c - f) for c, own, f in zip(ce, kl[name], full, strict=True)]
        size = summary(caches[name])["cache/bytes_per_token"] if name in caches else RENORMALISED.get(name, 0) * BYTES_OF_ENTRY or None
        nll = [summary(folder)["eval/student_nll"] for folder in folders]
        rows.append(
            {"arm": name, "bytes": size, "kl": mean(kl[name]), "kept": mean(kept), "low": min(kept), "high": max(kept), "nll": mean(nll)}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| arm | bytes per token | KL to the teacher | kept of the gain (range over seeds) | held-out loss |", "|:--|--:|--:|--:|--:|"]
    for row in rows:
        size = "–" if row["bytes"] is None else f"{row['bytes']:.1f}"
        kept = f"{100 * row['kept']:.1f} % ({100 * row['low']:.1f}–{100 * row['high']:.1f})"
        lines.append(f"| {row['arm']} | {size} | {row['kl']:.4f} | {kept} | {row['nll']:.4f} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bytes per token against what is kept of the gain."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    families = {"threshold": ("#0b6e99", "o"), "draws": ("#5a7d2a", "s"), "renormalised": ("#c4500c", "x"), "tail": ("#7b4b94", "^")}
    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    for family, (colour, marker) in families.items():
        own = [row for row in rows if family in row["arm"] and row["bytes"]]
        if not own:
            continue
        own.sort(key=lambda row: row["bytes"])
        middle = [100 * row["kept"] for row in own]
        spread = [
            [m - 100 * row["low"] for m, row in zip(middle, own, strict=True)],
            [100 * row["high"] - m for m, row in zip(middle, own, strict=True)],
        ]
        style = "-" if family == "threshold" else ""
        axes.errorbar([row["bytes"] for row in own], middle, spread, color=colour, marker=marker, ls=style, lw=1.2, capsize=2, label=family)
        below = family in ("draws", "renormalised")  # neighbours of two families do not write over one another
        for row, height in zip(own, middle, strict=True):
            offset: dict[str, Any] = {"xytext": (5, -11 if below else 5), "textcoords": "offset points"}  # beside the bar
            axes.annotate(_without(row["arm"], family), (row["bytes"], height), fontsize=7, color=colour, **offset)
    axes.axhline(100, color="black", lw=0.8, ls="--")
    sizes = [row["bytes"] for row in rows if row["bytes"]]
    axes.set(xlim=(min(sizes) / 1.4, max(sizes) * 1.4), ylim=(100 * min(row["low"] for row in rows if row["bytes"]) - 4, 104))
    axes.set(xscale="log", xlabel="bytes per token on disk", ylabel="kept of the gain over cross-entropy (%)", title=title)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _without(arm: str, family: str) -> str:
    """What tells an arm from others of its family: `k = 8`, `50 from p^0.8`."""
    return " ".join(arm.replace(family, "").replace(" in a ", " in ").strip(", ").replace(",", "").split())


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")


if __name__ == "__main__":
    main()
