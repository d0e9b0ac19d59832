"""The form that rewards and what is made of them have: (layers, episodes)."""

from __future__ import annotations

from torch import Tensor

from dvla_fast.arguments import expect_tensor


def expect_layers(name: str, x: Tensor, decisions: bool = False) -> None:
    """Raises TypeError or ValueError unless x is a tensor (layers, episodes), none of them 0.

    ``decisions``: it may be one (layers, episodes, decisions), too.
    """
    expect_tensor(name, x)
    if x.dim() != 2 and not (decisions and x.dim() == 3):
        hint = "; one gate's tensors get that form by x[None]" if x.dim() == 1 else ""
        raise ValueError(f"{name}: shape {tuple(x.shape)}, expected (layers, episodes){hint}")
    if not x.numel():
        raise ValueError(
            f"{name}: shape {tuple(x.shape)}, expected at least one layer and one episode"
        )


def expect_rewards(rewards: Tensor) -> None:
    """Likewise for rewards (layers, episodes), which are floating-point: so are their baselines."""
    expect_layers("rewards", rewards)
    if not rewards.is_floating_point():
        raise TypeError(f"rewards: expected a floating tensor, got {rewards.dtype}")


def expect_scores(name: str, x: Tensor, decisions: Tensor) -> None:
    """Likewise unless x (…, outputs) holds a score for each of the decisions (…)."""
    expect_tensor(name, x)
    if x.shape[:-1] != decisions.shape:
        raise ValueError(
            f"{name}: shape {tuple(x.shape)}, expected {(*decisions.shape, 'outputs')}"
        )
