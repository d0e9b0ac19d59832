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

// exp(x) within 1.3 units in the last place where the result is a normal number, 0 below, and NaN
// where x is; meant for x <= 0 (a score less its maximum) or little above. exp x = 2^k exp r with
// |r| <= ln 2 / 2, and exp r = 1 + r + r^2 P(r), P of the least relative error (3.1e-9), summed in
// Estrin's order: the chain of Horner's would be waited for.
inline Vec<float> exp_shifted(const Vec<float>& x) {
  [[maybe_unused]] constexpr float kLog2e = 0x1.715476p0f;
  [[maybe_unused]] constexpr float kLn2High = 0x1.62e4p-1f;  // 14 zero bits: k * kLn2High is exact
  [[maybe_unused]] constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  [[maybe_unused]] constexpr float kSmallest = -87.33654f;  // log of the smallest normal number
  [[maybe_unused]] constexpr float kSeries[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f,
                                                0x1.1239e4p-7f, 0x1.6a2432p-10f};
#if defined(CPU_CAPABILITY_AVX512)
  // With a mask of all lanes: GCC 12 warns of the plain form's own undefined operand.
  const __m512 k = _mm512_maskz_roundscale_ps(0xFFFF, _mm512_mul_ps(x, _mm512_set1_ps(kLog2e)),
                                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_fnmadd_ps(k, _mm512_set1_ps(kLn2Low),
                                    _mm512_fnmadd_ps(k, _mm512_set1_ps(kLn2High), x));
  const __m512 r2 = _mm512_mul_ps(r, r);
  const __m512 high =
      _mm512_fmadd_ps(_mm512_set1_ps(kSeries[4]), r2,
                      _mm512_fmadd_ps(_mm512_set1_ps(kSeries[3]), r, _mm512_set1_ps(kSeries[2])));
  const __m512 series = _mm512_fmadd_ps(
      high, r2, _mm512_fmadd_ps(_mm512_set1_ps(kSeries[1]), r, _mm512_set1_ps(kSeries[0])));
  const __m512 power = _mm512_fmadd_ps(series, r2, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  // "Not less, or unordered" keeps NaN.
  const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kSmallest), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(keep, power, k);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 k = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(kLog2e)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 r = _mm256_fnmadd_ps(k, _mm256_set1_ps(kLn2Low),
                                    _mm256_fnmadd_ps(k, _mm256_set1_ps(kLn2High), x));
  const __m256 r2 = _mm256_mul_ps(r, r);
  const __m256 high =
      _mm256_fmadd_ps(_mm256_set1_ps(kSeries[4]), r2,
                      _mm256_fmadd_ps(_mm256_set1_ps(kSeries[3]), r, _mm256_set1_ps(kSeries[2])));
  const __m256 series = _mm256_fmadd_ps(
      high, r2, _mm256_fmadd_ps(_mm256_set1_ps(kSeries[1]), r, _mm256_set1_ps(kSeries[0])));
  const __m256 power = _mm256_fmadd_ps(series, r2, _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  // k is added to the exponent as an integer. A NaN of x is in `power`, and its k converts to a
  // number whose low bits are 0.
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(k), 23);
  const __m256 keep = _mm256_cmp_ps(x, _mm256_set1_ps(kSmallest), _CMP_NLT_UQ);
  return _mm256_and_ps(keep,
                       _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent)));
#else
  return x.exp();
#endif
}

// Sum of a[i] b[i] over n values, n a multiple of the lanes.
template <class acc_t>
inline acc_t dot(const acc_t* a, const acc_t* b, int64_t n) {
  Vec<acc_t> sum(acc_t(0));
  for (int64_t i = 0; i < n; i += kLanes<acc_t>) {
    sum = at::vec::fmadd(Vec<acc_t>::loadu(a + i), Vec<acc_t>::loadu(b + i), sum);
  }
  acc_t lane[kLanes<acc_t>];
  sum.store(lane);
  for (int64_t step = kLanes<acc_t> / 2; step > 0; step /= 2) {
    for (int64_t i = 0; i < step; ++i) lane[i] += lane[i + step];
  }
  return lane[0];
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
