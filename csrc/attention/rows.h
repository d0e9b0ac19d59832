// Moving rows between tensors of any dtype and stride and the tiles the kernels compute on.
#pragma once

#include <algorithm>
#include <cstring>

#include "attention/vec_math.h"

namespace dvla_fast::attention {

// Half types are computed in float32.
template <class scalar_t>
using Acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

#if defined(CPU_CAPABILITY_AVX512)
// The first n of 16 lanes, n > 0.
inline __mmask16 first_of_16(int64_t n) { return n >= 16 ? 0xFFFF : (1U << n) - 1; }

// 16 values of half types, those in `keep`, as float32. With a mask of all lanes where GCC 12 warns
// of the plain form's own undefined operand.
template <class half_t>
inline __m512 load_halves(const half_t* from, __mmask16 keep) {
  const __m256i bits = _mm256_maskz_loadu_epi16(keep, from);
  if constexpr (std::is_same_v<half_t, at::Half>) return _mm512_maskz_cvtph_ps(0xFFFF, bits);
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xFFFF, bits);
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, wide, 16));
}

// And back, rounded to nearest; bfloat16 in hardware makes 0 of what is below the normal numbers.
template <class half_t>
inline void store_halves(__m512 values, __mmask16 keep, half_t* to) {
  __m256i bits;
  if constexpr (std::is_same_v<half_t, at::Half>) {
    bits = _mm512_maskz_cvtps_ph(0xFFFF, values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
#if defined(__AVX512BF16__)
    bits = (__m256i)_mm512_cvtneps_pbh(values);
#else
    bits = at::vec::cvtfp32_bf16(values);
#endif
  }
  _mm256_mask_storeu_epi16(to, keep, bits);
}
#endif

// to[0..n) = factor * from[0..n).
template <class scalar_t>
inline void load_row(const scalar_t* from, int64_t stride, int64_t n, Acc<scalar_t> factor,
                     Acc<scalar_t>* to) {
  using acc_t = Acc<scalar_t>;
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = factor * static_cast<acc_t>(from[i * stride]);
    return;
  }
  const Vec<acc_t> f(factor);
  int64_t i = 0;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    for (; i + kLanes<acc_t> <= n; i += kLanes<acc_t>) {
      (f * Vec<acc_t>::loadu(from + i)).store(to + i);
    }
    if (i < n) (f * Vec<acc_t>::loadu(from + i, n - i)).store(to + i, n - i);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    for (; i < n; i += 16) {
      const __mmask16 keep = first_of_16(n - i);
      _mm512_mask_storeu_ps(to + i, keep, f * Vec<float>(load_halves(from + i, keep)));
    }
#else
    constexpr int64_t lanes = kLanes<float>;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      const auto [low, high] = at::vec::convert_to_float(Vec<scalar_t>::loadu(from + i));
      (f * low).store(to + i);
      (f * high).store(to + i + lanes);
    }
    if (i < n) {
      const auto [low, high] = at::vec::convert_to_float(Vec<scalar_t>::loadu(from + i, n - i));
      (f * low).store(to + i, std::min(lanes, n - i));
      if (n - i > lanes) (f * high).store(to + i + lanes, n - i - lanes);
    }
#endif
  }
}

// to[0..n) = from[0..n), rounded to the tensor's dtype; `to` has unit stride.
template <class scalar_t>
inline void store_row(const Acc<scalar_t>* from, int64_t n, scalar_t* to) {
  using acc_t = Acc<scalar_t>;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    std::memcpy(to, from, n * sizeof(scalar_t));
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 keep = first_of_16(n - i);
      store_halves(_mm512_maskz_loadu_ps(keep, from + i), keep, to + i);
    }
#else
    constexpr int64_t lanes = kLanes<float>;
    int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      at::vec::convert_from_float<scalar_t>(Vec<float>::loadu(from + i),
                                            Vec<float>::loadu(from + i + lanes))
          .store(to + i);
    }
    if (i < n) {
      const int64_t left = n - i;
      const Vec<float> low = Vec<float>::loadu(from + i, std::min(lanes, left));
      const Vec<float> high =
          left > lanes ? Vec<float>::loadu(from + i + lanes, left - lanes) : Vec<float>(0.0f);
      at::vec::convert_from_float<scalar_t>(low, high).store(to + i, left);
    }
#endif
  }
}

// The matrix of one (outer, head) of a 4-d tensor: rows are tokens, columns the head dimension.
template <class scalar_t>
struct Matrix {
  const scalar_t* data;
  int64_t row, column;  // strides
};

