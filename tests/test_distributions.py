"""MeanConcentrationBeta against torch.distributions.Beta where that one is exact enough."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Beta, kl_divergence

from dvla_fast.distributions import MeanConcentrationBeta


@pytest.fixture
def pair() -> tuple[MeanConcentrationBeta, Beta]:
    mean = torch.rand(3, 2, dtype=torch.float64) * 0.8 + 0.1
    kappa = torch.tensor([2.5, 30.0], dtype=torch.float64)
    return (
        MeanConcentrationBeta(mean=mean, concentration=kappa),
        Beta(kappa * mean, kappa * (1 - mean)),
    )


def test_moments_density_and_entropy_equal_torch(pair: tuple[MeanConcentrationBeta, Beta]) -> None:
    ours, theirs = pair
    value = theirs.sample()
    assert ours.batch_shape == theirs.batch_shape == (3, 2)
    for name in ("mean", "variance", "stddev"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.mode[:, 1], theirs.mode[:, 1])
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())


def test_kl_equals_torch_and_vanishes_at_itself(pair: tuple[MeanConcentrationBeta, Beta]) -> None:
    ours, theirs = pair
    other = MeanConcentrationBeta(logits=torch.zeros(3, 2).double(), concentration=4.0)
    want = kl_divergence(theirs, Beta(torch.full((3, 2), 2.0).double(), 2.0))
    torch.testing.assert_close(kl_divergence(ours, other), want)
    torch.testing.assert_close(kl_divergence(ours, ours), torch.zeros(3, 2).double())


def test_samples_expand_and_carry_their_logit(pair: tuple[MeanConcentrationBeta, Beta]) -> None:
    ours, _ = pair
    wide = ours.expand(torch.Size((5, 3, 2)))
    assert wide.batch_shape == (5, 3, 2)
    assert wide.sample((4,)).shape == (4, 5, 3, 2)
    logit = ours.sample_logit((1000,))
    rounded = ours.log_prob(torch.sigmoid(logit))  # 1 - alpha has lost digits on the way
    torch.testing.assert_close(rounded, ours.log_prob_logit(logit), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(torch.sigmoid(logit).mean(0), ours.mean, atol=0.05, rtol=0)


def test_gradients_flow_to_mean_and_concentration() -> None:
    logits = torch.randn(4, requires_grad=True)
    kappa = torch.full((4,), 3.0, requires_grad=True)
    MeanConcentrationBeta(logits=logits, concentration=kappa).entropy().sum().backward()
    assert logits.grad is not None
    assert kappa.grad is not None


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        MeanConcentrationBeta(concentration=1.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        MeanConcentrationBeta(mean=1.5)
    with pytest.raises(ValueError, match="concentration"):
        MeanConcentrationBeta(logits=torch.zeros(1), concentration=-1.0, validate_args=True)
    policy = MeanConcentrationBeta(logits=torch.zeros(1), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        policy.log_prob(torch.tensor([2.0]))
    with pytest.raises(NotImplementedError, match="scipy"):
        policy.cdf(torch.tensor([0.5]))


def test_rounded_samples_keep_a_finite_density() -> None:
    """A quarter of Beta(9.9, 0.1) rounds to 1 in float32; it is moved inside, as torch does."""
    policy = MeanConcentrationBeta(mean=torch.tensor(0.99), concentration=10.0)
    samples = policy.sample((5000,))
    assert bool(((samples > 0) & (samples < 1)).all())
    assert float(policy.log_prob(samples).max()) < 14
    uniform = MeanConcentrationBeta(logits=torch.zeros(2), concentration=2.0)
    ends = uniform.log_prob(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.zeros(2), atol=1e-5, rtol=0)
