"""Expected calibration error on examples that can be done in the head."""

from __future__ import annotations

import pytest
import torch

from mini_distill.evaluation.calibration import calibration_gaps, expected_calibration_error


def error(confidence: list[float], correct: list[bool]) -> float:
    gaps = calibration_gaps(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct))
    return expected_calibration_error(gaps, len(correct))


def test_a_model_that_is_right_as_often_as_it_says_has_no_calibration_error() -> None:
    confidence = [0.25] * 4 + [0.5] * 4 + [1.0] * 3
    correct = [True, False, False, False] + [True, True, False, False] + [True] * 3
    assert error(confidence, correct) == pytest.approx(0.0, abs=1e-12)


def test_a_model_that_is_always_sure_and_always_wrong_has_error_one() -> None:
    assert error([1.0] * 5, [False] * 5) == 1.0


def test_bins_are_weighted_by_their_tokens() -> None:
    # one bin: three tokens at 0.9, all wrong; another: one token at 0.1, right
    assert error([0.9, 0.9, 0.9, 0.1], [False, False, False, True]) == pytest.approx((3 * 0.9 + 1 * 0.9) / 4)


def test_over_and_underconfidence_cancel_within_a_bin_but_not_between_bins() -> None:
    assert error([0.5, 0.5], [True, False]) == pytest.approx(0.0)
    assert error([0.5, 0.9], [True, False]) == pytest.approx((0.5 + 0.9) / 2)