// The last vector of `n` values = 0. (std::fill of a few values is a call of memset.)
template <class acc_t>
inline void clear_last(acc_t* to, int64_t n) {
  Vec<acc_t>(acc_t(0)).store(to + n - kLanes<acc_t>);
}

// to (count, width) with row stride ld, `width` or that in whole vectors, = factor * rows [first,
// first + count) of `from`; the columns above `width` become 0. `index` chooses the rows, nullptr:
// as they lie.
template <class scalar_t>
inline void load_rows(const Matrix<scalar_t>& from, const int64_t* index, int64_t first,
                      int64_t count, int64_t width, Acc<scalar_t> factor, Acc<scalar_t>* to,
                      int64_t ld) {
  for (int64_t i = 0; i < count; ++i, to += ld) {
    const int64_t n = index ? index[first + i] : first + i;
    if (width < ld) clear_last(to, ld);
    load_row(from.data + n * from.row, from.column, width, factor, to);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// to (columns, rows) = from (rows, columns)', of at most 16 rows and columns; of both where
// `whole`. Blocks of 1, 2, 4 and 8 values change places in turn, all in registers.
template <bool whole>
inline void transpose_square(const float* from, int64_t ld_from, int64_t rows, int64_t columns,
                             float* to, int64_t ld_to) {
  // With a mask of all lanes: GCC 12 warns of the plain forms' own undefined operand.
  constexpr __mmask16 all = 0xFFFF;
  const __mmask16 row_mask = whole ? all : (1U << columns) - 1;
  const __mmask16 column_mask = whole ? all : (1U << rows) - 1;
  __m512 x[16];
  __m512d y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const bool there = whole || i < rows;
    x[i] = _mm512_maskz_loadu_ps(there ? row_mask : 0, from + (there ? i * ld_from : 0));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(all, x[i], x[i + 1]));
    y[i + 1] = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(all, x[i], x[i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xFF, y[i], y[i + 2]));
    x[i + 1] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xFF, y[i], y[i + 2]));
    x[i + 2] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xFF, y[i + 1], y[i + 3]));
    x[i + 3] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xFF, y[i + 1], y[i + 3]));
  }
  // x[4 g + c]: columns c, c + 4, c + 8, c + 12 of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 low_even = _mm512_maskz_shuffle_f32x4(all, x[c], x[c + 4], 0x88);
    const __m512 low_odd = _mm512_maskz_shuffle_f32x4(all, x[c], x[c + 4], 0xDD);
    const __m512 high_even = _mm512_maskz_shuffle_f32x4(all, x[c + 8], x[c + 12], 0x88);
    const __m512 high_odd = _mm512_maskz_shuffle_f32x4(all, x[c + 8], x[c + 12], 0xDD);
    x[c] = _mm512_maskz_shuffle_f32x4(all, low_even, high_even, 0x88);
    x[c + 4] = _mm512_maskz_shuffle_f32x4(all, low_odd, high_odd, 0x88);
    x[c + 8] = _mm512_maskz_shuffle_f32x4(all, low_even, high_even, 0xDD);
    x[c + 12] = _mm512_maskz_shuffle_f32x4(all, low_odd, high_odd, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (!whole && i >= columns) break;
    _mm512_mask_storeu_ps(to + i * ld_to, column_mask, x[i]);
  }
}
#endif

// to (columns, rows) = from (rows, columns)'.
template <class acc_t>
inline void transpose(const acc_t* from, int64_t ld_from, int64_t rows, int64_t columns, acc_t* to,
                      int64_t ld_to) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<acc_t, float>) {
    for (int64_t r = 0; r < rows; r += 16) {
      for (int64_t c = 0; c < columns; c += 16) {
        const float* square = from + r * ld_from + c;
        float* place = to + c * ld_to + r;
        const int64_t high = rows - r, wide = columns - c;
        if (high >= 16 && wide >= 16) {
          transpose_square<true>(square, ld_from, 16, 16, place, ld_to);
        } else {
          transpose_square<false>(square, ld_from, std::min<int64_t>(16, high),
                                  std::min<int64_t>(16, wide), place, ld_to);
        }
      }
    }
    return;
  }
#endif
  [[maybe_unused]] constexpr int64_t side = 8;
  int64_t whole_rows = 0, whole_columns = 0;
