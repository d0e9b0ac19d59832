"""Baselines against their recurrences written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dvla_fast.rl import (
    EMABaseline,
    LeaveOneOutBaseline,
    ValueBaseline,
    build_baseline,
    normalise_advantage,
)


def test_baselines_by_name() -> None:
    """With the parameters that each has of its own."""
    average = build_baseline("ema", [3, 4], momentum=0.5)
    assert isinstance(average, EMABaseline)
    assert (average.value.shape, average.momentum) == ((2,), 0.5)
    others = build_baseline("leave-one-out", [3, 4], samples=2)
    assert isinstance(others, LeaveOneOutBaseline)
    assert others(torch.tensor([[1.0, 2.0, 5.0, 7.0]])).tolist() == [[2.0, 1.0, 7.0, 5.0]]
    values = build_baseline("value", [3, 4], hidden_dim=5)
    assert isinstance(values, ValueBaseline)
    assert [network.hidden.weight.shape for network in values.networks] == [(5, 7), (5, 9)]
    assert build_baseline("none", [3, 4]) is None
    with pytest.raises(ValueError, match="baseline: unknown 'median'; expected one of ema"):
        build_baseline("median", [3, 4])


def test_ema_follows_its_recurrence() -> None:
    baseline = EMABaseline(2, momentum=0.8)
    torch.manual_seed(0)
    steps = torch.randn(6, 2, 4)
    expected = torch.zeros(2)
    for number, rewards in enumerate(steps):
        torch.testing.assert_close(baseline(rewards), expected.unsqueeze(1))
        mean = rewards.mean(1)
        expected = mean if number == 0 else 0.8 * expected + 0.2 * mean


def test_ema_rests_in_evaluation() -> None:
    baseline = EMABaseline(1)
    baseline(torch.ones(1, 3))
    baseline.eval()
    baseline(torch.full((1, 3), 9.0))
    assert baseline(torch.ones(1, 3)).tolist() == [[1.0]]


def test_ema_does_not_rewrite_what_it_returned() -> None:
    baseline = EMABaseline(1)
    baseline(torch.ones(1, 3))
    before = baseline(torch.zeros(1, 3))
    baseline(torch.zeros(1, 3))
    assert before.tolist() == [[1.0]]


def test_ema_resumes_from_its_state_dict() -> None:
    baseline, other = EMABaseline(2), EMABaseline(2)
    for _ in range(3):
        baseline(torch.rand(2, 4))
    assert set(baseline.state_dict()) == {"value", "steps"}
    other.load_state_dict(baseline.state_dict())
    rewards = torch.rand(2, 4)
    for _ in range(2):
        assert torch.equal(other(rewards), baseline(rewards))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ema_refuses_rewards_that_are_no_numbers(value: float) -> None:
    with pytest.raises(ValueError, match="rewards: NaN or infinity found"):
        EMABaseline(2)(torch.tensor([[1.0, 1.0], [1.0, value]]))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ema_does_not_take_in_what_is_no_number(value: float) -> None:
    baseline, bad = EMABaseline(2), torch.tensor([[1.0, 1.0], [1.0, value]])
    for rewards in (bad, torch.ones(2, 2), bad):
        baseline(rewards)
    assert baseline.value.tolist() == [1.0, 1.0]
    assert baseline.steps.item() == 1


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0, 0.0, 0.0, 3.0]])
    got = LeaveOneOutBaseline(3)(rewards)
    assert got.tolist() == [[4.0, 3.5, 1.5, 1.5, 1.5, 0.0]]
    whole = LeaveOneOutBaseline()(rewards)
    torch.testing.assert_close(whole, (12.0 - rewards) / 5)


def test_values_learn_and_leave_the_states_alone() -> None:
    baseline = ValueBaseline([3, 4], hidden_dim=5)
    for parameter in baseline.parameters():
        torch.nn.init.normal_(parameter)
    states = [torch.randn(6, 7, requires_grad=True), torch.randn(6, 2, 9, requires_grad=True)]
    values = baseline(torch.zeros(2, 6), states)
    pooled = (states[0], states[1].mean(1))  # one value for all decisions of an episode
    expected = [network(state)[:, 0] for network, state in zip(baseline.networks, pooled)]
    torch.testing.assert_close(values, torch.stack(expected))
    values.sum().backward()
    assert all(state.grad is None for state in states)
    assert all(parameter.grad.any() for parameter in baseline.parameters())


def test_advantages_have_deviation_one() -> None:
    advantage = normalise_advantage(torch.tensor([[0.0, 2.0, 4.0], [5.0, 5.0, 5.0]]))
    unit = 1.5**0.5  # of the population, not of a sample
    torch.testing.assert_close(advantage[0], torch.tensor([-unit, 0.0, unit]), rtol=1e-3, atol=0)
    assert not advantage[1].any()


@pytest.mark.parametrize("make", [lambda: EMABaseline(2), LeaveOneOutBaseline])
def test_rewards_of_a_wrong_form(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"^rewards: shape \(\), expected \(layers, episodes\)"):
        make()(torch.tensor(1.0))
    # A baseline of whole numbers would be cut to one.
    with pytest.raises(TypeError, match=r"^rewards: expected a floating tensor, got torch\.int64"):
        make()(torch.ones(2, 4, dtype=torch.int64))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="momentum"):
        EMABaseline(2, momentum=1.0)
    with pytest.raises(ValueError, match="num_layers"):
        EMABaseline(0)
    with pytest.raises(ValueError, match=r"rewards: shape \(3, 4\)"):
        EMABaseline(2)(torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"^num_layers: expected a whole number, got 2\.5$"):
        EMABaseline(2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^momentum: expected a number, got 'a'$"):
        EMABaseline(2, "a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^rewards: expected a tensor, got list$"):
        EMABaseline(2)([1.0, 2.0])
    with pytest.raises(TypeError, match=r"^samples: expected a whole number, got 2\.5$"):
        LeaveOneOutBaseline(2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples"):
        LeaveOneOutBaseline(1)
    with pytest.raises(ValueError, match="groups of 4"):
        LeaveOneOutBaseline(4)(torch.zeros(2, 6))
    with pytest.raises(TypeError, match=r"^rewards: expected a tensor, got list$"):
        LeaveOneOutBaseline(2)([1.0, 2.0])
    values = ValueBaseline([3, 4])
    with pytest.raises(TypeError, match=r"^rewards: expected a tensor, got list$"):
        values([1.0, 2.0], [torch.zeros(1, 7), torch.zeros(1, 9)])
    with pytest.raises(ValueError, match=r"^rewards: shape \(2,\), expected \(layers, episodes\)"):
        values(torch.zeros(2), [torch.zeros(1, 7), torch.zeros(1, 9)])
