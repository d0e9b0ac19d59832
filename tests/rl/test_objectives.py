"""Objectives, advantages and the policy loss against formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dvla_fast.functional import beta_kl, beta_log_prob, beta_sample
from dvla_fast.rl import (
    OBJECTIVES,
    ClippedSurrogate,
    Counterfactual,
    Decisions,
    EMABaseline,
    GroupRelative,
    Pathwise,
    PolicyLoss,
    PreferencePairs,
    Reference,
    Reinforce,
    ReinforceLoss,
    ValueBaseline,
    advantage_figures,
    build_objective,
    discounted_returns,
    normalise_advantage,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def row(*values: float) -> Tensor:
    return torch.tensor([values])


def test_every_name_builds_and_an_unknown_one_is_refused() -> None:
    draws = {name: build_objective(name).samples for name in OBJECTIVES}
    assert draws == {**dict.fromkeys(OBJECTIVES, 1), "grpo": 4, "dpo": 2}
    with pytest.raises(ValueError, match=r"objective: unknown 'trpo'; expected one of reinforce"):
        build_objective("trpo")


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.5, 2.0, 1.2 * 2.0, 0.0),  # better already: clipped, no gradient
        (0.5, 2.0, 0.5 * 2.0, 0.5 * 2.0),  # worse: pulled back
        (1.5, -2.0, 1.5 * -2.0, 1.5 * -2.0),
        (0.5, -2.0, 0.8 * -2.0, 0.0),
        (1e30, 1.0, 1.2, 0.0),
        (1e30, -1.0, -math.exp(20), -math.exp(20)),  # ran away: held, and still pushed back
        (1e-30, 1.0, math.exp(-20), math.exp(-20)),
    ],
)
def test_clipped_surrogate(ratio: float, advantage: float, value: float, slope: float) -> None:
    log_prob = row(math.log(ratio)).requires_grad_()
    decisions = Decisions(log_prob, row(0.0), row(advantage))
    surrogate, figures = ClippedSurrogate(0.2)(decisions)
    assert surrogate.item() == pytest.approx(value, rel=1e-5)
    (gradient,) = torch.autograd.grad(surrogate.sum(), log_prob)
    assert gradient.item() == pytest.approx(slope, rel=1e-5)
    assert figures["clip_fraction"].tolist() == [float(abs(ratio - 1) > 0.2)]


def test_group_relative_advantages_are_standardised_within_a_state() -> None:
    rewards = row(1.0, 3.0, 5.0, 5.0)
    advantage = GroupRelative(2).advantage(rewards, torch.zeros(1, 4))
    torch.testing.assert_close(advantage, row(-1.0, 1.0, 0.0, 0.0), atol=2e-4, rtol=0)
    with pytest.raises(ValueError, match="groups of 3"):
        GroupRelative(3).advantage(rewards, torch.zeros(1, 4))


def test_counterfactual_advantage_is_paired_and_its_baseline_sees_the_difference() -> None:
    seen = []

    def baseline(signal: Tensor) -> Tensor:
        seen.append(signal)
        return row(0.5)

    log_prob = torch.zeros(1, 2, requires_grad=True)
    loss_fn = PolicyLoss(Counterfactual(), entropy_weight=0.0, weight=1.0)
    reference = Reference(row(1.0, 4.0))
    loss, _ = loss_fn(log_prob, torch.zeros(1, 2), row(2.0, 4.5), baseline, reference=reference)
    (gradient,) = torch.autograd.grad(-loss, log_prob)
    torch.testing.assert_close(seen[0], row(1.0, 0.5))
    torch.testing.assert_close(gradient, row(0.5, 0.0) / 2)
    with pytest.raises(ValueError, match="reference_rewards: the counterfactual"):
        loss_fn(log_prob, torch.zeros(1, 2), row(2.0, 4.5))


def test_preference_loss_sums_over_the_gates_of_an_episode() -> None:
    """Two gates, three pairs: the first draw wins, the second wins, and a tie."""
    log_prob = torch.randn(2, 6, requires_grad=True)
    reference = torch.randn(2, 6)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.5, 0.0, 1.0, 0.0, 1.0]])
    loss_fn = PolicyLoss(PreferencePairs(0.7), entropy_weight=0.0, weight=1.0)
    none = torch.zeros(2, 6)
    loss, figures = loss_fn(log_prob, none, rewards, reference=Reference(None, reference))
    gap = (log_prob - reference).sum(0)
    first = torch.nn.functional.logsigmoid(0.7 * (gap[0] - gap[1]))
    second = torch.nn.functional.logsigmoid(0.7 * (gap[3] - gap[2]))
    torch.testing.assert_close(loss, -(first + second) / 3)
    assert figures["preference_ties"].item() == pytest.approx(1 / 3)
    right = float(gap[0] > gap[1]) + float(gap[3] > gap[2])
    assert figures["preference_accuracy"].item() == right / 2
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert gradient[:, 4:].abs().max() == 0


def test_accuracy_of_preferences_among_ties_alone_is_unknown() -> None:
    log_prob = torch.randn(2, 4)
    decisions = Decisions(log_prob, log_prob, torch.ones(2, 4), torch.randn(2, 4))
    _, figures = PreferencePairs()(decisions)
    assert figures["preference_accuracy"].isnan()
    assert figures["preference_ties"].item() == 1


def test_a_policy_that_is_its_reference_prefers_nothing() -> None:
    log_prob = torch.randn(1, 4)
    decisions = Decisions(log_prob, log_prob, row(1.0, 0.0, 0.0, 1.0), log_prob)
    _, figures = PreferencePairs()(decisions)
    assert figures["preference_accuracy"].item() == 0


@pytest.mark.parametrize("kind", ["dpo", "counterfactual", "kl"])
def test_the_reference_is_a_constant(kind: str) -> None:
    """Where it hangs on what learns, as through a gate's state, no gradient flows through it."""
    objective = Reinforce() if kind == "kl" else build_objective(kind)
    loss_fn = PolicyLoss(objective, kl_weight=0.3 if kind == "kl" else 0.0)
    shared = torch.randn((), requires_grad=True)
    ours, theirs, rewards = torch.randn(3, 2, 4)
    carries = Reference(rewards * shared, theirs * shared)
    constant = Reference(*(x.detach() for x in carries))
    losses = [
        loss_fn(ours * shared, torch.zeros(2, 4), rewards.roll(1), reference=reference)[0]
        for reference in (carries, constant)
    ]
    got, want = (torch.autograd.grad(loss, shared)[0] for loss in losses)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_the_policy_that_drew_is_a_constant(kind: str) -> None:
    loss_fn = PolicyLoss(build_objective(kind, samples=2))
    shared = torch.randn((), requires_grad=True)
    ours, rewards = torch.randn(2, 2, 4)
    old = ours * shared
    losses = [
        loss_fn(ours * shared, torch.zeros(2, 4), rewards, old_log_prob=given)[0]
        for given in (old, old.detach())
    ]
    got, want = (torch.autograd.grad(loss, shared, retain_graph=True)[0] for loss in losses)
    torch.testing.assert_close(got, want)


