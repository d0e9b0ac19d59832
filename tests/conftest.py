"""Shared fixtures: a fixed seed for every test, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from text_encoders import (  # noqa: F401  (fixtures)
    tiny_bert,
    tiny_clip,
    tiny_open_clip,
    tiny_open_clip_folder,
    tiny_siglip,
)

# Files of a few long tests. They come first, so that no process is left alone with one at the end.
LONG = ("test_interpreter.py", "test_benchmarks.py", "test_docs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def memory_given_back() -> Iterator[None]:
    """For tests that take gigabytes of a GPU which other processes share."""
    yield
    torch.cuda.empty_cache()
