"""Where charts put their points, and what they say of themselves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_distill.reporting.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Series, draw, nice_ticks, thinned

numbers = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30), st.lists(numbers, max_size=2))
def test_every_point_and_level_is_inside_the_frame_and_more_is_higher(points: list[tuple[float, float]], levels: list[float]) -> None:
    drawing = draw(Chart("t", "x", "y", [Series("s", points, "student", marks=True)], levels=[("l", y, "teacher") for y in levels]))
    places = [(mark.x, mark.y) for mark in drawing.marks]
    assert all(LEFT - 1e-6 <= x <= WIDTH - RIGHT + 1e-6 for x, _ in places)
    assert all(TOP - 1e-6 <= y <= HEIGHT - BOTTOM + 1e-6 for y in [*(y for _, y in places), *(y for _, y, _ in drawing.levels)])
    for (_, value), (_, place) in zip(points, places, strict=True):
        for (_, other), (_, other_place) in zip(points, places, strict=True):
            assert not (value > other and place > other_place + 1e-6)


@given(numbers, st.floats(1e-9, 1e9))
def test_ticks_are_round_few_and_inside(low: float, width: float) -> None:
    high = low + width
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 11
    assert all(low - 1e-9 * abs(low) - 1e-6 * width <= tick <= high + 1e-9 * abs(high) + 1e-6 * width for tick in ticks)


def test_a_logarithmic_axis_gives_equal_room_to_equal_factors() -> None:
    points = [(1e6, 1.0), (1e7, 2.0), (1e8, 3.0)]
    first, second, third = draw(Chart("t", "x", "y", [Series("s", points, "run0", marks=True)], logarithmic=True)).marks
    assert second.x - first.x == pytest.approx(third.x - second.x)


def test_a_thinned_curve_keeps_its_mean_and_says_how_many_points_are_one() -> None:
    points = [(float(i), math.sin(i)) for i in range(1000)]
    thin, size = thinned(points, most=100)
    assert (len(thin), size) == (100, 10)
    assert sum(y for _, y in thin) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thinned(points[:50], most=100) == (points[:50], 1)


def test_names_that_do_not_fit_side_by_side_are_tilted() -> None:
    series = [Series("s", [(0.0, 1.0), (1.0, 2.0)], "student")]
    short, long = ([name * i for i in range(1, 3)] for name in ("a", "a long name of a part of the data"))
    assert not draw(Chart("t", "x", "y", series, categories=short)).tilted
    assert draw(Chart("t", "x", "y", series, categories=[*long, *long])).tilted


def test_a_chart_says_in_words_where_its_curves_go() -> None:
    falling = Series("student", [(0.0, 5.0), (1.0, 3.0)], "student")
    uneven = Series("other", [(0.0, 1.0), (1.0, 0.5), (2.0, 2.0)], "other")
    alt = draw(Chart("Loss", "step", "nats", [falling, uneven], levels=[("teacher", 2.5, "teacher")])).alt
    assert alt == "Loss: nats against step. student falls from 5 to 3. other on the whole rises from 1 to 2. teacher: 2.5."


def test_one_curve_alone_needs_no_legend() -> None:
    one = Series("student", [(0.0, 5.0), (1.0, 3.0)], "student")
    assert draw(Chart("t", "x", "y", [one])).legend == []
    assert draw(Chart("t", "x", "y", [one], levels=[("teacher", 2.5, "teacher")])).legend == [
        ("student", "student", False),
        ("teacher", "teacher", True),
    ]
