"""What a Beta policy needs beyond drawing and density: its CDF, the implicit derivatives of a draw,
and the divergence of two policies. Plain PyTorch in float64, for a few numbers a step: an integral
takes some 10 kB of memory an element.

With a = κp, b = κ(1 − p), the logit u of a draw has the density g(u) = exp(h(u))/B(a, b),
h(u) = a·u − κ·softplus(u): log-concave, with its mode at the policy's logit η. Every integral here
runs over the tail beyond l that does not hold the mode, where the integrand only falls:
J_φ = ∫₀^∞ φ(s) exp(h(l − s) − h(l)) ds, which needs no normalising constant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dvla_fast.arguments import expect_real, expect_tensor
from dvla_fast.ops.beta_policy import check_values, number_or_none
from dvla_fast.reference import STIRLING, log_peak, stirling

_NODES = 128
_LOW, _HIGH = -4.0, 4.25  # beyond these, what is left out is below float64's rounding
_LARGEST = torch.finfo(torch.float64).max
_SMALL_SHAPE = 0.1  # a = κp: below, the derivative by κ takes its form without 1/a


class ImplicitDerivatives(NamedTuple):
    """How a draw's logit l moves with the policy at a fixed value of the CDF; shape of the logits.

    dα follows as α(1 − α) dl.
    """

    logits: Tensor
    """∂l/∂η > 0, η the policy's logit."""
    concentration: Tensor
    """∂l/∂κ at fixed η."""


def beta_cdf(logits: Tensor, concentration: float | Tensor, action_logit: Tensor) -> Tensor:
    """P(α ≤ sigmoid(action_logit)) under Beta(κp, κ(1 − p)), p = sigmoid(logits).

    Args:
        logits: policy logits η, any shape.
        concentration: κ > 0, a number or a tensor that broadcasts.
        action_logit: log(α/(1 − α)), broadcasts.

    Returns:
        Tensor of the broadcast shape, in [0, 1], in ``logits``' dtype (at least float32), without
        gradient. Within 1e-7 for κ up to 1e16; not relatively so where the result is tiny.

    Raises:
        TypeError: logits no floating tensor, the action no real one, or ``concentration`` neither a
            number nor a real tensor.
        ValueError: κ as a number is not positive and finite; where values are checked
            (:func:`dvla_fast.functional.set_value_checks`), κ as a tensor is not, or logits or
            actions hold NaN.
    """
    with torch.no_grad():
        tail, upper = _tail(logits, concentration, action_logit)
        mass = (torch.exp(tail.log_density) * tail.mass).clamp(0.0, 1.0)
        return torch.where(upper, 1.0 - mass, mass).to(_result_dtype(logits))


def beta_implicit_derivatives(
    logits: Tensor, concentration: float | Tensor, action_logit: Tensor
) -> ImplicitDerivatives:
    """Derivatives of a draw by implicit reparameterisation: ∂l/∂θ = −(∂F/∂θ)/g(l).

    The source is Figurnov, Mohamed and Mnih, *Implicit Reparameterization Gradients*, NeurIPS 2018
    (equation 5). F is the CDF at the logit l of the draw and g its density. ∂F/∂θ is the integral
    of g·∂ log g/∂θ up to l, the derivative taken under the integral sign, with
    ∂ log g/∂η = κp(1 − p)(u − ψ(a) + ψ(b)) and ∂ log g/∂κ = p·u − softplus(u) minus its mean; it is
    summed by a double-exponential trapezoid rule of 128 nodes.

    Args:
        logits, concentration, action_logit: as in :func:`beta_cdf`.

    Returns:
        :class:`ImplicitDerivatives` in ``logits``' dtype (at least float32), without gradient.

    Raises:
        TypeError, ValueError: as :func:`beta_cdf`.
    """
    with torch.no_grad():
        tail, upper = _tail(logits, concentration, action_logit)
        a, b, kappa = tail.a, tail.b, tail.a + tail.b
        p, center = a / kappa, torch.digamma(1 + a) - torch.digamma(b)
        # By parts: J of s is (J of 1 + κ J of s·σ(l − s))/a. With ψ(a) = ψ(1 + a) − 1/a the terms
        # in 1/a drop out, and all that are left are positive.
        by_logit = b * tail.drift - a * b / kappa * (tail.l - center) * tail.mass
        mean = p * torch.digamma(a) + (1 - p) * torch.digamma(b) - torch.digamma(kappa)
        level = p * tail.l - F.softplus(tail.l) - mean
        by_kappa = -(level * tail.mass + tail.exponent / kappa)
        # Likewise, where 1/a would be all that is left; large κ keep their digits above. 1/b drops
        # out too: ψ(b) = ψ(1 + b) − 1/b here and in ψ(κ) − ψ(b).
        level = p * (tail.l - torch.digamma(1 + a) + torch.digamma(1 + b))
        level = level + _digamma_rise(1 + b, a)
        small = tail.drift + tail.soft - level * tail.mass
        by_kappa = torch.where(a < _SMALL_SHAPE, small, by_kappa)
        dtype = _result_dtype(logits)
        return ImplicitDerivatives(
            by_logit.to(dtype), torch.where(upper, -by_kappa, by_kappa).to(dtype)
        )


