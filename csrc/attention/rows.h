// Moving rows between tensors of any dtype and stride and the tiles the kernels compute on.
#pragma once

#include <algorithm>
#include <cstring>

#include "attention/vec_math.h"

namespace dvla_fast::attention {

// Half types are computed in float32.
template <class scalar_t>
using Acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

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
  }
}

// to[0..n) = from[0..n), rounded to the tensor's dtype; `to` has unit stride.
template <class scalar_t>
inline void store_row(const Acc<scalar_t>* from, int64_t n, scalar_t* to) {
  using acc_t = Acc<scalar_t>;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    std::memcpy(to, from, n * sizeof(scalar_t));
  } else {
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
  }
}

// The matrix of one (outer, head) of a 4-d tensor: rows are tokens, columns the head dimension.
template <class scalar_t>
struct Matrix {
  const scalar_t* data;
  int64_t row, column;  // strides
};

// to (count, width) with row stride ld = factor * rows [first, first + count) of `from`; columns
// [width, ld) become 0. `index` chooses the rows, nullptr: as they lie.
template <class scalar_t>
inline void load_rows(const Matrix<scalar_t>& from, const int64_t* index, int64_t first,
                      int64_t count, int64_t width, Acc<scalar_t> factor, Acc<scalar_t>* to,
                      int64_t ld) {
  for (int64_t i = 0; i < count; ++i, to += ld) {
    const int64_t n = index ? index[first + i] : first + i;
    load_row(from.data + n * from.row, from.column, width, factor, to);
    std::fill(to + width, to + ld, Acc<scalar_t>(0));
  }
}

// to (columns, rows) = from (rows, columns)'.
template <class acc_t>
inline void transpose(const acc_t* from, int64_t ld_from, int64_t rows, int64_t columns, acc_t* to,
                      int64_t ld_to) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<acc_t, float>) {
    return at::vec::transpose_mxn<float>(from, ld_from, to, ld_to, static_cast<int>(rows),
                                         static_cast<int>(columns));
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
  transpose(rows, ld, panel.count, width, to, wide);
  if (panel.count == wide) return;
  for (int64_t d = 0; d < width; ++d) {
    std::fill(to + d * wide + panel.count, to + (d + 1) * wide, acc_t(0));
  }
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
