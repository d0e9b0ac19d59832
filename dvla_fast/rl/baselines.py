"""Baselines: what REINFORCE subtracts from a reward, to lower the variance and not the mean.

Called with the rewards (L, E) of a step (and, where its ``needs_states`` says so, with the states
that the gates decided from), a baseline returns values that broadcast to the rewards and do not
depend on the action that each is subtracted from; then, in training, it takes the step in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dvla_fast import _extension
from dvla_fast.arguments import expect_number, expect_whole
from dvla_fast.nn.layers import reset_parts
from dvla_fast.nn.policy import StateNetwork
from dvla_fast.ops.value_checks import require, value_checks
from dvla_fast.rl.checks import expect_layers, expect_rewards


class EMABaseline(nn.Module):
    """Exponential moving average of each gated layer's reward (method §3, the default).

    Its first call has seen no reward: it returns 0, and the average starts at that call's mean.
    Every call in training takes a step in. For several updates from the same draws call it once,
    before them, and give what it returned to the policy loss::

        level = baseline(loss_fn.signal(rewards))
        for _ in range(epochs):
            loss, _ = loss_fn(log_prob, entropy, rewards, level, old_log_prob=old)

    NaN or infinite rewards are refused where values are checked
    (:func:`dvla_fast.functional.set_value_checks`); elsewhere a step that holds one is not taken
    in.

    Args:
        num_layers: gated layers L.
        momentum: share of the old value that an update keeps.

    Raises:
        TypeError: ``num_layers`` is no whole number, or ``momentum`` no number.
        ValueError: a parameter out of its range.
    """

    value: Tensor
    steps: Tensor

    def __init__(self, num_layers: int, momentum: float = 0.9) -> None:
        super().__init__()
        expect_whole("num_layers", num_layers)
        expect_number("momentum", momentum)
        if num_layers < 1:
            raise ValueError(f"num_layers: expected a positive number, got {num_layers}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(num_layers))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Forget the steps taken in."""
        self.value.zero_()
        self.steps.zero_()

    @torch.no_grad()
    def forward(self, rewards: Tensor) -> Tensor:
        """Rewards (L, E) -> baseline (L, 1) from earlier steps; takes these in when training.

        Raises:
            TypeError: rewards that are no floating-point tensor.
            ValueError: rewards of another shape; NaN or infinite ones to take in.
        """
        expect_rewards(rewards)
        if rewards.shape[0] != self.value.shape[0]:
            raise ValueError(
                f"rewards: shape {tuple(rewards.shape)}, expected ({self.value.shape[0]}, E)"
            )
        current = self.value.clone().unsqueeze(1)
        if self.training:
            if value_checks(rewards.device) and not _extension.transforming():
                require(rewards.isfinite(), "rewards: NaN or infinity found")
            mean = rewards.mean(1).to(self.value.dtype)
            kept = torch.where(self.steps == 0, mean, self.value)
            finite = mean.isfinite().all()
            moved = torch.lerp(mean, kept, self.momentum)
            self.value.copy_(torch.where(finite, moved, self.value))
            self.steps.add_(finite)
        return current.to(rewards.dtype)

    def extra_repr(self) -> str:
        return f"num_layers={self.value.shape[0]}, momentum={self.momentum:g}"


class LeaveOneOutBaseline(nn.Module):
    """Mean reward of the other samples of the same episode (Kool et al., 2019).

    Args:
        samples: draws K of each episode, consecutive along E; None: all of E are one group, which
            compares different episodes: unbiased too, less sharp.

    Raises:
        TypeError: ``samples`` is no whole number.
        ValueError: fewer than two samples.
    """

    def __init__(self, samples: int | None = None) -> None:
        super().__init__()
        if samples is not None:
            expect_whole("samples", samples)
        if samples is not None and samples < 2:
            raise ValueError(f"samples: expected at least 2, got {samples}")
        self.samples = samples

    @torch.no_grad()
    def forward(self, rewards: Tensor) -> Tensor:
        """Rewards (L, E) -> baseline (L, E).

        Raises:
            TypeError: rewards that are no floating-point tensor.
            ValueError: rewards of another shape; E does not fall into groups of ``samples`` of at
                least two.
        """
        expect_rewards(rewards)
        count = rewards.shape[-1] if self.samples is None else self.samples
        if count < 2 or rewards.shape[-1] % count:
            raise ValueError(
                f"rewards: {rewards.shape[-1]} episodes do not make groups of {max(count, 2)}"
            )
        groups = rewards.unflatten(-1, (-1, count))
        return ((groups.sum(-1, keepdim=True) - groups) / (count - 1)).flatten(-2)


