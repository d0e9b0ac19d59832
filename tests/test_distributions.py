"""MeanConcentrationBeta against torch.distributions.Beta where that one is exact enough."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Beta, Distribution, Independent, kl_divergence

import dvla_fast
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
    ends = MeanConcentrationBeta(mean=torch.tensor([0.05, 0.2, 0.95]))
    edge = Beta(ends.concentration1, ends.concentration0)
    torch.testing.assert_close(ends.mode, edge.mode)
    assert MeanConcentrationBeta(mean=torch.tensor(0.5), concentration=1.0).mode.isnan()
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())


def test_kl_equals_torch_and_vanishes_at_itself(pair: tuple[MeanConcentrationBeta, Beta]) -> None:
    ours, theirs = pair
    other = MeanConcentrationBeta(logits=torch.zeros(3, 2).double(), concentration=4.0)
    want = kl_divergence(theirs, Beta(torch.full((3, 2), 2.0).double(), 2.0))
    torch.testing.assert_close(kl_divergence(ours, other), want)
    torch.testing.assert_close(kl_divergence(theirs, other), want)
    torch.testing.assert_close(
        kl_divergence(other, theirs), kl_divergence(Beta(2.0, torch.tensor(2.0).double()), theirs)
    )
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


def test_the_global_setting_decides_what_is_validated() -> None:
    Distribution.set_default_validate_args(False)
    try:
        assert MeanConcentrationBeta(mean=0.0).logits == -torch.inf
        with pytest.raises(ValueError, match="between 0 and 1"):
            MeanConcentrationBeta(mean=0.0, validate_args=True)
    finally:
        Distribution.set_default_validate_args(__debug__)


@pytest.mark.parametrize("parameter", ["logits", "mean"])
@pytest.mark.parametrize("kappa", [torch.float64, torch.float32, torch.int64, torch.float16, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_everything_has_the_wider_dtype(
    parameter: str, dtype: torch.dtype, kappa: torch.dtype | None
) -> None:
    number = 10.0 if kappa is None else torch.full((3,), 10, dtype=kappa)
    given = {parameter: torch.full((3,), 0.25, dtype=dtype)}
    policy = MeanConcentrationBeta(**given, concentration=number)
    wide = torch.float64 if torch.float64 in (dtype, kappa) else torch.float32
    value = policy.sample()
    for x in (
        value, policy.rsample(), policy.mean, policy.variance, policy.mode, policy.entropy(),
        policy.concentration0, policy.log_prob(value), policy.cdf(value),
        kl_divergence(policy, policy),
    ):  # fmt: skip
        assert x.dtype == wide


def test_whole_numbers_are_parameters_and_values() -> None:
    whole = MeanConcentrationBeta(logits=torch.tensor([0, 1, -1]), concentration=torch.tensor(10))
    real = MeanConcentrationBeta(logits=torch.tensor([0.0, 1.0, -1.0]), concentration=10.0)
    assert whole.sample().dtype == torch.float32
    alone = torch.tensor(10.0, dtype=torch.float64)  # of no dimension: it widens no other tensor
    for logits, kappa, wide in (
        (torch.zeros(3), alone, torch.float32),
        (0.0, alone, torch.float64),
        (np.float32(0.3), np.float64(10.0), torch.float32),
    ):
        given = MeanConcentrationBeta(logits=logits, concentration=kappa)
        assert given.sample().dtype == wide
    torch.testing.assert_close(whole.entropy(), real.entropy())
    for value in (0, 1):
        for method in ("log_prob", "cdf"):
            got, want = (
                getattr(policy, method)(torch.tensor(x))
                for policy, x in ((whole, value), (real, float(value)))
            )
            torch.testing.assert_close(got, want)
    double = MeanConcentrationBeta(logits=torch.zeros(3).double())
    torch.testing.assert_close(
        double.log_prob(torch.tensor(1)), double.log_prob(torch.tensor(1.0).double())
    )


@pytest.mark.parametrize("name", ["logits", "mean", "concentration"])
def test_parameters_of_a_wrong_kind(name: str) -> None:
    for wrong, kind in (
        ("a", "a number or a tensor, got 'a'"),
        ([0.5], r"a number or a tensor, got"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected {kind}"):
            MeanConcentrationBeta(
                **{"logits": 0.0, name: wrong} if name != "mean" else {name: wrong}
            )
    with pytest.raises(
        TypeError, match=r"concentration: expected real values, got torch\.complex64"
    ):
        MeanConcentrationBeta(logits=0.0, concentration=torch.ones(2, dtype=torch.cfloat))
    policy = MeanConcentrationBeta(logits=0.0, validate_args=False)
    for call in (policy.log_prob, policy.cdf):
        with pytest.raises(TypeError, match=r"^value: expected real values, got torch\.complex64"):
            call(torch.full((2,), 0.5, dtype=torch.cfloat))


def test_wrong_arguments_raise() -> None:
    for given in ({}, {"logits": 0.0, "mean": 0.5}):
        with pytest.raises(ValueError, match="exactly one"):
            MeanConcentrationBeta(**given, concentration=1.0)
    for mean in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            MeanConcentrationBeta(mean=mean)
    with pytest.raises(ValueError, match="concentration"):
        MeanConcentrationBeta(logits=torch.zeros(1), concentration=-1.0, validate_args=True)
    policy = MeanConcentrationBeta(logits=torch.zeros(1), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        policy.log_prob(torch.tensor([2.0]))
    with pytest.raises(ValueError, match="support"):
        policy.cdf(torch.tensor([-1.0]))
    with pytest.raises(NotImplementedError, match="scipy"):
        policy.icdf(torch.tensor([0.5]))
    with pytest.raises(NotImplementedError):
        policy.enumerate_support()


def test_rounded_samples_keep_a_finite_density() -> None:
    """A quarter of Beta(9.9, 0.1) rounds to 1 in float32; it is moved inside, as torch does."""
    policy = MeanConcentrationBeta(mean=torch.tensor(0.99), concentration=10.0)
    samples = policy.sample((5000,))
    assert bool(((samples > 0) & (samples < 1)).all())
    assert float(policy.log_prob(samples).max()) < 14
    uniform = MeanConcentrationBeta(logits=torch.zeros(2), concentration=2.0)
    ends = uniform.log_prob(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.zeros(2), atol=1e-5, rtol=0)


def test_cdf_equals_scipy(pair: tuple[MeanConcentrationBeta, Beta]) -> None:
    ours, theirs = pair
    value = theirs.sample((20,))
    want = stats.beta.cdf(value, theirs.concentration1, theirs.concentration0)
    torch.testing.assert_close(ours.cdf(value), torch.from_numpy(want), rtol=1e-10, atol=1e-12)
    assert ours.cdf(torch.tensor(0.0)).eq(0).all()
    assert ours.cdf(torch.tensor(1.0)).eq(1).all()


def test_parameters_under_the_names_of_torch(pair: tuple[MeanConcentrationBeta, Beta]) -> None:
    ours, theirs = pair
    torch.testing.assert_close(ours.concentration1, theirs.concentration1)
    torch.testing.assert_close(ours.concentration0, theirs.concentration0)
    assert ours.support == theirs.support
    assert ours.has_enumerate_support == theirs.has_enumerate_support
    assert "MeanConcentrationBeta" in repr(ours)


def test_independent_sums_the_last_dimension(pair: tuple[MeanConcentrationBeta, Beta]) -> None:
    ours, theirs = (Independent(x, 1) for x in pair)
    value = theirs.sample()
    assert ours.batch_shape == (3,)
    assert ours.event_shape == (2,)
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(kl_divergence(ours, ours), torch.zeros(3).double())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_the_same_distribution(
    pair: tuple[MeanConcentrationBeta, Beta], how: str
) -> None:
    ours, theirs = pair
    if how == "deepcopy":
        copied = copy.deepcopy(ours)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(ours))
    else:
        stream = io.BytesIO()
        torch.save(ours, stream)
        stream.seek(0)
        copied = torch.load(stream, weights_only=False)
    value = theirs.sample()
    torch.testing.assert_close(copied.log_prob(value), ours.log_prob(value))
    assert copied.batch_shape == ours.batch_shape


def test_expanding_keeps_validation_and_shares_memory() -> None:
    policy = MeanConcentrationBeta(logits=torch.zeros(2, 1), validate_args=True)
    wide = policy.expand((4, 2, 3))
    assert wide.logits.data_ptr() == policy.logits.data_ptr()
    assert wide.mode.shape == wide.stddev.shape == wide.entropy().shape == (4, 2, 3)
    with pytest.raises(ValueError, match="support"):
        wide.log_prob(torch.tensor(1.5))


def test_rsample_has_the_gradient_of_the_expectation() -> None:
    """E[α²] = p(1 − p)/(κ + 1) + p²: its gradients by rsample, within five standard errors."""
    torch.manual_seed(0)
    logits = torch.full((20_000,), 0.7, dtype=torch.float64, requires_grad=True)
    kappa = torch.full((20_000,), 3.0, dtype=torch.float64, requires_grad=True)
    sample = MeanConcentrationBeta(logits=logits, concentration=kappa).rsample()
    terms = torch.autograd.grad((sample**2).sum(), (logits, kappa))
    one, k = (x[:1].detach().requires_grad_() for x in (logits, kappa))
    p = torch.sigmoid(one)
    exact = torch.autograd.grad(p * (1 - p) / (k + 1) + p**2, (one, k))
    for got, want in zip(terms, exact):
        assert abs(got.mean() - want) < 5 * got.std() / 20_000**0.5
        assert abs(want) > 10 * got.std() / 20_000**0.5  # the comparison can tell


def test_log_prob_differentiates_with_respect_to_the_value() -> None:
    mean, kappa = torch.rand(5).double() * 0.6 + 0.2, torch.tensor(7.0).double()
    ours = MeanConcentrationBeta(mean=mean, concentration=kappa)
    theirs = Beta(kappa * mean, kappa * (1 - mean))
    value = torch.rand(5).double().requires_grad_()
    got, want = (torch.autograd.grad(d.log_prob(value).sum(), value)[0] for d in (ours, theirs))
    torch.testing.assert_close(got, want)


def _results(logits: Tensor, value: Tensor) -> dict[str, Tensor]:
    policy = MeanConcentrationBeta(logits=logits, concentration=5.0, validate_args=False)
    return {"log_prob": policy.log_prob(value), "rsample": policy.rsample()}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("name", "by"), [("log_prob", "logits"), ("log_prob", "value"), ("rsample", "logits")]
)
def test_second_derivatives_raise(name: str, by: str, backend: str | None) -> None:
    """They are silently wrong where a gradient in closed form is taken as constant."""
    leaves = {"logits": torch.randn(3), "value": torch.rand(3)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    dvla_fast.set_backend(backend)
    try:
        total = _results(**leaves)[name].sum()
        (gradient,) = torch.autograd.grad(total, leaves[by], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            gradient.square().sum().backward()
    finally:
        dvla_fast.set_backend(None)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (1, 1)])
def test_second_derivatives_raise_under_torch_func(first: int, second: int) -> None:
    def gradient(*leaves: Tensor) -> Tensor:
        once = torch.func.grad(lambda *x: _results(*x)["log_prob"].sum(), first)
        return once(*leaves).sum()

    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.func.grad(gradient, second)(torch.randn(3), torch.rand(3))


@pytest.mark.parametrize("name", ["log_prob", "rsample"])
def test_gradients_under_torch_compile(name: str) -> None:
    leaves = [torch.randn(3, requires_grad=True), torch.rand(3, requires_grad=True)]
    asked = leaves if name == "log_prob" else leaves[:1]
    compiled = torch.compile(_results, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (_results, compiled):
        torch.manual_seed(0)
        total = run(*leaves)[name].sum()
        gradients.append(torch.autograd.grad(total, asked))
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, want)


def test_curvature_of_the_divergence_is_the_fisher_information() -> None:
    """Of equal policies too, where the divergence is 0 and a clamp would stop gradients."""
    logits = torch.linspace(-3, 3, 7, dtype=torch.float64).requires_grad_()
    policy = MeanConcentrationBeta(logits=logits, concentration=10.0)
    fixed = MeanConcentrationBeta(logits=logits.detach(), concentration=10.0)
    a, b = policy.concentration1.detach(), policy.concentration0.detach()
    fisher = (a * b / 10) ** 2 * (torch.polygamma(1, a) + torch.polygamma(1, b))
    for pair in ((policy, fixed), (fixed, policy)):
        divergence = kl_divergence(*pair)
        assert divergence.eq(0).all()
        (slope,) = torch.autograd.grad(divergence.sum(), logits, create_graph=True)
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)
        (curvature,) = torch.autograd.grad(slope.sum(), logits)
        torch.testing.assert_close(curvature, fisher, rtol=1e-8, atol=0)


def test_log_prob_at_infinite_logits_under_vmap() -> None:
    """Without NaN, and as without a transform."""
    policy = MeanConcentrationBeta(logits=torch.zeros(3), concentration=torch.tensor(10.0))
    at = torch.tensor([-torch.inf, 0.0, torch.inf])
    torch.testing.assert_close(
        torch.func.vmap(lambda x: policy.log_prob_logit(x))(at.expand(2, 3))[1],
        policy.log_prob_logit(at),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_number_beside_half_logits_keeps_its_digits(dtype: torch.dtype) -> None:
    logits, action = torch.full((4,), 0.3, dtype=dtype), torch.linspace(-2, 2, 4)
    for kappa in (10.3, 1e5):  # not a bfloat16; beyond float16
        policy = MeanConcentrationBeta(logits=logits, concentration=kappa)
        expected = dvla_fast.functional.beta_log_prob(logits, kappa, action)
        torch.testing.assert_close(policy.log_prob_logit(action), expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(
            policy.entropy(), dvla_fast.functional.beta_entropy(logits, kappa), rtol=2e-6, atol=0
        )
