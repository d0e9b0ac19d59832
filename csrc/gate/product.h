// Matrix products of the gated layer. In float32 and float64 they run on the register tiles of
// attention: every value is a sum over the depth whose order follows from the depth alone, so it
// depends neither on the number of threads nor on how the rows were cut up, which a BLAS does not
// promise. Half types go to the library, which has the machine's own tiles, and so does everything
// in the variant without vector instructions of its own, where the tiles are several times slower.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "attention/micro_gemm.h"
#include "attention/problem.h"

namespace dvla_fast::gate {

using attention::Acc;

// Of the right-hand side this many rows are taken at once: with them a strip of it stays in the
// first-level cache. Long sums are sums of such parts, which also keeps their rounding small.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kDepth = 128;
#else
constexpr int64_t kDepth = 192;
#endif
// Rows of the left-hand side that are taken at once, to stay in the second-level cache.
constexpr int64_t kRows = 96;
// Pieces that a product is cut into at least, for the threads, where it has as many strips.
constexpr int64_t kPieces = 16;
// In half types the library's products that are deeper than this are taken in runs: it may cut a
// deeper one up along its depth, and differently so for other numbers of threads.
constexpr int64_t kHalfRun = 1024;

// The right-hand side (depth, columns) of products. For the tiles it is packed: strip after strip
// of at most kMaxVecs vectors, `depth` rows of them, padding 0.
template <class scalar_t>
class Factor {
 public:
  static constexpr bool kSame = std::is_same_v<scalar_t, Acc<scalar_t>>;
#if defined(CPU_CAPABILITY_DEFAULT)
  static constexpr bool kPacked = false;
#else
  static constexpr bool kPacked = kSame;
#endif
  static constexpr int64_t kLanes = attention::kLanes<Acc<scalar_t>>;

  Factor() = default;
  explicit Factor(const at::Tensor& b) : depth_(b.size(0)), columns_(b.size(1)), data_(b) {
    if constexpr (kPacked) pack(b);
  }

  // to (rows, columns), unit column stride, = a (rows, depth) b; or += where `add`.
  void multiply(const at::Tensor& a, const at::Tensor& to, bool add = false) const {
    check(a, to);
    if constexpr (kPacked) {
      packed(a, to, add);
    } else {
      at::Tensor out = to;
      add ? out.addmm_(a, data_) : at::mm_out(out, a, data_);
    }
  }

  // The same for `to` in the type that sums have, which is float32 for half types.
  void accumulate(const at::Tensor& a, const at::Tensor& to, bool add) const {
    if constexpr (kSame) {
      multiply(a, to, add);
    } else {
      check(a, to);
      for (int64_t from = 0; from == 0 || from < depth_; from += kHalfRun, add = true) {
        const int64_t count = std::min(kHalfRun, depth_ - from);
        const at::Tensor part = at::mm(a.narrow(1, from, count), data_.narrow(0, from, count));
        add ? to.add_(part) : to.copy_(part);
      }
    }
  }

 private:
  // The tiles read and write what the sizes say.
  void check(const at::Tensor& a, const at::Tensor& to) const {
    TORCH_CHECK_VALUE(a.size(1) == depth_ && to.size(0) == a.size(0) && to.size(1) == columns_,
                      "gated_attention: a product of ", a.sizes(), " and [", depth_, ", ", columns_,
                      "] is not ", to.sizes(), "; the weights' shapes do not fit the tokens'");
  }

  int64_t vecs() const { return attention::ceil_div(columns_, kLanes); }
  int64_t strips() const { return attention::ceil_div(vecs(), attention::kMaxVecs); }
  // First vector of a strip; that of strip strips() is vecs().
  int64_t first(int64_t strip) const { return vecs() * strip / strips(); }

  // A matrix whose rows or columns lie one value after another.
  static bool dense(const at::Tensor& x, int64_t dim) {
    return x.size(dim) < 2 || x.stride(dim) == 1;
  }
  static at::Tensor readable(const at::Tensor& x) {
    return dense(x, 0) || dense(x, 1) ? x : x.contiguous();
  }

  void pack(const at::Tensor& given) {
    const at::Tensor b = readable(given);
    data_ = at::empty({vecs() * kLanes * depth_}, b.options());
    const bool by_row = dense(b, 1);
    const int64_t ld = b.stride(by_row ? 0 : 1);
    const scalar_t* from = b.const_data_ptr<scalar_t>();
    scalar_t* all = data_.mutable_data_ptr<scalar_t>();
    attention::parallel_items(strips(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = first(i) * kLanes, wide = (first(i + 1) - first(i)) * kLanes;
        const int64_t count = std::min(wide, columns_ - column);
        scalar_t* to = all + column * depth_;
        if (!by_row) attention::transpose(from + column * ld, ld, count, depth_, to, wide);
        for (int64_t k = 0; k < depth_; ++k, to += wide) {
          if (by_row) std::copy_n(from + k * ld + column, count, to);
          std::fill(to + count, to + wide, scalar_t(0));
        }
      }
    });
  }

  void packed(const at::Tensor& given, const at::Tensor& to, bool add) const {
    const at::Tensor a = readable(given);
    const int64_t rows = a.size(0);
    const bool by_row = dense(a, 1);
    const int64_t lda = a.stride(by_row ? 0 : 1), ldc = to.stride(0);
    const scalar_t* from = a.const_data_ptr<scalar_t>();
    scalar_t* out = to.mutable_data_ptr<scalar_t>();
    const int64_t blocks = attention::ceil_div(rows, kRows);
    const int64_t cuts =
        std::clamp<int64_t>(attention::ceil_div(kPieces, std::max<int64_t>(1, blocks)), 1,
                            std::max<int64_t>(1, strips()));
    attention::parallel_items(blocks * cuts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / cuts * kRows, cut = i % cuts;
        const int64_t count = std::min(kRows, rows - row);
        const scalar_t* left = from + row * (by_row ? lda : 1);
        const auto run = by_row ? &Factor::block<false> : &Factor::block<true>;
        (this->*run)(count, left, lda, strips() * cut / cuts, strips() * (cut + 1) / cuts,
                     out + row * ldc, ldc, add);
      }
    });
  }

  // Some rows of a product, in the columns of some strips.
  template <bool transposed>
  void block(int64_t rows, const scalar_t* a, int64_t lda, int64_t begin, int64_t end, scalar_t* to,
             int64_t ldc, bool add) const {
    const scalar_t* b = data_.template const_data_ptr<scalar_t>();
    for (int64_t k = 0; k == 0 || k < depth_; k += kDepth) {
      const int64_t depth = std::min(kDepth, depth_ - k);
      const scalar_t* left = a + k * (transposed ? lda : 1);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = first(i) * kLanes, wide = (first(i + 1) - first(i)) * kLanes;
        const int64_t columns = std::min(wide, columns_ - column);
        attention::gemm<transposed>(rows, columns, depth, left, lda, b + column * depth_ + k * wide,
                                    wide, to + column, ldc, add || k > 0);
      }
    }
  }

  int64_t depth_ = 0, columns_ = 0;
  at::Tensor data_;
};

}  // namespace dvla_fast::gate
