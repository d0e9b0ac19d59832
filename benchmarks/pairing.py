"""Times a peer in turn with ours: a ratio that holds while a machine's speed changes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

OURS = "dvla_fast"
# Short calls are timed in blocks: one call right after another provider's meets cold caches.
BLOCK_SECONDS, MOST_CALLS = 0.005, 100
LEAST_ROUNDS, MOST_ROUNDS = 5, 100


def time_beside(
    benchmark: Any, provider: str, run: Callable[[str], object], seconds: float, warm_up: int = 1
) -> None:
    """Time ``run(provider)`` as ``benchmark.pedantic`` does, and against ``run("dvla_fast")``.

    ``extra_info["ratio"]`` of a peer becomes the median over rounds of its time over ours, blocks
    of as many calls of the two in turn; above 1 means that dvla_fast is faster.

    Args:
        run: one call of a provider.
        seconds: how long the rounds of the provider take in all, about.
        warm_up: calls before anything is timed.
    """
    if benchmark.disabled:
        benchmark.pedantic(lambda: run(provider))
        return
    for name in (OURS, provider):
        for _ in range(warm_up):
            run(name)
    ours, own = _seconds(run, OURS, 1), _seconds(run, provider, 1)
    calls = min(MOST_CALLS, math.ceil(BLOCK_SECONDS / ours))
    least = LEAST_ROUNDS if own < 1 else 2
    rounds = int(min(MOST_ROUNDS, max(least, seconds / (own * calls))))
    benchmark.pedantic(lambda: run(provider), rounds=rounds, iterations=calls, warmup_rounds=1)
    if provider == OURS:
        return
    ratios = []
    for _ in range(rounds):
        ours = _seconds(run, OURS, calls)
        ratios.append(_seconds(run, provider, calls) / ours)
    benchmark.extra_info["ratio"] = round(statistics.median(ratios), 3)


def _seconds(run: Callable[[str], object], name: str, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run(name)
    return time.perf_counter() - begin
