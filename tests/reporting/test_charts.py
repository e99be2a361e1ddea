"""Where charts put their points, and what they say of themselves."""

from __future__ import annotations

import math
import re
from html import unescape
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_distill.evaluation.table import percent
from mini_distill.reporting.charts import COLOURS, HEIGHT, LONGEST, WIDTH, Chart, Drawing, Series, apart, draw, thinned, tick_texts
from mini_distill.reporting.figures import signed_free

numbers = st.floats(-1e9, 1e9, allow_nan=False)


def marks(drawing: Drawing) -> list[tuple[str, float, float]]:
    """What each point says when it is pointed at, and where it is."""
    groups = re.findall(r'<title>([^<]*)</title>.*?<use [^>]*? x="([^"]+)" y="([^"]+)"', drawing.svg)
    return [(unescape(title), float(x), float(y)) for title, x, y in groups]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
def test_every_point_is_inside_the_frame_and_more_is_higher(points: list[tuple[float, float]]) -> None:
    found = [(x, y) for _, x, y in marks(draw(Chart("t", "x", "y", [Series("s", points, "student", marks=True)])))]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in found)
    for (_, value), (_, place) in zip(points, found, strict=True):
        for (_, other), (_, other_place) in zip(points, found, strict=True):
            assert not (value > other and place > other_place + 1e-3)


def test_a_logarithmic_axis_gives_equal_room_to_equal_factors() -> None:
    points = [(1e6, 1.0), (1e7, 2.0), (1e8, 3.0)]
    (_, first, _), (_, second, _), (_, third, _) = marks(
        draw(Chart("t", "x", "y", [Series("s", points, "run0", marks=True)], logarithmic=True))
    )
    assert second - first == pytest.approx(third - second)


def test_colours_and_font_are_those_of_the_page() -> None:
    series = [Series(style, [(0.0, 1.0), (1.0, 2.0)], style) for style in COLOURS[3:]]
    svg = draw(Chart("t", "x", "y", series, levels=[("l", 1.0, "teacher")], diagonal="d")).svg
    assert {f"var(--{name})" for name in COLOURS} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not re.search(r"#[0-9a-f]{6}|font-family|<style|<metadata|<!--", svg)


def test_two_charts_share_no_names_within_a_page() -> None:
    one, other = (draw(Chart(title, "x", "y", [Series("s", [(0.0, 1.0)], "run0")], levels=[("l", 1.0, "run1")])).svg for title in "ab")
    names = [set(re.findall(r'id="([^"]*)"', svg)) for svg in (one, other)]
    assert all(names) and not names[0] & names[1]


@pytest.mark.parametrize(
    "text", ["$x^2$ \\frac", "<script>alert(1)</script>", "a & b", '" onload="x', "#000003", "日本語", "--><b>", "two\nlines"]
)
def test_a_name_is_shown_as_it_is_and_is_no_markup(text: str) -> None:
    series = Series(text, [(0.0, 1.0), (1.0, 2.0)], "run0", labels=("", text[:3]))
    drawing = draw(Chart(text, text, "y", [series], categories=[text, "other"], levels=[(text, 1.5, "run1")]))
    root = ElementTree.fromstring(drawing.svg.replace("xlink:href", "href"))
    assert {element.tag for element in root.iter()} <= {"svg", "g", "path", "use", "text", "title", "defs", "clipPath", "rect"}
    shown = ["".join(element.itertext()) for element in root.iter("text")]
    wanted = " ".join(text.split())
    assert (wanted if len(wanted) <= LONGEST else f"{wanted[: LONGEST - 1]}…") in shown
    assert all(wanted in " ".join(title.split()) for title, *_ in marks(drawing))


def test_a_thinned_curve_keeps_its_mean_and_says_how_many_points_are_one() -> None:
    points = [(float(i), math.sin(i)) for i in range(1000)]
    thin, size = thinned(points, most=100)
    assert (len(thin), size) == (100, 10)
    assert sum(y for _, y in thin) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thinned(points[:50], most=100) == (points[:50], 1)


def test_names_that_do_not_fit_side_by_side_are_tilted() -> None:
    series = [Series("s", [(0.0, 1.0), (1.0, 2.0)], "student")]
    short, long = ([name * i for i in range(1, 3)] for name in ("a", "a long name of a part of the data"))
    assert "rotate(-35" not in draw(Chart("t", "x", "y", series, categories=short)).svg
    assert "rotate(-35" in draw(Chart("t", "x", "y", series, categories=[*long, *long])).svg


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


def test_ticks_have_the_decimals_that_tell_them_apart() -> None:
    """An axis from 0 to 2 % read `0 %, 0 %, 1 %, 2 %, 2 %`."""
    assert tick_texts([0, 0.005, 0.01, 0.015], percent) == ["0.0 %", "0.5 %", "1.0 %", "1.5 %"]
    assert tick_texts([0, 0.2, 0.4], percent) == ["0 %", "20 %", "40 %"]
    assert tick_texts([4.58711, 4.58712], signed_free) == ["4.58711", "4.58712"]
    assert tick_texts([1, 2, 2.5], signed_free) == ["1", "2", "2.5"]
    series = [Series("s", [(0.0, 0.001), (1.0, 0.019)], "student")]
    shown = re.findall(r"<text[^>]*>([^<]* %)</text>", draw(Chart("t", "x", "y", series, y_text=percent)).svg)
    assert len(shown) == len(set(shown)) > 2 and "0.5 %" in shown


def test_labels_that_would_lie_on_each_other_are_raised() -> None:
    labels = [("1", (0.1, 0.50), "a"), ("2", (0.1, 0.52), "b"), ("3", (0.11, 0.45), "c"), ("4", (0.9, 0.5), "d")]
    found = {text: place for text, place, _ in apart(labels)}
    assert found["3"] == (0.11, 0.45) and found["4"] == (0.9, 0.5)  # the lowest, and one far away
    assert found["3"][1] < found["1"][1] < found["2"][1]
    assert min(b[1] - a[1] for a, b in ((found["3"], found["1"]), (found["1"], found["2"]))) > 0.09