def test_preferences_of_several_decisions_an_episode() -> None:
    log_prob, reference = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    decisions = Decisions(log_prob, log_prob, row(1.0, 0.0, 0.0, 1.0), reference)
    surrogate, _ = PreferencePairs(0.7)(decisions)
    gap = (log_prob - reference).sum((0, 2))
    want = torch.nn.functional.logsigmoid(0.7 * torch.stack((gap[0] - gap[1], gap[3] - gap[2])))
    torch.testing.assert_close(surrogate.flatten(1).mean(1).sum(), want.mean())
    expected = want.repeat_interleave(2).view(1, 4, 1).expand_as(log_prob)
    torch.testing.assert_close(surrogate, expected)


def test_pathwise_refuses_rewards_without_gradient() -> None:
    loss_fn = PolicyLoss(Pathwise())
    with pytest.raises(ValueError, match="rewards with a gradient"):
        loss_fn(torch.zeros(1, 2), torch.zeros(1, 2), row(1.0, 2.0))
    alpha = row(0.2, 0.4).requires_grad_()
    loss, _ = PolicyLoss(Pathwise(), 0.0, 1.0)(torch.zeros(1, 2), torch.zeros(1, 2), alpha**2)
    loss.backward()
    torch.testing.assert_close(alpha.grad, -alpha.detach())
    silent, _ = PolicyLoss(Pathwise(through_loss=True), 0.0)(
        torch.zeros(1, 2), torch.zeros(1, 2), row(1.0, 2.0)
    )
    assert silent.item() == 0


