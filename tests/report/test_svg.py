"""The chart functions: well-formed, complete, and safe with any text and any number."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from dvla_fast.report.svg import (
    Interval,
    Line,
    Mark,
    bounds,
    heatmap,
    interval_chart,
    line_chart,
    number,
    scatter,
    ticks,
)


def parse(svg: str) -> ElementTree.Element:
    assert "nan" not in svg.lower().replace("meaning", "")
    assert "inf" not in svg.lower().replace("information", "")
    return ElementTree.fromstring(svg)


@pytest.mark.parametrize("points", [[(1, 0.5)], [(1, 0.0), (2, 0.0)], [(1, 1e-9), (800, 1e9)]])
def test_line_chart(points: list[tuple[float, float]]) -> None:
    root = parse(line_chart([Line("a <b> & c", points)], "epoch", "loss"))
    assert "a <b> & c" in root.attrib["aria-label"]
    assert root.find("path[@class='line c0']") is not None


def test_gaps_and_many_points() -> None:
    points = [(float(i), math.nan if i == 500 else math.sin(i)) for i in range(5000)]
    svg = line_chart([Line("a", points, band=[(x, y - 1, y + 1) for x, y in points])], "x", "y")
    parse(svg)
    assert len(svg) < 30_000


def test_interval_chart_shows_numbers() -> None:
    rows = [Interval("mine", 81.234, 0.36), Interval("alone", -3.0), Interval("one", 5, math.inf)]
    root = parse(interval_chart(rows, "accuracy, %"))
    texts = ["".join(item.itertext()) for item in root.iter("text")]
    assert "81.23 ± 0.36" in texts
    assert "−3.00" in texts
    assert "5.00" in texts


def texts_of(root: ElementTree.Element) -> list[str]:
    return ["".join(item.itertext()) for item in root.iter("text")]


def test_interval_chart_of_differences() -> None:
    """Values have signs, and a p-value stands whole behind a name that is cut."""
    rows = [Interval("long name " * 10, 0.5, 0.25, aside="p < 0.001"), Interval("b", -1.5, 0.2)]
    root = parse(interval_chart(rows, "difference, points", signed=True))
    found = texts_of(root)
    assert {"+0.50 ± 0.25", "−1.50 ± 0.20", "p < 0.001"} <= set(found)
    assert max(map(len, found)) <= 50  # the name leaves room for it
    assert "+0.50 ± 0.25, p < 0.001" in root.attrib["aria-label"]


def test_ticks_are_labelled_with_what_they_are() -> None:
    """Steps of 0.00005 between numbers near 0.5, which four digits cannot tell apart."""
    rows = [Interval("a", 0.50761, 0.00001), Interval("b", 0.50775, 0.00001)]
    found = texts_of(parse(interval_chart(rows, "mean α", digits=3)))
    assert found[: found.index("mean α")] == ["0.5076", "0.50765", "0.5077", "0.50775"]


@pytest.mark.parametrize("last", [1, 2, 3, 7, 11, 12, 40, 100, 800])
def test_epochs_are_whole(last: int) -> None:
    points = [(epoch, 0.001 * epoch) for epoch in range(1, last + 1)]
    found = texts_of(parse(line_chart([Line("a", points)], "epoch", "", (10.25, 11.75))))
    x_labels = found[found.index("11.5") + 1 : -2]
    assert 1 <= len(x_labels) <= 7
    assert all(float(label) == int(label) for label in x_labels)


def test_scatter_and_heatmap() -> None:
    marks = [
        Mark("a", [(0, 0), (1, 1)]),
        Mark("b", [(0, 1)], 1, "cross"),
        Mark("c", [(1, 0)], 2, "star"),
    ]
    root = parse(scatter(marks))
    assert {item.attrib["class"] for item in root.iter("path")} == {
        "points c0", "cross c1", "star c2",
    }  # fmt: skip
    root = parse(heatmap([[0.9, 0.1], [math.nan, 1.0]], ["<x>", "y"], "confusion"))
    assert [item.attrib["class"] for item in root.iter("rect")] == ["hit", "miss", "void", "hit"]
    parse(heatmap([[0.5] * 40] * 40, [f"class {i}" for i in range(40)], "large"))


def test_ticks_and_numbers() -> None:
    assert ticks(0, 1, 4) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert ticks(43.7, 46.1, 4) == pytest.approx([44, 45, 46])
    assert number(-0.5) == "−0.5"
    assert number(2.4e-5) == "2.4e-5"
    assert number(-2e-5) == "−2e-5"
    low, high = bounds([3.0, 3.0, math.nan])
    assert low < 3.0 < high
    assert bounds([]) == (0.0, 1.0)
