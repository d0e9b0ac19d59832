"""Benchmarks run on the number of threads PyTorch would use, and record on what machine."""

from __future__ import annotations

import platform

import pytest
import torch


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
