// Elementary functions for host and device, written so that
//   - every machine gets the same bits: only +, -, *, /, sqrt, fma and integer operations are used,
//     each correctly rounded by IEEE 754 (build without contraction and without fast-math);
//   - a plain loop over them vectorises: no branches, no tables, no library calls.
// Accuracy is within about 2 units in the last place on the stated domains.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DVLA_HD __host__ __device__ __forceinline__
#else
#define DVLA_HD inline __attribute__((always_inline))
#endif

namespace dvla_fast {

DVLA_HD double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
DVLA_HD float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

template <class T>
DVLA_HD T max_(T a, T b) {
  return a > b ? a : b;
}

template <class T>
DVLA_HD T min_(T a, T b) {
  return a < b ? a : b;
}

template <class T>
DVLA_HD T abs_(T a) {
  return a < T(0) ? -a : a;
}

template <class To, class From>
DVLA_HD To bits_(From from) {
  static_assert(sizeof(To) == sizeof(From));
#if defined(__CUDA_ARCH__)
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
#else
  return __builtin_bit_cast(To, from);
#endif
}

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

// 2 atanh(s) - 2s for |s| <= 3 - 2 sqrt 2, by the Taylor series: s z (2/3 + 2z/5 + ...), z = s^2.
DVLA_HD double atanh_tail(double s) {
  const double z = s * s;
  double sum = 2.0 / 21;
  sum = fma_(sum, z, 2.0 / 19);
  sum = fma_(sum, z, 2.0 / 17);
  sum = fma_(sum, z, 2.0 / 15);
  sum = fma_(sum, z, 2.0 / 13);
  sum = fma_(sum, z, 2.0 / 11);
  sum = fma_(sum, z, 2.0 / 9);
  sum = fma_(sum, z, 2.0 / 7);
  sum = fma_(sum, z, 2.0 / 5);
  sum = fma_(sum, z, 2.0 / 3);
  return s * z * sum;
}

DVLA_HD float atanh_tail(float s) {
  const float z = s * s;
  float sum = 2.0f / 9;
  sum = fma_(sum, z, 2.0f / 7);
  sum = fma_(sum, z, 2.0f / 5);
  sum = fma_(sum, z, 2.0f / 3);
  return s * z * sum;
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
  const T s = top / (top + T(2));
  const T tail = fma_(k, F::ln2_low, atanh_tail(s));
  return fma_(k, F::ln2_high, T(2) * s + tail);
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
  double sum = 1.0 / 6227020800.0;  // 1/13!
  sum = fma_(sum, r, 1.0 / 479001600.0);
  sum = fma_(sum, r, 1.0 / 39916800.0);
  sum = fma_(sum, r, 1.0 / 3628800.0);
  sum = fma_(sum, r, 1.0 / 362880.0);
  sum = fma_(sum, r, 1.0 / 40320.0);
  sum = fma_(sum, r, 1.0 / 5040.0);
  sum = fma_(sum, r, 1.0 / 720.0);
  sum = fma_(sum, r, 1.0 / 120.0);
  sum = fma_(sum, r, 1.0 / 24.0);
  sum = fma_(sum, r, 1.0 / 6.0);
  sum = fma_(sum, r, 0.5);
  const double scale = bits_<double>((bits_<std::int64_t>(shifted) + 1023) << F::mantissa);
  return {scale, fma_(r * r, sum, r)};
}

DVLA_HD double exp_(double x) {
  const ExpParts e = exp_parts(x);
  return fma_(e.scale, e.less_one, e.scale);
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
  T c = T(-1.0 / 3628800);
  c = fma_(c, z, T(1.0 / 40320));
  c = fma_(c, z, T(-1.0 / 720));
  c = fma_(c, z, T(1.0 / 24));
  c = fma_(c, z, T(-0.5));
  c = fma_(c, z, T(1));
  T s = T(1.0 / 362880);
  s = fma_(s, z, T(-1.0 / 5040));
  s = fma_(s, z, T(1.0 / 120));
  s = fma_(s, z, T(-1.0 / 6));
  s = fma_(s * z, theta, theta);
  const std::uint32_t quadrant = word >> 30;
  const T x = (quadrant & 1) ? s : c;
  const T y = (quadrant & 1) ? c : s;
  return {((quadrant + 1) & 2) ? -x : x, (quadrant & 2) ? -y : y};
}

}  // namespace dvla_fast
