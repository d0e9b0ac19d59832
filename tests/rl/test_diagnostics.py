"""Diagnostics against per-decision gradients by autograd."""

from __future__ import annotations

import math

import pytest
import torch

from dvla_fast.functional import beta_policy
from dvla_fast.nn import BetaPolicy, CategoricalPolicy, GatePolicy
from dvla_fast.rl import (
    ClippedSurrogate,
    Objective,
    PolicyLoss,
    PreferencePairs,
    Reference,
    Reinforce,
    advantage_figures,
    alpha_figures,
    collapsed_layers,
    gradient_figures,
)


@pytest.mark.parametrize(
    "objective", [Reinforce(), ClippedSurrogate(0.2), PreferencePairs(0.5)], ids=type
)
def test_gradient_variance_is_that_of_the_terms_of_the_gradient(objective: Objective) -> None:
    """The terms are what autograd finds at each decision's own logit, but for mean and weight."""
    torch.manual_seed(0)
    layers, episodes = 2, 8
    logits = torch.randn(layers, episodes, dtype=torch.float64, requires_grad=True)
    step = beta_policy(logits, 10.0)
    old = step.log_prob.detach() + 0.2 * torch.randn(layers, episodes)
    reference = Reference(None, torch.randn(layers, episodes).double())
    policy = BetaPolicy(3)
    scores = policy.score(logits.detach().unsqueeze(-1), step.action_logit)
    loss, figures = PolicyLoss(objective, entropy_weight=0.0, weight=0.1)(
        step.log_prob,
        step.entropy,
        torch.randn(layers, episodes).double(),
        old_log_prob=old,
        reference=reference,
        scores=scores,
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    terms = -gradient / 0.1 * episodes
    torch.testing.assert_close(figures["gradient_variance"], terms.var(1, unbiased=False))
    torch.testing.assert_close(figures["gradient_mean"], terms.mean(1).abs())


def test_gradient_figures_of_several_outputs() -> None:
    """Two terms, (1, 0) and (0, 2): their mean is (1/2, 1), of variances 1/4 and 1."""
    figures = gradient_figures(torch.tensor([[1.0, 2.0]]), torch.eye(2)[None])
    torch.testing.assert_close(figures["gradient_mean"], torch.tensor([1.25**0.5]))
    torch.testing.assert_close(figures["gradient_variance"], torch.tensor([1.25]))


@pytest.mark.parametrize("policy", [BetaPolicy(3, 4), CategoricalPolicy(3, 4)], ids=type)
def test_scores_are_the_derivatives_of_the_log_density(
    policy: GatePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    policy.double()
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    state = torch.randn(6, 7, dtype=torch.float64)
    step = policy(state)
    outputs = policy.outputs(state).detach().requires_grad_()
    monkeypatch.setattr(policy.network, "forward", lambda _: outputs)
    again = policy(state, action_logit=step.action_logit)
    (want,) = torch.autograd.grad(again.log_prob.sum(), outputs)
    torch.testing.assert_close(policy.score(outputs.detach(), step.action_logit), want)


def test_divergence_of_policies() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 3)
    got = CategoricalPolicy(3).divergence(first, second)
    want = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=first),
        torch.distributions.Categorical(logits=second),
    )
    torch.testing.assert_close(got, want)
    a, b = 10 * torch.sigmoid(first[:, 0]), 10 * torch.sigmoid(-first[:, 0])
    c, d = 10 * torch.sigmoid(second[:, 0]), 10 * torch.sigmoid(-second[:, 0])
    want = torch.distributions.kl_divergence(
        torch.distributions.Beta(a.double(), b.double()),
        torch.distributions.Beta(c.double(), d.double()),
    )
    got = BetaPolicy(3).divergence(first[:, :1], second[:, :1])
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-6)


def test_wrong_terms_of_a_gradient_are_named() -> None:
    coefficient, score = torch.zeros(2, 4), torch.zeros(2, 4, 3)
    with pytest.raises(TypeError, match=r"^score: expected a tensor, got list$"):
        gradient_figures(coefficient, [1.0])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^score: shape \(2, 3, 3\), expected \(2, 4, 'outputs'\)$"
    ):
        gradient_figures(coefficient, score[:, 1:])
    with pytest.raises(TypeError, match=r"^coefficient: expected a tensor, got list$"):
        gradient_figures([[0.0] * 4] * 2, score)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^coefficient: shape \(4,\), expected"):
        gradient_figures(coefficient[0], score[0])


def test_extremes_of_advantages() -> None:
    figures = advantage_figures(torch.tensor([[1.0, -2.0, 0.5], [3.0, 3.0, 3.0]]))
    assert figures["advantage_min"].tolist() == [-2.0, 3.0]
    assert figures["advantage_max"].tolist() == [1.0, 3.0]


def test_alpha_figures_take_every_decision() -> None:
    alphas = [torch.tensor([0.2, 0.4]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])]
    figures = alpha_figures([alpha.requires_grad_() for alpha in alphas])
    assert not any(value.requires_grad for value in figures.values())
    torch.testing.assert_close(figures["alpha"], torch.tensor([0.3, 0.75]))
    torch.testing.assert_close(figures["alpha_spread"], torch.tensor([0.1, 0.1875**0.5]))
    torch.testing.assert_close(figures["alpha_edge"], torch.tensor([0.0, 1.0]))
    rows = alpha_figures(torch.tensor([[0.2, 0.4], [0.5, 0.5]]))  # type: ignore[arg-type]
    torch.testing.assert_close(rows["alpha"], torch.tensor([0.3, 0.5]))


@pytest.mark.parametrize("alphas", [[], [torch.ones(2), torch.ones(0)]])
def test_alpha_figures_without_decisions(alphas: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^alphas: expected at least one layer and one decision"):
        alpha_figures(alphas)
    with pytest.raises(TypeError, match=r"^alphas: expected a tensor, got float$"):
        alpha_figures([0.5])  # type: ignore[list-item]


def test_collapse() -> None:
    assert collapsed_layers([0.5, 0.01, 0.985], [-0.5, -3.0, -3.0], discrete=False) == [1, 2]
    assert collapsed_layers([0.03, 0.97], [-2.0, -2.0], discrete=False) == []
    assert collapsed_layers([1.0, 0.5], [0.021, 0.019], discrete=True) == [1]
    # By state at one end or the other: the mean and the spread of α look alive.
    assert collapsed_layers([0.5, 0.5], [-9e3, -0.5], False, [1.0, 0.3]) == [0]
    assert collapsed_layers([0.5, 0.5], [-0.5, -0.5], False, [0.9, 0.89]) == [0]
    for discrete in (True, False):
        assert collapsed_layers([math.nan], [math.nan], discrete) == [0]
