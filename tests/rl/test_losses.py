"""REINFORCE against the analytic gradient of a bandit, and the whole objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dvla_fast
from dvla_fast.functional import beta_policy
from dvla_fast.nn import DVLA, SmallConvAttention, TextTokens
from dvla_fast.rl import (
    EMABaseline,
    LeaveOneOutBaseline,
    PolicyLoss,
    Reference,
    ReinforceLoss,
    ValueBaseline,
    check_reward_weights,
    gate_states,
    total_loss,
)


def expected_reward(logit: torch.Tensor, target: float, kappa: float = 10.0) -> torch.Tensor:
    """E[−(α − target)²] under Beta(κp, κ(1 − p)): −(variance + bias²), in closed form."""
    p = torch.sigmoid(logit)
    return -(p * (1 - p) / (kappa + 1) + (p - target) ** 2)


@pytest.mark.parametrize("target", [0.8, 0.1])
@pytest.mark.parametrize("kind", ["none", "constant", "leave-one-out"])
def test_gradient_is_that_of_the_expected_reward(target: float, kind: str) -> None:
    draws = 200_000
    logit = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    step = beta_policy(logit.expand(1, draws), 10.0, generator=torch.Generator().manual_seed(7))
    rewards = -((step.alpha - target) ** 2)
    baseline = {
        "none": None,
        "constant": torch.tensor(-0.2, dtype=torch.float64),
        "leave-one-out": LeaveOneOutBaseline(),
    }[kind]
    loss, _ = ReinforceLoss(entropy_weight=0.0, weight=1.0)(
        step.log_prob, step.entropy, rewards, baseline
    )
    (estimate,) = torch.autograd.grad(-loss, logit)
    exact_logit = logit.detach().requires_grad_()
    (exact,) = torch.autograd.grad(expected_reward(exact_logit, target), exact_logit)
    # Five standard errors of the score-function estimator.
    per_draw = logit.detach().expand(draws).clone().requires_grad_()
    scored = beta_policy(per_draw, 10.0, action_logit=step.action_logit[0])
    (score,) = torch.autograd.grad(scored.log_prob.sum(), per_draw)
    level = -0.2 if kind == "constant" else rewards.mean() if kind == "leave-one-out" else 0.0
    error = ((rewards[0] - level) * score).std() / draws**0.5
    assert abs(estimate - exact) < 5 * error
    assert abs(exact) > 20 * error  # the comparison can tell


def test_entropy_bonus_has_the_entropys_gradient() -> None:
    logit = torch.tensor([[1.5]], dtype=torch.float64, requires_grad=True)
    step = beta_policy(logit, 10.0)
    loss, _ = ReinforceLoss(entropy_weight=0.2, weight=0.1)(
        step.log_prob, step.entropy, torch.zeros(1, 1)
    )
    (got,) = torch.autograd.grad(loss, logit, retain_graph=True)
    (wanted,) = torch.autograd.grad(step.entropy.sum(), logit)
    torch.testing.assert_close(got, -0.1 * 0.2 * wanted)


@pytest.mark.parametrize("target", [0.85, 0.15])
def test_the_gates_policy_moves_to_the_rewarded_alpha(target: float) -> None:
    torch.manual_seed(0)
    gate = dvla_fast.RLAGate(8, 6, 2, hidden_dim=16)
    images, text = torch.randn(32, 3, 8), torch.randn(32, 2, 6)
    loss_fn, baseline = ReinforceLoss(entropy_weight=0.0, weight=1.0), EMABaseline(1)
    optimizer = torch.optim.Adam(gate.policy.parameters(), lr=0.02)
    for _ in range(80):
        out = gate(images, text)
        rewards = -((out.alpha - target) ** 2).unsqueeze(0)
        loss, _ = loss_fn(out.log_prob[None], out.entropy[None], rewards, baseline)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    settled = gate.eval()(images, text).alpha
    assert abs(settled.mean().item() - target) < 0.1


def test_the_policy_learns_to_read_its_state() -> None:
    torch.manual_seed(0)
    gate = dvla_fast.RLAGate(8, 6, 2, hidden_dim=16)
    text = torch.randn(1, 2, 6).expand(64, 2, 6)
    kind = torch.arange(64) % 2  # two kinds of images want opposite gates
    images = torch.randn(64, 3, 8) * 0.3 + torch.where(kind == 0, 1.0, -1.0)[
        :, None, None
    ] * torch.linspace(-1, 1, 8)
    target = torch.where(kind == 0, 0.9, 0.1)
    loss_fn, baseline = ReinforceLoss(entropy_weight=0.0, weight=1.0), EMABaseline(1)
    optimizer = torch.optim.Adam(gate.policy.parameters(), lr=0.02)
    for _ in range(100):
        out = gate(images, text)
        rewards = -((out.alpha - target) ** 2).unsqueeze(0)
        loss, _ = loss_fn(out.log_prob[None], out.entropy[None], rewards, baseline)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    alpha = gate.eval()(images, text).alpha
    assert alpha[kind == 0].mean() > 0.7
    assert alpha[kind == 1].mean() < 0.3


def test_loss_is_the_formula_summed_over_layers() -> None:
    torch.manual_seed(0)
    log_prob, entropy, rewards = torch.randn(3, 2, 5).unbind(0)
    level = torch.randn(2, 1)
    loss, figures = ReinforceLoss(0.2, 0.1)(log_prob, entropy, rewards, level)
    by_hand = -0.1 * ((rewards - level) * log_prob + 0.2 * entropy).mean(1).sum()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(figures["reward"], rewards.mean(1))
    torch.testing.assert_close(figures["baseline"], level.squeeze(1))
    torch.testing.assert_close(figures["entropy"], entropy.mean(1))
    torch.testing.assert_close(figures["advantage_std"], (rewards - level).std(1, unbiased=False))


def test_decisions_of_an_episode_share_its_reward() -> None:
    torch.manual_seed(0)
    log_prob, entropy, rewards = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(2, 5)
    loss, _ = ReinforceLoss(0.2, 0.1)(log_prob, entropy, rewards)
    by_hand = -0.1 * (rewards.unsqueeze(-1) * log_prob + 0.2 * entropy).mean((1, 2)).sum()
    torch.testing.assert_close(loss, by_hand)


def test_no_gradient_flows_into_rewards_or_baseline() -> None:
    log_prob = torch.randn(1, 4, requires_grad=True)
    rewards = torch.randn(1, 4, requires_grad=True)
    level = torch.zeros(1, 1, requires_grad=True)
    loss, figures = ReinforceLoss()(log_prob, torch.zeros(1, 4), rewards, level)
    loss.backward()
    assert rewards.grad is None
    assert level.grad is None
    assert not any(value.requires_grad for value in figures.values())


@pytest.mark.parametrize(
    ("match", "shapes"),
    [
        ("rewards: shape", ((2, 4), (2, 4), (2, 3))),
        ("rewards: shape", ((4,), (4,), (4,))),
        ("entropy: shape", ((2, 4), (2, 3), (2, 4))),
        (r"rewards: shape \(4,\), expected \(layers, episodes\); .* x\[None\]", ((4,),) * 3),
        (r"log_prob: shape \(4,\), .* x\[None\]$", ((4,), (4,), (1, 4))),
        (r"log_prob: shape .* expected \(layers, episodes\)$", ((1, 4, 2, 2),) * 2 + ((1, 4),)),
        (r"rewards: shape \(2, 0\), expected at least one layer and one ep", ((2, 0),) * 3),
        (r"log_prob: shape \(1, 4, 0\), expected at least one", ((1, 4, 0),) * 2 + ((1, 4),)),
    ],
)
def test_wrong_shapes(match: str, shapes: tuple) -> None:
    with pytest.raises(ValueError, match=match):
        ReinforceLoss()(*(torch.zeros(shape) for shape in shapes))


def episode_batch() -> tuple[DVLA, tuple, torch.Tensor, TextTokens]:
    torch.manual_seed(0)
    backbone = SmallConvAttention(image_size=8, width=8, depths=(1, 1, 1), num_heads=2)
    model = DVLA(backbone, text_dim=6, num_heads=2, hidden_dim=8)
    text = TextTokens(torch.randn(2, 6, 6), torch.tensor([0, 1] * 3), torch.randn(2, 3, 6))
    labels = torch.arange(3).expand(2, 3)
    episodes = (torch.randn(2, 3, 1, 8, 8), labels, torch.randn(2, 6, 1, 8, 8))
    return model, episodes, torch.arange(3).repeat(2).expand(2, 6), text


def test_total_loss_adds_up_and_reaches_every_parameter() -> None:
    model, episodes, labels, text = episode_batch()
    output = model(*episodes, text, way=3)
    reinforce = ReinforceLoss()
    loss, figures = total_loss(output, labels, text, reinforce, EMABaseline(2))
    parts = figures["supervised"] + figures["reinforce"] + figures["alignment"]
    torch.testing.assert_close(loss, parts)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not any(value.requires_grad for value in figures.values())
    for name in ("alpha", "reward", "reward_similarity", "reward_improvement", "entropy"):
        assert figures[name].shape == (2,)
    torch.testing.assert_close(
        figures["reward"], 0.5 * figures["reward_similarity"] + figures["reward_improvement"]
    )


def test_policy_learns_from_reinforce_alone() -> None:
    model, episodes, labels, text = episode_batch()
    output = model(*episodes, text, way=3)
    loss, _ = total_loss(output, labels, text, ReinforceLoss(weight=0.0), EMABaseline(2))
    loss.backward()
    assert not any(p.grad.any() for gate in model.gates for p in gate.policy.parameters())


def test_total_loss_without_text_is_cross_entropy() -> None:
    model, episodes, labels, _ = episode_batch()
    output = model(*episodes, way=3)
    loss, figures = total_loss(output, labels, None, ReinforceLoss(), None)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    assert set(figures) == {"supervised", "accuracy"}


def test_states_are_those_of_every_gate_or_none() -> None:
    model, episodes, _, text = episode_batch()
    output = model(*episodes, text, way=3)
    states = gate_states(output)
    assert states is not None
    for state, trace in zip(states, output.layers, strict=True):
        assert torch.equal(state, trace.state)
        assert not state.requires_grad
    first, second = output.layers
    assert gate_states(output._replace(layers=(first, second._replace(state=None)))) is None
    assert gate_states(output._replace(layers=())) is None


def test_total_loss_names_wrong_labels() -> None:
    model, episodes, labels, text = episode_batch()
    output = model(*episodes, text, way=3)
    with pytest.raises(ValueError, match=r"query_labels: shape \(2, 5\)"):
        total_loss(output, labels[:, :5], text, ReinforceLoss())
    with pytest.raises(TypeError, match="int64"):
        total_loss(output, labels.float(), text, ReinforceLoss())
    with pytest.raises(ValueError, match=r"query_labels: expected values in \[0, 3\)"):
        total_loss(output, labels + 1, text, ReinforceLoss())


def test_wrong_kinds_are_named() -> None:
    zero = torch.zeros(2, 4)
    with pytest.raises(TypeError, match=r"rewards: expected a floating tensor, got torch\.int64"):
        PolicyLoss()(zero, zero, zero.long())
    with pytest.raises(TypeError, match="baseline: expected a module, a tensor or None, got float"):
        PolicyLoss()(zero, zero, zero, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scores: shape \(2, 4\), expected \(2, 4, 'outputs'\)"):
        PolicyLoss()(zero, zero, zero, scores=zero)
    with pytest.raises(TypeError, match="number as weight of 'accuracy', got '1'"):
        check_reward_weights({"accuracy": "1"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"^dims: expected a width for each gated layer, got 3"):
        ValueBaseline(3)  # type: ignore[arg-type]
    states = [torch.zeros(4, 7), torch.zeros(4, 9)]
    with pytest.raises(ValueError, match="states: 9 wide, expected 7"):
        ValueBaseline([3, 3])(zero, states)


@pytest.mark.parametrize(
    ("name", "wrong", "kind"),
    [
        ("log_prob", None, "a tensor, got NoneType"),
        ("entropy", None, "a tensor, got NoneType"),
        ("rewards", [1.0], "a tensor, got list"),
        ("old_log_prob", 0.3, "a tensor, got float"),
        ("scores", [1.0], "a tensor, got list"),
        ("reference", torch.zeros(2, 4), "a Reference, got Tensor"),
        ("reference.log_prob", Reference(None, 0.3), "a tensor, got float"),  # type: ignore
        ("reference.rewards", Reference([1.0]), "a tensor, got list"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_tensor_is_named(name: str, wrong: Any, kind: str) -> None:
    zero = torch.zeros(2, 4)
    arguments: dict[str, Any] = {"log_prob": zero, "entropy": zero, "rewards": zero}
    with pytest.raises(TypeError, match=f"^{name}: expected {kind}$"):
        PolicyLoss()(**{**arguments, name.split(".")[0]: wrong})


def test_total_loss_wants_weights_by_name() -> None:
    model, episodes, labels, text = episode_batch()
    output = model(*episodes, text, way=3)
    message = r"rewards: expected a mapping from names to weights, such as .*, got list"
    with pytest.raises(TypeError, match=message):
        total_loss(output, labels, text, ReinforceLoss(), rewards=["accuracy"])  # type: ignore
    with pytest.raises(TypeError, match=message):
        check_reward_weights(["accuracy"])  # type: ignore[arg-type]
