"""What the rewards say about α: mean reward as a function of one gate, and where it draws a policy.

With the other gates at their policy's mean, the mean reward of gated layer t is a function R_t(α).
A Beta policy of mean p in that layer maximises

    J_t(p) = E[R_t(α)] + τ H(p),  α ~ Beta(κp, κ(1 − p)),

H its entropy, which is largest at p = 1/2. The maximum with and without τ tells a gate that stays
at 1/2 because the rewards ask for it, or are flat, from one that the entropy bonus holds there, and
both from one that has not learned yet.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dvla_fast import functional
from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.data.images import to_device_of
from dvla_fast.engine.build import split_classes
from dvla_fast.nn import DVLA
from dvla_fast.rl import RewardInputs, weighted_rewards
from dvla_fast.semantics import EncodedTexts

ALPHAS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_CELLS = 400  # of [0, 1], over which a policy's distribution is added up
_BATCH = 8  # episodes of one pass


@torch.inference_mode()
def reward_curves(
    model: DVLA,
    data: FewShotData,
    texts: EncodedTexts,
    sampler: EpisodeSampler,
    weights: Mapping[str, float],
    episodes: int = 64,
    maps: Tensor | None = None,
) -> Tensor:
    """Mean rewards of base episodes with one gate set and the others at their policy's mean.

    Args:
        model: in evaluation mode, on the data's device.
        texts: encoded texts of ``data.class_names``.
        sampler: of ``data.base``.
        weights: of the rewards, by name.
        episodes: how many, the first of the sampler's list.
        maps: what ``DVLA.prefix`` gives for all base images, if it is known already.

    Returns:
        (L, len(ALPHAS)) float64, a row a gated layer.

    Raises:
        ValueError: less than one episode.
    """
    if episodes < 1:
        raise ValueError(f"episodes: expected at least 1, got {episodes}")
    positions = split_classes(data, "base").cpu()
    sums = torch.zeros(len(model.gated_layers), len(ALPHAS), dtype=torch.float64)
    for first in range(0, episodes, _BATCH):
        batch = sampler.batch(first, min(_BATCH, episodes - first))
        support, query = (_inputs(data, maps, index) for index in (batch.support, batch.query))
        support_labels, query_labels, classes = (
            to_device_of(data.base.labels, part)
            for part in (batch.support_labels, batch.query_labels, positions[batch.classes])
        )
        text = texts.episodes(classes)
        for layer, location in enumerate(model.gated_layers):
            for column, alpha in enumerate(ALPHAS):
                output = model(
                    support, support_labels, query, text, way=sampler.way,
                    alpha={location: alpha}, sample=False, from_prefix=maps is not None,
                )  # fmt: skip
                inputs = RewardInputs(output, query_labels, text)
                sums[layer, column] += weighted_rewards(weights, inputs)[0][layer].sum().cpu()
    return sums / episodes


def _inputs(data: FewShotData, maps: Tensor | None, index: Tensor) -> Tensor:
    if maps is not None:
        return maps[to_device_of(maps, index)]
    return data.normalise(data.base.gather(index.flatten())).unflatten(0, index.shape)


def best_mean(
    alphas: Sequence[float],
    rewards: Sequence[float],
    concentration: float,
    entropy_weight: float,
) -> float:
    """The mean p of a Beta policy that maximises J(p), on a grid of step 0.01.

    Args:
        alphas: where the mean reward is known, increasing from 0 to 1; straight lines in between.
        rewards: the mean reward there.
        concentration: κ.
        entropy_weight: τ.

    Raises:
        ValueError: alphas do not increase from 0 to 1, are not as many as the rewards, or a reward
            is not finite.
    """
    if len(rewards) != len(alphas):
        raise ValueError(f"rewards: expected {len(alphas)}, one an alpha, got {len(rewards)}")
    whole = len(alphas) > 1 and (alphas[0], alphas[-1]) == (0.0, 1.0)
    if not whole or not all(a < b for a, b in pairwise(alphas)):
        raise ValueError(f"alphas: expected values increasing from 0 to 1, got {list(alphas)}")
    if not all(map(math.isfinite, rewards)):
        raise ValueError(f"rewards: expected finite numbers, got {list(rewards)}")
    known = torch.tensor(alphas, dtype=torch.float64)
    level = torch.tensor(rewards, dtype=torch.float64)
    edges = torch.linspace(0, 1, _CELLS + 1, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    right = torch.searchsorted(known, middles).clamp(1, len(known) - 1)
    share = (middles - known[right - 1]) / (known[right] - known[right - 1])
    curve = torch.lerp(level[right - 1], level[right], share)  # [cells]
    means, masses = _policies(concentration)
    entropies = functional.beta_entropy(torch.logit(means), concentration)
    value = masses @ curve + entropy_weight * entropies
    return float(means[value.argmax()])


@functools.lru_cache(maxsize=8)
def _policies(concentration: float) -> tuple[Tensor, Tensor]:
    """Means (M,) of a grid of Beta policies, and what each gives to the cells of [0, 1], (M, C)."""
    means = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    edges = torch.linspace(0, 1, _CELLS + 1, dtype=torch.float64)[1:-1]
    below = functional.beta_cdf(torch.logit(means).unsqueeze(1), concentration, torch.logit(edges))
    ends = below.new_zeros(len(means), 1)
    return means, torch.cat([ends, below, ends + 1], 1).diff(dim=1)
