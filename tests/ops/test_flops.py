"""The counted operations of the fused ops are those of the same products in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dvla_fast
from dvla_fast import _extension, functional
from dvla_fast.flops import register_flop_formulas

pytestmark = pytest.mark.skipif(not _extension.has_autograd, reason="compares the compiled ops")

BATCH, GROUPS, HEADS, IMAGE, TEXT, WIDTH = 6, 2, 4, 9, 5, 8
CHANNELS = HEADS * WIDTH


@pytest.fixture(autouse=True)
def _formulas() -> None:
    register_flop_formulas()
    register_flop_formulas()  # again does nothing


def count(call: Callable[[], Any]) -> tuple[int, set[str]]:
    """Operations, and what the counter knows them by."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops(), set(map(str, counter.get_flop_counts()["Global"]))


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def dual(backend: str | None) -> Tensor:
    q, tk, tv = (leaf(GROUPS, HEADS, TEXT, WIDTH) for _ in range(3))
    ik, iv = (leaf(BATCH, HEADS, IMAGE, WIDTH) for _ in range(2))
    alpha = torch.rand(BATCH, requires_grad=True)
    return functional.dual_attention(q, ik, iv, tk, tv, alpha, backend=backend)


def gated(backend: str | None, tokens: bool = True) -> Tensor:
    q, tk, tv = (leaf(GROUPS, HEADS, TEXT, WIDTH) for _ in range(3))
    image = leaf(BATCH, IMAGE, CHANNELS).requires_grad_(tokens)
    weights = leaf(2 * CHANNELS, CHANNELS), leaf(CHANNELS, CHANNELS)
    alpha = torch.rand(BATCH, requires_grad=True)
    updated, fused = functional.gated_attention(
        q, image, weights[0], tk, tv, alpha, weights[1], backend=backend
    )
    return updated.sum() + fused.sum()


def policy(backend: str | None) -> Tensor:
    image, text = leaf(BATCH, IMAGE, CHANNELS), leaf(GROUPS, TEXT, CHANNELS)
    weights = leaf(16, 2 * CHANNELS + 1), leaf(16), leaf(1, 16), leaf(1)
    step = functional.gate_policy(image, text, *weights, 10.0, backend=backend)
    return step.log_prob.sum()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "make",
    [dual, gated, lambda backend: gated(backend, tokens=False), policy],
    ids=["dual_attention", "gated_attention", "frozen tokens", "gate_policy"],
)
def test_as_in_plain_pytorch(make: Callable[[str | None], Tensor], backward: bool) -> None:
    def run(backend: str | None) -> Callable[[], Any]:
        return lambda: make(backend).sum().backward() if backward else make(backend)

    total, names = count(run("cpp"))
    expected, plain = count(run("reference"))
    assert total == expected > 0
    assert all(name.startswith("dvla_fast.") for name in names)
    assert all(name.startswith("aten.") for name in plain)


def test_a_whole_gate() -> None:
    gate = dvla_fast.RLAGate(CHANNELS, 16, HEADS)
    image, text = torch.randn(BATCH, IMAGE, CHANNELS), torch.randn(GROUPS, TEXT, 16)

    def run() -> None:
        gate(image, text).image_tokens.sum().backward()

    total, names = count(run)
    dvla_fast.set_backend("reference")
    try:
        assert count(run)[0] == total
    finally:
        dvla_fast.set_backend(None)
    assert "dvla_fast.dual_attention_backward" in names
