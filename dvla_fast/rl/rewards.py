"""Rewards of the gates (method §3 and §4): how well the fused tokens mean the right class, and how
much the gate improved the classification. Plain functions of tensors; no gradient flows through
them. A registry holds those that a configuration names; :func:`register_reward` adds one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dvla_fast import _extension
from dvla_fast.arguments import expect_number, expect_tensor
from dvla_fast.nn.episode import EpisodeOutput, TextTokens
from dvla_fast.nn.episode_checks import check_labels
from dvla_fast.nn.prototype import prototype_logits
from dvla_fast.ops.value_checks import require, value_checks


class RewardInputs(NamedTuple):
    """What a registered reward may read: L gated layers, E episodes."""

    output: EpisodeOutput
    """Of a :class:`dvla_fast.DVLA` call with text."""
    query_labels: Tensor
    """(E, Q) int64: known in training only."""
    text: TextTokens
    """The episodes' texts."""
    previous_accuracy: Tensor | None = None
    """() or (E,): final accuracy of the episodes before; None: there were none."""


RewardFunction = Callable[[RewardInputs], Tensor]
"""RewardInputs -> (L, E)."""

_REWARDS: dict[str, RewardFunction] = {}


def register_reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: make a function of :class:`RewardInputs` available under ``name``.

    Raises:
        TypeError: the name is no string.
        ValueError: the name is taken.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")

    def register(function: RewardFunction) -> RewardFunction:
        if name in _REWARDS:
            raise ValueError(f"reward {name!r} is registered already")
        _REWARDS[name] = function
        return function

    return register


def reward_names() -> tuple[str, ...]:
    """Names of the registered rewards."""
    return tuple(_REWARDS)


def check_reward_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights that name no reward or are no numbers.

    Raises:
        TypeError: no mapping, or a weight that is no number.
        ValueError: no reward, an unknown one, or a weight that is not finite.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            "rewards: expected a mapping from names to weights, such as {'accuracy': 1.0}, got"
            f" {type(weights).__name__}"
        )
    if not weights:
        raise ValueError(f"rewards: expected at least one of {', '.join(_REWARDS)}")
    for name, weight in weights.items():
        if name not in _REWARDS:
            raise ValueError(f"rewards: unknown {name!r}; expected some of {', '.join(_REWARDS)}")
        expect_number("rewards", weight, f"a number as weight of {name!r}")
        if not math.isfinite(weight):
            raise ValueError(f"rewards: expected a finite weight of {name!r}, got {weight}")


