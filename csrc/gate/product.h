// Matrix products of the gated layer. They run on the register tiles of attention: every value is a
// sum over the depth whose order follows from the depth alone, so it depends neither on the number
// of threads nor on how the rows were cut up, which a BLAS does not promise. Half types are
// converted a block at a time where the machine has no fast products of their own; bfloat16 is
// multiplied as it is where vectors can. Where tiles can, half types go to the library, and so does
// everything in the variant without vector instructions, in which our tiles are several times
// slower.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "attention/bf16_gemm.h"
#include "attention/micro_gemm.h"
#include "attention/problem.h"
#include "attention/scratch.h"
#include "tensors.h"

namespace dvla_fast::gate {

using attention::Acc;

// Of the right-hand side this many rows of float32 are taken at once: with them a strip of it stays
// in the first-level cache. Long sums are sums of such parts, which also keeps their rounding
// small.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kDepth = 128;
#else
constexpr int64_t kDepth = 192;
#endif
// Rows of the left-hand side that are taken at once, to stay in the second-level cache.
constexpr int64_t kRows = 96;
// Pieces that a product is cut into at least, for the threads, where it has as many strips.
constexpr int64_t kPieces = 16;

// When the right-hand side of products is packed: before the first of them, or a strip at a time,
// by the thread that uses it. The latter needs no memory for the whole, and reads the left-hand
// side once a strip: to be chosen where that is small.
enum class Packing { kWhole, kStrips };

// Rows that are summed over at a time where their number follows from the images: what is packed of
// them stays small. (In half types the library may cut a deeper product up along its depth, and
// differently so for other numbers of threads.)
constexpr int64_t kRun = 1024;

// Whether products go to the library.
#if defined(CPU_CAPABILITY_DEFAULT)
template <class scalar_t>
constexpr bool kLibrary = true;
#elif defined(__AMX_BF16__)  // processors with these tiles have float16 in vectors, too
template <class scalar_t>
constexpr bool kLibrary = sizeof(scalar_t) == 2;
#else
template <class scalar_t>
constexpr bool kLibrary = false;
#endif

// Whether products multiply pairs of bfloat16 values (bf16_gemm.h).
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template <class scalar_t>
constexpr bool kPairs = std::is_same_v<scalar_t, at::BFloat16>;
#else
template <class scalar_t>
constexpr bool kPairs = false;
#endif

// The right-hand side (depth, columns) of products. For the tiles it is packed in the type of sums,
// or in pairs of rows of bfloat16: strip after strip of at most kMaxVecs vectors, `depth` rows of
// them, padding 0.
template <class scalar_t>
class Factor {
 public:
  using acc_t = Acc<scalar_t>;
  using operand_t = std::conditional_t<kPairs<scalar_t>, scalar_t, acc_t>;
  static constexpr bool kPacked = !kLibrary<scalar_t>;

  Factor() = default;
  Factor(const at::Tensor& b, Packing packing)
      : depth_(b.size(0)), columns_(b.size(1)), packing_(packing), given_(b) {
    if constexpr (!kPacked) return;
    given_ = readable(b);
    if (packing == Packing::kStrips) return;
    pack();
    given_ = at::Tensor();
  }

  // to (rows, columns), unit column stride, = a (rows, depth) b; or += where `add`.
  void multiply(const at::Tensor& a, const at::Tensor& to, bool add = false) const {
    check(a, to);
    if constexpr (kPacked) {
      packed<scalar_t>(a, to, add);
    } else {
      at::Tensor out = to;
      add ? out.addmm_(a, given_) : at::mm_out(out, a, given_);
    }
  }

  // The same for `to` in the type that sums have, which is float32 for half types, or its own.
  void accumulate(const at::Tensor& a, const at::Tensor& to, bool add) const {
    if (to.scalar_type() == c10::CppTypeToScalarType<scalar_t>::value) return multiply(a, to, add);
    check(a, to);
    if constexpr (kPacked) return packed<acc_t>(a, to, add);
    const at::Tensor product = at::mm(a, given_);
    add ? to.add_(product) : to.copy_(product);
  }

