"""Baselines: what REINFORCE subtracts from a reward, to lower the variance and not the mean.

Called with the rewards (L, E) of a step, a baseline returns values that broadcast to them and do
not depend on the action that each is subtracted from; then, in training, it takes the step in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMABaseline(nn.Module):
    """Exponential moving average of each gated layer's reward (method §3, the default).

    Its first call has seen no reward: it returns 0, and the average starts at that call's mean.

    Args:
        num_layers: gated layers L.
        momentum: share of the old value that an update keeps.

    Raises:
        ValueError: a parameter out of its range.
    """

    value: Tensor
    steps: Tensor

    def __init__(self, num_layers: int, momentum: float = 0.9) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers: expected a positive number, got {num_layers}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(num_layers))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, rewards: Tensor) -> Tensor:
        """Rewards (L, E) -> baseline (L, 1) from earlier steps; takes these in when training."""
        if rewards.dim() != 2 or rewards.shape[0] != self.value.shape[0]:
            raise ValueError(
                f"rewards: shape {tuple(rewards.shape)}, expected ({self.value.shape[0]}, E)"
            )
        current = self.value.clone().unsqueeze(1)
        if self.training:
            mean = rewards.mean(1).to(self.value.dtype)
            kept = torch.where(self.steps == 0, mean, self.value)
            self.value.copy_(torch.lerp(mean, kept, self.momentum))
            self.steps.add_(1)
        return current.to(rewards.dtype)

    def extra_repr(self) -> str:
        return f"num_layers={self.value.shape[0]}, momentum={self.momentum:g}"


class LeaveOneOutBaseline(nn.Module):
    """Mean reward of the other samples of the same episode (Kool et al., 2019).

    Args:
        samples: draws K of each episode, consecutive along E; None: all of E are one group, which
            compares different episodes: unbiased too, less sharp.

    Raises:
        ValueError: fewer than two samples.
    """

    def __init__(self, samples: int | None = None) -> None:
        super().__init__()
        if samples is not None and samples < 2:
            raise ValueError(f"samples: expected at least 2, got {samples}")
        self.samples = samples

    @torch.no_grad()
    def forward(self, rewards: Tensor) -> Tensor:
        """Rewards (L, E) -> baseline (L, E).

        Raises:
            ValueError: E does not fall into groups of ``samples`` of at least two.
        """
        count = rewards.shape[-1] if self.samples is None else self.samples
        if count < 2 or rewards.shape[-1] % count:
            raise ValueError(
                f"rewards: {rewards.shape[-1]} episodes do not make groups of {max(count, 2)}"
            )
        groups = rewards.unflatten(-1, (-1, count))
        return ((groups.sum(-1, keepdim=True) - groups) / (count - 1)).flatten(-2)
