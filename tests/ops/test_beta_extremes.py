"""The policy far out: large concentrations, means near 0 and 1, actions beyond any number."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from test_beta_policy import BACKENDS, exact, measured, needs_extension
from torch import Tensor

from dvla_fast.functional import beta_policy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kappa", [1.0, 1e3, 1e12])
@pytest.mark.parametrize("x", [-34.0, 34.0, -60.0, 250.0])
def test_means_far_out_and_actions_far_from_them(
    x: float, kappa: float, dtype: torch.dtype, backend: str
) -> None:
    """The differences of logits go up to 30, where nearly all of what is subtracted cancels."""
    distance = torch.arange(-30, 31, dtype=dtype)
    logits, kappas = torch.full_like(distance, x), torch.full_like(distance, kappa)
    action = logits + distance
    got = measured(logits, kappas, action, backend)
    relative = 2e-7 if dtype == torch.float32 else 2e-12 if backend == "cpp" else 5e-12
    largest = torch.finfo(dtype).max
    for i in range(len(distance)):
        want = exact(x, kappa, float(action[i]))
        for name, value in want.items():
            # Beyond it a result saturates; the reference has no gradient there.
            if backend == "reference" and " by " in name and abs(want[name.split()[0]]) > largest:
                continue
            value = min(max(value, -largest), largest)
            if dtype == torch.float32 and name.startswith("log_prob") and kappa > 1e3:
                continue  # holds fewer digits, see policy_step
            error = abs(float(got[name][i]) - value)
            bound = relative * abs(value) + 1e-13 * (1e3 if dtype == torch.float32 else 1.0)
            assert error <= bound, (name, float(distance[i]), float(error), float(bound))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kappa", [1e8, 1e12, 1e16])
@pytest.mark.parametrize("x", [-8.0, 0.0, 3.0])
def test_a_large_concentration_keeps_its_digits(x: float, kappa: float, backend: str) -> None:
    """Within a few standard deviations: a difference of large logarithms would keep none."""
    deviation = math.hypot(math.exp(x / 2), math.exp(-x / 2)) / math.sqrt(kappa)
    steps = torch.tensor([-3.0, -0.7, 0.0, 0.7, 3.0], dtype=torch.float64)
    logits, kappas = torch.full_like(steps, x), torch.full_like(steps, kappa)
    action = logits + deviation * steps
    got = measured(logits, kappas, action, backend)
    for i in range(len(steps)):
        for name, value in exact(x, kappa, float(action[i])).items():
            size = {"log_prob by logits": math.sqrt(kappa), "log_prob by kappa": 1.0 / kappa}
            bound = 1e-9 * abs(value) + 1e-15 * math.sqrt(kappa) * size.get(name, 1.0)
            error = abs(float(got[name][i]) - value)
            assert error <= bound, (name, float(steps[i]), float(error), float(bound))


@needs_extension
@pytest.mark.parametrize("kappa", [1e-30, 1e-8, 1e30])
@pytest.mark.parametrize("x", [-1e30, -200.0, 0.0, 90.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_policies_stay_finite(x: float, kappa: float, dtype: torch.dtype) -> None:
    logits = torch.full((64,), x, dtype=dtype, requires_grad=True)
    concentration = torch.full((64,), kappa, dtype=dtype, requires_grad=True)
    out = beta_policy(logits, concentration)
    grads = torch.autograd.grad((out.log_prob + out.entropy).sum(), (logits, concentration))
    for value in (*out, *grads):
        assert bool(torch.isfinite(value).all())


@pytest.mark.parametrize("x", [-300.0, -2.0, 0.0, 1.0, 40.0])
@pytest.mark.parametrize("kappa", [0.3, 8.0, 20.0, 1e6])
def test_second_derivatives_of_the_reference(x: float, kappa: float) -> None:
    """In eager mode and torch.func: of the branch that holds, though others overflow."""
    deviation = min(5.0, math.hypot(math.exp(x / 2), math.exp(-x / 2)) / math.sqrt(kappa))
    for action in (x - 2 * deviation, x, x + deviation, x + 800.0):

        def densities(logit: Tensor, concentration: Tensor, draw: float = action) -> Tensor:
            stored = torch.full_like(logit, draw)
            out = beta_policy(logit, concentration, action_logit=stored, backend="reference")
            return out.log_prob

        point = torch.tensor(x, dtype=torch.float64), torch.tensor(kappa, dtype=torch.float64)
        got = torch.func.hessian(densities, argnums=0)(*point)
        eager = torch.autograd.functional.hessian(densities, point)
        first = exact(x, kappa, action)["log_prob by logits"]
        with mpmath.workdps(50):
            p, q = 1 / (1 + mpmath.exp(-mpmath.mpf(x))), 1 / (1 + mpmath.exp(mpmath.mpf(x)))
            curvature = mpmath.psi(1, kappa * p) + mpmath.psi(1, kappa * q)
            want = (q - p) * first - (kappa * p * q) ** 2 * curvature
        assert float(got) == pytest.approx(float(want), rel=1e-6, abs=1e-10)
        assert float(eager[0][0]) == pytest.approx(float(want), rel=1e-6, abs=1e-10)
        assert all(bool(entry.isfinite()) for row in eager for entry in row)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("x", [-200.0, 0.3, 90.0])
def test_stored_actions_beyond_the_largest_number(
    x: float, dtype: torch.dtype, backend: str
) -> None:
    """They count as the largest, and so do the results: nothing is infinite or NaN."""
    limit = torch.finfo(dtype).max
    action = torch.tensor([math.inf, -math.inf, limit], dtype=dtype)
    logits = torch.full_like(action, x).requires_grad_()
    kappa = torch.full_like(action, 10.0).requires_grad_()
    out = beta_policy(logits, kappa, action_logit=action, backend=backend)
    assert out.action_logit.tolist() == [limit, -limit, limit]
    grads = torch.autograd.grad((out.log_prob / 4 + out.entropy / 4).sum(), (logits, kappa))
    for value in (*out, *grads):
        assert bool(value.isfinite().all())
