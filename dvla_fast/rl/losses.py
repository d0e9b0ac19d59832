"""The objective of DVLA-RL: cross-entropy of the prototypes plus REINFORCE for the gates.

L = L_sup + λ L_RL with ∇L_RL = −E[(R − b) ∇ log π] − τ ∇H(π) (method §3). Diagnostics stay on
the device: nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvla_fast.nn.dvla import EpisodeOutput, TextTokens
from dvla_fast.rl.rewards import alignment_cosine, episode_accuracy, reward_parts

Baseline = Callable[[Tensor], Tensor]


class ReinforceLoss(nn.Module):
    """REINFORCE with baseline and entropy bonus: λ Σ_layers mean_episodes −[(R − b) log π + τ H].

    Args:
        entropy_weight: τ.
        weight: λ, the loss's weight beside the supervised one.
    """

    def __init__(self, entropy_weight: float = 0.2, weight: float = 0.1) -> None:
        super().__init__()
        self.entropy_weight = entropy_weight
        self.weight = weight

    def forward(
        self,
        log_prob: Tensor,
        entropy: Tensor,
        rewards: Tensor,
        baseline: Baseline | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () and detached diagnostics.

        Args:
            log_prob: (L, E) of the actions taken; (L, E, n) for n decisions an episode, which
                share its reward.
            entropy: like ``log_prob``.
            rewards: (L, E); no gradient flows to them.
            baseline: a module such as :class:`EMABaseline`, called once; a tensor that broadcasts
                to ``rewards``; None: 0.

        Returns:
            The weighted loss, and "reinforce" (), "entropy" (L,), "reward" (L,), "baseline" (L,)
            and "advantage_std" (L,).

        Raises:
            ValueError: shapes that do not fit together.
        """
        if rewards.dim() != 2 or log_prob.shape[:2] != rewards.shape:
            raise ValueError(
                f"rewards: shape {tuple(rewards.shape)} does not fit log_prob"
                f" {tuple(log_prob.shape)}"
            )
        if entropy.shape != log_prob.shape:
            raise ValueError(
                f"entropy: shape {tuple(entropy.shape)}, expected {tuple(log_prob.shape)}"
            )
        rewards = rewards.detach()
        given = baseline(rewards) if callable(baseline) else baseline
        level = torch.zeros_like(rewards) if given is None else given.detach().expand_as(rewards)
        advantage = rewards - level
        spread = advantage if log_prob.dim() == 2 else advantage.unsqueeze(-1)
        score = spread * log_prob + self.entropy_weight * entropy
        loss = -self.weight * score.flatten(1).mean(1).sum()
        diagnostics = {
            "reinforce": loss.detach(),
            "entropy": entropy.detach().flatten(1).mean(1),
            "reward": rewards.mean(1),
            "baseline": level.mean(1),
            "advantage_std": advantage.std(1, unbiased=False),
        }
        return loss, diagnostics

    def extra_repr(self) -> str:
        return f"entropy_weight={self.entropy_weight:g}, weight={self.weight:g}"


def alignment_loss(output: EpisodeOutput, query_labels: Tensor, text: TextTokens) -> Tensor:
    """Mean of 1 − cos(U·GAP(H), t*) over layers and images, ().

    A reward has no gradient, so this is what teaches U. GAP(H) is detached: only U learns.
    """
    labels = query_labels if output.aligned_labels is None else output.aligned_labels
    cosines = [alignment_cosine(t.aligned, text.class_embedding, labels) for t in output.layers]
    return 1.0 - torch.stack([cosine.mean() for cosine in cosines]).mean()


def total_loss(
    output: EpisodeOutput,
    query_labels: Tensor,
    text: TextTokens | None,
    reinforce: ReinforceLoss,
    baseline: Baseline | Tensor | None = None,
    *,
    lambda_sim: float = 0.5,
    lambda_imp: float = 1.0,
    alignment_weight: float = 1.0,
    previous_accuracy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_sup + λ L_RL + the alignment loss that trains U alone.

    Args:
        output: of a :class:`dvla_fast.DVLA` call.
        query_labels: (E, Q) int64.
        text: the texts that the call was given; None: the loss is L_sup.
        reinforce: holds λ and τ.
        baseline: see :class:`ReinforceLoss`.
        lambda_sim: weight of the similarity reward.
        lambda_imp: weight of the accuracy-improvement reward.
        alignment_weight: weight of :func:`alignment_loss`.
        previous_accuracy: see :func:`dvla_fast.rl.layer_rewards`.

    Returns:
        The loss (), and detached tensors: "supervised", "accuracy", "alignment", and per layer (L,)
        "reward_similarity", "reward_improvement", "alpha", beside those of :class:`ReinforceLoss`.

    Raises:
        TypeError, ValueError: labels that do not fit the logits.
    """
    if query_labels.dtype != torch.int64:
        raise TypeError(f"query_labels: expected int64, got {query_labels.dtype}")
    if query_labels.shape != output.logits.shape[:2]:
        raise ValueError(
            f"query_labels: shape {tuple(query_labels.shape)}, expected"
            f" {tuple(output.logits.shape[:2])}"
        )
    supervised = F.cross_entropy(output.logits.flatten(0, 1), query_labels.flatten())
    figures = {
        "supervised": supervised.detach(),
        "accuracy": episode_accuracy(output.logits.detach(), query_labels).mean(),
    }
    if text is None or not output.layers:
        return supervised, figures
    similarity, improvement = reward_parts(output, query_labels, text, previous_accuracy)
    policy_loss, diagnostics = reinforce(
        torch.stack([trace.log_prob for trace in output.layers]),
        torch.stack([trace.entropy for trace in output.layers]),
        lambda_sim * similarity + lambda_imp * improvement,
        baseline,
    )
    alignment = alignment_loss(output, query_labels, text)
    figures.update(diagnostics)
    figures["alignment"] = alignment.detach()
    figures["reward_similarity"] = similarity.mean(1)
    figures["reward_improvement"] = improvement.mean(1)
    figures["alpha"] = torch.stack([trace.alpha.detach().mean() for trace in output.layers])
    return supervised + policy_loss + alignment_weight * alignment, figures
