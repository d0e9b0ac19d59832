"""The policies on their own: distributions, starting points, precision."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dvla_fast import functional
from dvla_fast.nn.layers import lookup
from dvla_fast.nn.policy import (
    POLICIES,
    BetaPolicy,
    CategoricalPolicy,
    FixedPolicy,
    PolicyStep,
    StateNetwork,
    build_policy,
    frozen_policy,
)


def test_beta_policy_is_the_beta_distribution_of_its_mean() -> None:
    policy = BetaPolicy(3, hidden_dim=4, concentration=6.0).double()
    torch.nn.init.normal_(policy.network.out.weight, std=0.2)
    state = torch.randn(50, 7, dtype=torch.float64)
    step = policy(state)
    mean = torch.sigmoid(policy.network(state).squeeze(-1))
    theirs = torch.distributions.Beta(6 * mean, 6 * (1 - mean))
    torch.testing.assert_close(step.log_prob, theirs.log_prob(step.alpha), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(step.entropy, theirs.entropy(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(policy(state, sample=False).alpha, mean)


def test_pathwise_gradient_is_that_of_the_quantile() -> None:
    beta = pytest.importorskip("scipy.stats").beta
    policy = BetaPolicy(3, concentration=4.0).double()
    policy.pathwise = True
    torch.nn.init.constant_(policy.network.out.bias, 0.7)
    alpha = policy(torch.randn(5, 7, dtype=torch.float64)).alpha

    def shapes(logit: float) -> tuple[float, float]:
        return 4.0 / (1 + math.exp(-logit)), 4.0 / (1 + math.exp(logit))

    level, step = beta.cdf(alpha.detach().numpy(), *shapes(0.7)), 1e-5
    moved = [beta.ppf(level, *shapes(0.7 + sign * step)) for sign in (1, -1)]
    (gradient,) = torch.autograd.grad(alpha.sum(), policy.network.out.bias)
    assert gradient.item() == pytest.approx(((moved[0] - moved[1]) / (2 * step)).sum(), rel=1e-5)


def test_pathwise_gradients_are_of_first_order() -> None:
    policy = BetaPolicy(3, hidden_dim=4)
    policy.pathwise = True
    weight = policy.network.out.bias
    alpha = policy(torch.randn(5, 7)).alpha
    (gradient,) = torch.autograd.grad(alpha.sum(), weight, create_graph=True)
    assert gradient.abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"pathwise: second derivatives"):
        gradient.square().sum().backward()


def test_categorical_policy_draws_its_probabilities() -> None:
    policy = CategoricalPolicy(3, hidden_dim=4)
    policy.network.out.bias.data = torch.tensor([0.5, 0.3, 0.2]).log()
    state = torch.randn(20_000, 7)
    step = policy(state, generator=torch.Generator().manual_seed(1))
    for choice, share in zip((1.0, 0.0, 0.5), (0.5, 0.3, 0.2)):
        chosen = step.alpha == choice
        assert abs(chosen.float().mean().item() - share) < 0.02
        assert torch.allclose(step.log_prob[chosen].exp(), torch.tensor(share))
    entropy = torch.distributions.Categorical(torch.tensor([0.5, 0.3, 0.2])).entropy()
    torch.testing.assert_close(step.entropy, entropy.expand(20_000))
    assert (policy(state, sample=False).alpha == 1.0).all()


@pytest.mark.parametrize("name", [n for n in POLICIES if n != "categorical"])
def test_every_policy_starts_at_one_half(name: str) -> None:
    step = build_policy(name, 3)(torch.randn(4, 7), sample=False)
    assert step.alpha.tolist() == [0.5] * 4


def test_a_tensor_concentration_is_refused() -> None:
    kappa = torch.nn.Parameter(torch.tensor(10.0))
    for make in (BetaPolicy, functools.partial(build_policy, "beta")):
        with pytest.raises(TypeError, match="concentration: expected a number, got a tensor"):
            make(3, concentration=kappa)


def test_deterministic_policies_have_no_density() -> None:
    step = FixedPolicy(0.2)(torch.randn(4, 7))
    torch.testing.assert_close(step.alpha, torch.full((4,), 0.2))
    torch.testing.assert_close(torch.sigmoid(step.action_logit), step.alpha)
    assert not step.log_prob.any()
    assert not step.entropy.any()
    for percent in range(101):  # not rounded on the way through a logit
        alpha = FixedPolicy(percent / 100)(torch.randn(1, 7)).alpha
        assert torch.equal(alpha, torch.tensor([percent / 100]))


def test_state_is_read_free_of_scale() -> None:
    network = StateNetwork(3, 8)
    torch.nn.init.normal_(network.out.weight)
    state = torch.randn(5, 7)
    louder = state * torch.tensor([1000.0] * 3 + [0.5] * 3 + [1.0])
    torch.testing.assert_close(network(louder), network(state), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_compute_in_float32_under_autocast(name: str) -> None:
    policy = build_policy(name, 3)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    state = torch.randn(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        inside = policy(state, sample=False)
    outside = policy(state, sample=False)
    for mine, theirs in zip(inside, outside):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs)


def test_half_precision_weights_still_give_float32_decisions() -> None:
    policy = BetaPolicy(3).bfloat16()
    assert policy(torch.randn(4, 7).bfloat16()).log_prob.dtype == torch.float32


@pytest.mark.parametrize("alpha", [1e-12, 0.3, 1 - 1e-9])
def test_a_frozen_policy_has_its_mean_at_the_edge_too(alpha: float) -> None:
    frozen = frozen_policy(BetaPolicy(3).double(), alpha)
    logit = frozen.network.out.bias.item()
    assert logit == pytest.approx(math.log(alpha) - math.log1p(-alpha))
    assert frozen(torch.randn(2, 7).double(), sample=False).alpha.tolist() == pytest.approx(
        [alpha] * 2
    )


@pytest.mark.parametrize("alpha", [0.0, 1.0, math.nan])
def test_a_frozen_mean_lies_inside(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha: expected a number in \(0, 1\)"):
        frozen_policy(BetaPolicy(3), alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_far_logits_are_finite(dtype: torch.dtype) -> None:
    policy = BetaPolicy(3)
    logits = torch.tensor([-800.0, -300.0, 300.0, 800.0], dtype=dtype).unsqueeze(-1)
    score = policy.score(logits, torch.tensor([-790.0, -290.0, 290.0, 790.0], dtype=dtype))
    assert bool(score.isfinite().all())
    # κp ψ(κp) is −1 where p vanishes; the logit of the action counts for nothing there.
    torch.testing.assert_close(score.abs(), torch.ones_like(score), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), [(-2.0, 3.0), (3.0, -2.0)])
def test_divergence_of_far_beta_policies_by_quadrature(first: float, second: float) -> None:
    """E[log π − log π'] over the logit x of the action, whose tails end well within the grid."""
    x = torch.linspace(-120, 120, 48_001, dtype=torch.float64)

    def log_density(logit: float) -> torch.Tensor:
        p = torch.tensor(logit, dtype=torch.float64).sigmoid()
        a, b = 6 * p, 6 * (1 - p)
        norm = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
        return norm + a * F.logsigmoid(x) + b * F.logsigmoid(-x)

    ours, theirs = log_density(first), log_density(second)
    assert torch.trapezoid(ours.exp(), x).item() == pytest.approx(1.0, rel=1e-9)
    want = torch.trapezoid(ours.exp() * (ours - theirs), x).item()
    outputs = torch.tensor([[[first]], [[second]]], dtype=torch.float64)
    got = BetaPolicy(3, concentration=6.0).divergence(*outputs)
    assert got.tolist() == pytest.approx([want], rel=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_divergence_of_far_categorical_policies_is_the_sum(turned: bool) -> None:
    shares = [(0.7, 0.29, 0.01), (0.05, 0.05, 0.9)]
    first, second = reversed(shares) if turned else shares
    want = sum(p * math.log(p / q) for p, q in zip(first, second))
    outputs = (torch.tensor([share], dtype=torch.float64).log() + 2.0 for share in (first, second))
    got = CategoricalPolicy(3).divergence(*outputs)
    assert got.tolist() == pytest.approx([want])


class _Blind(BetaPolicy):
    def forward(self, state: torch.Tensor, **options: Any) -> PolicyStep:
        return super().forward(state.detach() * 0, **options)


class _OtherNetwork(StateNetwork):
    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return super().forward(state * 0)


@pytest.mark.parametrize("kind", ["policy", "network", "module", "hook"])
def test_the_gate_decides_as_the_policy_does(kind: str) -> None:
    """Also where a user has changed it."""
    policy = (_Blind if kind == "policy" else BetaPolicy)(4, hidden_dim=5)
    if kind == "network":
        policy.network = _OtherNetwork(4, 5)
    torch.nn.init.normal_(policy.network.out.weight)
    if kind == "module":
        policy.network = torch.nn.Sequential(torch.nn.Linear(9, 1))
    images, texts = torch.randn(3, 2, 4), torch.randn(3, 5, 4)
    seen: list[torch.Tensor] = []
    if kind == "hook":
        policy.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    step, state = policy.decide(images, texts, sample=False)
    assert len(seen) == (kind == "hook")
    torch.testing.assert_close(step.alpha, policy(state, sample=False).alpha)
    again = policy(state, action_logit=step.action_logit)
    torch.testing.assert_close(step.log_prob, again.log_prob)
    stored, _ = policy.decide(images, texts, action_logit=step.action_logit)
    torch.testing.assert_close(stored.log_prob, again.log_prob)


def test_the_gate_draws_as_the_policy_does() -> None:
    """A part of a batch what the whole draws, and with the pathwise gradient."""
    policy = BetaPolicy(4, hidden_dim=5)
    torch.nn.init.normal_(policy.network.out.weight)
    images, texts = torch.randn(4, 2, 4), torch.randn(4, 5, 4)
    torch.manual_seed(3)
    whole, _ = policy.decide(images, texts)
    policy.share = (1, 2)
    torch.manual_seed(3)
    part, _ = policy.decide(images[2:], texts[2:])
    for found, expected in zip(part, whole):
        torch.testing.assert_close(found, expected[2:])
    policy.share, policy.pathwise = (0, 1), True
    assert policy.decide(images, texts)[0].alpha.requires_grad
    assert not policy.decide(images, texts, action_logit=whole.action_logit)[0].alpha.requires_grad


def test_the_most_probable_choice_of_each_state() -> None:
    policy = CategoricalPolicy(3, hidden_dim=4)
    torch.nn.init.normal_(policy.network.out.weight)
    states = torch.randn(20, 7)
    best = policy.outputs(states).argmax(1)
    assert len(best.unique()) > 1
    assert torch.equal(policy(states, sample=False).alpha, torch.tensor(policy.choices)[best])


@pytest.mark.parametrize("choice", [1.7, 3.0, -1.0, math.nan])
def test_choices_that_there_are_not(choice: float) -> None:
    policy = CategoricalPolicy(3, hidden_dim=4)
    with pytest.raises(ValueError, match="action_logit: expected the indices of choices, 0 to 2"):
        policy(torch.randn(2, 7), action_logit=torch.tensor([0.0, choice]))
    functional.set_value_checks(False)
    try:
        step = policy(torch.randn(2, 7), action_logit=torch.tensor([0.0, choice]))
    finally:
        functional.set_value_checks(None)
    assert step.log_prob.isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"action_logit: shape \(2,\), expected \(4,\)"):
        policy(torch.randn(4, 7), action_logit=torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lookup(dtype: torch.dtype) -> None:
    index = torch.tensor([[2, 0], [1, 2]])
    for numbers in ((1.4, 0.6, 0.1), (1.4, 0.0, -3.0)):
        want = torch.tensor(numbers, dtype=dtype)[index]
        got = lookup(numbers, index, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, want)
    assert torch.equal(lookup((0.5,), index, dtype), torch.full((2, 2), 0.5, dtype=dtype))


@pytest.mark.parametrize("name", ["beta", "categorical"])
def test_parts_of_a_batch_draw_what_the_whole_does(name: str) -> None:
    policy = build_policy(name, 4, hidden_dim=8)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    states = torch.randn(6, 9)
    torch.manual_seed(3)
    whole = policy(states)
    for part in range(3):
        policy.share = (part, 3)
        rows = slice(2 * part, 2 * part + 2)
        torch.manual_seed(3)
        for found, expected in zip(policy(states[rows]), whole):
            torch.testing.assert_close(found, expected[rows])
