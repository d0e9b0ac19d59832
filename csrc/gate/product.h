// Matrix products of the gated layer. They run on the register tiles of attention: every value is a
// sum over the depth whose order follows from the depth alone, so it depends neither on the number
// of threads nor on how the rows were cut up, which a BLAS does not promise. Half types are
// converted a block at a time where the machine has no fast products of their own; where it has,
// they go to the library, and so does everything in the variant without vector instructions, in
// which the tiles are several times slower.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "attention/micro_gemm.h"
#include "attention/problem.h"
#include "attention/scratch.h"
#include "tensors.h"

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

// Whether products go to the library.
#if defined(CPU_CAPABILITY_DEFAULT)
template <class scalar_t>
constexpr bool kLibrary = true;
#elif defined(__AMX_BF16__)  // processors with these tiles have float16 in vectors, too
template <class scalar_t>
constexpr bool kLibrary = sizeof(scalar_t) == 2;
#elif defined(__AVX512BF16__)
template <class scalar_t>
constexpr bool kLibrary = std::is_same_v<scalar_t, at::BFloat16>;
#else
template <class scalar_t>
constexpr bool kLibrary = false;
#endif

// The right-hand side (depth, columns) of products. For the tiles it is packed in the type of sums:
// strip after strip of at most kMaxVecs vectors, `depth` rows of them, padding 0.
template <class scalar_t>
class Factor {
 public:
  using acc_t = Acc<scalar_t>;
  static constexpr bool kPacked = !kLibrary<scalar_t>;

  Factor() = default;
  explicit Factor(const at::Tensor& b) : depth_(b.size(0)), columns_(b.size(1)), data_(b) {
    if constexpr (kPacked) pack(b);
  }

  // to (rows, columns), unit column stride, = a (rows, depth) b; or += where `add`.
  void multiply(const at::Tensor& a, const at::Tensor& to, bool add = false) const {
    check(a, to);
    if constexpr (kPacked) {
      packed<scalar_t>(a, to, add);
    } else {
      at::Tensor out = to;
      add ? out.addmm_(a, data_) : at::mm_out(out, a, data_);
    }
  }

  // The same for `to` in the type that sums have, which is float32 for half types.
  void accumulate(const at::Tensor& a, const at::Tensor& to, bool add) const {
    if constexpr (kSame) return multiply(a, to, add);
    check(a, to);
    if constexpr (kPacked) return packed<acc_t>(a, to, add);
    for (int64_t from = 0; from == 0 || from < depth_; from += kHalfRun, add = true) {
      const int64_t count = std::min(kHalfRun, depth_ - from);
      const at::Tensor part = at::mm(narrow(a, 1, from, count), narrow(data_, 0, from, count));
      add ? to.add_(part) : to.copy_(part);
    }
  }

 private:
  static constexpr bool kSame = std::is_same_v<scalar_t, acc_t>;
  static constexpr int64_t kLanes = attention::kLanes<acc_t>;

  // A thread's: converted values of an operand, and sums that are not rounded yet.
  struct Scratch {
    Scratch(attention::Arena& arena, int64_t values, int64_t sums)
        : values(arena.take<acc_t>(values)), sums(arena.take<acc_t>(sums)) {}
    acc_t *values, *sums;
  };

  // The tiles read and write what the sizes say.
  void check(const at::Tensor& a, const at::Tensor& to) const {
    TORCH_CHECK_VALUE(a.size(1) == depth_ && to.size(0) == a.size(0) && to.size(1) == columns_,
                      "gated_attention: a product of ", a.sizes(), " and [", depth_, ", ", columns_,
                      "] is not ", to.sizes(), "; the weights' shapes do not fit the tokens'");
  }

  int64_t vecs() const { return attention::ceil_div(columns_, kLanes); }
  int64_t strips() const { return attention::ceil_div(vecs(), attention::kMaxVecs); }
  // First column of a strip; that of strip strips() is columns() rounded up to whole vectors.
  int64_t first(int64_t strip) const { return vecs() * strip / strips() * kLanes; }

  // A matrix whose rows or columns lie one value after another.
  static bool dense(const at::Tensor& x, int64_t dim) {
    return x.size(dim) < 2 || x.stride(dim) == 1;
  }
  static at::Tensor readable(const at::Tensor& x) {
    return dense(x, 0) || dense(x, 1) ? x : x.contiguous();
  }

