"""Polynomials of this library's elementary functions. Written by build_tools/series.py.

x is a block, float64 or (where a function serves the sampling) float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _step(total, x, coefficient: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.fma(total, x, tl.full(x.shape, coefficient, x.dtype))


@triton.jit
def atanh_series(x):  # type: ignore[no-untyped-def]
    if x.dtype == tl.float64:
        # (2 atanh(s) - 2s) / s^3 in z = s^2, |s| <= 3 - 2 sqrt 2; error 3.1e-16
        total = tl.full(x.shape, 0.14616585424888623, x.dtype)
        total = _step(total, x, 0.15331710618210773)
        total = _step(total, x, 0.18182889455674947)
        total = _step(total, x, 0.22222211130259878)
        total = _step(total, x, 0.2857142862600327)
        total = _step(total, x, 0.39999999999899444)
        total = _step(total, x, 0.666666666666667)
    else:
        # (2 atanh(s) - 2s) / s^3 in z = s^2, |s| <= 3 - 2 sqrt 2; error 1.9e-7
        total = tl.full(x.shape, 0.2958005304318844, x.dtype)
        total = _step(total, x, 0.39988778282162807)
        total = _step(total, x, 0.6666668504515603)
    return total


@triton.jit
def exp_series(x):  # type: ignore[no-untyped-def]
    # (exp(r) - 1 - r) / r^2, |r| <= ln 2 / 2; error 1.1e-16
    total = tl.full(x.shape, 2.510038549551032e-08, x.dtype)
    total = _step(total, x, 2.7620088445409746e-07)
    total = _step(total, x, 2.7557268459997064e-06)
    total = _step(total, x, 2.4801521295954376e-05)
    total = _step(total, x, 0.00019841269863053618)
    total = _step(total, x, 0.0013888888917213717)
    total = _step(total, x, 0.008333333333330062)
    total = _step(total, x, 0.04166666666662413)
    total = _step(total, x, 0.16666666666666669)
    total = _step(total, x, 0.5000000000000001)
    return total


@triton.jit
def sin_series(x):  # type: ignore[no-untyped-def]
    # (sin(t) / t - 1) / t^2 in z = t^2, |t| <= pi/4; error 2.8e-11
    total = tl.full(x.shape, 2.724992580305979e-06, x.dtype)
    total = _step(total, x, -0.00019840086735384846)
    total = _step(total, x, 0.008333331874710208)
    total = _step(total, x, -0.1666666666385529)
    return total


@triton.jit
def cos_series(x):  # type: ignore[no-untyped-def]
    # (cos(t) - 1) / t^2 in z = t^2, |t| <= pi/4; error 3.6e-13
    total = tl.full(x.shape, -2.7237140418016e-07, x.dtype)
    total = _step(total, x, 2.4799862190148396e-05)
    total = _step(total, x, -0.00138888850913992)
    total = _step(total, x, 0.04166666663739607)
    total = _step(total, x, -0.4999999999996389)
    return total


@triton.jit
def acceptance_series(x):  # type: ignore[no-untyped-def]
    # -(log(1 + t) - t + t^2/2 - t^3/3) / t^4, |t| <= 0.3; error 6.7e-8
    total = tl.full(x.shape, -0.10639302831068707, x.dtype)
    total = _step(total, x, 0.11675330398569767)
    total = _step(total, x, -0.11021039301153983)
    total = _step(total, x, 0.12402579334082682)
    total = _step(total, x, -0.1428735725655276)
    total = _step(total, x, 0.1666844343393834)
    total = _step(total, x, -0.19999995367820372)
    total = _step(total, x, 0.2499999499072574)
    return total


@triton.jit
def delta_series(x):  # type: ignore[no-untyped-def]
    # y (lgamma(y) - Stirling's formula) in z = 1/y^2, y >= 8; error 3.1e-15
    total = tl.full(x.shape, 0.0007726514467211638, x.dtype)
    total = _step(total, x, -0.0005943175908563629)
    total = _step(total, x, 0.000793645716111539)
    total = _step(total, x, -0.002777777767912452)
    total = _step(total, x, 0.08333333333333025)
    return total


@triton.jit
def epsilon_series(x):  # type: ignore[no-untyped-def]
    # y^2 (log y - psi(y) - 1/(2y)) in z = 1/y^2, y >= 8; error 4.7e-16
    total = tl.full(x.shape, -0.017711160415846534, x.dtype)
    total = _step(total, x, 0.007519088230747095)
    total = _step(total, x, -0.004166217650696842)
    total = _step(total, x, 0.003968252342841619)
    total = _step(total, x, -0.008333333331168558)
    total = _step(total, x, 0.08333333333333287)
    return total


@triton.jit
def trigamma_series(x):  # type: ignore[no-untyped-def]
    # y^2 (y psi'(y) - 1 - 1/(2y)) in z = 1/y^2, y >= 8; error 6.3e-15
    total = tl.full(x.shape, -0.20667659543769643, x.dtype)
    total = _step(total, x, 0.07498454186764437)
    total = _step(total, x, -0.033327227198005537)
    total = _step(total, x, 0.02380950174113664)
    total = _step(total, x, -0.03333333330396469)
    total = _step(total, x, 0.1666666666666603)
    return total
