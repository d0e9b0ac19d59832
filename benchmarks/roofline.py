"""How far the dual-attention rows of a record are from what the machine could do at best.

    python -m benchmarks.roofline run.json

Ceilings are measured here and now: matrix products of the row's dtype (the faster of a plain one
and a convolution that is one), exp, and copying. A row's bound is the larger of its arithmetic
(products, then one exp a score) and its memory traffic (inputs read and results written once). The
rate of exp is torch.exp's, which the bfloat16 kernels' shorter polynomial can beat. Few-shot shapes
are too small to reach the bound: launching threads and moving cold inputs take part of the time.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.ratios import OURS, medians

CASE = re.compile(
    r"dual_attention T(\d+)-G(\d+)-H(\d+)-D(\d+)-N(\d+)-P(\d+) (float32|bfloat16) "
    r"(forward|forward\+backward)$"
)
BYTES = {"float32": 4, "bfloat16": 2}


class Ceilings(NamedTuple):
    flops: dict[str, float]
    """Floating-point operations a second of a 1024³ product, by dtype, as PyTorch's fastest way."""
    exps: float
    """torch.exp, elements a second, float32."""
    bandwidth: float
    """Bytes a second, read plus written, of a 64 MB copy."""


def best(call: Callable[[], object], repeats: int = 20) -> float:
    """Seconds of the fastest of some calls."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure(size: int = 1024) -> Ceilings:
    flops = {}
    for name in BYTES:
        a = torch.randn(size, size).to(getattr(torch, name))
        x, weight = a.unsqueeze(0), a.unsqueeze(2)
        # The same product by another library: MKL leaves half of AMD's AVX-512 unused.
        ways = (lambda a=a: a @ a, lambda x=x, weight=weight: F.conv1d(x, weight))
        flops[name] = 2 * size**3 / min(best(way) for way in ways)
    x = torch.randn(2**20)
    y, from_, to = torch.empty_like(x), torch.randn(2**24), torch.empty(2**24)
    exps = x.numel() / best(lambda: torch.exp(x, out=y))
    return Ceilings(flops, exps, 2 * from_.nbytes / best(lambda: to.copy_(from_)))


def bound(case: re.Match, ceilings: Ceilings) -> float:
    """Seconds that the case takes at least."""
    t, g, h, d, n, p = (int(x) for x in case.groups()[:6])
    dtype, backward = case[7], case[8] != "forward"
    scores = t * h * p * (g * n + p)
    texts, images, results = 3 * t * h * p * d, 2 * t * g * h * n * d, t * g * h * p * d
    # Backward: five products for the forward's two, the exps again; it reads the inputs and the
    # result's gradient and writes a gradient of every input.
    products, exps = (3.5, 2) if backward else (1, 1)
    moved = texts + images + results
    moved += 2 * (texts + images) + results if backward else 0
    arithmetic = products * 4 * d * scores / ceilings.flops[dtype] + exps * scores / ceilings.exps
    return max(arithmetic, moved * BYTES[dtype] / ceilings.bandwidth)


def table(record: dict, ceilings: Ceilings) -> str:
    lines = ["| case | dvla_fast | bound | share of it reached |", "|---|---|---|---|"]
    for row in medians(record):
        case = CASE.match(row["group"])
        if row["provider"] != OURS or case is None:
            continue
        least, ours = bound(case, ceilings) * 1e6, row["median_us"]
        lines.append(f"| {row['group']} | {ours:,.1f} µs | {least:,.1f} µs | {least / ours:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON of --benchmark-json or ratios --save")
    arguments = parser.parse_args()
    ceilings = measure()
    products = ", ".join(f"{name} {f / 1e9:,.0f} GFLOP/s" for name, f in ceilings.flops.items())
    print(
        f"Ceilings: {products}; exp {1e9 / ceilings.exps:.2f} ns; "
        f"copy {ceilings.bandwidth / 1e9:.0f} GB/s\n"
    )
    print(table(json.loads(arguments.record.read_text()), ceilings))


if __name__ == "__main__":
    main()