 private:
  // Whether operands are taken as they lie.
  static constexpr bool kInPlace = std::is_same_v<scalar_t, acc_t>;
  static constexpr int64_t kLanes = attention::kLanes<acc_t>;
  // Rows of a block of the right-hand side: pairs take as many bytes as float32.
  static constexpr int64_t kBlock = kPairs<scalar_t> ? 2 * kDepth : kDepth;

  // A thread's: copied values of the left-hand side, sums that are not rounded yet, a packed strip,
  // and copied values of it.
  struct Scratch {
    Scratch(attention::Arena& arena, int64_t values, int64_t sums, int64_t strip,
            int64_t strip_values)
        : values(arena.take<operand_t>(values)),
          sums(arena.take<acc_t>(sums)),
          strip(arena.take<operand_t>(strip)),
          strip_values(arena.take<operand_t>(strip_values)) {}
    operand_t* values;
    acc_t* sums;
    operand_t *strip, *strip_values;
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

  // Rows that the packed right-hand side has: pairs are filled up with 0.
  int64_t deep() const { return kPairs<scalar_t> ? attention::ceil_div(depth_, 2) * 2 : depth_; }

  // Rows of `count` values as operands: as they lie, or copied to `scratch`.
  static attention::Tile<operand_t> converted(const scalar_t* from, int64_t ld, int64_t rows,
                                              int64_t count, operand_t* scratch) {
    if constexpr (kPairs<scalar_t>) {
      if (count % 2 == 0 && ld % 2 == 0) return {from, ld};
      for (int64_t i = 0; i < rows; ++i) {
        scalar_t* to = scratch + i * (count + count % 2);
        std::copy_n(from + i * ld, count, to);
        if (count % 2) to[count] = scalar_t(0);
      }
      return {scratch, count + count % 2};
    } else if constexpr (kInPlace) {
      return {from, ld};
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        attention::load_row(from + i * ld, 1, count, acc_t(1), scratch + i * count);
      }
      return {scratch, count};
    }
  }

  // Whether rows of the right-hand side lie one value after another, rather than columns.
  bool given_by_row() const { return dense(given_, 1); }
  // Values of the widest strip, and of what of it is copied before it is packed.
  int64_t strip_size() const { return attention::kMaxVecs * kLanes * deep(); }
  int64_t strip_values() const { return kInPlace || given_by_row() ? 0 : strip_size(); }

  void pack() {
    data_ = new_empty({vecs() * kLanes * deep()},
                      given_.options().dtype(c10::CppTypeToScalarType<operand_t>::value));
    operand_t* to = data_.mutable_data_ptr<operand_t>();
    parallel_items(strips(), [&](int64_t begin, int64_t end) {
      const auto s =
          attention::on_arena<Scratch>(int64_t{0}, int64_t{0}, int64_t{0}, strip_values());
      for (int64_t i = begin; i < end; ++i) pack_strip(i, to + first(i) * deep(), s.strip_values);
    });
  }

  void pack_strip(int64_t strip, operand_t* to, operand_t* scratch) const {
    const bool by_row = given_by_row();
    const int64_t ld = given_.stride(by_row ? 0 : 1), column = first(strip);
    const int64_t wide = first(strip + 1) - column, count = std::min(wide, columns_ - column);
    const scalar_t* from = given_.template const_data_ptr<scalar_t>() + column * (by_row ? 1 : ld);
    if constexpr (kPairs<scalar_t>) {
      pack_pairs(from, ld, by_row, count, wide, to, scratch);
    } else {
      if (!by_row) {
        const auto rows = converted(from, ld, count, depth_, scratch);
        attention::transpose(rows.data, rows.ld, count, depth_, to, wide);
      }
      for (int64_t k = 0; k < depth_; ++k, to += wide) {
        if (by_row) attention::load_row(from + k * ld, 1, count, acc_t(1), to);
        std::fill(to + count, to + wide, acc_t(0));
      }
    }
  }

#if defined(__AVX512BF16__)
  // The same for pairs of rows.
  void pack_pairs(const scalar_t* from, int64_t ld, bool by_row, int64_t count, int64_t wide,
                  scalar_t* to, scalar_t* scratch) const {
    if (by_row) return attention::pack_pairs(from, ld, depth_, count, deep(), wide, to);
    const auto rows = converted(from, ld, count, depth_, scratch);
    attention::transpose_pairs(rows.data, rows.ld / 2, count, deep() / 2, to, wide);
    for (int64_t k = 0; count < wide && k < deep(); k += 2) {
      std::fill(to + k * wide + 2 * count, to + (k + 2) * wide, scalar_t(0));
    }
  }
#endif

