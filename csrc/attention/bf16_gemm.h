// Matrix products of bfloat16 with float32 sums, on AMX tiles or, without them, AVX512-BF16.
//
// C (M, 16 V) (+)= A (M, K) B (K, 16 V): A lies row by row, B in pairs of rows: element (k, n) at
// ((k / 2) * columns + n) * 2 + k % 2. M is a multiple of kRowStep and K of kDepthStep: operands
// are packed with that padding, which must be 0 along K in one operand and no NaN in the other.
#pragma once

#if defined(__AVX512BF16__)

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "attention/micro_gemm.h"
#include "attention/rows.h"

namespace dvla_fast::attention {

using bf16 = c10::BFloat16;

constexpr int64_t kTile = 16;  // columns of a tile of C, lanes of a vector
#if defined(__AMX_BF16__)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif
// What rows of C, and rows of B, are padded to: whole tiles, or whole pairs.
constexpr int64_t kRowStep = kTiles ? 16 : 1, kDepthStep = kTiles ? 32 : 2;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// In vectors, of any M and even K, A lying row by row or, where `paired`, in pairs of columns:
// element (m, k) at ((k / 2) * lda + m) * 2 + k % 2. Of C's last vector only the lanes in `last`
// exist; where C is bfloat16 it is `factor` times the product, rounded, and nothing is added. Tiles
// are R rows high; the rows left over take tiles of half the height.
template <bool paired, int V, int R = 8, class out_t = float>
inline void bf16_gemm_rows(int64_t M, int64_t K, const bf16* a, int64_t lda, const bf16* b,
                           int64_t ldb, out_t* c, int64_t ldc, bool add, __mmask16 last,
                           float factor = 1.0f) {
  int64_t m = 0;
  for (; m + R <= M; m += R, a += paired ? 2 * R : R * lda, c += R * ldc) {
    __m512 sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < K; k += 2) {
      __m512bh row[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) row[v] = (__m512bh)_mm512_loadu_si512(b + k * ldb + v * 32);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, paired ? a + k * lda + 2 * r : a + r * lda + k, sizeof(pair));
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], value, row[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        out_t* to = c + r * ldc + v * 16;
        const __mmask16 lanes = v == V - 1 ? last : 0xFFFF;
        if constexpr (std::is_same_v<out_t, float>) {
          // Added last, as in gemm_tile.
          if (add) sum[r][v] = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), sum[r][v]);
          _mm512_mask_storeu_ps(to, lanes, sum[r][v]);
        } else {
          store_halves(_mm512_mul_ps(_mm512_set1_ps(factor), sum[r][v]), lanes, to);
        }
      }
    }
  }
  if constexpr (R > 1) {
    if (m < M) {
      bf16_gemm_rows<paired, V, R / 2>(M - m, K, a, lda, b, ldb, c, ldc, add, last, factor);
    }
  }
}

#if defined(__AMX_BF16__)

// While it lives, the thread's tile registers are 16 rows of 64 bytes.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// Tiles 0 to 2 are C, 3 to 5 are B, 6 is A.
template <int V>
inline void bf16_gemm_columns(int64_t M, int64_t K, const bf16* a, int64_t lda, const bf16* b,
                              int64_t ldb, float* c, int64_t ldc, bool add) {
  const int64_t b_bytes = ldb * 4, a_bytes = lda * 2, c_bytes = ldc * 4;
  for (int64_t m = 0; m < M; m += kTile, a += kTile * lda, c += kTile * ldc) {
    if (add) {
      _tile_loadd(0, c, c_bytes);
      if constexpr (V > 1) _tile_loadd(1, c + 16, c_bytes);
      if constexpr (V > 2) _tile_loadd(2, c + 32, c_bytes);
    } else {
      _tile_zero(0);
      if constexpr (V > 1) _tile_zero(1);
      if constexpr (V > 2) _tile_zero(2);
    }
    for (int64_t k = 0; k < K; k += kDepthStep) {
      const bf16* rows = b + k * ldb;
      _tile_loadd(6, a + k, a_bytes);
      _tile_loadd(3, rows, b_bytes);
      _tile_dpbf16ps(0, 6, 3);
      if constexpr (V > 1) {
        _tile_loadd(4, rows + 32, b_bytes);
        _tile_dpbf16ps(1, 6, 4);
      }
      if constexpr (V > 2) {
        _tile_loadd(5, rows + 64, b_bytes);
        _tile_dpbf16ps(2, 6, 5);
      }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (V > 1) _tile_stored(1, c + 16, c_bytes);
    if constexpr (V > 2) _tile_stored(2, c + 32, c_bytes);
  }
}

#else

struct TileSession {};

template <int V>
inline void bf16_gemm_columns(int64_t M, int64_t K, const bf16* a, int64_t lda, const bf16* b,
                              int64_t ldb, float* c, int64_t ldc, bool add) {
  bf16_gemm_rows<false, V>(M, K, a, lda, b, ldb, c, ldc, add, 0xFFFF);
}

#endif

// C (M, columns), columns a multiple of 16. lda and ldc count elements, ldb columns of B.
inline void bf16_gemm(int64_t M, int64_t columns, int64_t K, const bf16* a, int64_t lda,
                      const bf16* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  const int64_t vecs = columns / kTile, strips = ceil_div(vecs, kMaxVecs);
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t first = vecs * i / strips, last = vecs * (i + 1) / strips;
    with_vecs(last - first, [&](auto V) {
      bf16_gemm_columns<V()>(M, K, a, lda, b + first * kTile * 2, ldb, c + first * kTile, ldc, add);
    });
  }
}

