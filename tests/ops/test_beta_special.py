"""CDF, implicit derivatives and divergence of Beta policies against mpmath and scipy."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from dvla_fast.functional import beta_cdf, beta_implicit_derivatives, beta_kl, beta_sample
from dvla_fast.ops.beta_special import _digamma_rise


def wide(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def draw_logit(eta: float, kappa: float, quantile: float) -> float:
    if quantile > 0.5:  # scipy rounds alpha near 1, not near 0
        return -draw_logit(-eta, kappa, 1 - quantile)
    p = special.expit(eta)
    return float(special.logit(stats.beta.ppf(quantile, kappa * p, kappa * (1 - p))))


@pytest.mark.parametrize("quantile", [1e-6, 0.3, 0.7, 1 - 1e-6])
@pytest.mark.parametrize(("eta", "kappa"), [(0.0, 0.5), (2.0, 2.0), (-1.0, 10.0), (4.0, 100.0)])
def test_cdf_and_implicit_derivatives_against_mpmath(
    eta: float, kappa: float, quantile: float
) -> None:
    """Derivatives: −(∂F/∂θ)/g with ∂F/∂θ by central differences of the CDF in 40 digits."""
    logit = draw_logit(eta, kappa, quantile)
    with mpmath.workdps(40):
        alpha = 1 / (1 + mpmath.exp(-mpmath.mpf(logit)))

        def shapes(e: mpmath.mpf, k: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
            return k / (1 + mpmath.exp(-e)), k / (1 + mpmath.exp(e))

        def cdf(e: mpmath.mpf, k: mpmath.mpf) -> mpmath.mpf:
            return mpmath.betainc(*shapes(e, k), 0, alpha, regularized=True)

        e, k, h = mpmath.mpf(eta), mpmath.mpf(kappa), mpmath.mpf("1e-12")
        a, b = shapes(e, k)
        density = alpha**a * (1 - alpha) ** b / mpmath.beta(a, b)
        want = float(cdf(e, k))
        by_logit = float(-(cdf(e + h, k) - cdf(e - h, k)) / (2 * h) / density)
        by_kappa = float(-(cdf(e, k + h) - cdf(e, k - h)) / (2 * h) / density)
    assert float(beta_cdf(wide(eta), kappa, wide(logit))) == pytest.approx(want, rel=1e-11)
    got = beta_implicit_derivatives(wide(eta), kappa, wide(logit))
    assert float(got.logits) == pytest.approx(by_logit, rel=1e-10)
    assert float(got.concentration) == pytest.approx(by_kappa, rel=1e-9, abs=1e-12 / kappa)


@pytest.mark.parametrize("kappa", [1e10, 1e13, 1e16])
@pytest.mark.parametrize("eta", [0.0, 2.0])
def test_cdf_of_a_large_concentration(eta: float, kappa: float) -> None:
    """Normal in the logit, up to a skewness of 1/sqrt κ."""
    deviation = (kappa * special.expit(eta) * special.expit(-eta)) ** -0.5
    z = torch.tensor([-3.0, -0.5, 0.0, 0.7, 2.5], dtype=torch.float64)
    got = beta_cdf(wide(eta), kappa, eta + deviation * z)
    want = torch.as_tensor(stats.norm.cdf(z))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8 + 0.4 * bool(eta) * deviation)


@pytest.mark.parametrize("kappa", [1e9, 1e13])
def test_cdf_where_one_shape_alone_is_large(kappa: float) -> None:
    """κ(1 − α) is then a Gamma variate of shape b = κ(1 − p), up to 1/κ."""
    for eta in (math.log(kappa), math.log(kappa) - 2):
        b = kappa * special.expit(-eta)
        for logit in (eta - 1.5, eta, eta + 2.0):
            want = special.gammaincc(b, kappa * special.expit(-logit))
            assert float(beta_cdf(wide(eta), kappa, wide(logit))) == pytest.approx(want, rel=1e-7)
            got = beta_cdf(wide(-eta), kappa, wide(-logit))
            assert float(got) == pytest.approx(1 - want, rel=1e-7)


@pytest.mark.parametrize("eta", [-18.0, -25.0, -200.0])
@pytest.mark.parametrize("kappa", [1e-8, 1.0, 10.0])
def test_means_beyond_reach_of_a_draw(eta: float, kappa: float) -> None:
    """The lower tail is 1/a long, a = κp: there F = e^(a·l)/(a·B(a, b)) to the last digit."""
    with mpmath.workdps(220):
        p = 1 / (1 + mpmath.exp(-mpmath.mpf(eta)))
        a, b = kappa * p, kappa * (1 - p)
        want = float(mpmath.exp(a * eta) / (a * mpmath.beta(a, b)))
        # log F = a·l + log Γ(κ) − log Γ(1 + a) − log Γ(b), held fixed
        rise = mpmath.digamma(1 + a) - mpmath.digamma(b)
        by_logit = float((1 - p) * (rise - eta))
        level = p * (eta - rise) + mpmath.digamma(a + b) - mpmath.digamma(b)
        by_kappa = float(-level / a)
    assert float(beta_cdf(wide(eta), kappa, wide(eta))) == pytest.approx(want, rel=1e-6)
    got = beta_implicit_derivatives(wide(eta), kappa, wide(eta))
    left_out = 100 * math.exp(eta)  # of the formula, relative
    assert float(got.logits) == pytest.approx(by_logit, rel=1e-10 + left_out)
    assert float(got.concentration) == pytest.approx(by_kappa, rel=1e-10 + left_out)


@pytest.mark.parametrize("x", [1e-8, 0.3, 5.0, 1e6])
@pytest.mark.parametrize("step", [1e-30, 1e-9, 0.02, 3.0])
def test_digamma_rise(x: float, step: float) -> None:
    with mpmath.workdps(60):
        want = float(mpmath.digamma(mpmath.mpf(x) + step) - mpmath.digamma(x))
    assert float(_digamma_rise(wide(x), wide(step))) == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("kappa", [0.05, 10.0, 1e6])
def test_derivative_equals_finite_differences_of_betainc(kappa: float) -> None:
    """scipy's betainc in float64 reaches what mpmath does not: κ = 1e6."""
    for eta in (-5.0, 0.0, 2.0):
        for quantile in (0.1, 0.6, 0.9):
            logit = draw_logit(eta, kappa, quantile)
            if not -30 < logit < 30:
                continue
            alpha, step = special.expit(logit), 1e-5 / max(1.0, kappa**0.5)
            cdf = [
                special.betainc(kappa * special.expit(e), kappa * special.expit(-e), alpha)
                for e in (eta - step, eta + step)
            ]
            p = special.expit(eta)
            density = stats.beta.pdf(alpha, kappa * p, kappa * (1 - p)) * alpha * (1 - alpha)
            want = -(cdf[1] - cdf[0]) / (2 * step) / density
            got = beta_implicit_derivatives(wide(eta), kappa, wide(logit)).logits
            assert float(got) == pytest.approx(want, rel=3e-5)