  // The left-hand side of a product, and where its results go.
  template <class out_t>
  struct Product {
    Product(const at::Tensor& a, const at::Tensor& to, bool add)
        : rows(a.size(0)),
          by_row(dense(a, 1)),
          add(add),
          lda(a.stride(by_row ? 0 : 1)),
          ldc(to.stride(0)),
          from(a.const_data_ptr<scalar_t>()),
          to(to.mutable_data_ptr<out_t>()) {}
    int64_t blocks() const { return attention::ceil_div(rows, kRows); }

    int64_t rows;
    bool by_row, add;
    int64_t lda, ldc;
    const scalar_t* from;
    out_t* to;
  };

  template <class out_t>
  void packed(const at::Tensor& given, const at::Tensor& to, bool add) const {
    if (columns_ == 0 || given.size(0) == 0) return;
    const at::Tensor a = readable(given);
    const Product<out_t> product(a, to, add);
    packing_ == Packing::kWhole ? from_whole(product) : from_strips(product);
  }

  // Pieces of one block of rows and some strips.
  template <class out_t>
  void from_whole(const Product<out_t>& product) const {
    const int64_t cuts = std::min(attention::ceil_div(kPieces, product.blocks()), strips());
    const operand_t* b = data_.template const_data_ptr<operand_t>();
    parallel_items(product.blocks() * cuts, [&](int64_t begin, int64_t end) {
      const auto s = attention::on_arena<Scratch>(
          values(), sums<out_t>(attention::ceil_div(strips(), cuts)), int64_t{0}, int64_t{0});
      for (int64_t i = begin; i < end; ++i) {
        const int64_t strip = strips() * (i % cuts) / cuts;
        block(product, i / cuts, strip, strips() * (i % cuts + 1) / cuts, b + first(strip) * deep(),
              s);
      }
    });
  }

  // Pieces of one strip and some blocks of rows.
  template <class out_t>
  void from_strips(const Product<out_t>& product) const {
    const int64_t blocks = product.blocks();
    const int64_t cuts = std::min(attention::ceil_div(kPieces, strips()), blocks);
    parallel_items(strips() * cuts, [&](int64_t begin, int64_t end) {
      const auto s =
          attention::on_arena<Scratch>(values(), sums<out_t>(1), strip_size(), strip_values());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t strip = i / cuts, cut = i % cuts;
        if (i == begin || cut == 0) pack_strip(strip, s.strip, s.strip_values);
        for (int64_t j = blocks * cut / cuts; j < blocks * (cut + 1) / cuts; ++j) {
          block(product, j, strip, strip + 1, s.strip, s);
        }
      }
    });
  }

  // Scratch of a block: copied values, and sums in so many strips that are rounded at the end.
  static constexpr int64_t values() { return kInPlace ? 0 : kRows * kBlock; }
  template <class out_t>
  static int64_t sums(int64_t strips) {
    return std::is_same_v<out_t, acc_t> ? 0 : kRows * strips * attention::kMaxVecs * kLanes;
  }

