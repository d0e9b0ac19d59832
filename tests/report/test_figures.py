"""The numbers that the charts are drawn from: those of the run, in the chart's unit."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla_fast.engine.records import EpisodeRecord
from dvla_fast.report import figures
from dvla_fast.report.collect import Run
from dvla_fast.report.figures import accuracy_parts, class_figures, gate_figures, layer_lines
from dvla_fast.report.svg import Interval, Line, Mark

NAMES = ["ant", "bee", "cat"]
MAIN, OTHER = "learned gate", "visual prototypes"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What each kind of chart was drawn from, in order; the pictures are empty."""
    found: dict[str, list[Any]] = {"interval_chart": [], "scatter": []}

    def record(name: str) -> Any:
        def draw(rows: Any, *more: Any, **options: Any) -> str:
            found[name].append(list(rows))
            return ""

        return draw

    for name in found:
        monkeypatch.setattr(figures, name, record(name))
    return found


@pytest.fixture
def run() -> Run:
    """Two checkpoints on six 2-way episodes of three classes, no two with one accuracy and α."""
    classes = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [1, 0], [2, 1]])
    labels = torch.tensor([[0, 0, 0, 1, 1, 1]] * 6)
    right = torch.arange(6) < torch.tensor([[6], [1], [4], [2], [3], [5]])
    answers = torch.where(right, labels, 1 - labels)
    alphas = torch.tensor([[0.1, 0.9], [0.2, 0.7], [0.8, 0.5], [0.4, 0.2], [0.6, 0.1], [0.3, 0.4]])
    record = EpisodeRecord(
        classes,
        labels,
        {OTHER: (1 - labels).expand(2, -1, -1), MAIN: torch.stack([answers, answers])},
        torch.stack([alphas - 0.05, alphas + 0.05]),
    )
    result = {
        "shot": 1,
        "episodes": 6,
        "method": MAIN,
        "methods": {
            MAIN: {"accuracy": 0.583, "ci95": 0.0123},
            OTHER: {"accuracy": 0.25, "ci95": None},
        },
        "paired": {f"{MAIN} - {OTHER}": {"difference": 0.333, "ci95": 0.0456, "p_value": 0.02}},
        "gated_layers": [[2, 1], [3, 0]],
    }
    return Run(Path("run"), "run", results=[result], records={1: record}, class_names={1: NAMES})


def half_width(values: list[float]) -> float:
    return 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def close(found: list[Interval], expected: dict[str, tuple[float, float | None]]) -> None:
    """Rows are these, in this order."""
    assert [row.label for row in found] == list(expected)
    for row, (value, half) in zip(found, expected.values()):
        assert row.value == pytest.approx(value, abs=1e-6)
        assert row.half == (None if half is None else pytest.approx(half, abs=1e-6))


def test_accuracies_and_differences_are_in_percent(run: Run, drawn: dict[str, list[Any]]) -> None:
    accuracy_parts([run])
    accuracies, gaps = drawn["interval_chart"]
    close(accuracies, {OTHER: (25.0, None), MAIN: (58.3, 1.23)})
    close(gaps, {f"{MAIN} − {OTHER}": (33.3, 4.56)})
    assert gaps[0].aside == "p = 0.02"


def test_number_of_episodes_is_told_once(run: Run) -> None:
    (part,) = accuracy_parts([run, replace(run, name="again")])
    assert part.figures[0].caption.startswith("Accuracy in percent over 6 episodes,")
    longer = replace(run, name="longer", results=[{**run.results[0], "episodes": 2000}])
    (part,) = accuracy_parts([run, longer])
    assert part.figures[0].caption.startswith("Accuracy in percent over 6 or 2,000 episodes,")


def test_accuracies_by_class(run: Run, drawn: dict[str, list[Any]]) -> None:
    """The first half of an episode's queries are of its first class."""
    class_figures(run, 1)
    shares = {"cat": [0, 1, 1], "bee": [1, 1 / 3, 0, 1, 2 / 3], "ant": [1, 1 / 3, 2 / 3, 0]}
    expected = {
        name: (100 * statistics.mean(values), 100 * half_width(values))
        for name, values in shares.items()
    }
    close(drawn["interval_chart"][0], expected)  # from the best class to the worst


@pytest.mark.parametrize(("most", "kept"), [(600, range(6)), (3, range(0, 6, 2))])
def test_gates_stand_beside_the_accuracy_of_their_episode(
    run: Run,
    drawn: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    kept: range,
) -> None:
    monkeypatch.setattr(figures, "_MOST_POINTS", most)
    gate_figures(run)
    alphas = [(0.1, 0.9), (0.2, 0.7), (0.8, 0.5), (0.4, 0.2), (0.6, 0.1), (0.3, 0.4)]
    right = (6, 1, 4, 2, 3, 5)  # of six queries
    for layer, (mark,) in enumerate(drawn["scatter"]):
        assert isinstance(mark, Mark)
        assert mark.name == ("stage 2, block 1", "stage 3, block 0")[layer]
        expected = [(alphas[i][layer], 100 * right[i] / 6) for i in kept]
        assert mark.points == [pytest.approx(point) for point in expected]
    assert len(drawn["scatter"]) == 2


def test_gates_by_class_are_those_of_episodes_that_hold_it(
    run: Run, drawn: dict[str, list[Any]]
) -> None:
    gate_figures(run)
    of_first_layer = {
        "cat": [0.2, 0.8, 0.3], "ant": [0.1, 0.8, 0.4, 0.6], "bee": [0.1, 0.2, 0.4, 0.6, 0.3],
    }  # fmt: skip
    of_second_layer = {
        "cat": [0.7, 0.5, 0.4], "bee": [0.9, 0.7, 0.2, 0.1, 0.4], "ant": [0.9, 0.5, 0.2, 0.1],
    }  # fmt: skip
    for found, values in zip(
        drawn["interval_chart"], (of_first_layer, of_second_layer), strict=True
    ):
        ordered = sorted(values.items(), key=lambda item: -statistics.mean(item[1]))
        close(found, {name: (statistics.mean(v), half_width(v)) for name, v in ordered})


def test_bands_reach_a_deviation_to_each_side() -> None:
    rows = [
        {"step": 1, "alpha_mean": [0.5, 0.7], "alpha_std": [0.1, 0.2]},
        {"step": 2, "alpha_mean": [0.6, 0.4], "alpha_std": [0.05, 0.15]},
    ]
    lines = layer_lines(Run(Path("run"), "run", metrics={"metatune": rows}), "alpha_mean")
    assert [line.band for line in lines] == [[], []]
    lines = layer_lines(
        Run(Path("run"), "run", metrics={"metatune": rows}), "alpha_mean", spread="alpha_std"
    )
    expected = [
        ("gated layer 1", [(1, 0.5), (2, 0.6)], [(1, 0.4, 0.6), (2, 0.55, 0.65)]),
        ("gated layer 2", [(1, 0.7), (2, 0.4)], [(1, 0.5, 0.9), (2, 0.25, 0.55)]),
    ]
    for line, (name, points, band) in zip(lines, expected, strict=True):
        assert isinstance(line, Line)
        assert (line.name, line.points) == (name, points)
        assert line.band == [pytest.approx(place) for place in band]