class ValueBaseline(nn.Module):
    """A value network a layer, V(s) ≈ E[R | s], from the states that the gates decide from.

    Its values carry a gradient: the policy loss adds the squared error between them and the
    rewards, and subtracts them detached (Sutton and Barto, 2018, chapter 13.4).

    Args:
        dims: width d of each gated layer's tokens; its state is (…, 2·d + 1).
        hidden_dim: hidden width.

    Raises:
        TypeError: ``dims`` is no collection, or a size no whole number.
        ValueError: no layer, or a size that is not positive.
    """

    needs_states = True

    def __init__(self, dims: Sequence[int], hidden_dim: int = 128) -> None:
        super().__init__()
        if not isinstance(dims, Collection):
            raise TypeError(f"dims: expected a width for each gated layer, got {dims!r}")
        for name, size in (*(("dims", dim) for dim in dims), ("hidden_dim", hidden_dim)):
            expect_whole(name, size)
        if not dims or min(dims) < 1 or hidden_dim < 1:
            raise ValueError(f"dims, hidden_dim: expected positive, got {dims} and {hidden_dim}")
        self.networks = nn.ModuleList(StateNetwork(dim, hidden_dim) for dim in dims)

    def reset_parameters(self) -> None:
        """Initialise the networks anew."""
        reset_parts(self)

    def forward(self, rewards: Tensor, states: Sequence[Tensor] | None = None) -> Tensor:
        """Rewards (L, E) and states, (E, 2·d + 1) or (E, n, 2·d + 1) a layer -> values (L, E).

        Raises:
            TypeError: rewards that are no floating-point tensor.
            ValueError: rewards of another shape; no states, or states of another number of layers
                or episodes or of another width.
        """
        expect_rewards(rewards)
        if states is None:
            raise ValueError("states: the value network needs the states of the gates")
        if len(states) != len(self.networks) or rewards.shape[0] != len(self.networks):
            raise ValueError(
                f"states: {len(states)} layers and rewards of {rewards.shape[0]}, expected"
                f" {len(self.networks)}"
            )
        values = []
        network: Any
        for network, state in zip(self.networks, states):
            pooled = state.detach()
            if pooled.dim() == 3:  # one reward for all decisions of an episode
                pooled = pooled.mean(1)
            if pooled.shape[0] != rewards.shape[1]:
                raise ValueError(
                    f"states: {pooled.shape[0]} episodes, rewards have {rewards.shape[1]}"
                )
            if pooled.shape[-1] != 2 * network.dim + 1:
                raise ValueError(f"states: {pooled.shape[-1]} wide, expected {2 * network.dim + 1}")
            values.append(network(pooled).squeeze(-1))
        return torch.stack(values).to(rewards.dtype)


BASELINES = ("ema", "leave-one-out", "value", "none")


def build_baseline(
    name: str,
    dims: Sequence[int],
    *,
    momentum: float = 0.9,
    samples: int | None = None,
    hidden_dim: int = 128,
) -> nn.Module | None:
    """The baseline of that name for gated layers of widths ``dims``; None for "none".

    Args:
        name: one of ``BASELINES``.
        dims: width d of each gated layer's tokens.
        momentum: of the moving average.
        samples: of the leave-one-out baseline.
        hidden_dim: of the value network.

    Raises:
        ValueError: unknown name, or a parameter out of its range.
    """
    if name == "ema":
        return EMABaseline(len(dims), momentum)
    if name == "leave-one-out":
        return LeaveOneOutBaseline(samples)
    if name == "value":
        return ValueBaseline(dims, hidden_dim)
    if name == "none":
        return None
    raise ValueError(f"baseline: unknown {name!r}; expected one of {', '.join(BASELINES)}")


def normalise_advantage(advantage: Tensor, epsilon: float = 1e-4) -> Tensor:
    """(A − mean)/(standard deviation + ε) over the episodes of each layer, (L, E).

    Raises:
        TypeError: no tensor.
        ValueError: another shape, or fewer than two episodes.
    """
    expect_layers("advantage", advantage)
    if advantage.shape[1] < 2:
        raise ValueError(
            f"advantage: {advantage.shape[1]} episode cannot be normalised; needs two or more"
        )
    spread = advantage.std(1, unbiased=False, keepdim=True)
    return (advantage - advantage.mean(1, keepdim=True)) / (spread + epsilon)
