"""Weights over the optimizer steps."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from mini_distill.losses.divergences import forward_kl
from mini_distill.losses.objective import DivergenceTerm, Objective
from mini_distill.losses.schedule import multiplier
from mini_distill.models.head import OutputHead
from mini_distill.teachers.targets import DenseTargets

RAMP = {10: 1.0, 20: 0.0, 25: 0.5}


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        *[(1, 1.0), (9, 1.0), (10, 1.0)],  # constant before the first point
        *[(11, 0.9), (15, 0.5), (19, 0.1), (20, 0.0)],
        *[(21, 0.1), (24, 0.4), (25, 0.5)],
        *[(26, 0.5), (10**9, 0.5)],  # and after the last
    ],
)
def test_a_schedule_is_linear_between_its_points_and_constant_outside(step: int, factor: float) -> None:
    assert multiplier(RAMP, step) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("point", RAMP)
def test_a_point_is_met_exactly(point: int) -> None:
    assert multiplier(RAMP, point) == RAMP[point]


@pytest.mark.parametrize("schedule", [None, {}])
def test_without_a_schedule_the_weight_stays(schedule: dict[int, float] | None) -> None:
    assert {multiplier(schedule, step) for step in (1, 2, 10**6)} == {1.0}


@pytest.mark.parametrize("step", [1, 7, 8])
def test_one_point_is_a_constant(step: int) -> None:
    assert multiplier({7: 0.25}, step) == 0.25


def test_the_order_in_which_points_are_written_does_not_matter() -> None:
    backwards = dict(sorted(RAMP.items(), reverse=True))
    assert [multiplier(backwards, step) for step in range(1, 30)] == [multiplier(RAMP, step) for step in range(1, 30)]


def test_adjacent_points_are_a_jump() -> None:
    assert [multiplier({3: 1.0, 4: 0.0}, step) for step in range(1, 7)] == [1, 1, 1, 0, 0, 0]


def test_a_factor_depends_on_nothing_but_the_step() -> None:
    """A run that goes on from a checkpoint asks for step 400 first; one that was never stopped has asked for all before."""
    whole = {step: multiplier(RAMP, step) for step in range(1, 41)}
    steps = list(whole)
    random.Random(0).shuffle(steps)
    assert all(multiplier(RAMP, step) == whole[step] for step in steps)


# ------------------------------------------------------------------------------------------------------------- in the objective


def scheduled(**more: float) -> Objective:
    return Objective(forward_kl, "forward_kl", temperature=2.0, kl_weight=0.6, ce_weight=0.3, schedules={"ce": RAMP}, **more)


@pytest.mark.parametrize(("step", "factor"), [(1, 1.0), (15, 0.5), (20, 0.0), (40, 0.5)])
def test_the_objective_of_a_step_multiplies_the_weight_and_leaves_the_others(step: int, factor: float) -> None:
    assert scheduled().at_step(step).factors() == pytest.approx([0.6 * 4, 0.3 * factor])


def test_the_first_step_is_one() -> None:
    objective = Objective(None, "forward_kl", kl_weight=0.0, ce_weight=1.0, schedules={"ce": {1: 0.0, 3: 1.0}})
    assert objective.factors() == objective.at_step(1).factors() == [0.0]
    assert objective.at_step(2).factors() == [0.5]


def test_asking_for_a_step_changes_no_other_objective() -> None:
    objective = scheduled()
    early, late = objective.at_step(1), objective.at_step(20)
    assert (early.factors()[1], late.factors()[1], objective.factors()[1]) == (0.3, 0.0, 0.3)
    assert late.at_step(15).factors() == objective.at_step(15).factors()  # not of the factors of step 20


@pytest.mark.parametrize("step", [1, 15, 20])
def test_both_paths_follow_the_schedule_and_log_the_terms_without_it(step: int) -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(5, 4, dtype=torch.float64), torch.randint(9, (5,))
    heads = [OutputHead(nn.Linear(4, 9, bias=False).double()) for _ in range(2)]
    teacher = DenseTargets(torch.randn(5, 4, dtype=torch.float64), heads[1], hidden.device)
    plain = scheduled()(heads[0].logits(hidden), teacher.logits(), targets)
    now = scheduled().at_step(step)
    for result in (now(heads[0].logits(hidden), teacher.logits(), targets), now.fused(hidden, heads[0], teacher, targets)):
        torch.testing.assert_close(result.terms, plain.terms)
        expected = 0.6 * 4 * plain.terms["forward_kl"] + 0.3 * multiplier(RAMP, step) * plain.terms["ce"]
        torch.testing.assert_close(result.loss.detach(), expected)


def test_a_further_term_is_scheduled_by_its_own_name() -> None:
    further = [DivergenceTerm("forward_kl_hot", forward_kl, 0.5, temperature=4.0)]
    objective = Objective(forward_kl, "forward_kl", further=further, schedules={"forward_kl_hot": {1: 0.0, 11: 2.0}})
    assert objective.at_step(6).factors() == pytest.approx([0.5, 0.5 * 16 * 1.0, 0.5])
