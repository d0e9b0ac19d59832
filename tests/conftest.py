"""Shared fixtures: a fixed seed for every test, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from text_encoders import (  # noqa: F401  (fixtures)
    tiny_bert,
    tiny_clip,
    tiny_open_clip,
    tiny_siglip,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