class _Tail(NamedTuple):
    """Integrals over the tail below l, mirrored where the tail above l was asked for."""

    a: Tensor
    b: Tensor
    l: Tensor  # noqa: E741  (the logit of the draw, as above)
    log_density: Tensor
    """log g(l)."""
    mass: Tensor
    """J of φ = 1."""
    drift: Tensor
    """J of φ = s·σ(l − s)."""
    soft: Tensor
    """J of φ = softplus(l − s)."""
    exponent: Tensor
    """J of φ = h(l − s) − h(l)."""


def _tail(
    logits: Tensor, concentration: float | Tensor, action_logit: Tensor
) -> tuple[_Tail, Tensor]:
    expect_real("action_logit", action_logit)
    eta, kappa = (x.detach() for x in _policy(logits, concentration, action_logit))
    draw = action_logit.detach().double()
    _check_shapes(logits=eta, concentration=kappa, action_logit=draw)
    eta, kappa, draw = torch.broadcast_tensors(eta, kappa, draw)
    upper = draw > eta
    sign = torch.where(upper, -1.0, 1.0)
    eta, draw = sign * eta, sign * draw
    a, b = kappa * torch.sigmoid(eta), kappa * torch.sigmoid(-eta)
    # The length over which h falls by 1, by bisection of its logarithm: h is concave, so that
    # beyond it h falls at least in proportion, and one set of nodes fits every case.
    # Where a is tiny it falls over 1/a.
    low, high = torch.full_like(a, -16.0), 16.0 + a.log().neg().clamp_min(0.0)
    for _ in range(20):
        middle = (low + high) / 2
        short = _exponent(a, b, draw, middle.exp()) > -1.0
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    step = (_HIGH - _LOW) / (_NODES - 1)
    t = torch.linspace(_LOW, _HIGH, _NODES, dtype=torch.float64, device=a.device)
    nodes = torch.exp(t - torch.exp(-t))
    weights = nodes * (1 + torch.exp(-t)) * step
    scale = high.exp().unsqueeze(-1)
    s = scale * nodes  # [..., nodes]
    exponent = _exponent(a.unsqueeze(-1), b.unsqueeze(-1), draw.unsqueeze(-1), s)
    value = exponent.exp() * weights * scale
    place = draw.unsqueeze(-1) - s
    integrands = (1.0, s * torch.sigmoid(place), F.softplus(place), exponent)
    log_density = log_peak(a, b) + _exponent(a, b, eta, eta - draw)
    return _Tail(a, b, draw, log_density, *((phi * value).sum(-1) for phi in integrands)), upper


def _policy(
    logits: Tensor,
    concentration: float | Tensor,
    action_logit: Tensor | None = None,
    prefix: str = "",
) -> tuple[Tensor, Tensor]:
    """A policy's logits and concentration in float64, looked at; ``prefix``: of their names."""
    name = f"{prefix}logits"
    expect_tensor(name, logits)
    if not logits.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {logits.dtype}")
    value = number_or_none(f"{prefix}concentration", concentration, _LARGEST)
    if value is None:
        assert isinstance(concentration, Tensor)
        kappa = concentration.to(logits.device, torch.float64)
    else:  # filled in on the device: copying it there would wait for the GPU
        kappa = torch.full((), value, dtype=torch.float64, device=logits.device)
    check_values(logits, kappa, action_logit, prefix)
    return logits.double().clamp(-300, 300), kappa  # as the kernels


def _check_shapes(**named: Tensor) -> None:
    """Raises ValueError unless the tensors are on one device and broadcast together."""
    (first, given), *others = named.items()
    for name, tensor in others:
        if tensor.device != given.device:
            raise ValueError(f"{name}: on {tensor.device}, {first} on {given.device}")
    try:
        torch.broadcast_shapes(*(x.shape for x in named.values()))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise ValueError(f"shapes that do not broadcast together: {shapes}") from error