  // Rows of `count` values in the type of sums: as they lie, or converted to `scratch`.
  static attention::Tile<acc_t> converted(const scalar_t* from, int64_t ld, int64_t rows,
                                          int64_t count, acc_t* scratch) {
    if constexpr (kSame) {
      return {from, ld};
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        attention::load_row(from + i * ld, 1, count, acc_t(1), scratch + i * count);
      }
      return {scratch, count};
    }
  }

  void pack(const at::Tensor& given) {
    const at::Tensor b = readable(given);
    data_ = new_empty({vecs() * kLanes * depth_},
                      b.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
    const bool by_row = dense(b, 1);
    const int64_t ld = b.stride(by_row ? 0 : 1);
    const scalar_t* from = b.const_data_ptr<scalar_t>();
    acc_t* all = data_.mutable_data_ptr<acc_t>();
    const int64_t values = kSame || by_row ? 0 : attention::kMaxVecs * kLanes * depth_;
    parallel_items(strips(), [&](int64_t begin, int64_t end) {
      const auto s = attention::on_arena<Scratch>(values, int64_t{0});
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = first(i), wide = first(i + 1) - column;
        const int64_t count = std::min(wide, columns_ - column);
        acc_t* to = all + column * depth_;
        if (!by_row) {
          const auto rows = converted(from + column * ld, ld, count, depth_, s.values);
          attention::transpose(rows.data, rows.ld, count, depth_, to, wide);
        }
        for (int64_t k = 0; k < depth_; ++k, to += wide) {
          if (by_row) attention::load_row(from + k * ld + column, 1, count, acc_t(1), to);
          std::fill(to + count, to + wide, acc_t(0));
        }
      }
    });
  }

  template <class out_t>
  void packed(const at::Tensor& given, const at::Tensor& to, bool add) const {
    if (columns_ == 0) return;
    const at::Tensor a = readable(given);
    const int64_t rows = a.size(0);
    const bool by_row = dense(a, 1);
    const int64_t lda = a.stride(by_row ? 0 : 1), ldc = to.stride(0);
    const scalar_t* from = a.const_data_ptr<scalar_t>();
    out_t* out = to.mutable_data_ptr<out_t>();
    const int64_t blocks = attention::ceil_div(rows, kRows);
    const int64_t cuts =
        std::clamp<int64_t>(attention::ceil_div(kPieces, std::max<int64_t>(1, blocks)), 1,
                            std::max<int64_t>(1, strips()));
    // Of a row of a piece.
    const int64_t sums = std::is_same_v<out_t, acc_t>
                             ? 0
                             : attention::ceil_div(strips(), cuts) * attention::kMaxVecs * kLanes;
    parallel_items(blocks * cuts, [&](int64_t begin, int64_t end) {
      const auto s = attention::on_arena<Scratch>(kSame ? 0 : kRows * kDepth, kRows * sums);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / cuts * kRows, cut = i % cuts;
        const int64_t count = std::min(kRows, rows - row);
        const int64_t begin_strip = strips() * cut / cuts, end_strip = strips() * (cut + 1) / cuts;
        const int64_t column = first(begin_strip);
        const scalar_t* left = from + row * (by_row ? lda : 1);
        const auto run = by_row ? &Factor::block<false> : &Factor::block<true>;
        out_t* place = out + row * ldc + column;
        if constexpr (std::is_same_v<out_t, acc_t>) {
          (this->*run)(count, left, lda, begin_strip, end_strip, place, ldc, add, s.values);
        } else {
          const int64_t width = std::min(columns_, first(end_strip)) - column;
          for (int64_t r = 0; add && r < count; ++r) {
            attention::load_row(place + r * ldc, 1, width, acc_t(1), s.sums + r * sums);
          }
          (this->*run)(count, left, lda, begin_strip, end_strip, s.sums, sums, add, s.values);
          for (int64_t r = 0; r < count; ++r) {
            attention::store_row(s.sums + r * sums, width, place + r * ldc);
          }
        }
      }
    });
  }

  // Some rows of a product, in the columns of some strips, of which the first goes to `to`.
  template <bool transposed>
  void block(int64_t rows, const scalar_t* a, int64_t lda, int64_t begin, int64_t end, acc_t* to,
             int64_t ldc, bool add, acc_t* scratch) const {
    const acc_t* b = data_.template const_data_ptr<acc_t>();
    for (int64_t k = 0; k == 0 || k < depth_; k += kDepth) {
      const int64_t depth = std::min(kDepth, depth_ - k);
      const auto left = transposed ? converted(a + k * lda, lda, depth, rows, scratch)
                                   : converted(a + k, lda, rows, depth, scratch);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = first(i), wide = first(i + 1) - column;
        const int64_t columns = std::min(wide, columns_ - column);
        attention::gemm<transposed>(rows, columns, depth, left.data, left.ld,
                                    b + column * depth_ + k * wide, wide,
                                    to + column - first(begin), ldc, add || k > 0);
      }
    }
  }

  int64_t depth_ = 0, columns_ = 0;
  at::Tensor data_;
};

}  // namespace dvla_fast::gate
