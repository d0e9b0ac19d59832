"""Second derivatives of the compiled ops raise, whatever they are asked for by."""

from __future__ import annotations

from collections.abc import Callable

import attention_cases
import pytest
import test_gate_policy
import test_gated_attention
import torch
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.functional import beta_policy, dual_attention, gate_policy, gated_attention

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))

Case = tuple[Callable[..., Tensor], list[Tensor]]


def cases() -> dict[str, Case]:
    """By op: a function to one result, and what it differentiates by."""
    attention = attention_cases.make(attention_cases.Shape(1, 2, 1, 3, 5, 4, 8))
    layer = test_gated_attention.make(test_gated_attention.Shape(1, 2, 1, 3, 5, 4, 8))
    decision = test_gate_policy.make(test_gate_policy.CASES[2])
    return {
        "beta_policy": (
            lambda x, kappa: beta_policy(x, kappa, action_logit=torch.ones_like(x)).log_prob,
            [torch.randn(3), torch.rand(3) + 1],
        ),
        "dual_attention": (dual_attention, list(attention)),
        "gated_attention": (lambda *x: gated_attention(*x)[0], list(layer)),
        "gate_policy": (
            lambda *x: gate_policy(*x, 10.0, deterministic=True).log_prob,
            list(decision),
        ),
    }


@pytest.fixture(params=["beta_policy", "dual_attention", "gated_attention", "gate_policy"])
def case(request: pytest.FixtureRequest) -> Case:
    return cases()[request.param]


def test_a_penalty_on_the_gradient_beside_the_loss(case: Case) -> None:
    """By the inputs, of which the loss alone has a gradient: the penalty's would be left out."""
    function, inputs = case
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = function(*[torch.tanh(x) for x in leaves]).sum()
    grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    penalty = sum(grad.square().sum() for grad in grads if grad is not None)
    for leaf, grad in zip(leaves, grads):
        if grad is None:
            continue
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            torch.autograd.grad(loss + penalty, leaf, retain_graph=True)


def test_the_derivative_by_the_gradient_that_came_in(case: Case) -> None:
    function, inputs = case
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    incoming = torch.randn_like(out).requires_grad_()
    grads = torch.autograd.grad(out, leaves, incoming, create_graph=True, allow_unused=True)
    total = sum(grad.sum() for grad in grads if grad is not None)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(total, incoming, allow_unused=True)


def test_first_derivatives_are_the_same_with_a_graph(case: Case) -> None:
    function, inputs = case
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves).square().sum()
    plain = torch.autograd.grad(out, leaves, retain_graph=True, allow_unused=True)
    graphed = torch.autograd.grad(out, leaves, create_graph=True, allow_unused=True)
    for one, other in zip(plain, graphed):
        assert (one is None and other is None) or torch.equal(one, other)
