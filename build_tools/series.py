"""Writes the polynomials of the elementary and gamma-type functions, for C++ and for Triton.

Each is a Chebyshev fit (near-minimax) computed in 40 digits with mpmath and rounded to the type it
is used in; the error printed beside it is that of the exact coefficients on the interval.

    python build_tools/series.py cpp > csrc/beta/series.h
    python build_tools/series.py triton > kernels/beta_series.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import mpmath as mp
import numpy as np

mp.mp.dps = 40
Number = mp.mpf


@dataclass
class Series:
    name: str
    formula: str
    function: Callable[[Number], Number]
    interval: tuple[Number, Number]
    terms: int
    dtype: str = "double"


def limit(value: Callable[[Number], Number], at_zero: Number) -> Callable[[Number], Number]:
    """``value`` with its removable singularity at 0 filled in."""
    return lambda x: at_zero if abs(x) < mp.mpf(10) ** -9 else value(x)


def delta(z: Number) -> Number:
    y = 1 / mp.sqrt(z)
    stirling = (y - mp.mpf(1) / 2) * mp.log(y) - y + mp.log(2 * mp.pi) / 2
    return (mp.loggamma(y) - stirling) * y


def epsilon(z: Number) -> Number:
    y = 1 / mp.sqrt(z)
    return (mp.log(y) - mp.psi(0, y) - 1 / (2 * y)) / z


def trigamma(z: Number) -> Number:
    y = 1 / mp.sqrt(z)
    return (y * mp.psi(1, y) - 1 - 1 / (2 * y)) / z


def acceptance(t: Number) -> Number:
    if abs(t) < mp.mpf(10) ** -4:  # the direct form cancels below
        return mp.mpf(1) / 4 - t / 5 + t**2 / 6 - t**3 / 7 + t**4 / 8
    return -(mp.log1p(t) - t + t**2 / 2 - t**3 / 3) / t**4


def all_series() -> list[Series]:
    third, sixth, half = mp.mpf(1) / 3, mp.mpf(1) / 6, mp.mpf(1) / 2
    atanh = limit(lambda z: 2 * (mp.atanh(mp.sqrt(z)) / mp.sqrt(z) - 1) / z, 2 * third)
    squares = (mp.mpf(0), (3 - 2 * mp.sqrt(2)) ** 2 * mp.mpf("1.0001"))
    reach = mp.log(2) / 2 * mp.mpf("1.0001")
    angles = (mp.mpf(0), (mp.pi / 4) ** 2)
    inverse_squares = (mp.mpf(0), mp.mpf(1) / 64)
    atanh_formula = "(2 atanh(s) - 2s) / s^3 in z = s^2, |s| <= 3 - 2 sqrt 2"
    return [
        Series("atanh_series", atanh_formula, atanh, squares, 7),
        Series("atanh_series", atanh_formula, atanh, squares, 3, "float"),
        Series(
            "exp_series",
            "(exp(r) - 1 - r) / r^2, |r| <= ln 2 / 2",
            limit(lambda r: (mp.expm1(r) - r) / r**2, half),
            (-reach, reach),
            10,
        ),
        Series(
            "sin_series",
            "(sin(t) / t - 1) / t^2 in z = t^2, |t| <= pi/4",
            limit(lambda z: (mp.sin(mp.sqrt(z)) / mp.sqrt(z) - 1) / z, -sixth),
            angles,
            4,
            "T",
        ),
        Series(
            "cos_series",
            "(cos(t) - 1) / t^2 in z = t^2, |t| <= pi/4",
            limit(lambda z: (mp.cos(mp.sqrt(z)) - 1) / z, -half),
            angles,
            5,
            "T",
        ),
        Series(
            "acceptance_series",
            "-(log(1 + t) - t + t^2/2 - t^3/3) / t^4, |t| <= 0.3",
            acceptance,
            (mp.mpf("-0.3"), mp.mpf("0.3")),
            8,
            "T",
        ),
        Series(
            "delta_series",
            "y (lgamma(y) - Stirling's formula) in z = 1/y^2, y >= 8",
            limit(delta, mp.mpf(1) / 12),
            inverse_squares,
            5,
        ),
        Series(
            "epsilon_series",
            "y^2 (log y - psi(y) - 1/(2y)) in z = 1/y^2, y >= 8",
            limit(epsilon, mp.mpf(1) / 12),
            inverse_squares,
            6,
        ),
        Series(
            "trigamma_series",
            "y^2 (y psi'(y) - 1 - 1/(2y)) in z = 1/y^2, y >= 8",
            limit(trigamma, sixth),
            inverse_squares,
            6,
        ),
    ]


def literal(value: Number, dtype: str) -> str:
    if dtype == "float":
        return f"{float(np.float32(float(value))).hex()}f"
    text = float(value).hex()
    return f"T({text})" if dtype == "T" else text


def fit(series: Series) -> tuple[list[Number], str]:
    """Coefficients, that of the highest power first, and the error in words."""
    coefficients, error = mp.chebyfit(
        series.function, list(series.interval), series.terms, error=True
    )
    return coefficients, f"{series.formula}; error {mp.nstr(error, 2)}"


def cpp_function(series: Series) -> str:
    coefficients, meaning = fit(series)
    first, *rest = (literal(c, series.dtype) for c in coefficients)
    template = ["template <class T>"] if series.dtype == "T" else []
    return "\n".join(
        [
            f"// {meaning}",
            *template,
            f"DVLA_HD {series.dtype} {series.name}({series.dtype} x) {{",
            f"  {series.dtype} sum = {first};",
            *(f"  sum = fma_(sum, x, {c});" for c in rest),
            "  return sum;",
            "}",
        ]
    )


def cpp() -> str:
    functions = "\n\n".join(cpp_function(series) for series in all_series())
    return f"""\
// Polynomials of this library's elementary functions. Written by build_tools/series.py.
#pragma once

#include "beta/portable.h"

namespace dvla_fast {{

{functions}

}}  // namespace dvla_fast
"""


def triton_function(name: str, versions: list[Series]) -> str:
    """One function of a block in float64 or float32; a series of one type serves both."""
    lines = ["@triton.jit", f"def {name}(x):  # type: ignore[no-untyped-def]"]
    for series in versions:
        coefficients, meaning = fit(series)
        first, *rest = (repr(float(c)) for c in coefficients)
        body = [
            f"# {meaning}",
            f"total = tl.full(x.shape, {first}, x.dtype)",
            *(f"total = _step(total, x, {c})" for c in rest),
        ]
        if len(versions) > 1:
            branch = "if x.dtype == tl.float64:" if series.dtype == "double" else "else:"
            body = [branch, *(f"    {line}" for line in body)]
        lines += [f"    {line}" for line in body]
    return "\n".join([*lines, "    return total"])


def triton() -> str:
    named: dict[str, list[Series]] = {}
    for series in all_series():
        named.setdefault(series.name, []).append(series)
    functions = "\n\n\n".join(triton_function(*item) for item in named.items())
    return f'''\
"""Polynomials of this library's elementary functions. Written by build_tools/series.py.

x is a block, float64 or (where a function serves the sampling) float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _step(total, x, coefficient: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.fma(total, x, tl.full(x.shape, coefficient, x.dtype))


{functions}
'''


if __name__ == "__main__":
    print({"cpp": cpp, "triton": triton}[sys.argv[1]](), end="")
