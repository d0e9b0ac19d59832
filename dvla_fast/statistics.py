"""Figures of an evaluation: intervals, paired differences, agreement of checkpoints, confusion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dvla_fast.errors import MissingDependencyError

LEVEL = 0.05  # of the tests
INTERVAL = "mean ± 1.96 * s / sqrt(n), s = sample standard deviation over the n episodes"
PAIRED_INTERVAL = (
    "mean ± t(0.975, n - 1) * s / sqrt(n), s = sample standard deviation of the n episodes' "
    "differences; p of the two-sided paired t test"
)
CHECKPOINT_INTERVAL = (
    "mean ± t(0.975, k - 1) * s / sqrt(k), s = sample standard deviation of the k checkpoints' "
    "accuracies on the same episodes"
)


def mean_interval(values: Tensor) -> tuple[float, float | None]:
    """Return the mean of values (n,) and the half width of its 95 % interval, 1.96 s / sqrt(n).

    One value has no spread: its half width is None.
    """
    values = values.double()
    if len(values) < 2:
        return values.mean().item(), None
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))


def paired_difference(first: Tensor, second: Tensor) -> dict[str, float | None]:
    """Compare two accuracies (n,) on the same episodes by the paired t test.

    The interval and p speak of episodes drawn from this split with these weights: not of other
    classes, and not of training again with another seed.

    Returns:
        ``difference``: the mean of first − second; ``ci95``: half width of its 95 % t interval;
        ``p_value``: two-sided, 1 where all differences are 0. Both are None for one episode, and
        where all differences are the same but not 0: a t test has then no spread to judge by.

    Raises:
        ValueError: different lengths.
        MissingDependencyError: SciPy is not installed.
    """
    if first.shape != second.shape or first.dim() != 1:
        raise ValueError(
            f"second: shape {tuple(second.shape)}, expected {tuple(first.shape)}, one accuracy an "
            "episode"
        )
    difference = (first.double() - second.double()).cpu().numpy()
    mean = float(difference.mean())
    if len(difference) < 2:
        return {"difference": mean, "ci95": None, "p_value": None}
    if np.ptp(difference) < 1e-6:  # rounding of float32 apart, the t statistic is 0/0 or infinite
        return _without_spread(mean, 1e-6)
    result = scipy_stats().ttest_1samp(difference, 0.0)
    low, high = result.confidence_interval(0.95)
    return {
        "difference": mean,
        "ci95": float(high - low) / 2,
        "p_value": float(result.pvalue),
    }


def checkpoint_interval(accuracies: list[float]) -> dict[str, Any]:
    """Summarise the accuracies of k checkpoints, e.g. of several training seeds.

    Returns:
        ``accuracies``, ``accuracy`` (mean), ``std`` and ``ci95`` (t interval over checkpoints;
        both None for one checkpoint, whose spread is unknown).
    """
    values = np.asarray(accuracies)
    std = half = None
    if len(values) > 1:
        std = float(values.std(ddof=1))
        half = float(scipy_stats().t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return {
        "accuracies": [float(value) for value in values],
        "accuracy": float(values.mean()),
        "std": std,
        "ci95": half,
        "interval": CHECKPOINT_INTERVAL,
    }


def unpaired_difference(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """Compare the accuracies of two groups of training runs by Welch's t test.

    The interval and p speak of training again: each value is one run's accuracy.

    Returns:
        As :func:`paired_difference`.

    Raises:
        ValueError: fewer than two runs in a group, whose spread is then unknown.
        MissingDependencyError: SciPy is not installed.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"two or more runs a group, got {len(first)} and {len(second)}")
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    mean = float(a.mean() - b.mean())
    if np.ptp(a) < 1e-9 and np.ptp(b) < 1e-9:
        return _without_spread(mean, 1e-9)
    with warnings.catch_warnings():  # of one group without spread, which shared_note tells
        warnings.filterwarnings("ignore", "Precision loss occurred", RuntimeWarning)
        result = scipy_stats().ttest_ind(a, b, equal_var=False)
    low, high = result.confidence_interval(0.95)
    return {"difference": mean, "ci95": float(high - low) / 2, "p_value": float(result.pvalue)}


def shared_note(name: str, accuracies: Sequence[float]) -> str:
    """Say that trainings seem to share what is compared, their spread being 0.00 points; else "".

    So do those from one backbone, whose visual prototypes hardly differ.
    """
    if len(accuracies) < 2 or np.std(accuracies, ddof=1) >= 5e-5:
        return ""
    return (
        f"{name}: all {len(accuracies)} trainings have the same accuracy; they seem to share what "
        "is compared (one backbone, say), and their spread says nothing of training again"
    )


