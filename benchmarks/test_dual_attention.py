"""dual_attention beside its PyTorch peers, on few-shot shapes and a long one.

One group a (shape, dtype, mode); a row is timed only after its result, and in `forward+backward`
its gradients, were compared with float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.memory import peak_mib
from benchmarks.pairing import OURS, time_beside
from dvla_fast import reference
from dvla_fast.functional import dual_attention


class Shape(NamedTuple):
    """Text groups, images a group, heads, head width, image tokens, query = text tokens."""

    groups: int
    images: int
    heads: int
    width: int
    keys: int
    rows: int

    def __str__(self) -> str:
        return "T{}-G{}-H{}-D{}-N{}-P{}".format(*self)


SHAPES = [
    Shape(5, 1, 8, 24, 196, 9),
    Shape(1, 80, 8, 24, 196, 45),
    Shape(1, 80, 8, 48, 49, 45),
    Shape(16, 80, 8, 48, 49, 45),
    Shape(25, 1, 8, 48, 49, 77),
    Shape(25, 1, 6, 64, 196, 77),
    Shape(2, 1, 8, 64, 4096, 1024),
]
COMPILED = {
    "torch.compile": peers.matmul_softmax,
    "torch.compile 2xSDPA+lerp": peers.sdpa_lerp,
    "FlexAttention": peers.flex_attention_lerp,
}
PROVIDERS = [OURS, "matmul+softmax", "2xSDPA+lerp", *COMPILED]
# Largest error allowed, as a share of the largest exact value. The bfloat16 peers mix in bfloat16.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
SECONDS_A_ROW = 0.35


def implementation(name: str) -> Callable[..., Tensor]:
    if name == OURS:
        return dual_attention
    if name in COMPILED:
        return peers.compiled(COMPILED[name])
    return {"matmul+softmax": peers.matmul_softmax, "2xSDPA+lerp": peers.sdpa_lerp}[name]


@functools.lru_cache(maxsize=1)
def inputs(shape: Shape) -> tuple[Tensor, ...]:
    """The six inputs and the output's gradient, float32 values that bfloat16 holds exactly."""
    gen = torch.Generator().manual_seed(0)
    t, g, h, d, n, p = shape

    def by_token(outer: int, tokens: int) -> Tensor:
        return torch.randn(outer, tokens, h, d, generator=gen).bfloat16().float().transpose(1, 2)

    tensors = (by_token(t, p), *(by_token(t * g, n) for _ in range(2)),
               *(by_token(t, p) for _ in range(2)))  # fmt: skip
    alpha = torch.rand(t * g, h, generator=gen).bfloat16().float()
    return (*tensors, alpha, by_token(t * g, p))


def run(attention: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> list[Tensor]:
    """The output, and with `backward` the gradients of the five tensors and alpha."""
    *leaves, grad_out = tensors
    if not backward:
        with torch.no_grad():
            return [attention(*leaves)]
    out = attention(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad_out)]


def first_group(tensors: tuple[Tensor, ...] | list[Tensor], shape: Shape) -> list[Tensor]:
    """The inputs of one text group: the others are computed alike, and float64 takes long."""
    groups = [1, shape.images, shape.images, 1, 1, shape.images, shape.images]
    return [x[:count] for x, count in zip(tensors, groups)]


@functools.lru_cache(maxsize=1)
def exact(shape: Shape) -> list[Tensor]:
    """Output and gradients of the first group in float64."""
    *leaves, grad_out = (x.double() for x in first_group(inputs(shape), shape))
    leaves = [x.requires_grad_() for x in leaves]
    scale = shape.width**-0.5
    return run(
        lambda *x: reference.dual_attention(*x, None, None, scale), [*leaves, grad_out], True
    )


def check(results: list[Tensor], shape: Shape, dtype: torch.dtype) -> None:
    groups = [shape.images, 1, shape.images, shape.images, 1, 1, shape.images]
    for got, want, count in zip(results, exact(shape), groups):
        error = (got[:count].double() - want).abs().max() / want.abs().max()
        assert error < TOLERANCE[dtype], f"wrong by {error:.2g}: not timed"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dual_attention(
    benchmark, shape: Shape, dtype: torch.dtype, mode: str, provider: str
) -> None:
    backward = mode == "forward+backward"
    if provider == "FlexAttention" and (backward or shape.groups > 1):
        pytest.skip("FlexAttention has no backward on CPUs, and its lowering fails on copied text")
    *leaves, alpha, grad_out = inputs(shape)
    leaves = [x.to(dtype).detach().requires_grad_(backward) for x in leaves]
    # alpha stays float32, as a policy gives it.
    tensors = [*leaves, alpha.clone().requires_grad_(backward), grad_out.to(dtype)]
    attention = implementation(provider)
    check(run(attention, tensors, backward), shape, dtype)
    benchmark.extra_info["peak_mib"] = peak_mib(lambda: run(attention, tensors, backward))
    benchmark.group = f"dual_attention {shape} {str(dtype)[6:]} {mode}"
    benchmark.name = provider
    benchmark.extra_info["threads"] = torch.get_num_threads()

    def call(name: str) -> list[Tensor]:
        return run(dual_attention if name == OURS else attention, tensors, backward)

    time_beside(benchmark, provider, call, SECONDS_A_ROW)
