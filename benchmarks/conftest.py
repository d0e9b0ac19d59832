"""Benchmarks run on the number of threads PyTorch would use, and record on what machine."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from benchmarks.ratios import medians


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rows", type=Path, help="append every row to this file as soon as it is measured"
    )


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """A run that is killed keeps its rows; pytest-benchmark's own record is written at its end."""
    path = item.config.getoption("--rows", None)
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if path is None or call.when != "call" or call.excinfo or not getattr(benchmark, "stats", None):
        return
    (row,) = medians({"benchmarks": [benchmark.stats.as_dict(include_data=False)]})
    with path.open("a") as rows:
        rows.write(json.dumps(row) + "\n")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    import dvla_fast

    machine_info["dvla_fast"] = dvla_fast.build_info()
    machine_info["processor_name"] = platform.processor()


@pytest.fixture(autouse=True)
def _steady_state() -> None:
    """The allocator of a process at work, for every provider alike.

    glibc hands each freed block back to the system, at the price of page faults at the next
    allocation, until it has once freed a block as large (32 MB at most).
    """
    torch.manual_seed(0)
    torch.empty(31 * 2**20, dtype=torch.uint8)
