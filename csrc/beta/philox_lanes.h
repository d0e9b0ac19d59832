// Philox for many elements at once on the CPU. A counter word lies in the low half of a 64-bit
// lane: its product with the multiplier is one instruction, the high half of the product one shift,
// and what is left above the low half never counts. Compilers shuffle halves back and forth
// instead.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "beta/philox.h"

namespace dvla_fast {

#if defined(__AVX512F__)
struct WordLanes {
  using Lanes = __m512i;
  static Lanes all(std::uint32_t x) { return _mm512_set1_epi64(x); }
  static Lanes load(const std::uint32_t* from) { return _mm512_loadu_si512(from); }
  static void store(std::uint32_t* to, Lanes x) { _mm512_storeu_si512(to, x); }
  static Lanes product(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
  static Lanes high(Lanes x) { return _mm512_srli_epi64(x, 32); }
  static Lanes mixed(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static Lanes joined(Lanes even, Lanes odd) {
    return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  }
};
#elif defined(__AVX2__)
struct WordLanes {
  using Lanes = __m256i;
  static Lanes all(std::uint32_t x) { return _mm256_set1_epi64x(x); }
  static Lanes load(const std::uint32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void store(std::uint32_t* to, Lanes x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
  }
  static Lanes product(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
  static Lanes high(Lanes x) { return _mm256_srli_epi64(x, 32); }
  static Lanes mixed(Lanes a, Lanes b, Lanes c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
  }
  static Lanes joined(Lanes even, Lanes odd) {
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
};
#endif

// Words w of block `block` of the elements {low[j], high}, to out[w][j], for j in [0, count);
// `count` is a multiple of 16.
template <int kSize>
void draw_lanes(const Stream& stream, const std::uint32_t* low, std::uint32_t high, int count,
                std::uint32_t block, std::uint32_t (*out)[kSize]) {
  static_assert(kSize % 16 == 0);
#if defined(__AVX2__)
  using W = WordLanes;
  using Lanes = W::Lanes;
  constexpr int step = sizeof(Lanes) / sizeof(std::uint32_t);
  const Lanes left = W::all(kPhiloxLeft), right = W::all(kPhiloxRight);
  Lanes keys[kPhiloxRounds][2];
  for (std::uint32_t round = 0; round < kPhiloxRounds; ++round) {
    keys[round][0] = W::all(stream.seed_low + round * kPhiloxKey0);
    keys[round][1] = W::all(stream.seed_high + round * kPhiloxKey1);
  }
  for (int j = 0; j < count; j += step) {
    const Lanes elements = W::load(low + j);
    Lanes words[2][4];  // of the even elements and of the odd ones
    for (int part = 0; part < 2; ++part) {
      words[part][0] = part ? W::high(elements) : elements;
      words[part][1] = W::all(high);
      words[part][2] = W::all(block);
      words[part][3] = W::all(stream.offset);
    }
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 2
      for (int part = 0; part < 2; ++part) {
        Lanes* w = words[part];
        const Lanes first = W::product(left, w[0]), second = W::product(right, w[2]);
        w[0] = W::mixed(W::high(second), w[1], keys[round][0]);
        w[1] = second;
        w[2] = W::mixed(W::high(first), w[3], keys[round][1]);
        w[3] = first;
      }
    }
    for (int w = 0; w < 4; ++w) W::store(out[w] + j, W::joined(words[0][w], words[1][w]));
  }
#else
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const Words words = stream.draw({low[j], high}, block);
    out[0][j] = words.w0, out[1][j] = words.w1, out[2][j] = words.w2, out[3][j] = words.w3;
  }
#endif
}

}  // namespace dvla_fast