def test_derivatives_of_the_mean_of_alpha() -> None:
    """E[dα/dη] is p(1 − p), and E[dα/dκ] is 0, since E[α] = p; five standard errors."""
    eta, kappa, draws = 0.8, 3.0, 20_000
    logits = torch.full((draws,), eta, dtype=torch.float64)
    alpha, logit = beta_sample(logits, kappa, generator=torch.Generator().manual_seed(0))
    slope = beta_implicit_derivatives(logits, kappa, logit)
    weight = alpha * (1 - alpha)
    p = special.expit(eta)
    for terms, want in ((weight * slope.logits, p * (1 - p)), (weight * slope.concentration, 0.0)):
        assert abs(terms.mean() - want) < 5 * terms.std() / draws**0.5


@pytest.mark.parametrize("kappa", [1e-3, 0.1, 10.0, 1e6])
@pytest.mark.parametrize("other_kappa", [1e-3, 10.0, 1e6])
def test_kl_against_mpmath(kappa: float, other_kappa: float) -> None:
    for eta, other in ((0.0, 0.0), (0.0, 1e-4), (-3.0, -3.001), (-6.0, 4.0)):
        with mpmath.workdps(50):

            def divergence(x: mpmath.mpf, y: mpmath.mpf) -> mpmath.mpf:
                return mpmath.loggamma(y) - mpmath.loggamma(x) - (y - x) * mpmath.psi(0, x)

            p, q = (1 / (1 + mpmath.exp(-mpmath.mpf(x))) for x in (eta, other))
            k, m = mpmath.mpf(kappa), mpmath.mpf(other_kappa)
            want = divergence(k * p, m * q) + divergence(k * (1 - p), m * (1 - q))
            want = float(want - divergence(k, m))
        got = float(beta_kl(wide(eta), kappa, wide(other), other_kappa))
        assert got == pytest.approx(want, rel=1e-9, abs=1e-15), (eta, other)


def test_kl_differentiates_at_itself() -> None:
    logits = torch.zeros(3, requires_grad=True)
    beta_kl(logits, 10.0, torch.tensor([0.0, 1.0, 20.0]), 10.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0] == 0
    assert logits.grad[1] < 0


def test_kl_of_logits_beyond_300_is_that_of_300() -> None:
    far = torch.tensor([-1e4, -740.0, 740.0, 1e4], dtype=torch.float64, requires_grad=True)
    got = beta_kl(far, 10.0, wide(0.0), 10.0)
    torch.testing.assert_close(got, beta_kl(far.sign() * 300, 10.0, wide(0.0), 10.0))
    back = beta_kl(wide(0.0), 10.0, far, 10.0)
    torch.testing.assert_close(back, beta_kl(wide(0.0), 10.0, far.sign() * 300, 10.0))
    torch.testing.assert_close(beta_kl(far, 10.0, far, 10.0), torch.zeros(4).double())
    (got + back).sum().backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()


def test_extreme_draws_stay_finite() -> None:
    logits = torch.tensor([-40.0, 0.0, 40.0, 3.0])
    actions = torch.tensor([-3e4, 200.0, -50.0, 1e6])
    for kappa in (0.01, 10.0, 1e6):
        cdf = beta_cdf(logits, kappa, actions)
        slope = beta_implicit_derivatives(logits, kappa, actions)
        assert cdf.dtype == torch.float32
        assert bool(((cdf >= 0) & (cdf <= 1)).all())
        assert slope.logits.isfinite().all()
        assert slope.concentration.isfinite().all()
