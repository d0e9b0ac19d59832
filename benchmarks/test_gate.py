"""RLAGate beside the same equations in eager PyTorch, as users would write them.

One group a (B, d, N, P, dtype, mode): one text of P tokens for all B images, 8 heads. A row is
timed only after its results, and in `forward+backward` its gradients, were compared with float64.
"""

from __future__ import annotations

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import gate_peers
from benchmarks.memory import peak_mib
from benchmarks.pairing import OURS, time_beside
from dvla_fast import RLAGate


class Case(NamedTuple):
    """Images, model width, image tokens, text tokens."""

    images: int
    width: int
    keys: int
    rows: int

    def __str__(self) -> str:
        return "B{}-d{}-N{}-P{}".format(*self)


CASES = [
    Case(images, width, keys, rows)
    for images, rows in ((5, 9), (5, 45), (25, 45), (80, 45), (1280, 45))
    for width, keys in ((192, 196), (384, 49))
]
PROVIDERS = [OURS, "eager matmul", "eager SDPA", "torch.compile"]
# Largest error allowed, as a share of the largest exact value.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
CHECKED_IMAGES = 80  # the others are computed alike
SECONDS_A_ROW = 0.7
# Calls before a row is timed. Memory that the system hands out for the first time is slow, on
# virtual machines most of all, and the results of 1280 images take hundreds of MiB.
WARM_UP = 6
# Gradients are those of the image tokens and of the weights around the attention; the policy's
# small ones are left to the tests.
WEIGHTS = ["text_projection", "text_qkv", "image_kv", "out_projection"]


def ours(gate: RLAGate, image_tokens: Tensor, text_tokens: Tensor) -> gate_peers.Result:
    out = gate(image_tokens, text_tokens, sample=False)
    return out.image_tokens, out.fused, out.log_prob, out.entropy


def implementation(name: str) -> gate_peers.Layer:
    if name == "torch.compile":
        return gate_peers.compiled()
    named = {"eager matmul": gate_peers.eager_matmul, "eager SDPA": gate_peers.eager_sdpa}
    return named.get(name, ours)


@functools.lru_cache(maxsize=1)
def inputs(case: Case, device: str = "cpu") -> tuple[RLAGate, Tensor, Tensor, list[Tensor]]:
    """A gate whose policy has left its start, tokens, and gradients of image tokens and H."""
    gen = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    gate = RLAGate(case.width)
    torch.nn.init.normal_(gate.policy.network.out.weight, std=0.1)

    def rand(tokens: int, width: int, images: int = case.images) -> Tensor:
        return torch.randn(images, tokens, width, generator=gen).bfloat16().float().to(device)

    gate = gate.bfloat16().float().to(device)
    gradients = [rand(case.keys, case.width), rand(case.rows, case.width)]
    return gate, rand(case.keys, case.width), rand(case.rows, 512, 1), gradients


def arguments(
    case: Case, dtype: torch.dtype, backward: bool, device: str = "cpu", images: int | None = None
) -> tuple[RLAGate, Tensor, Tensor, list[Tensor], bool]:
    """What follows the layer in :func:`run`, of the first images or of all."""
    gate, image_tokens, text_tokens, gradients = inputs(case, device)
    leaf = image_tokens[:images].to(dtype, copy=True).requires_grad_(backward)
    gradients = [g[:images].to(dtype) for g in gradients]
    return copy.deepcopy(gate).to(dtype), leaf, text_tokens.to(dtype), gradients, backward


def run(
    layer: gate_peers.Layer,
    gate: RLAGate,
    image_tokens: Tensor,
    text_tokens: Tensor,
    gradients: list[Tensor],
    backward: bool,
) -> list[Tensor]:
    """New image tokens and H, and with `backward` the gradients of tokens and weights."""
    if not backward:
        with torch.no_grad():
            return list(layer(gate, image_tokens, text_tokens)[:2])
    updated, fused, log_prob, entropy = layer(gate, image_tokens, text_tokens)
    leaves = [image_tokens, *(getattr(gate, name).weight for name in WEIGHTS)]
    policy = (log_prob + entropy).sum()
    gradients = [*(g.to(x.dtype) for g, x in zip(gradients, (updated, fused))), None]
    return [updated, fused, *torch.autograd.grad([updated, fused, policy], leaves, gradients)]


@functools.lru_cache(maxsize=1)
def exact(case: Case, device: str = "cpu") -> list[Tensor]:
    """Results and gradients in float64, of the images that are checked."""
    return run(
        gate_peers.eager_matmul, *arguments(case, torch.float64, True, device, CHECKED_IMAGES)
    )


def check(
    layer: gate_peers.Layer, case: Case, dtype: torch.dtype, backward: bool, device: str = "cpu"
) -> None:
    results = run(layer, *arguments(case, dtype, backward, device, CHECKED_IMAGES))
    for got, want in zip(results, exact(case, device)):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < TOLERANCE[dtype], f"wrong by {error:.2g}: not timed"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gate(benchmark, case: Case, dtype: torch.dtype, mode: str, provider: str) -> None:
    backward = mode == "forward+backward"
    layer = implementation(provider)
    check(layer, case, dtype, backward)
    given = arguments(case, dtype, backward)

    def call(name: str) -> list[Tensor]:
        return run(ours if name == OURS else layer, *given)

    benchmark.extra_info["peak_mib"] = peak_mib(lambda: call(provider))
    benchmark.group = f"RLAGate {case} {str(dtype)[6:]} {mode}"
    benchmark.name = provider
    benchmark.extra_info["threads"] = torch.get_num_threads()
    time_beside(benchmark, provider, call, SECONDS_A_ROW, WARM_UP)
