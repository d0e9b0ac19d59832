"""Intervals of an ablation: over episodes and training seeds, corrected for many comparisons.

Every seed's model meets the same episodes, so accuracies form a table of seeds × episodes with both
ways crossed, and so do paired differences. The standard error is that of the pigeonhole bootstrap
(A. B. Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007): seeds and
episodes are drawn anew with replacement, independently, and a drawn table is all their crossings.
n − 1 units are drawn of n, which makes the variance of a mean unbiased where n is small (Rao and
Wu, "Resampling inference with complex survey data", JASA 83, 1988). The noise that belongs to one
seed on one episode is then counted up to three times: the interval errs on the wide side.

A few seeds do not know their own spread, so the interval is estimate ± t(0.975, ν) · SE with
Satterthwaite's ν (Biometrics Bulletin 2, 1946) from the variances over seeds and over episodes; p
is two-sided from the same t. One seed alone leaves the episodes: nothing is said about training
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from dvla_fast.statistics import scipy_stats

FORMULA = (
    "estimate ± t(0.975, v) * SE; SE of the pigeonhole bootstrap over seeds and episodes (Owen "
    "2007, n - 1 units drawn of n), v after Satterthwaite; p two-sided from the same t; p_holm: "
    "Holm's step-down correction over all comparisons of the table"
)
SINGLE = "single seed: the interval is over episodes alone"


def crossed_interval(parts: Sequence[Any], draws: int = 4000) -> dict[str, Any]:
    """Estimate a sum of means over seeds × episodes tables whose rows are the same seeds.

    Args:
        parts: arrays (S, E_i). One: its mean. Several, on different episodes: the sum of their
            means; negate one for a difference of differences.
        draws: bootstrap draws.

    Returns:
        ``estimate``, ``se``, ``low``, ``high`` (95 %), ``p_value`` (two-sided, of 0), ``freedom``,
        ``seeds``; ``se``, ``low`` and ``high`` are None for a single seed on a single episode.

    Raises:
        ValueError: no table, an empty one, or tables of different numbers of seeds.
    """
    tables = [np.asarray(part, dtype=np.float64) for part in parts]
    seeds = len(tables[0]) if tables else 0
    if not seeds or any(t.ndim != 2 or len(t) != seeds or not t.shape[1] for t in tables):
        shapes = [t.shape for t in tables]
        raise ValueError(
            f"parts: expected tables (seeds, episodes) of the same seeds, got {shapes}"
        )
    estimate = sum(float(table.mean()) for table in tables)
    rows = _weights(seeds, draws, 0)
    drawn = np.zeros(draws)
    for index, table in enumerate(tables):
        columns = _weights(table.shape[1], draws, 1 + index)
        drawn += np.einsum("be,be->b", rows @ table, columns)
    error = float(drawn.std(ddof=1))
    freedom = _freedom(tables)
    result = {"estimate": estimate, "se": error, "freedom": freedom, "seeds": seeds}
    if not freedom:
        return {**result, "se": None, "low": None, "high": None, "p_value": 1.0}
    if error < 1e-9:
        # Without any spread only "no difference" can be said.
        known = estimate if abs(estimate) < 1e-9 else None
        return {**result, "low": known, "high": known, "p_value": 1.0}
    student = scipy_stats().t(freedom)
    half = float(student.ppf(0.975)) * error
    p = float(2 * student.sf(abs(estimate) / error))
    return {**result, "low": estimate - half, "high": estimate + half, "p_value": p}


@lru_cache(maxsize=8)
def _weights(units: int, draws: int, seed: int) -> Any:
    """(draws, units): the share of each unit among n − 1 drawn with replacement."""
    taken = max(units - 1, 1)
    rng = np.random.default_rng([units, seed])
    return rng.multinomial(taken, np.full(units, 1 / units), size=draws) / taken


def _freedom(tables: Sequence[Any]) -> float:
    """Satterthwaite's degrees of freedom; 0 where nothing is known about the spread."""
    terms = []
    seeds = len(tables[0])
    if seeds > 1:
        whole = sum(table.mean(1) for table in tables)
        terms.append((float(np.var(whole, ddof=1)) / seeds, seeds - 1))
    for table in tables:
        episodes = table.shape[1]
        if episodes > 1:
            terms.append((float(np.var(table.mean(0), ddof=1)) / episodes, episodes - 1))
    total = sum(variance for variance, _ in terms)
    squares = sum(variance**2 / free for variance, free in terms)
    if squares > 0:
        return total**2 / squares
    return float(max((free for _, free in terms), default=0))
