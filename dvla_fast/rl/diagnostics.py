"""What to watch while a policy learns: functions that return detached tensors on the device.

Nothing here waits for a GPU; :func:`collapsed_layers` works on numbers read once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dvla_fast.arguments import expect_tensor
from dvla_fast.rl.checks import expect_layers, expect_scores

COLLAPSE_EDGE = 0.02
COLLAPSE_ENTROPY = 0.02
COLLAPSE_SHARE = 0.9


@torch.no_grad()
def advantage_figures(advantage: Tensor) -> dict[str, Tensor]:
    """Mean, standard deviation and extremes over the episodes of each layer: (L, E) -> (L,).

    Raises:
        TypeError, ValueError: no tensor of that form, or one without an episode.
    """
    expect_layers("advantage", advantage)
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

    Raises:
        TypeError, ValueError: no tensors of these forms, or scores that do not fit the
            coefficients.
    """
    expect_layers("coefficient", coefficient, decisions=True)
    expect_scores("score", score, coefficient)
    terms = (coefficient.unsqueeze(-1) * score).flatten(1, -2)  # [L, D, O]
    mean = terms.mean(1)
    variance = (terms - mean.unsqueeze(1)).square().sum(-1).mean(1)
    return {"gradient_mean": mean.norm(dim=-1), "gradient_variance": variance}


@torch.no_grad()
def alpha_figures(alphas: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of all decisions of each layer's α: mean, deviation, share near 0 or 1 -> (L,) each.

    Raises:
        TypeError: an α that is no tensor.
        ValueError: no layer, or a layer without a decision.
    """
    for alpha in alphas:
        expect_tensor("alphas", alpha)
    if not len(alphas) or any(not alpha.numel() for alpha in alphas):
        raise ValueError(
            f"alphas: expected at least one layer and one decision of each, got shapes"
            f" {[tuple(alpha.shape) for alpha in alphas]}"
        )
    flat = [alpha.float().flatten() for alpha in alphas]
    ends = [torch.minimum(alpha, 1 - alpha) < COLLAPSE_EDGE for alpha in flat]
    return {
        "alpha": torch.stack([alpha.mean() for alpha in flat]),
        "alpha_spread": torch.stack([alpha.std(unbiased=False) for alpha in flat]),
        "alpha_edge": torch.stack([end.float().mean() for end in ends]),
    }


def collapsed_layers(
    alpha_mean: Sequence[float],
    entropy: Sequence[float],
    discrete: bool,
    alpha_edge: Sequence[float] = (),
) -> list[int]:
    """Indices of the layers whose policy has stopped exploring, or is NaN.

    A Beta policy of fixed concentration has collapsed when the mean of its gates is within 0.02 of
    0 or 1, or nine of ten gates are, at one end or at both (by state): log-densities there move by
    tens of nats, and every draw is the same gate. A discrete one has when its entropy is below
    0.02 nats.

    Args:
        alpha_mean: mean α of each layer, over an epoch or so.
        entropy: mean entropy of each layer.
        discrete: the policy is categorical.
        alpha_edge: share of each layer's gates within 0.02 of 0 or 1; empty: not known.
    """
    if discrete:  # comparisons are written so that NaN counts
        return [index for index, value in enumerate(entropy) if not value >= COLLAPSE_ENTROPY]
    shares = alpha_edge or [0.0] * len(alpha_mean)
    return [
        index
        for index, (mean, share) in enumerate(zip(alpha_mean, shares, strict=True))
        if not (min(mean, 1 - mean) >= COLLAPSE_EDGE and share < COLLAPSE_SHARE)
    ]
