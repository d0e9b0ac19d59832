// What host and device code share: a function marker and the operations that every machine rounds
// the same way.
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

DVLA_HD double abs_(double a) { return __builtin_fabs(a); }
DVLA_HD float abs_(float a) { return __builtin_fabsf(a); }

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

}  // namespace dvla_fast