// to (M, width), row by row, = factor A B, rounded; in vectors. B's columns are whole vectors.
inline void bf16_gemm_rounded(int64_t M, int64_t width, int64_t K, const bf16* a, int64_t lda,
                              const bf16* b, int64_t ldb, float factor, bf16* to, int64_t ld) {
  const int64_t vecs = ceil_div(width, kTile), strips = ceil_div(vecs, kMaxVecs);
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t first = vecs * i / strips * kTile, last = vecs * (i + 1) / strips * kTile;
    with_vecs((last - first) / kTile, [&](auto V) {
      bf16_gemm_rows<false, V()>(M, K, a, lda, b + first * 2, ldb, to + first, ld, false,
                                 first_of_16(width - last + kTile), factor);
    });
  }
}

// 16 values of two rows, rounded: `low` in the lower half of the result.
inline __m512i round_pair(__m512 low, __m512 high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// The halves' values in turn: a pair of rows as B wants it.
inline __m512i interleave(__m512i halves) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}

// 16 values of two rows in turn, from the first'th on.
template <int first>
inline __m512i interleave(__m512i low, __m512i high) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i order = _mm512_add_epi16(_mm512_load_si512(kOrder), _mm512_set1_epi16(first));
  return _mm512_permutex2var_epi16(low, order, high);
}

// A mask of the first n of 32 lanes, n being any number.
inline __mmask32 first_of_32(int64_t n) {
  return n >= 32 ? 0xFFFFFFFFU : n > 0 ? (1U << n) - 1 : 0;
}

// Rows (count, width) to B's layout (rows, columns): `rows` even and >= count, `columns` a multiple
// of 16 and >= width; the rest is 0.
inline void pack_pairs(const bf16* from, int64_t ld, int64_t count, int64_t width, int64_t rows,
                       int64_t columns, bf16* to, const Ahead& ahead = {}) {
  for (int64_t n = 0; n < rows; n += 2, to += 2 * columns) {
    if (ahead.bytes > 0) ahead.fetch(n), ahead.fetch(n + 1);
    for (int64_t d = 0; d < columns; d += 32) {
      const bf16* row = from + n * ld + d;
      const __mmask32 keep = first_of_32(width - d);
      const __m512i low = _mm512_maskz_loadu_epi16(n < count ? keep : 0, row);
      const __m512i high = _mm512_maskz_loadu_epi16(n + 1 < count ? keep : 0, row + ld);
      _mm512_storeu_si512(to + 2 * d, interleave<0>(low, high));
      if (d + 16 < columns) _mm512_storeu_si512(to + 2 * d + 32, interleave<16>(low, high));
    }
  }
}

// to (columns, rows) pairs of values = from (rows, columns) pairs; strides in pairs.
inline void transpose_pairs(const bf16* from, int64_t ld_from, int64_t rows, int64_t columns,
                            bf16* to, int64_t ld_to) {
  transpose(reinterpret_cast<const float*>(from), ld_from, rows, columns,
            reinterpret_cast<float*>(to), ld_to);
}

}  // namespace dvla_fast::attention

#endif