@torch.no_grad()
def weighted_rewards(
    weights: Mapping[str, float], inputs: RewardInputs
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weight · reward over the named rewards, (L, E), and the unweighted parts by name.

    Raises:
        TypeError, ValueError: see :func:`check_reward_weights`; no gated layer; a reward of wrong
            shape or, where values are checked, one that is NaN or infinite; labels or
            ``previous_accuracy`` that do not fit the output.
    """
    check_reward_weights(weights)
    if not inputs.output.layers:
        raise ValueError("output: no gated layers to reward; was DVLA called without text?")
    expected = (len(inputs.output.layers), inputs.output.logits.shape[0])
    parts = {name: _REWARDS[name](inputs) for name in weights}
    for name, part in parts.items():
        if not isinstance(part, Tensor) or not part.is_floating_point():
            kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(f"reward {name!r}: expected a floating tensor, got {kind}")
        if tuple(part.shape) != expected:
            raise ValueError(
                f"reward {name!r}: shape {tuple(part.shape)}, expected (layers, episodes) ="
                f" {expected}"
            )
        if value_checks(part.device) and not _extension.transforming():
            require(part.isfinite(), f"reward {name!r}: NaN or infinity found")
    terms = [weight * parts[name] for name, weight in weights.items()]
    return sum(terms[1:], start=terms[0]), parts


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of ``x``, at least float32: half types would round shares and cosines."""
    return torch.promote_types(x.dtype, torch.float32)


def discounted_returns(rewards: Tensor, discount: float) -> Tensor:
    """G_t = Σ_{k ≥ t} discount^(k − t) R_k over the gated layers: (L, E) -> (L, E).

    Discount 0 leaves each layer its own reward, which is the paper's choice; 1 credits a gate with
    everything that comes after it.

    Raises:
        TypeError, ValueError: rewards that are no tensor, or of no layer.
    """
    expect_tensor("rewards", rewards)
    if not rewards.dim() or not rewards.shape[0]:
        raise ValueError(
            f"rewards: shape {tuple(rewards.shape)}, expected (layers, episodes) of at least one"
            " layer"
        )
    result = [rewards[-1]]
    for reward in rewards.flip(0)[1:]:
        result.append(reward + discount * result[-1])
    return torch.stack(result[::-1])


def episode_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right queries in each episode: logits (E, Q, way), labels (E, Q) -> (E,).

    In the dtype of the logits, at least float32.

    Raises:
        TypeError, ValueError: labels that do not fit the logits.
    """
    check_labels("labels", labels, logits.shape[:-1], logits.shape[-1])
    return (logits.argmax(-1) == labels).to(_wide(logits)).mean(-1)


@torch.no_grad()
def similarity_reward(aligned: Tensor, class_embedding: Tensor, labels: Tensor) -> Tensor:
    """Mean of cos(U·GAP(H), t*) over the images of each episode.

    Args:
        aligned: (E, M, text_dim), U·GAP(H) of M images.
        class_embedding: (E, way, text_dim).
        labels: (E, M) int64, the true classes.

    Returns:
        (E,) in [-1, 1].

    Raises:
        TypeError, ValueError: labels or embeddings that do not fit.
    """
    return alignment_cosine(aligned, class_embedding, labels).mean(-1)


def alignment_cosine(aligned: Tensor, class_embedding: Tensor, labels: Tensor) -> Tensor:
    """cos(U·GAP(H), t*) of every image, (E, M), differentiable; shapes as in similarity_reward.

    In the wider of the two dtypes, at least float32.

    Raises:
        TypeError, ValueError: labels or embeddings that do not fit.
    """
    for name, tensor in (("aligned", aligned), ("class_embedding", class_embedding)):
        expect_tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions, got shape {tuple(tensor.shape)}")
    episodes, _, width = aligned.shape
    if class_embedding.shape[0] != episodes or class_embedding.shape[2] != width:
        raise ValueError(
            f"class_embedding: shape {tuple(class_embedding.shape)}, expected"
            f" ({episodes}, way, {width})"
        )
    check_labels("labels", labels, aligned.shape[:-1], class_embedding.shape[1])
    index = labels.unsqueeze(-1).expand(-1, -1, class_embedding.shape[-1])
    target = class_embedding.gather(1, index)  # [E, M, text_dim]
    wide = torch.promote_types(_wide(aligned), target.dtype)
    return F.cosine_similarity(aligned.to(wide), target.to(wide), dim=-1)


@torch.no_grad()
def accuracy_reward(
    support_before: Tensor,
    support_after: Tensor,
    query_before: Tensor,
    query_after: Tensor,
    support_labels: Tensor,
    query_labels: Tensor,
    way: int,
) -> Tensor:
    """Prototype accuracy of pooled features after a gate minus before it: (E,) in [-1, 1].

    Features (E, S, d) and (E, Q, d), or (E, Q, way, d) for queries with one for each class; labels
    (E, S) and (E, Q).

    Raises:
        TypeError, ValueError: shapes, dtypes or labels do not fit together.
    """
    after = prototype_logits(support_after, support_labels, query_after, way)
    before = prototype_logits(support_before, support_labels, query_before, way)
    check_labels("query_labels", query_labels, query_after.shape[:2], way)
    return episode_accuracy(after, query_labels) - episode_accuracy(before, query_labels)


@register_reward("similarity")
def _similarity(inputs: RewardInputs) -> Tensor:
    """cos(U·GAP(H), t*), t* the text embedding of the true class."""
    output, text = inputs.output, inputs.text
    labels = inputs.query_labels if output.aligned_labels is None else output.aligned_labels
    return torch.stack(
        [similarity_reward(t.aligned, text.class_embedding, labels) for t in output.layers]
    )


@register_reward("improvement")
def _improvement(inputs: RewardInputs) -> Tensor:
    """Acc_t − Acc_{t−1} with t the gated layers of one episode."""
    output, way = inputs.output, inputs.output.logits.shape[-1]
    return torch.stack(
        [
            accuracy_reward(
                t.support_before,
                t.support_after,
                t.query_before,
                t.query_after,
                output.support_labels,
                inputs.query_labels,
                way,
            )
            for t in output.layers
        ]
    )


@register_reward("episode_improvement")
def _episode_improvement(inputs: RewardInputs) -> Tensor:
    """Acc_t − Acc_{t−1} with t consecutive episodes; 0 where there were none before."""
    accuracy = _accuracy(inputs)
    previous = inputs.previous_accuracy
    if previous is not None and previous.shape not in ((), accuracy.shape[1:]):
        raise ValueError(
            f"previous_accuracy: shape {tuple(previous.shape)}, expected () or"
            f" {tuple(accuracy.shape[1:])}"
        )
    return torch.zeros_like(accuracy) if previous is None else accuracy - previous


@register_reward("accuracy")
def _accuracy(inputs: RewardInputs) -> Tensor:
    """Final accuracy of the episode, the same for every layer."""
    accuracy = episode_accuracy(inputs.output.logits, inputs.query_labels)
    return accuracy.expand(len(inputs.output.layers), -1)


@register_reward("log_likelihood")
def _log_likelihood(inputs: RewardInputs) -> Tensor:
    """Mean log-probability of the queries' true classes: accuracy without its steps."""
    logits, labels = inputs.output.logits, inputs.query_labels
    check_labels("query_labels", labels, logits.shape[:-1], logits.shape[-1])
    chosen = (
        torch.log_softmax(logits, dim=-1, dtype=_wide(logits))
        .gather(-1, labels.unsqueeze(-1))
        .squeeze(-1)
    )
    return chosen.mean(-1).expand(len(inputs.output.layers), -1)


@torch.no_grad()
def reward_parts(
    output: EpisodeOutput,
    query_labels: Tensor,
    text: TextTokens,
    previous_accuracy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(similarity, improvement), each (L, E): see :func:`layer_rewards`."""
    inputs = RewardInputs(output, query_labels, text, previous_accuracy)
    gain = _improvement if previous_accuracy is None else _episode_improvement
    return _similarity(inputs), gain(inputs)


def layer_rewards(
    output: EpisodeOutput,
    query_labels: Tensor,
    text: TextTokens,
    lambda_sim: float = 0.5,
    lambda_imp: float = 1.0,
    *,
    previous_accuracy: Tensor | None = None,
) -> Tensor:
    """R_t = λ_sim · cos(U·GAP(H), t*) + λ_imp · (Acc_t − Acc_{t−1}), (L, E), without gradient.

    Args:
        output: of a :class:`dvla_fast.DVLA` call with text.
        query_labels: (E, Q) int64: known in training only.
        text: the episodes' texts.
        lambda_sim: weight of the similarity.
        lambda_imp: weight of the improvement.
        previous_accuracy: () or (E,): read t as consecutive episodes instead of consecutive gates,
            the improvement being this episode's final accuracy minus this one (method §4).

    Raises:
        TypeError, ValueError: the output has no gated layer; labels or ``previous_accuracy`` that
            do not fit it.
    """
    if not output.layers:
        raise ValueError("output: no gated layers to reward; was DVLA called without text?")
    similarity, improvement = reward_parts(output, query_labels, text, previous_accuracy)
    return lambda_sim * similarity + lambda_imp * improvement
