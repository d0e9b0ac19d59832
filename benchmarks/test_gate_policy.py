"""The gate's whole decision beside its composition in eager PyTorch.

Pooled state, network, Beta policy: α drawn, its log-density and the entropy; with backward, the
gradient of a REINFORCE loss by tokens and weights. One group a case and mode. A row is timed only
after its results at the mean, and in `forward+backward` its gradients, were compared with float64.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pairing import OURS, time_beside
from dvla_fast.functional import gate_policy

KAPPA = 10.0
SECONDS_A_ROW = 0.3
HIDDEN = 128


class Case(NamedTuple):
    """Episodes, images of each, image tokens, text tokens, width."""

    episodes: int
    images: int
    keys: int
    rows: int
    width: int

    def __str__(self) -> str:
        return "T{}-G{}-N{}-P{}-d{}".format(*self)


CASES = [
    Case(1, 5, 196, 9, 192),
    Case(1, 25, 49, 45, 384),
    Case(1, 80, 196, 45, 192),
    Case(16, 80, 49, 45, 384),
    Case(1600, 1, 1, 1, 192),  # little but the network and the policy
]
Decision = tuple[Tensor, Tensor]


def inputs(case: Case) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen)

    features = 2 * case.width + 1
    return [
        rand(case.episodes * case.images, case.keys, case.width),
        rand(case.episodes, case.rows, case.width),
        rand(HIDDEN, features) / features**0.5,
        rand(HIDDEN),
        rand(1, HIDDEN) / HIDDEN**0.5,
        rand(1),
    ]


def ours(draw: bool, *tensors: Tensor) -> Decision:
    out = gate_policy(*tensors, KAPPA, deterministic=not draw)
    return out.log_prob, out.entropy


def eager(
    draw: bool, image: Tensor, text: Tensor, first: Tensor, first_bias: Tensor, last: Tensor,
    last_bias: Tensor,
) -> Decision:  # fmt: skip
    """As PyTorch users write it, argument validation off."""
    x = image.mean(1).unflatten(0, (text.shape[0], -1)).mean(1)
    y = text.mean(1)
    width = x.shape[-1]
    cosine = F.cosine_similarity(x, y, dim=-1).unsqueeze(-1)
    parts = F.layer_norm(x, (width,)), F.layer_norm(y, (width,)), cosine
    hidden = F.gelu(F.linear(torch.cat(parts, dim=-1), first, first_bias))
    mean = torch.sigmoid(F.linear(hidden, last, last_bias).squeeze(-1))
    policy = torch.distributions.Beta(KAPPA * mean, KAPPA * (1 - mean), validate_args=False)
    action = policy.sample() if draw else mean.detach()
    return policy.log_prob(action), policy.entropy()


PROVIDERS = {OURS: ours, "eager PyTorch": eager}


def gradients(provider, tensors: list[Tensor], draw: bool) -> list[Tensor]:
    log_prob, entropy = provider(draw, *tensors)
    loss = -(log_prob + 0.2 * entropy).mean()
    return [log_prob, entropy, *torch.autograd.grad(loss, tensors)]


def check(provider, case: Case) -> None:
    """At the policy's mean, which both sides take alike."""
    tensors = inputs(case)
    exact = gradients(eager, [x.double().requires_grad_() for x in tensors], False)
    found = gradients(provider, [x.requires_grad_() for x in tensors], False)
    for got, want in zip(found, exact):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 1e-3, f"wrong by {error:.2g}: not timed"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gate_policy(benchmark, case: Case, mode: str, provider: str) -> None:
    check(PROVIDERS[provider], case)
    tensors = inputs(case)
    benchmark.group = f"gate_policy {case} float32 {mode}"
    benchmark.name = provider
    benchmark.extra_info["threads"] = torch.get_num_threads()
    backward = mode == "forward+backward"
    leaves = [x.requires_grad_(backward) for x in tensors]

    def call(name: str) -> object:
        if backward:
            return gradients(PROVIDERS[name], leaves, True)
        with torch.no_grad():
            return PROVIDERS[name](True, *leaves)

    time_beside(benchmark, provider, call, SECONDS_A_ROW)
