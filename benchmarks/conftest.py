"""Benchmarks run on the number of threads PyTorch would use, and say on what."""

from __future__ import annotations

import platform

import pytest
import torch


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    import dvla_fast

    machine_info["dvla_fast"] = dvla_fast.build_info()
    machine_info["processor_name"] = platform.processor()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
