"""beta_policy beside torch.distributions.Beta: sample + log_prob + entropy, and the gradient.

Both sides get the same logits and κ = 10. The peer runs at its best setting, without argument
validation. Correctness is checked before anything is timed. Groups put the two side by side;
``python -m benchmarks.ratios`` prints the ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Beta

from benchmarks.pairing import OURS, time_beside
from dvla_fast.functional import beta_policy

KAPPA = 10.0
SECONDS_A_ROW = 0.5
SIZES = (5, 25, 100, 1_000_000)

Densities = tuple[Tensor, Tensor]


def ours(logits: Tensor) -> Densities:
    out = beta_policy(logits, KAPPA)
    return out.log_prob, out.entropy


def peer(logits: Tensor) -> Densities:
    mean = torch.sigmoid(logits)
    policy = Beta(KAPPA * mean, KAPPA * (1 - mean), validate_args=False)
    return policy.log_prob(policy.sample()), policy.entropy()


PROVIDERS = {OURS: ours, "torch.distributions": peer}


def check() -> None:
    """The two agree on what does not depend on the draw, and on the density of a given draw."""
    logits = torch.randn(1000, dtype=torch.float64)
    mean = torch.sigmoid(logits)
    policy = Beta(KAPPA * mean, KAPPA * (1 - mean))
    alpha = policy.sample().clamp(1e-12, 1 - 1e-12)
    out = beta_policy(logits, KAPPA, action_logit=torch.logit(alpha))
    torch.testing.assert_close(out.entropy, policy.entropy())
    torch.testing.assert_close(out.log_prob, policy.log_prob(alpha))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("n", SIZES)
def test_forward(benchmark: Callable, n: int, provider: str) -> None:
    check()
    benchmark.group = f"beta_policy forward n={n}"
    logits = torch.randn(n)
    time_beside(benchmark, provider, lambda name: PROVIDERS[name](logits), SECONDS_A_ROW)


def direct(densities: Densities, weights: Tensor) -> None:
    torch.autograd.backward(densities, (weights, weights))


def sums(densities: Densities, weights: Tensor) -> None:
    log_prob, entropy = densities
    (log_prob.sum() + entropy.sum()).backward()


def reinforce(densities: Densities, weights: Tensor) -> None:
    log_prob, entropy = densities
    (-(weights * log_prob) - 0.2 * entropy).mean().backward()


# How the gradient is driven. "forward+backward" hands gradients to the two results, which leaves
# little but the op and PyTorch's engine; the others add PyTorch ops that cost both sides the same.
DRIVES = {
    "forward+backward": direct,
    "forward+backward of sums": sums,
    "REINFORCE loss forward+backward": reinforce,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("drive", DRIVES)
def test_forward_backward(benchmark: Callable, drive: str, n: int, provider: str) -> None:
    check()
    benchmark.group = f"beta_policy {drive} n={n}"
    logits = torch.randn(n, requires_grad=True)
    weights = torch.ones(n)

    def step(name: str) -> None:
        logits.grad = None
        DRIVES[drive](PROVIDERS[name](logits), weights)

    time_beside(benchmark, provider, step, SECONDS_A_ROW)
