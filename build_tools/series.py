"""Writes csrc/beta/series.h: the polynomials of the elementary and gamma-type functions.

Each is a Chebyshev fit (near-minimax) computed in 40 digits with mpmath and rounded to the type it
is used in; the error printed beside it is that of the exact coefficients on the interval.

    python build_tools/series.py > csrc/beta/series.h
"""

from __future__ import annotations

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


def code(series: Series) -> str:
    low, high = series.interval
    fit, error = mp.chebyfit(series.function, [low, high], series.terms, error=True)
    first, *rest = (literal(c, series.dtype) for c in fit)
    template = ["template <class T>"] if series.dtype == "T" else []
    return "\n".join(
        [
            f"// {series.formula}; error {mp.nstr(error, 2)}",
            *template,
            f"DVLA_HD {series.dtype} {series.name}({series.dtype} x) {{",
            f"  {series.dtype} sum = {first};",
            *(f"  sum = fma_(sum, x, {c});" for c in rest),
            "  return sum;",
            "}",
        ]
    )


def main() -> None:
    print(
        "// Polynomials of this library's elementary functions. Written by build_tools/series.py."
    )
    print("#pragma once\n")
    print('#include "beta/portable.h"\n')
    print("namespace dvla_fast {\n")
    print("\n\n".join(code(series) for series in all_series()))
    print("\n}  // namespace dvla_fast")


if __name__ == "__main__":
    main()