def test_later_updates_use_the_policy_that_drew() -> None:
    old, new, rewards = torch.randn(1, 4), torch.randn(1, 4, requires_grad=True), torch.randn(1, 4)
    loss_fn = PolicyLoss(ClippedSurrogate(0.9), entropy_weight=0.0, weight=1.0)
    loss, _ = loss_fn(new, torch.zeros(1, 4), rewards, old_log_prob=old)
    ratio = (new - old).exp()
    want = torch.minimum(ratio * rewards, ratio.clamp(0.1, 1.9) * rewards)
    torch.testing.assert_close(loss, -want.mean())


def test_kl_penalty_is_the_estimate_of_grpo() -> None:
    log_prob, theirs = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    loss_fn = PolicyLoss(Reinforce(), entropy_weight=0.0, weight=1.0, kl_weight=0.3)
    zero = torch.zeros(2, 3)
    loss, figures = loss_fn(log_prob, zero, zero, reference=Reference(None, theirs))
    change = theirs - log_prob
    want = (change.exp() - 1 - change).mean(1)
    torch.testing.assert_close(loss, 0.3 * want.sum())
    torch.testing.assert_close(figures["kl_reference"], want.detach())
    with pytest.raises(ValueError, match="kl_weight needs a reference policy"):
        loss_fn(log_prob, zero, zero)


def test_kl_penalty_is_finite_far_from_the_reference() -> None:
    """Where e^200 is too large for a float32 the estimate is held; the slope is not."""
    log_prob = row(-200.0, -200.0).requires_grad_()
    loss_fn = PolicyLoss(entropy_weight=0.0, weight=1.0, kl_weight=1.0)
    zero = torch.zeros(1, 2)
    loss, figures = loss_fn(log_prob, zero, zero, reference=Reference(None, zero))
    assert loss.isfinite()
    assert figures["kl_reference"].isfinite().all()
    (gradient,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(gradient, row(-200.0, -200.0) / 2)


@pytest.mark.parametrize(
    ("mean", "old_mean"),
    [(0.7, None), (0.9, None), (0.97, None), (0.99, None), (0.7, 0.6), (0.4, 0.6)],
)
def test_kl_penalty_has_the_gradient_of_the_divergence(mean: float, old_mean: float | None) -> None:
    """Near the reference and far from it; also at actions that an older policy drew."""
    count = 400_000
    logit = torch.tensor(mean).double().logit().requires_grad_()
    logits, flat = logit.expand(1, count), torch.zeros(1, count).double()
    drawn_from = logits.detach() if old_mean is None else flat + math.log(old_mean / (1 - old_mean))
    generator = torch.Generator().manual_seed(0)
    _, action = beta_sample(drawn_from, 10.0, generator=generator)
    log_prob = beta_log_prob(logits, 10.0, action)
    reference = Reference(None, beta_log_prob(flat, 10.0, action))
    loss_fn = PolicyLoss(entropy_weight=0.0, weight=1.0, kl_weight=1.0)
    loss, figures = loss_fn(
        log_prob, flat, flat, reference=reference,
        old_log_prob=beta_log_prob(drawn_from, 10.0, action),
    )  # fmt: skip
    (slope,) = torch.autograd.grad(loss, logit, retain_graph=True)
    distance = beta_kl(logit, 10.0, torch.zeros(()).double(), 10.0)
    (want,) = torch.autograd.grad(distance, logit)
    assert slope.item() == pytest.approx(want.item(), rel=0.02)
    assert figures["kl_reference"].item() == pytest.approx(distance.item(), rel=0.02)
    assert loss.item() == pytest.approx(distance.item(), rel=0.02)


def test_a_baseline_called_before_the_updates_takes_the_draws_in_once() -> None:
    baseline, loss_fn = EMABaseline(1), PolicyLoss(ClippedSurrogate())
    baseline(row(1.0, 1.0))
    old, rewards = torch.randn(1, 4), torch.randn(1, 4)
    level = baseline(loss_fn.signal(rewards))
    for _ in range(3):
        log_prob = (old + 0.1).requires_grad_()
        _, figures = loss_fn(log_prob, torch.zeros(1, 4), rewards, level, old_log_prob=old)
        assert figures["baseline"].tolist() == [1.0]
    assert baseline.steps.item() == 2


def test_baselines_of_a_wrong_shape() -> None:
    zero = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"baseline: shape \(3,\) does not broadcast"):
        PolicyLoss()(zero, zero, zero, torch.zeros(3))


