// Vector building blocks of the attention kernels: the vector type, exp, dot product, buffers.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

namespace dvla_fast::attention {

template <class acc_t>
using Vec = at::vec::Vectorized<acc_t>;

template <class acc_t>
constexpr int64_t kLanes = Vec<acc_t>::size();

// A tile is at most this many vectors wide, and kTileRows high: the sums fill the register file
// (32 vector registers with AVX-512, 16 below) beside the operands.
constexpr int64_t kMaxVecs = 3;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

// Long sums of weights are added up in runs of this many, which keeps their rounding small.
constexpr int64_t kSumRows = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class acc_t>
constexpr int64_t padded(int64_t n) {
  return ceil_div(n, kLanes<acc_t>) * kLanes<acc_t>;
}

constexpr float kLog2e = 0x1.715476p0f;

// Calls f(std::integral_constant<int, vecs>{}) for vecs in 1..kMaxVecs.
template <class F>
inline void with_vecs(int64_t vecs, const F& f) {
  static_assert(kMaxVecs == 3);
  switch (vecs) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    default:
      return f(std::integral_constant<int, 3>{});
  }
}

inline Vec<double> exp_shifted(const Vec<double>& x) { return x.exp(); }

#if defined(CPU_CAPABILITY_AVX512)
// The nearest integers. With a mask of all lanes: GCC 12 warns of the plain form's own undefined
// operand.
inline Vec<float> rounded(const Vec<float>& x) {
  return _mm512_maskz_roundscale_ps(0xFFFF, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// power 2^k where x is not below `smallest`, else 0. "Not less, or unordered" keeps NaN.
inline Vec<float> scaled(const Vec<float>& power, const Vec<float>& k, const Vec<float>& x,
                         float smallest) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(smallest), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(keep, power, k);
}
#elif defined(CPU_CAPABILITY_AVX2)
inline Vec<float> rounded(const Vec<float>& x) { return x.round(); }

// As above. k is added to the exponent as an integer: a NaN of x is in `power`, and its k converts
// to a number whose low bits are 0.
inline Vec<float> scaled(const Vec<float>& power, const Vec<float>& k, const Vec<float>& x,
                         float smallest) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(k), 23);
  const __m256 keep = _mm256_cmp_ps(x, _mm256_set1_ps(smallest), _CMP_NLT_UQ);
  return _mm256_and_ps(keep,
                       _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent)));
}
#endif

// exp(x) within 1.3 units in the last place where the result is a normal number, 0 below, and NaN
// where x is; meant for x <= 0 (a score less its maximum) or little above. exp x = 2^k exp r with
// |r| <= ln 2 / 2, and exp r = 1 + r + r^2 P(r), P of the least relative error (3.1e-9), summed in
// Estrin's order: the chain of Horner's would be waited for.
inline Vec<float> exp_shifted(const Vec<float>& x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  using V = Vec<float>;
  using at::vec::fmadd;
  constexpr float kLn2High = 0x1.62e4p-1f;  // 14 zero bits: k * kLn2High is exact
  constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  constexpr float kSmallest = -87.33654f;  // log of the smallest normal number
  const V k = rounded(x * V(kLog2e));
  const V r = fmadd(k, V(-kLn2Low), fmadd(k, V(-kLn2High), x)), r2 = r * r;
  const V high = fmadd(V(0x1.6a2432p-10f), r2, fmadd(V(0x1.1239e4p-7f), r, V(0x1.5558f2p-5f)));
  const V series = fmadd(high, r2, fmadd(V(0x1.555492p-3f), r, V(0x1.fffffcp-2f)));
  return scaled(fmadd(series, r2, r + V(1.0f)), k, x, kSmallest);
#else
  return x.exp();
#endif
}

template <class acc_t>
inline acc_t sum_lanes(const Vec<acc_t>& x) {
  acc_t lane[kLanes<acc_t>];
  x.store(lane);
  for (int64_t step = kLanes<acc_t> / 2; step > 0; step /= 2) {
    for (int64_t i = 0; i < step; ++i) lane[i] += lane[i + step];
  }
  return lane[0];
}

// sum + a[i] b[i] over n values, n a multiple of the lanes.
template <class acc_t>
inline Vec<acc_t> add_products(const acc_t* a, const acc_t* b, int64_t n, Vec<acc_t> sum) {
  for (int64_t i = 0; i < n; i += kLanes<acc_t>) {
    sum = at::vec::fmadd(Vec<acc_t>::loadu(a + i), Vec<acc_t>::loadu(b + i), sum);
  }
  return sum;
}

// Sum of a[i] b[i] over n values, n a multiple of the lanes.
template <class acc_t>
inline acc_t dot(const acc_t* a, const acc_t* b, int64_t n) {
  return sum_lanes(add_products(a, b, n, Vec<acc_t>(acc_t(0))));
}

// to[i] += factor from[i] over n values, n a multiple of the lanes.
template <class acc_t>
inline void add_scaled(acc_t* to, const acc_t* from, acc_t factor, int64_t n) {
  const Vec<acc_t> f(factor);
  for (int64_t i = 0; i < n; i += kLanes<acc_t>) {
    at::vec::fmadd(Vec<acc_t>::loadu(from + i), f, Vec<acc_t>::loadu(to + i)).store(to + i);
  }
}

}  // namespace dvla_fast::attention
