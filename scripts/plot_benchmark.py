"""Draw what a sweep of `benchmark_step.py` has written: time and memory of a step against what was varied.

The memory is the peak above models, gradients and AdamW's moments: what the loss, and the activations, cost.

python scripts/plot_benchmark.py by_vocab.jsonl --axis vocab --output docs/images/step_vocab.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmark_step import Line, read_lines

COLOURS = {
    "mini_distill": "#0b6e99",
    "teacher_rows": "#c4500c",
    "ce_fused": "#5a7d2a",
    "plain_full": "#7b4b94",
    "trl_gkd": "#8a6d1a",
    "trl_distillation": "#a33b56",
    "floor_sum": "#2f8f83",
}
"""The same for a variant in every plot; further ones are grey."""
MEASURES = {"seconds": ("seconds a step", 1.0), "working_mib": ("memory above models, gradients and moments (GiB)", 1 / 1024)}
AXES = {"vocab": "vocabulary", "tokens": "tokens of a step", "supervised_share": "share of supervised tokens"}


def main() -> None:
    """Read, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--axis", choices=("vocab", "tokens", "supervised"), required=True)
    parser.add_argument("--output", type=Path, required=True, help="an .svg or .png")
    parser.add_argument("--variants", nargs="+", help="only these, in this order")
    arguments = parser.parse_args()
    axis = "supervised_share" if arguments.axis == "supervised" else arguments.axis
    plot(read_lines(arguments.results), axis, arguments.variants, arguments.output)


def plot(lines: list[Line], axis: str, variants: list[str] | None, path: Path) -> None:
    """Two panels, a line for each variant; both axes logarithmic, but for a share."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "benchmark"  # the same figures, the same file
    measured = [{**line, "tokens": line["batch"] * line["seq"]} for line in lines if axis in line or axis == "tokens"]
    names = variants or list(dict.fromkeys(line["variant"] for line in measured if "seconds" in line))
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(9.6, 3.8), layout="constrained")
    for panel, (measure, (label, factor)) in zip(panels, MEASURES.items(), strict=True):
        for name in names:
            points = sorted((line[axis], line[measure] * factor) for line in measured if line["variant"] == name and measure in line)
            panel.plot(
                *zip(*points, strict=True) if points else ([], []), color=COLOURS.get(name, "#777777"), lw=1.6, marker="o", ms=4, label=name
            )
        _axes(panel, axis, sorted({line[axis] for line in measured}))
        panel.set(xlabel=AXES[axis], title=label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(names)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _axes(panel: Any, axis: str, values: list[float]) -> None:
    """Ticks at what was measured."""
    from matplotlib.ticker import LogLocator

    if axis == "supervised_share":
        panel.set(xlim=(0, 1.02), ylim=(0, 1.08 * panel.dataLim.ymax))
        panel.set_xticks(values, [f"{100 * value:g} %" for value in values])
    else:
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(values, [f"{value:,.0f}" for value in values])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.grid(axis="y", color="#dddddd", lw=0.6)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
