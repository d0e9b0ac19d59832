"""What the pathwise objective learns from: the loss's gradient at every gate that was drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dvla_fast import functional
from dvla_fast.nn import BetaPolicy, PolicyStep
from dvla_fast.rl import gradient_figures


class _Draw(NamedTuple):
    alpha: Tensor
    """(A,); keeps its gradient."""
    slope: Tensor
    """dα/dη, (A,)."""


class AlphaGradients:
    """Draws of a step's policies whose gates keep the gradient that reaches them.

    Where the other objectives have c·∂ log π/∂η, this one has ∂loss/∂α·dα/∂η, times the number of
    decisions, since the loss is a mean over them.

    Args:
        gates: one a layer, whose policies have ``pathwise`` set.
    """

    def __init__(self, gates: Iterable[Any]) -> None:
        self._policies: list[BetaPolicy] = [gate.policy for gate in gates]
        self._draws: list[list[_Draw]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, what the policies draw is kept; what was kept before is forgotten."""
        self._draws = [[] for _ in self._policies]
        handles = [
            policy.register_forward_hook(_keeper(draws))
            for policy, draws in zip(self._policies, self._draws)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """After the backward pass: those of :func:`dvla_fast.rl.gradient_figures`, (L,) each."""
        terms = []
        for draws in self._draws:
            grads = [draw.alpha.grad * draw.slope for draw in draws if draw.alpha.grad is not None]
            terms.append(torch.cat(grads))
        self._draws = []
        score = torch.stack(terms).unsqueeze(-1)  # [L, D, 1]
        return gradient_figures(torch.full_like(score[..., 0], score.shape[1]), score)


def _keeper(draws: list[_Draw]) -> Any:
    """A forward hook that adds to ``draws``."""

    def keep(policy: BetaPolicy, state: tuple[Tensor], step: PolicyStep) -> None:
        if not step.alpha.requires_grad:  # a replayed or a mean gate
            return
        step.alpha.retain_grad()
        alpha, drawn = step.alpha.detach(), step.action_logit
        with torch.no_grad():
            logits = policy.outputs(state[0]).squeeze(-1)
            slope = functional.beta_implicit_derivatives(logits, policy.concentration, drawn).logits
        draws.append(_Draw(step.alpha, alpha * (1 - alpha) * slope))  # dα/dl = α(1 − α)

    return keep
