"""What scripts/benchmark_step.py and plot_benchmark.py make of the lines of a measurement."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from benchmark_step import Settings, markdown, read_lines
from plot_benchmark import plot

TIMES = {"reference": "mini_distill", "rounds": 3, "seconds": 1.5, "tokens_per_second": 1365.3}
RATIOS = {"ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1, "inverse_ratio": 1.0}
MEASURED = {**TIMES, **RATIOS, "peak_mib": 956.4, "state_mib": 795.0, "supervised_share": 0.875, "head_share_of_ceiling": 0.5}


def written(file: Path, **settings: Any) -> Path:
    """A measured variant, one that was skipped, and the sum of the floors, which has no memory of its own."""
    lines = [
        asdict(Settings("mini_distill", **settings)) | MEASURED,
        asdict(Settings("liger_jsd", **settings)) | {"skipped": "ImportError: a | b\n  c"},
        asdict(Settings("floor_sum", **settings)) | TIMES | RATIOS | {"supervised_share": 0.875},
    ]
    with file.open("a") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in lines)
    return file


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_row_of_a_table_has_all_columns_also_one_that_was_skipped(device: str, tmp_path: Path) -> None:
    title, _, head, under, *rows = markdown(read_lines(written(tmp_path / "lines.jsonl", device=device))).splitlines()
    assert title.startswith("Vocabulary 32,000, 4 × 512 tokens, 87.5% supervised")
    assert {row.count("|") for row in (head, under, *rows)} == {7 + (device == "cuda")}
    assert "| 956 | 161 |" in rows[0]
    assert rows[1].startswith("| liger_jsd | skipped: ImportError: a / b c |")


def test_the_plot_shows_memory_without_gradients_and_moments(tmp_path: Path) -> None:
    """The peak grew with the vocabulary for every variant: most of it was the state of the optimizer."""
    for vocab in (4096, 32000):
        written(tmp_path / "lines.jsonl", vocab=vocab)
    plot(read_lines(tmp_path / "lines.jsonl"), "vocab", None, tmp_path / "plot.svg")
    assert "memory above models, gradients and moments (GiB)" in (tmp_path / "plot.svg").read_text()