def lineage_note(name: str, started_from: Sequence[str | None]) -> str:
    """Say that trainings start from fewer checkpoints than they are; else "".

    Args:
        name: of what is compared; empty: all of it.
        started_from: the checkpoint that each training started from; None: not known.
    """
    known = [origin for origin in started_from if origin]
    count = len(set(known))
    if count == len(known):
        return ""
    shown = "one checkpoint: their spread reflects repeated meta-tuning only"
    if count > 1:
        shown = f"{count} checkpoints: their spread understates that of training again"
    return f"{name}{': ' if name else ''}{len(known)} trainings start from {shown}"


def _without_spread(mean: float, rounding: float) -> dict[str, float | None]:
    if abs(mean) < rounding:
        return {"difference": mean, "ci95": 0.0, "p_value": 1.0}
    return {"difference": mean, "ci95": None, "p_value": None}


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, 1979): the family-wise error stays below the level.

    Returns:
        Corrected p-values in the given order, at most 1.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def points(half: float | None, digits: int = 2) -> str:
    """Lay out the half width of an interval in percent, ``n/a`` where there is none."""
    return "n/a" if half is None else f"{100 * half:.{digits}f}"


def p_text(value: float | None) -> str:
    """Lay out a p-value, ``p n/a`` where there is none."""
    if value is None:
        return "p n/a"
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def require_scipy() -> None:
    """Raise MissingDependencyError now rather than after the episodes."""
    scipy_stats()


def scipy_stats() -> Any:
    """Return ``scipy.stats`` (MissingDependencyError where SciPy is not installed)."""
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingDependencyError(
            "t tests need SciPy, which is not installed; run pip install 'dvla-fast[train]'"
        ) from error
    return stats


class Confusion(NamedTuple):
    """Who is taken for whom, over all queries of all episodes."""

    counts: Tensor
    """(C, C) int64: queries of class i (row) that were given class j (column)."""
    offered: Tensor
    """(C, C) int64: queries of class i in episodes that held class j: could have been given it."""

    @property
    def rates(self) -> Tensor:
        """(C, C) float64: counts / offered, the share of i taken for j where j was a choice.

        An episode offers only some classes, so counts alone depend on which ones met. NaN where
        the two never met.
        """
        return self.counts.double() / self.offered.double()


def confusion(classes: Tensor, labels: Tensor, predictions: Tensor, count: int) -> Confusion:
    """Count predictions class by class.

    Args:
        classes: (n, way) int64, the class of each episode label.
        labels: (n, Q) int64 in [0, way), the truth.
        predictions: (n, Q) int64 in [0, way); (K, n, Q) for K checkpoints, which are added up.
        count: number of classes C.
    """
    models = predictions.reshape(-1, *labels.shape)
    true = classes.gather(1, labels)  # (n, Q)
    given = torch.stack([classes.gather(1, rows) for rows in models])  # (K, n, Q)
    offered = true.unsqueeze(2) * count + classes.unsqueeze(1)  # (n, Q, way)
    size = count * count
    return Confusion(
        (true * count + given).flatten().bincount(minlength=size).view(count, count),
        offered.flatten().bincount(minlength=size).view(count, count) * len(models),
    )


def episode_class_accuracies(classes: Tensor, labels: Tensor, predictions: Tensor) -> Tensor:
    """Share of a class's queries that were right in each episode, over all checkpoints: (n, way).

    Arguments are those of :func:`confusion`.
    """
    models = predictions.reshape(-1, *labels.shape)
    right = (models == labels).double().mean(0)  # (n, Q)
    sums = torch.zeros(classes.shape, dtype=torch.float64).scatter_add_(1, labels, right)
    numbers = torch.zeros_like(sums).scatter_add_(1, labels, torch.ones_like(right))
    return sums / numbers


def class_accuracies(
    classes: Tensor, labels: Tensor, predictions: Tensor, count: int
) -> list[dict[str, Any]]:
    """Accuracy of each class over the episodes that hold it, with its 95 % interval.

    Arguments are those of :func:`confusion`. An episode gives a class one value, the share of its
    queries that were right (over all checkpoints); the interval is 1.96·s/√n over those.

    Returns:
        For each of the C classes ``episodes``, ``accuracy`` and ``ci95`` (None where no episode
        holds the class, or only one).
    """
    values = episode_class_accuracies(classes, labels, predictions).flatten()  # (n * way,)
    owner = classes.flatten()
    rows = []
    for index in range(count):
        mine = values[owner == index]
        mean, half = mean_interval(mine) if len(mine) else (None, None)
        rows.append({"episodes": len(mine), "accuracy": mean, "ci95": half})
    return rows