#if defined(CPU_CAPABILITY_AVX2)
  // torch has a kernel for one square alone: for other sizes its loop is scalar.
  if constexpr (std::is_same_v<acc_t, float>) {
    whole_rows = rows / side * side, whole_columns = columns / side * side;
    for (int64_t r = 0; r < whole_rows; r += side) {
      for (int64_t c = 0; c < whole_columns; c += side) {
        at::vec::transpose_mxn<float, side, side>(from + r * ld_from + c, ld_from,
                                                  to + c * ld_to + r, ld_to);
      }
    }
  }
#endif
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
      to[c * ld_to + r] = from[r * ld_from + c];
    }
  }
}

// A run of query tokens that lie in the lanes of `vecs` vectors, one panel of P tokens in all.
struct Panel {
  int64_t first;  // token of the first lane
  int64_t count;  // tokens; the lanes above them are padding
  int64_t vecs;
};

// Panels whose scores the backward holds side by side, so that the products that sum over queries
// run over all of them at once.
constexpr int64_t kStripPanels = 2;

// The panels that P tokens fall into. A buffer "in panels" of X values a token holds, panel after
// panel, X rows of vecs * lanes values: panel i starts at panel.first * X.
template <class acc_t>
struct Panels {
  explicit Panels(int64_t tokens)
      : tokens(tokens),
        vecs(ceil_div(tokens, kLanes<acc_t>)),
        count(ceil_div(vecs, kMaxVecs)),
        lanes(vecs * kLanes<acc_t>) {}

  // Lanes of the widest panel.
  int64_t panel_lanes() const { return std::min(vecs, kMaxVecs) * kLanes<acc_t>; }
  // Lanes of the widest strip.
  int64_t strip_lanes() const { return std::min(vecs, kStripPanels * kMaxVecs) * kLanes<acc_t>; }

  Panel operator[](int64_t i) const {
    const int64_t begin = vecs * i / count, end = vecs * (i + 1) / count;
    const int64_t first = begin * kLanes<acc_t>;
    return {first, std::min(tokens - first, (end - begin) * kLanes<acc_t>), end - begin};
  }

  int64_t tokens, vecs, count, lanes;
};

// Panels [first, last); places in their buffers count from the first one's.
template <class acc_t>
struct PanelRange {
  int64_t start() const { return panels[first].first; }
  int64_t lanes() const {
    const Panel end = panels[last - 1];
    return end.first + end.vecs * kLanes<acc_t> - start();
  }
  // f(vectors as a constant, lane) for each panel.
  template <class F>
  void each(const F& f) const {
    for (int64_t i = first; i < last; ++i) {
      const Panel panel = panels[i];
      with_vecs(panel.vecs, [&](auto V) { f(V, panel.first - start()); });
    }
  }

  const Panels<acc_t>& panels;
  int64_t first, last;
};

// rows (panel.count, width), row stride ld, to one panel (width, vecs * lanes); padding becomes 0.
template <class acc_t>
inline void rows_to_panel(const acc_t* rows, int64_t ld, int64_t width, const Panel& panel,
                          acc_t* to) {
  const int64_t wide = panel.vecs * kLanes<acc_t>;
  if (panel.count < wide) {
    for (int64_t d = 0; d < width; ++d) clear_last(to + d * wide, wide);
  }
  transpose(rows, ld, panel.count, width, to, wide);
}

// One panel (width, vecs * lanes) to rows of a tensor (tokens, width) with unit column stride.
// `rows` is scratch for panel.count rows of `ld` >= width values.
template <class scalar_t>
inline void store_panel(const Acc<scalar_t>* from, const Panel& panel, int64_t width,
                        Acc<scalar_t>* rows, int64_t ld, scalar_t* to, int64_t to_row) {
  using acc_t = Acc<scalar_t>;
  const int64_t wide = panel.vecs * kLanes<acc_t>;
  to += panel.first * to_row;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    transpose(from, wide, width, panel.count, to, to_row);
  } else {
    transpose(from, wide, width, panel.count, rows, ld);
    for (int64_t p = 0; p < panel.count; ++p) store_row(rows + p * ld, width, to + p * to_row);
  }
}

// rows (count, width) to rows [first, first + count) of a tensor, those that `index` chooses.
template <class scalar_t>
inline void store_rows(const Acc<scalar_t>* from, int64_t ld, const int64_t* index, int64_t first,
                       int64_t count, int64_t width, scalar_t* to, int64_t to_row) {
  for (int64_t j = 0; j < count; ++j) {
    const int64_t n = index ? index[first + j] : first + j;
    store_row(from + j * ld, width, to + n * to_row);
  }
}

}  // namespace dvla_fast::attention
