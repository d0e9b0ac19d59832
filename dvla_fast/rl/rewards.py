"""Rewards of the gates (method §3): how well the fused tokens mean the right class, and how much
the gate improved the classification. Plain functions of tensors; no gradient flows through them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dvla_fast.nn.dvla import EpisodeOutput, TextTokens
from dvla_fast.nn.prototype import prototype_logits


def episode_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right queries in each episode: logits (E, Q, way), labels (E, Q) -> (E,)."""
    return (logits.argmax(-1) == labels).to(torch.float32).mean(-1)


@torch.no_grad()
def similarity_reward(aligned: Tensor, class_embedding: Tensor, labels: Tensor) -> Tensor:
    """Mean of cos(U·GAP(H), t*) over the images of each episode.

    Args:
        aligned: (E, M, text_dim), U·GAP(H) of M images.
        class_embedding: (E, way, text_dim).
        labels: (E, M) int64, the true classes.

    Returns:
        (E,) in [-1, 1].
    """
    return alignment_cosine(aligned, class_embedding, labels).mean(-1)


def alignment_cosine(aligned: Tensor, class_embedding: Tensor, labels: Tensor) -> Tensor:
    """cos(U·GAP(H), t*) of every image, (E, M), differentiable; shapes as in similarity_reward."""
    index = labels.unsqueeze(-1).expand(-1, -1, class_embedding.shape[-1])
    target = class_embedding.gather(1, index)  # [E, M, text_dim]
    return F.cosine_similarity(aligned.float(), target.float(), dim=-1)


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

    Features (E, S, d) and (E, Q, d), labels (E, S) and (E, Q).
    """
    after = prototype_logits(support_after, support_labels, query_after, way)
    before = prototype_logits(support_before, support_labels, query_before, way)
    return episode_accuracy(after, query_labels) - episode_accuracy(before, query_labels)


@torch.no_grad()
def reward_parts(
    output: EpisodeOutput,
    query_labels: Tensor,
    text: TextTokens,
    previous_accuracy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(similarity, improvement), each (L, E): see :func:`layer_rewards`."""
    labels = query_labels if output.aligned_labels is None else output.aligned_labels
    similarity = [similarity_reward(t.aligned, text.class_embedding, labels) for t in output.layers]
    if previous_accuracy is not None:
        gain = episode_accuracy(output.logits, query_labels) - previous_accuracy
        improvement = [gain] * len(output.layers)
    else:
        way = output.logits.shape[-1]
        improvement = [
            accuracy_reward(
                t.support_before,
                t.support_after,
                t.query_before,
                t.query_after,
                output.support_labels,
                query_labels,
                way,
            )
            for t in output.layers
        ]
    return torch.stack(similarity), torch.stack(improvement)


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
        ValueError: the output has no gated layer.
    """
    if not output.layers:
        raise ValueError("output: no gated layers to reward; was DVLA called without text?")
    similarity, improvement = reward_parts(output, query_labels, text, previous_accuracy)
    return lambda_sim * similarity + lambda_imp * improvement
