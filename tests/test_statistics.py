"""The formulas of an evaluation, against hand-worked and SciPy's own numbers."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from dvla_fast.statistics import (
    checkpoint_interval,
    class_accuracies,
    confusion,
    lineage_note,
    mean_interval,
    paired_difference,
    unpaired_difference,
)


def test_interval_formula() -> None:
    mean, half = mean_interval(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * math.sqrt(0.2 / 3) / 2, rel=1e-6)
    assert mean_interval(torch.tensor([0.3]))[1] is None
    # more digits than a float32 has
    assert mean_interval(torch.tensor([2.0**24, 1.0, 1.0]))[0] == (2**24 + 2) / 3


@pytest.mark.parametrize("count", [2, 40])
def test_paired_t_test(count: int) -> None:
    torch.manual_seed(0)
    first, second = torch.rand(count).double(), torch.rand(count).double() - 0.2
    found = paired_difference(first, second)
    theirs = stats.ttest_rel(first.numpy(), second.numpy())
    low, high = theirs.confidence_interval(0.95)
    assert found["p_value"] == pytest.approx(theirs.pvalue)
    assert found["difference"] - found["ci95"] == pytest.approx(low)
    assert found["difference"] + found["ci95"] == pytest.approx(high)


def test_rounding_is_no_spread() -> None:
    """0.8 − 0.6 and 0.6 − 0.4 differ in float32's last digit alone."""
    found = paired_difference(torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.4]))
    assert (found["ci95"], found["p_value"]) == (None, None)


@pytest.mark.parametrize(
    ("gap", "half", "p_value"),
    [(0.0, 0.0, 1.0), (0.25, None, None)],
    ids=["no difference", "always the same"],
)
def test_differences_without_spread(gap: float, half: float | None, p_value: float | None) -> None:
    """A t test divides by their spread: two equal differences once gave p = 0."""
    base = torch.full((5,), 0.5)
    want = {"difference": gap, "ci95": half, "p_value": p_value}
    assert paired_difference(base + gap, base) == want
    assert unpaired_difference([0.5 + gap, 0.5 + gap], [0.5, 0.5]) == want
    one = paired_difference(base[:1], base[:1])
    assert (one["difference"], one["ci95"], one["p_value"]) == (0.0, None, None)


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((3, 2), (3, 2))])
def test_paired_accuracies_are_one_an_episode(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="second: shape"):
        paired_difference(*map(torch.rand, shapes))


def test_trainings_of_unknown_origin_share_no_known_one() -> None:
    assert lineage_note("", [None, None]) == ""
    assert lineage_note("", ["one", None]) == ""


def test_checkpoint_interval() -> None:
    found = checkpoint_interval([0.5, 0.6, 0.7])
    assert found["std"] == pytest.approx(0.1)
    assert found["ci95"] == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert checkpoint_interval([0.5])["ci95"] is None


def test_confusion_by_hand() -> None:
    """Two 2-way episodes of three classes: (0, 1) with one mistake, (2, 0) without."""
    classes = torch.tensor([[0, 1], [2, 0]])
    labels = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    predictions = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
    found = confusion(classes, labels, predictions, 3)
    assert found.counts.tolist() == [[3, 1, 0], [0, 2, 0], [0, 0, 2]]
    assert found.offered.tolist() == [[4, 2, 2], [2, 2, 0], [2, 0, 2]]
    assert found.rates[0].tolist() == [0.75, 0.5, 0.0]
    assert math.isnan(found.rates[1, 2].item())  # 1 and 2 never met
    twice = confusion(classes, labels, predictions.repeat(2, 1, 1), 3)
    assert torch.equal(twice.counts, 2 * found.counts)
    assert torch.equal(twice.rates.nan_to_num(-1), found.rates.nan_to_num(-1))
    assert confusion(classes, labels, predictions, 4).offered[3].tolist() == [0] * 4  # never met
    rows = class_accuracies(classes, labels, predictions, 4)
    assert [row["accuracy"] for row in rows] == [0.75, 1.0, 1.0, None]
    assert [row["episodes"] for row in rows] == [2, 1, 1, 0]
    assert rows[0]["ci95"] == pytest.approx(1.96 * math.sqrt(0.125) / math.sqrt(2))
