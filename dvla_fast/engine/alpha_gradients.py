"""What the pathwise objective learns from: the loss's gradient by every drawn gate's logit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dvla_fast.nn import BetaPolicy, PolicyStep
from dvla_fast.rl import gradient_figures


class AlphaGradients:
    """Gradients that reach the policies of a step through the gates that they drew.

    Where the other objectives have c·∂ log π/∂η, this one has ∂loss/∂α·dα/∂η, times the number of
    decisions, since the loss is a mean over them.

    Args:
        gates: one a layer, whose policies have ``pathwise`` set.
    """

    def __init__(self, gates: Iterable[Any]) -> None:
        self._policies: list[BetaPolicy] = [gate.policy for gate in gates]
        self._terms: list[list[Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, what the policies draw is watched; what was kept before is forgotten."""
        self._terms = [[] for _ in self._policies]
        handles = [
            policy.register_forward_hook(_keeper(terms))
            for policy, terms in zip(self._policies, self._terms)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """After the backward pass: those of :func:`dvla_fast.rl.gradient_figures`, (L,) each."""
        score = torch.stack([torch.cat(terms) for terms in self._terms]).unsqueeze(-1)  # [L, D, 1]
        self._terms = []
        return gradient_figures(torch.full_like(score[..., 0], score.shape[1]), score)


def _keeper(terms: list[Tensor]) -> Any:
    """A forward hook: in the backward pass, what α hands on to the logit is added to ``terms``."""

    def keep(_: BetaPolicy, __: tuple[Tensor], step: PolicyStep) -> None:
        node = step.alpha.grad_fn  # the one that gives a draw its slope; none: a mean or replayed α
        if node is not None:
            node.register_hook(lambda grads, _: terms.append(grads[1]))  # by value, logit, slope

    return keep
