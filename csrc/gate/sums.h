// Sums over the tokens of an image, in an order that follows from the shape alone: a library's
// reduction may cut columns up by the number of threads.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/add.h>

#include <algorithm>

#include "gate/problem.h"

namespace dvla_fast::gate {

// Columns that a thread takes at a time, and rows of a partial sum, which keep the rounding small.
constexpr int64_t kSumColumns = 128, kSumRows = 32;

// out (count) = share * the sum of `rows` rows; values of a row and rows are the strides apart.
template <class scalar_t>
void sum_rows(const scalar_t* from, int64_t row_stride, int64_t column_stride, int64_t rows,
              int64_t count, Acc<scalar_t> share, Acc<scalar_t>* out) {
  using acc_t = Acc<scalar_t>;
  acc_t row[kSumColumns], part[kSumColumns], total[kSumColumns] = {};
  for (int64_t first = 0; first < rows; first += kSumRows) {
    std::fill_n(part, count, acc_t(0));
    for (int64_t r = first; r < std::min(rows, first + kSumRows); ++r) {
      attention::load_row(from + r * row_stride, column_stride, count, acc_t(1), row);
      for (int64_t j = 0; j < count; ++j) part[j] += row[j];
    }
    for (int64_t j = 0; j < count; ++j) total[j] += part[j];
  }
  for (int64_t j = 0; j < count; ++j) out[j] = share * total[j];
}

// (images, 1, C) in the gate's type: the sum over rows of x (images, L, C), of any strides, over
// the number of each image's text tokens.
inline at::Tensor shared_sum(const Problem& z, const Chunk& c, const at::Tensor& x) {
  const at::Tensor out = new_empty({c.images, 1, z.C}, z.alpha.options());
  const at::Tensor shares = z.images(z.mean_share, c);  // [images, 1]
  const int64_t pieces = attention::ceil_div(z.C, kSumColumns), rows = x.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "gated_attention sum", [&] {
        using acc_t = Acc<scalar_t>;
        const scalar_t* from = x.const_data_ptr<scalar_t>();
        const acc_t* share = shares.const_data_ptr<acc_t>();
        acc_t* to = out.mutable_data_ptr<acc_t>();
        parallel_items(c.images * pieces, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t image = i / pieces, column = i % pieces * kSumColumns;
            sum_rows(from + image * x.stride(0) + column * x.stride(2), x.stride(1), x.stride(2),
                     rows, std::min(kSumColumns, z.C - column), share[image],
                     to + image * z.C + column);
          }
        });
      });
  return out;
}

// Updated tokens of more bytes than this are written past the caches. Otherwise each line would be
// read from memory before it is overwritten, which takes longer than the sum, and the next layer
// reads them from memory either way.
constexpr int64_t kStreamedBytes = 4 * 1024 * 1024;

// to (n) = a + b; `streamed`: past the caches, n whole vectors and `to` aligned to them.
template <bool streamed>
inline void add_rows(const float* a, const float* b, int64_t n, float* to) {
  int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (streamed) {
    for (; i < n; i += 16) {
      _mm512_stream_ps(to + i, _mm512_add_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i)));
    }
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (streamed) {
    for (; i < n; i += 8) {
      _mm256_stream_ps(to + i, _mm256_add_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i)));
    }
  }
#endif
  for (; i < n; ++i) to[i] = a[i] + b[i];
}

// updated = tokens + added (images, 1, C) for the images of a chunk.
inline void add_to_tokens(const Problem& z, const Chunk& c, const at::Tensor& added,
                          const at::Tensor& updated) {
  const at::Tensor tokens = z.images(z.tokens, c);
  at::Tensor to = z.images(updated, c);
  if (tokens.scalar_type() != at::kFloat || !tokens.is_contiguous()) {
    at::add_out(to, tokens, added.to(tokens.scalar_type()));
    return;
  }
  const auto *from = tokens.const_data_ptr<float>(), *sums = added.const_data_ptr<float>();
  auto* out = to.mutable_data_ptr<float>();
  constexpr int64_t lanes = attention::kLanes<float>;
  const bool streamed = updated.numel() * 4 > kStreamedBytes && z.C % lanes == 0 &&
                        reinterpret_cast<uintptr_t>(out) % (lanes * sizeof(float)) == 0;
  const auto row = streamed ? add_rows<true> : add_rows<false>;
  const auto part = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      row(from + i * z.C, sums + i / z.N * z.C, z.C, out + i * z.C);
    }
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
    if (streamed) _mm_sfence();  // to be seen by other threads in order
#endif
  };
  parallel_items(c.images * z.N, part, kSumRows);
}

}  // namespace dvla_fast::gate
