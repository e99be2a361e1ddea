"""Calibration, slices, differences and samples, as far as details.json has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from measured_folders import details, write_run

from mini_distill.report import report
from mini_distill.reporting.close_look import differences, reliability, slices
from mini_distill.reporting.figures import Figure
from mini_distill.reporting.measured import Measured, open_measured


def test_calibration_leaves_out_empty_bins(tmp_path: Path) -> None:
    drawing = reliability(open_measured(write_run(tmp_path / "run")))
    assert drawing is not None and [len(series.points) for series in drawing.chart.series] == [4, 4]  # the first bin has no tokens
    assert reliability(Measured(tmp_path)) is None


def test_slices_have_charts_and_figures(tmp_path: Path) -> None:
    views = slices(open_measured(write_run(tmp_path / "run")))
    assert [view.name for view in views][:2] == ["By tokens before the predicted one", "By the teacher's uncertainty (entropy, nats)"]
    assert [len(view.charts) for view in views] == [2, 2, 2]
    assert [cell.text for cell in views[0].table.rows[0][2:5] if isinstance(cell, Figure)] == ["3.400", "2.100", "0.700"]
    assert list(views[0].charts[0].chart.categories) == ["<0.1", "0.1–0.5", "≥0.5"]
    assert (
        views[0].charts[0].chart.series[0].line and not views[2].charts[0].chart.series[0].line
    )  # a column has no order to join its values by


def test_a_token_tells_its_numbers_and_a_stronger_difference_is_darker(tmp_path: Path) -> None:
    (text,) = differences(open_measured(write_run(tmp_path / "run", details=details("def"))))
    assert [token.heat for token in text.tokens] == [None, 4, 6]
    assert text.tokens[1].title == (
        f"KL 1.25 nats\nstudent gives it {100 * math.exp(-2.3):.1f} %, expects “def”\nteacher gives it {100 * math.exp(-0.4):.1f} %, expects “def”"
    )
    assert [row[0] for row in text.worst.rows] == ["↵", "def"]  # the furthest first


def test_details_with_less_in_them_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    sparse: dict[str, Any] = {
        "reliability": {"student": [{"tokens": 3, "accuracy": None}, {"tokens": 3, "accuracy": 0.5}]},
        "slices": {"position": [{"label": "1–7", "student_nll": None}], "empty": []},
        "differences": [{"row": "x", "forward_kl": None, "tokens": []}, {"forward_kl": 1.0, "tokens": [{"forward_kl": 0.5}, {}]}],
        "samples": [{"continuations": {}}],
        "future": 3,
    }
    page = report([write_run(tmp_path / "run", details=sparse)]).read_text(encoding="utf-8")
    assert "text 1" in page and "Sample 1" in page
