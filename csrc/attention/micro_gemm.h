// Small matrix product on register tiles: C (+)= A B, where the columns of B and C lie in vector
// lanes and A is read one value at a time and broadcast. A is used as it lies in memory, plain or
// transposed, so that keys, values and scores need no repacking between the products of attention.
#pragma once

#include "attention/vec_math.h"

namespace dvla_fast::attention {

// One tile of R rows and V vectors. A (R, K): element (r, k) at a[r * lda + k], or at
// a[k * lda + r] when transposed. B (K, V * lanes) with row stride ldb, C likewise with ldc.
template <bool transposed, int R, int V, class acc_t>
inline __attribute__((always_inline)) void gemm_tile(int64_t K, const acc_t* a, int64_t lda,
                                                     const acc_t* b, int64_t ldb, acc_t* c,
                                                     int64_t ldc, bool add) {
  constexpr int64_t lanes = kLanes<acc_t>;
  Vec<acc_t> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      sum[r][v] = add ? Vec<acc_t>::loadu(c + r * ldc + v * lanes) : Vec<acc_t>(acc_t(0));
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    Vec<acc_t> row[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) row[v] = Vec<acc_t>::loadu(b + k * ldb + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<acc_t> value(transposed ? a[k * lda + r] : a[r * lda + k]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[r][v] = at::vec::fmadd(value, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sum[r][v].store(c + r * ldc + v * lanes);
  }
}

// All M rows of a column of tiles V vectors wide; the rows left over take tiles of half the height.
template <bool transposed, int R, int V, class acc_t>
inline void gemm_rows(int64_t M, int64_t K, const acc_t* a, int64_t lda, const acc_t* b,
                      int64_t ldb, acc_t* c, int64_t ldc, bool add) {
  int64_t m = 0;
  for (; m + R <= M; m += R) {
    gemm_tile<transposed, R, V>(K, a + (transposed ? m : m * lda), lda, b, ldb, c + m * ldc, ldc,
                                add);
  }
  if constexpr (R > 1) {
    if (m < M) {
      gemm_rows<transposed, R / 2, V>(M - m, K, a + (transposed ? m : m * lda), lda, b, ldb,
                                      c + m * ldc, ldc, add);
    }
  }
}

// C (M, vecs * lanes) = A B, or C += A B when `add`.
template <bool transposed, class acc_t>
void gemm(int64_t M, int64_t vecs, int64_t K, const acc_t* a, int64_t lda, const acc_t* b,
          int64_t ldb, acc_t* c, int64_t ldc, bool add) {
  const int64_t columns = ceil_div(vecs, kMaxVecs);
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t first = vecs * i / columns, last = vecs * (i + 1) / columns;
    const int64_t offset = first * kLanes<acc_t>;
    with_vecs(last - first, [&](auto width) {
      gemm_rows<transposed, kTileRows, width()>(M, K, a, lda, b + offset, ldb, c + offset, ldc,
                                                add);
    });
  }
}

}  // namespace dvla_fast::attention