def _exponent(a: Tensor, b: Tensor, logit: Tensor, s: Tensor) -> Tensor:
    """h(l − s) − h(l) for s ≥ 0, without cancellation.

    −a·s − κ log(σ(−l) + σ(l) e^(−s)) where σ(l) is the smaller part of 1, else what equals it:
    b·s − κ log(σ(l) + σ(−l) e^s).
    """
    down = logit <= 0
    small, t = -logit.abs(), torch.where(down, -s, s)
    near = torch.log1p(torch.sigmoid(small) * torch.expm1(t))
    far = torch.logaddexp(F.logsigmoid(-small), F.logsigmoid(small) + t)
    return torch.where(down, a, b) * t - (a + b) * torch.where(s < 0.5, near, far)


def _digamma_rise(x: Tensor, step: Tensor) -> Tensor:
    """ψ(x + step) − ψ(x) for step ≥ 0, to full accuracy for small steps."""
    total = torch.zeros_like(x)
    for k in range(STIRLING):
        total = total + step / ((x + k) * (x + k + step))
    low, high = x + STIRLING, x + STIRLING + step
    # ψ(y) = log y − 1/(2y) − 1/(12y²) + 1/(120y⁴) − 1/(252y⁶) + 1/(240y⁸) − 1/(132y¹⁰) …
    r, t = 1 / (low * low), 1 / (high * high)
    square = step * (low + high) * r * t  # 1/low² − 1/high²
    power, series = torch.ones_like(r), torch.zeros_like(r)
    for n, factor in enumerate((1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760)):
        series = series + factor * power
        power = power * t + r ** (n + 1)  # (rⁿ⁺² − tⁿ⁺²)/(r − t)
    return total + torch.log1p(step / low) + step / (2 * low * high) + square * series


def beta_kl(
    logits: Tensor,
    concentration: float | Tensor,
    other_logits: Tensor,
    other_concentration: float | Tensor,
) -> Tensor:
    """KL(Beta(κp, κ(1 − p)) ‖ Beta(κ'p', κ'(1 − p'))) in nats.

    With D(x, y) = log Γ(y) − log Γ(x) − (y − x)ψ(x) ≥ 0 the divergence is
    D(a, a') + D(b, b') − D(κ, κ'). Each D is a sum of non-negative terms here: neighbours of
    large κ keep their digits, where the closed form is a small difference of large numbers. Logits
    beyond ±300 count as ±300, as in the policy's own ops.

    Args:
        logits, concentration: the first policy, which the expectation is over.
        other_logits, other_concentration: the second one; all four broadcast.

    Returns:
        Tensor of the broadcast shape in ``logits``' dtype (at least float32), differentiable.

    Raises:
        TypeError, ValueError: as :func:`beta_cdf`.
    """
    eta, kappa = _policy(logits, concentration)
    other, other_kappa = _policy(other_logits, other_concentration, prefix="other_")
    _check_shapes(
        logits=eta, concentration=kappa, other_logits=other, other_concentration=other_kappa
    )
    return unchecked_kl(eta, kappa, other, other_kappa).to(_result_dtype(logits))


def unchecked_kl(eta: Tensor, kappa: Tensor, other: Tensor, other_kappa: Tensor) -> Tensor:
    """:func:`beta_kl` of float64 tensors, logits within ±300; NaN comes out where it went in."""
    a, b = kappa * torch.sigmoid(eta), kappa * torch.sigmoid(-eta)
    c, d = other_kappa * torch.sigmoid(other), other_kappa * torch.sigmoid(-other)
    kl = _gamma_divergence(a, c) + _gamma_divergence(b, d) - _gamma_divergence(kappa, other_kappa)
    # Not clamp_min: it has no gradient where the policies are alike, and so no curvature there.
    return kl - kl.detach().clamp_max(0.0)


def _gamma_divergence(x: Tensor, y: Tensor) -> Tensor:
    """D(x, y): moved up by Γ(x + 1) = xΓ(x) until Stirling's series holds."""
    total = torch.zeros_like(x * y)
    for k in range(STIRLING):
        total = total + _excess(x + k, y + k)
    x, y = x + STIRLING, y + STIRLING
    excess = _excess(x, y)
    z = (y - x) / x
    # (y − ½) log(y/x) − (y − x) + (y − x)/(2x), written with z − log(1 + z)
    total = total + x * (z * (z - excess) - excess) + 0.5 * excess
    value, slope = stirling(x)
    return total + (stirling(y)[0] - value - (y - x) * slope)


def _excess(x: Tensor, y: Tensor) -> Tensor:
    """z − log(1 + z) ≥ 0 for z = (y − x)/x, to full accuracy for small z."""
    z = (y - x) / x
    near = z.abs() < 0.125
    small = torch.where(near, z, 0.0)
    series = torch.zeros_like(small)
    for n in range(18, 1, -1):  # z²/2 − z³/3 + …
        series = (series + (-1) ** n / n) * small
    return torch.where(near, series * small, z - (torch.log(y) - torch.log(x)))


def _result_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
