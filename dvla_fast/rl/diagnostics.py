"""What to watch while a policy learns: functions that return detached tensors on the device.

Nothing here waits for a GPU; :func:`collapsed_layers` works on numbers read once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLLAPSE_EDGE = 0.02
COLLAPSE_ENTROPY = 0.02


@torch.no_grad()
def advantage_figures(advantage: Tensor) -> dict[str, Tensor]:
    """Mean, standard deviation and extremes over the episodes of each layer: (L, E) -> (L,)."""
    return {
        "advantage_mean": advantage.mean(1),
        "advantage_std": advantage.std(1, unbiased=False),
        "advantage_min": advantage.amin(1),
        "advantage_max": advantage.amax(1),
    }


@torch.no_grad()
def gradient_figures(coefficient: Tensor, score: Tensor) -> dict[str, Tensor]:
    """Mean and variance of the terms that a step's policy gradient is the mean of.

    A term is c·∂ log π(action)/∂ outputs, one a decision, with c = ∂ surrogate/∂ log π; for
    REINFORCE c is the advantage. "gradient_variance" is the sum over the outputs of the terms'
    variance over the D = E·n decisions of a layer: the gradient with respect to the policy's
    *outputs*, before weight λ, entropy bonus, penalty and network. Divided by D it estimates the
    variance of the step's mean where terms are independent; it holds the spread of the true
    gradient between states too. "gradient_mean" is the norm of the mean term.

    Args:
        coefficient: c, (L, E) or (L, E, n).
        score: (L, E, O) or (L, E, n, O), of :meth:`dvla_fast.nn.GatePolicy.score`.

    Returns:
        "gradient_mean" and "gradient_variance", (L,) each.
    """
    terms = (coefficient.unsqueeze(-1) * score).flatten(1, -2)  # [L, D, O]
    mean = terms.mean(1)
    variance = (terms - mean.unsqueeze(1)).square().sum(-1).mean(1)
    return {"gradient_mean": mean.norm(dim=-1), "gradient_variance": variance}


@torch.no_grad()
def alpha_figures(alphas: Sequence[Tensor]) -> dict[str, Tensor]:
    """Mean and standard deviation over all decisions of each layer's α -> (L,) each."""
    flat = [alpha.detach().float().flatten() for alpha in alphas]
    return {
        "alpha": torch.stack([alpha.mean() for alpha in flat]),
        "alpha_spread": torch.stack([alpha.std(unbiased=False) for alpha in flat]),
    }


def collapsed_layers(
    alpha_mean: Sequence[float], entropy: Sequence[float], discrete: bool
) -> list[int]:
    """Indices of the layers whose policy has stopped exploring.

    A Beta policy of fixed concentration has collapsed when the mean of its gates is within 0.02 of
    0 or 1: log-densities there move by tens of nats, and every draw is the same gate. A discrete
    one has when its entropy is below 0.02 nats.

    Args:
        alpha_mean: mean α of each layer, over an epoch or so.
        entropy: mean entropy of each layer.
        discrete: the policy is categorical.
    """
    if discrete:
        return [index for index, value in enumerate(entropy) if value < COLLAPSE_ENTROPY]
    return [i for i, mean in enumerate(alpha_mean) if min(mean, 1 - mean) < COLLAPSE_EDGE]
