// Elementary functions for host and device, written so that
//   - every machine gets the same bits: only +, -, *, /, sqrt, fma and integer operations are used,
//     each correctly rounded by IEEE 754 (build without contraction and without fast-math);
//   - a plain loop over them vectorises: no branches, no tables, no library calls.
// Accuracy is within about 2 units in the last place on the stated domains.
#pragma once

#include "beta/series.h"

namespace dvla_fast {

// The layout of each type, and how many series terms its precision needs.
template <class T>
struct Format;

template <>
struct Format<double> {
  using Int = std::int64_t;
  static constexpr int mantissa = 52;
  static constexpr Int sqrt_half = 0x3FE6A09E667F3BCD;
  // Adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits.
  static constexpr double rounder = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42fefa39efp-1;
  static constexpr double ln2_low = 0x1.abc9e3b39803fp-56;
  static constexpr double smallest = 0x1p-1022;
  static constexpr double largest = 0x1.fffffffffffffp1023;
};

template <>
struct Format<float> {
  using Int = std::int32_t;
  static constexpr int mantissa = 23;
  static constexpr Int sqrt_half = 0x3F3504F3;
  static constexpr float rounder = 0x1.8p23f;
  static constexpr float ln2_high = 0x1.62e43p-1f;
  static constexpr float ln2_low = -0x1.05c61p-29f;
  static constexpr float smallest = 0x1p-126f;
  static constexpr float largest = 0x1.fffffep127f;
};

// 2 atanh(s) for |s| <= 3 - 2 sqrt 2.
template <class T>
DVLA_HD T twice_atanh(T s) {
  const T z = s * s;
  return fma_(s * z, atanh_series(z), s + s);
}

// log(u) where u = 1 + offset is known beside the offset, which is exact where u is near 1:
// u = 2^k m with m in [sqrt 1/2, sqrt 2), log u = k ln 2 + 2 atanh((m - 1)/(m + 1)).
template <class T>
DVLA_HD T log_of(T u, T offset) {
  using F = Format<T>;
  using Int = typename F::Int;
  const Int bits = bits_<Int>(u);
  const Int exponent = (bits - F::sqrt_half) >> F::mantissa;
  const T m = bits_<T>(bits - (exponent << F::mantissa));
  const T k = bits_<T>(bits_<Int>(F::rounder) + exponent) - F::rounder;
  const T top = exponent == 0 ? offset : m - T(1);
  const T small = fma_(k, F::ln2_low, twice_atanh(top / (top + T(2))));
  return fma_(k, F::ln2_high, small);
}

// log x for positive finite x; values below the smallest normal number count as that number.
template <class T>
DVLA_HD T log_(T x) {
  const T u = max_(x, Format<T>::smallest);
  return log_of(u, u - T(1));
}

// log(1 + t) for t > -1.
template <class T>
DVLA_HD T log1p_(T t) {
  return log_of(T(1) + t, t);
}

// exp(x) = scale + scale * less_one, for x <= 709 (clamped to the normal range below): both exp and
// expm1 come from it without cancellation.
struct ExpParts {
  double scale;     // 2^k
  double less_one;  // exp(r) - 1, |r| <= ln 2 / 2
};

DVLA_HD ExpParts exp_parts(double x) {
  using F = Format<double>;
  const double bounded = max_(x, -708.0);
  const double shifted = fma_(bounded, 0x1.71547652b82fep0, F::rounder);
  const double k = shifted - F::rounder;
  const double r = fma_(k, -F::ln2_low, fma_(k, -F::ln2_high, bounded));
  const double scale = bits_<double>((bits_<std::int64_t>(shifted) + 1023) << F::mantissa);
  return {scale, fma_(r * r, exp_series(r), r)};
}

DVLA_HD double exp_(double x) {
  const ExpParts e = exp_parts(x);
  return fma_(e.scale, e.less_one, e.scale);
}

// For e in [0, 1]: log(1 + e) and 1 / (1 + e), with one division for both.
struct Softplus {
  double log1p, reciprocal;
};

DVLA_HD Softplus softplus_parts(double e) {
  // Above sqrt 2 - 1, 1 + e is halved for the series: (m - 1)/(m + 1) = (e - 1)/(e + 3).
  const bool halved = e > 0.41421356237309503;
  const double u = 1.0 + e;
  const double top = halved ? e - 1.0 : e, bottom = halved ? e + 3.0 : e + 2.0;
  const double shared = 1.0 / (u * bottom);
  const double series = twice_atanh(top * (shared * u));
  using F = Format<double>;
  const double doubled = (series + F::ln2_low) + F::ln2_high;
  return {halved ? doubled : series, shared * bottom};
}

// Cosine and sine of a uniform angle made of 32 random bits: the top two choose the quadrant, the
// rest an angle in [-pi/4, pi/4) around its middle.
template <class T>
struct CosSin {
  T cos, sin;
};

template <class T>
DVLA_HD CosSin<T> uniform_angle(std::uint32_t word) {
  const T theta = T(static_cast<std::int32_t>(word << 2)) * T(3.14159265358979323846 / 0x1p33);
  const T z = theta * theta;
  const T c = fma_(cos_series<T>(z), z, T(1));
  const T s = fma_(sin_series<T>(z) * z, theta, theta);
  const std::uint32_t quadrant = word >> 30;
  const T x = (quadrant & 1) ? s : c;
  const T y = (quadrant & 1) ? c : s;
  return {((quadrant + 1) & 2) ? -x : x, (quadrant & 2) ? -y : y};
}

}  // namespace dvla_fast