def test_discounted_returns_credit_what_comes_after() -> None:
    rewards = torch.tensor([[1.0, 0.0], [2.0, 4.0], [3.0, 8.0]])
    assert discounted_returns(rewards, 0.0).tolist() == rewards.tolist()
    assert discounted_returns(rewards, 0.5).tolist() == [[2.75, 4.0], [3.5, 8.0], [3.0, 8.0]]
    log_prob = torch.zeros(3, 2, requires_grad=True)
    loss, _ = PolicyLoss(entropy_weight=0.0, weight=1.0, discount=0.5)(log_prob, rewards, rewards)
    (gradient,) = torch.autograd.grad(-loss, log_prob)
    torch.testing.assert_close(gradient, discounted_returns(rewards, 0.5) / 2)


def test_the_references_rewards_are_discounted_as_ours_are() -> None:
    rewards, theirs = torch.randn(2, 3, 4)

    def returns(x: Tensor) -> Tensor:
        return torch.stack((x[0] + 0.5 * x[1] + 0.25 * x[2], x[1] + 0.5 * x[2], x[2]))

    signal = PolicyLoss(Counterfactual(), discount=0.5).signal(rewards, Reference(theirs))
    torch.testing.assert_close(signal, returns(rewards) - returns(theirs))


def test_normalised_advantages() -> None:
    rewards = torch.randn(2, 50) * 7 + 3
    normal = normalise_advantage(rewards)
    torch.testing.assert_close(normal.mean(1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(normal.std(1, unbiased=False), torch.ones(2), atol=1e-3, rtol=0)
    assert normalise_advantage(torch.ones(1, 4)).abs().max() == 0
    _, figures = PolicyLoss(normalise=True)(rewards, rewards, rewards)
    torch.testing.assert_close(figures["advantage_std"], torch.ones(2), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="1 episode cannot be normalised"):
        normalise_advantage(torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"advantage: shape \(4,\), expected \(layers, episodes\)"):
        normalise_advantage(torch.ones(4))
    for function in (normalise_advantage, advantage_figures):
        with pytest.raises(ValueError, match=r"advantage: shape \(2, 0\), expected at least one"):
            function(torch.ones(2, 0))
        with pytest.raises(TypeError, match="advantage: expected a tensor, got list"):
            function([[1.0, 2.0]])  # type: ignore[arg-type]


def test_value_network_learns_the_rewards_of_states() -> None:
    baseline, loss_fn = ValueBaseline([2, 3], hidden_dim=16), PolicyLoss()
    states = [torch.randn(8, 5), torch.randn(8, 4, 7)]
    rewards = torch.stack((states[0][:, 0], states[1].mean(1)[:, 0]))
    zero = torch.zeros(2, 8)
    optimizer = torch.optim.Adam(baseline.parameters(), lr=0.02)
    errors = []
    for _ in range(150):
        loss, figures = loss_fn(zero, zero, rewards, baseline, states=states)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(figures["value_error"])
    torch.testing.assert_close(errors[0], rewards.square().mean(1))  # starts at 0
    assert (errors[-1] < 0.05 * errors[0]).all()
    with pytest.raises(ValueError, match="states: the value network needs"):
        baseline(rewards)
    with pytest.raises(ValueError, match="states: 1 layers"):
        baseline(rewards, states[:1])
    with pytest.raises(ValueError, match="rewards of 1, expected 2"):
        baseline(rewards[:1], states)
    with pytest.raises(ValueError, match="rewards have 8"):
        baseline(rewards, [state[:4] for state in states])


@pytest.mark.parametrize("given", [{}, {"value_weight": 2.0}])
def test_value_error_is_added_once_and_stops_at_the_states(given: dict[str, float]) -> None:
    """Where no action was likely or unlikely, the squared error alone is left of the loss."""
    baseline, zero = ValueBaseline([2, 3], hidden_dim=4), torch.zeros(2, 6)
    for parameter in baseline.parameters():
        torch.nn.init.normal_(parameter)
    states = [torch.randn(6, 5, requires_grad=True), torch.randn(6, 4, 7, requires_grad=True)]
    rewards = torch.randn(2, 6)
    loss, figures = PolicyLoss(**given)(zero, zero, rewards, baseline, states=states)
    error = (baseline(rewards, states) - rewards).square().mean(1)
    torch.testing.assert_close(loss, given.get("value_weight", 0.5) * error.sum())
    torch.testing.assert_close(figures["value_error"], error.detach())
    loss.backward()
    assert all(parameter.grad is not None for parameter in baseline.parameters())
    assert all(state.grad is None for state in states)


def test_policy_gradient_does_not_reach_the_value_network() -> None:
    baseline = ValueBaseline([2], hidden_dim=4)
    log_prob = torch.zeros(1, 3, requires_grad=True)
    values = baseline(torch.zeros(1, 3), [torch.randn(3, 5)])
    loss, _ = PolicyLoss(weight=1.0)(log_prob, log_prob.detach(), torch.randn(1, 3), values)
    loss.backward()
    assert all(parameter.grad is None for parameter in baseline.parameters())


@pytest.mark.parametrize(
    ("match", "make"),
    [
        ("clip", lambda: ClippedSurrogate(1.0)),
        ("samples", lambda: GroupRelative(1)),
        ("beta", lambda: PreferencePairs(0.0)),
        ("beta", lambda: PreferencePairs(math.inf)),
        ("discount", lambda: PolicyLoss(discount=1.5)),
        ("kl_weight", lambda: PolicyLoss(kl_weight=-1.0)),
        ("value_weight", lambda: PolicyLoss(value_weight=math.nan)),
        ("^weight: expected a finite", lambda: PolicyLoss(weight=math.nan)),
        ("^weight", lambda: PolicyLoss(weight=-0.1)),
        ("entropy_weight", lambda: PolicyLoss(entropy_weight=math.inf)),
        ("entropy_weight", lambda: ReinforceLoss(-1.0)),
        ("discount: PreferencePairs", lambda: PolicyLoss(PreferencePairs(), discount=0.5)),
        ("normalise: GroupRelative", lambda: PolicyLoss(GroupRelative(), normalise=True)),
        ("dims", lambda: ValueBaseline([])),
    ],
)
def test_wrong_parameters(match: str, make: object) -> None:
    with pytest.raises(ValueError, match=match):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("match", "make"),
    [
        (
            r"objective: expected an Objective, got str; build_objective\('ppo'\) makes one",
            lambda: PolicyLoss("ppo"),
        ),
        ("objective: expected an Objective, got str", lambda: PolicyLoss("trpo")),
        ("objective: expected an Objective, got Linear", lambda: PolicyLoss(torch.nn.Linear(1, 1))),
        ("weight: expected a number, got None", lambda: PolicyLoss(weight=None)),
        ("entropy_weight: expected a number, got '1'", lambda: ReinforceLoss("1")),
        ("kl_weight: expected a number, got None", lambda: PolicyLoss(kl_weight=None)),
        ("value_weight: expected a number, got True", lambda: PolicyLoss(value_weight=True)),
        ("discount: expected a number, got None", lambda: PolicyLoss(discount=None)),
        ("clip: expected a number, got None", lambda: ClippedSurrogate(None)),
        ("samples: expected a whole number, got 2.5", lambda: GroupRelative(2.5)),
        ("beta: expected a number, got '1'", lambda: PreferencePairs("1")),
        ("dims: expected a whole number, got 2.5", lambda: ValueBaseline([2.5])),
        ("hidden_dim: expected a whole number, got 8.0", lambda: ValueBaseline([2], 8.0)),
    ],
)
def test_parameters_of_a_wrong_kind(match: str, make: object) -> None:
    with pytest.raises(TypeError, match=f"^{match}$"):
        make()  # type: ignore[operator]


def test_a_baseline_where_none_belongs_is_refused() -> None:
    zero = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="baseline: GroupRelative takes none"):
        PolicyLoss(GroupRelative(2))(zero, zero, zero, EMABaseline(1))
    with pytest.raises(ValueError, match=r"old_log_prob: shape \(1, 3\)"):
        PolicyLoss()(zero, zero, zero, old_log_prob=zero[:, :3])
    with pytest.raises(ValueError, match="need a reference policy"):
        PolicyLoss(PreferencePairs())(zero, zero, zero)
