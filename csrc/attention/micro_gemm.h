// Small matrix product on register tiles: C (+)= A B, where the columns of B and C lie in vector
// lanes and A is read one value at a time and broadcast. A is used as it lies in memory, plain or
// transposed, so that keys, values and scores need no repacking between the products of attention.
#pragma once

#include "attention/vec_math.h"

namespace dvla_fast::attention {

// A row of C that is not whole vectors: `tail` values in the last one, 0 for all.
template <bool partial, int V, class acc_t>
inline __attribute__((always_inline)) Vec<acc_t> load_part(const acc_t* from, int v, int64_t tail) {
  if constexpr (partial) {
    if (v == V - 1) return Vec<acc_t>::loadu(from, tail);
  }
  return Vec<acc_t>::loadu(from);
}

template <bool partial, int V, class acc_t>
inline __attribute__((always_inline)) void store_part(const Vec<acc_t>& value, acc_t* to, int v,
                                                      int64_t tail) {
  if constexpr (partial) {
    if (v == V - 1) return value.store(to, static_cast<int>(tail));
  }
  value.store(to);
}

// Rows of two matrices to be fetched while a product works on the same rows of another. The tokens
// of a head lie apart by the width of all heads, in short pieces that hardware does not foresee.
struct Ahead {
  const void *first = nullptr, *second = nullptr;
  int64_t first_row = 0, second_row = 0;  // bytes from one row to the next
  int64_t bytes = 0;                      // of a row; 0: nothing is to be fetched

  // Inlined by force: as a function without effects, its calls would be removed.
  inline __attribute__((always_inline)) void fetch(int64_t row) const {
    const char* a = static_cast<const char*>(first) + row * first_row;
    const char* b = static_cast<const char*>(second) + row * second_row;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(a + i), __builtin_prefetch(b + i);
    __builtin_prefetch(a + bytes - 1), __builtin_prefetch(b + bytes - 1);
  }
};

// One tile of R rows and V vectors. A (R, K): element (r, k) at a[r * lda + k], or at
// a[k * lda + r] when transposed. B (K, V * lanes) with row stride ldb, C likewise with ldc, of
// which only the first `tail` lanes of the last vector exist when `partial`.
template <bool transposed, bool partial, int R, int V, class acc_t>
inline __attribute__((always_inline)) void gemm_tile(int64_t K, const acc_t* a, int64_t lda,
                                                     const acc_t* b, int64_t ldb, acc_t* c,
                                                     int64_t ldc, int64_t tail, bool add) {
  constexpr int64_t lanes = kLanes<acc_t>;
  Vec<acc_t> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sum[r][v] = Vec<acc_t>(acc_t(0));
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
    for (int v = 0; v < V; ++v) {
      acc_t* to = c + r * ldc + v * lanes;
      // Added last: a sum over many blocks of keys then rounds once a block, not once a key.
      if (add) sum[r][v] = load_part<partial, V, acc_t>(to, v, tail) + sum[r][v];
      store_part<partial, V, acc_t>(sum[r][v], to, v, tail);
    }
  }
}

// All M rows of a column of tiles V vectors wide; the rows left over take tiles of half the height.
template <bool transposed, bool partial, int R, int V, class acc_t>
inline void gemm_rows(int64_t M, int64_t K, const acc_t* a, int64_t lda, const acc_t* b,
                      int64_t ldb, acc_t* c, int64_t ldc, int64_t tail, bool add,
                      const Ahead& ahead = {}) {
  int64_t m = 0;
  for (; m + R <= M; m += R) {
    if (ahead.bytes > 0) {
      for (int64_t r = 0; r < R; ++r) ahead.fetch(m + r);
    }
    gemm_tile<transposed, partial, R, V>(K, a + (transposed ? m : m * lda), lda, b, ldb,
                                         c + m * ldc, ldc, tail, add);
  }
  if constexpr (R > 1) {
    if (m < M) {
      gemm_rows<transposed, partial, R / 2, V>(M - m, K, a + (transposed ? m : m * lda), lda, b,
                                               ldb, c + m * ldc, ldc, tail, add);
    }
  }
}

// C (M, columns) = A B, or C += A B when `add`. B has whole vectors, C need not.
template <bool transposed, class acc_t>
void gemm(int64_t M, int64_t columns, int64_t K, const acc_t* a, int64_t lda, const acc_t* b,
          int64_t ldb, acc_t* c, int64_t ldc, bool add) {
  constexpr int64_t lanes = kLanes<acc_t>;
  const int64_t vecs = ceil_div(columns, lanes), tail = columns % lanes;
  const int64_t strips = ceil_div(vecs, kMaxVecs);
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t first = vecs * i / strips, last = vecs * (i + 1) / strips;
    const int64_t offset = first * lanes;
    with_vecs(last - first, [&](auto width) {
      if (tail && i == strips - 1) {
        gemm_rows<transposed, true, kTileRows, width()>(M, K, a, lda, b + offset, ldb, c + offset,
                                                        ldc, tail, add);
      } else {
        gemm_rows<transposed, false, kTileRows, width()>(M, K, a, lda, b + offset, ldb, c + offset,
                                                         ldc, 0, add);
      }
    });
  }
}

}  // namespace dvla_fast::attention