  // A block of rows, in the columns of strips [begin, end), which are packed at `b`.
  template <class out_t>
  void block(const Product<out_t>& p, int64_t index, int64_t begin, int64_t end, const operand_t* b,
             const Scratch& s) const {
    const int64_t row = index * kRows, count = std::min(kRows, p.rows - row);
    const int64_t column = first(begin), width = std::min(columns_, first(end)) - column;
    const scalar_t* a = p.from + row * (p.by_row ? p.lda : 1);
    const auto run = p.by_row ? &Factor::sum_block<false> : &Factor::sum_block<true>;
    out_t* to = p.to + row * p.ldc + column;
    if constexpr (std::is_same_v<out_t, acc_t>) {
      (this->*run)(count, a, p.lda, begin, end, b, to, p.ldc, p.add, s.values);
    } else {
      for (int64_t r = 0; p.add && r < count; ++r) {
        attention::load_row(to + r * p.ldc, 1, width, acc_t(1), s.sums + r * width);
      }
      (this->*run)(count, a, p.lda, begin, end, b, s.sums, width, p.add, s.values);
      for (int64_t r = 0; r < count; ++r) {
        attention::store_row(s.sums + r * width, width, to + r * p.ldc);
      }
    }
  }

  // The same in the type of sums, from `a` to `to`.
  template <bool transposed>
  void sum_block(int64_t rows, const scalar_t* a, int64_t lda, int64_t begin, int64_t end,
                 const operand_t* b, acc_t* to, int64_t ldc, bool add, operand_t* scratch) const {
    for (int64_t k = 0; k == 0 || k < depth_; k += kBlock) {
      const int64_t depth = std::min(kBlock, depth_ - k);
      const auto left =
          left_block<transposed>(a + k * (transposed ? lda : 1), lda, rows, depth, scratch);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = first(i) - first(begin), wide = first(i + 1) - first(i);
        const int64_t columns = std::min(wide, columns_ - first(i));
        tiles<transposed>(rows, columns, depth, left, b + column * deep() + k * wide, wide,
                          to + column, ldc, add || k > 0);
      }
    }
  }

  // A block (rows, depth) of the left-hand side for the tiles.
  template <bool transposed>
  static attention::Tile<operand_t> left_block(const scalar_t* a, int64_t lda, int64_t rows,
                                               int64_t depth, operand_t* scratch) {
    if constexpr (!transposed) {
      return converted(a, lda, rows, depth, scratch);
    } else if constexpr (kPairs<scalar_t>) {
      return left_pairs(a, lda, rows, depth, scratch);
    } else {
      return converted(a, lda, depth, rows, scratch);
    }
  }

#if defined(__AVX512BF16__)
  // The same of a transposed block, in pairs of columns.
  static attention::Tile<scalar_t> left_pairs(const scalar_t* a, int64_t lda, int64_t rows,
                                              int64_t depth, scalar_t* scratch) {
    const int64_t wide = attention::round_up(rows, kLanes);
    attention::pack_pairs(a, lda, depth, rows, attention::round_up(depth, 2), wide, scratch);
    return {scratch, wide};
  }
#endif

  // One strip of a block of rows.
  template <bool transposed>
  static void tiles(int64_t rows, int64_t columns, int64_t depth,
                    const attention::Tile<operand_t>& left, const operand_t* b, int64_t wide,
                    acc_t* to, int64_t ldc, bool add) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs<scalar_t>) {
      const __mmask16 last = 0xFFFFU >> (wide - columns);
      return attention::with_vecs(wide / kLanes, [&](auto V) {
        attention::bf16_gemm_rows<transposed, V()>(rows, depth, left.data, left.ld, b, wide, to,
                                                   ldc, add, last);
      });
    }
#endif
    if constexpr (!kPairs<scalar_t>) {
      attention::gemm<transposed>(rows, columns, depth, left.data, left.ld, b, wide, to, ldc, add);
    }
  }

  int64_t depth_ = 0, columns_ = 0;
  Packing packing_ = Packing::kWhole;
  at::Tensor given_, data_;  // as it was given, where it is still read, and packed
};

// to = or, where `add`, += a (rows, depth) b (depth, columns); `to` as for Factor::accumulate, in
// its own type for a single run.
template <class scalar_t>
void add_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& to, bool add,
                 Packing packing) {
  const int64_t depth = b.size(0);
  for (int64_t from = 0; from == 0 || from < depth; from += kRun, add = true) {
    const int64_t count = std::min(kRun, depth - from);
    const Factor<scalar_t> right(narrow(b, 0, from, count), packing);
    right.accumulate(narrow(a, 1, from, count), to, add);
  }
}

}  // namespace dvla_fast::gate
