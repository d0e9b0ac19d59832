"""Settings of the tests of dvla_fast.rl."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dvla_fast.functional import set_value_checks


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors here are tiny: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Values are not looked at, as on a GPU."""
    set_value_checks(False)
    yield
    set_value_checks(None)
