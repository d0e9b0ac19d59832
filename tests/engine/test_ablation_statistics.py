"""Intervals over seeds and episodes, and Holm's correction."""

from __future__ import annotations

import numpy as np
import pytest

from dvla_fast.engine.ablation_statistics import crossed_interval


def made(rng: np.random.Generator, seeds: float, episodes: float, both: float) -> np.ndarray:
    """Five seeds × 200 episodes of mean 0, with standard deviations of each effect."""
    return (
        seeds * rng.standard_normal((5, 1))
        + episodes * rng.standard_normal((1, 200))
        + both * rng.standard_normal((5, 200))
    )


@pytest.mark.parametrize("spread", [(1.0, 0.0, 2.0), (0.0, 3.0, 2.0), (0.3, 2.0, 4.0)])
def test_interval_holds_the_truth_as_often_as_it_says(spread: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(0)
    found = [crossed_interval([made(rng, *spread)], draws=200) for _ in range(200)]
    share = np.mean([one["low"] <= 0 <= one["high"] for one in found])
    assert 0.91 <= share <= 1.0
    assert np.mean([one["p_value"] < 0.05 for one in found]) == pytest.approx(1 - share)


def test_spread_over_seeds_counts() -> None:
    rng = np.random.default_rng(0)
    table = made(rng, 0.0, 1.0, 0.0)
    apart = table + np.array([[-2.0], [-1.0], [0.0], [1.0], [2.0]])
    narrow, wide = crossed_interval([table]), crossed_interval([apart])
    assert wide["se"] > 5 * narrow["se"]
    # the spread of five seeds alone: s / sqrt(5), four degrees of freedom
    assert wide["se"] == pytest.approx(np.sqrt(2.5 / 5), rel=0.1)
    assert wide["freedom"] == pytest.approx(4, rel=0.1)


def test_single_seed_is_an_interval_over_episodes() -> None:
    values = np.random.default_rng(0).standard_normal((1, 400))
    found = crossed_interval([values])
    assert found["se"] == pytest.approx(values.std(ddof=1) / 20, rel=0.08)
    assert found["freedom"] == pytest.approx(399)


def test_difference_of_differences() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(3, 1, (5, 100)), rng.normal(1, 1, (5, 60))
    found = crossed_interval([first, -second])
    assert found["estimate"] == pytest.approx(first.mean() - second.mean())
    assert found["low"] > 1
    assert found["p_value"] < 1e-6


def test_tables_are_drawn_apart() -> None:
    """Two tables hold different episodes, even where they have equally many of equal values."""
    table = np.random.default_rng(2).standard_normal((1, 300))
    alone, apart = crossed_interval([table]), crossed_interval([table, -table])
    assert apart["se"] == pytest.approx(np.sqrt(2) * alone["se"], rel=0.08)


@pytest.mark.parametrize(
    ("rows", "columns", "freedom"),
    [
        # variances of the mean 4/3 (2 degrees) and 1/3 (2): (5/3)² / (16/9/2 + 1/9/2)
        ((0, 2, 4), (0, 1, 2), 50 / 17),
        # 4/3 (2 degrees) and 7/6 (3): (5/2)² / (16/9/2 + 49/36/3)
        ((0, 2, 4), (0, 1, 2, 5), 135 / 29),
        # 4/3 (2 degrees) and 1/4 (1): (19/12)² / (16/9/2 + 1/16/1)
        ((0, 2, 4), (0, 1), 361 / 137),
    ],
)
def test_degrees_of_freedom_are_satterthwaites(
    rows: tuple[float, ...], columns: tuple[float, ...], freedom: float
) -> None:
    table = np.add.outer(rows, columns)
    assert crossed_interval([table])["freedom"] == pytest.approx(freedom)


def test_nothing_to_learn_from() -> None:
    assert crossed_interval([np.zeros((1, 1))])["low"] is None
    same = crossed_interval([np.zeros((3, 5))])
    assert (same["low"], same["p_value"]) == (0, 1)
    for parts in ([], [np.zeros((0, 4))], [np.zeros((2, 3)), np.zeros((3, 3))]):
        with pytest.raises(ValueError, match="same seeds"):
            crossed_interval(parts)
