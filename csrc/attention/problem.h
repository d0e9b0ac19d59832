// What forward and backward share: sizes, access to the tensors, the keys that a mask keeps, and
// how keys are cut into blocks.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "attention/rows.h"
#include "parallel.h"
#include "tensors.h"

namespace dvla_fast::attention {

// B = T * G images, the G of a group share one text.
struct Sizes {
  Sizes(const at::Tensor& query, const at::Tensor& image_key, const at::Tensor& text_key)
      : T(query.size(0)),
        B(image_key.size(0)),
        G(B / T),
        H(query.size(1)),
        P(query.size(2)),
        N(image_key.size(2)),
        S(text_key.size(2)),
        D(query.size(3)) {}
  int64_t T, B, G, H, P, N, S, D;
};

// A 4-d tensor (outer, heads, tokens, width) of any strides, read by (outer, head).
template <class scalar_t>
class Reader {
 public:
  // An empty tensor of fewer dimensions: nothing is to be read.
  explicit Reader(const at::Tensor& x) {
    if (!x.defined() || x.dim() != 4) return;
    data_ = x.const_data_ptr<scalar_t>();
    outer_ = x.stride(0), head_ = x.stride(1), row_ = x.stride(2), column_ = x.stride(3);
  }
  Matrix<scalar_t> operator()(int64_t outer, int64_t head) const {
    return {data_ + outer * outer_ + head * head_, row_, column_};
  }

 private:
  const scalar_t* data_ = nullptr;
  int64_t outer_ = 0, head_ = 0, row_ = 0, column_ = 0;
};

// A (B, H) tensor of any strides.
template <class acc_t>
class Gate {
 public:
  explicit Gate(const at::Tensor& x)
      : data_(x.const_data_ptr<acc_t>()), outer_(x.stride(0)), head_(x.stride(1)) {}
  acc_t operator()(int64_t outer, int64_t head) const {
    return data_[outer * outer_ + head * head_];
  }

 private:
  const acc_t* data_;
  int64_t outer_, head_;
};

// An uninitialised result (outer, heads, tokens, width) stored as (outer, tokens, heads, width), so
// that joining the heads afterwards copies nothing.
inline at::Tensor empty_by_token(int64_t outer, int64_t heads, int64_t tokens, int64_t width,
                                 const at::Tensor& like) {
  const at::Tensor x = new_empty({outer, tokens, heads, width}, like.options());
  return strided(x, {outer, heads, tokens, width}, {x.stride(0), width, heads * width, 1}, 0);
}

// A result (outer, heads, tokens, width) of unit column stride, written by (outer, head).
template <class scalar_t>
class Writer {
 public:
  // An undefined tensor: nothing is to be written.
  explicit Writer(const at::Tensor& x) {
    if (!x.defined()) return;
    data_ = x.mutable_data_ptr<scalar_t>();
    outer_ = x.stride(0), head_ = x.stride(1), row_ = x.stride(2);
  }
  explicit operator bool() const { return data_ != nullptr; }
  scalar_t* operator()(int64_t outer, int64_t head) const {
    return data_ + outer * outer_ + head * head_;
  }
  int64_t row() const { return row_; }

 private:
  scalar_t* data_ = nullptr;
  int64_t outer_ = 0, head_ = 0, row_ = 0;
};

// The keys that a mask (outer, tokens) keeps. Masked keys are left out of every loop rather than
// given a score of -inf: no arithmetic is spent on them, and a path with no key left gives 0.
class KeptKeys {
 public:
  KeptKeys(const std::optional<at::Tensor>& mask, int64_t outer, int64_t tokens)
      : tokens_(tokens), all_(!mask.has_value()) {
    if (all_) return;
    index_.resize(outer * tokens);
    count_.resize(outer);
    const bool* data = mask->const_data_ptr<bool>();
    const int64_t step = mask->stride(1);
    for (int64_t i = 0; i < outer; ++i) {
      const bool* keep = data + i * mask->stride(0);
      int64_t* next = index_.data() + i * tokens;
      for (int64_t n = 0; n < tokens; ++n) {
        if (keep[n * step]) *next++ = n;
      }
      count_[i] = next - (index_.data() + i * tokens);
    }
  }
  bool all() const { return all_; }
  int64_t count(int64_t outer) const { return all_ ? tokens_ : count_[outer]; }
  // The kept tokens in order, or nullptr when all are.
  const int64_t* index(int64_t outer) const {
    return count(outer) == tokens_ ? nullptr : index_.data() + outer * tokens_;
  }

 private:
  int64_t tokens_;
  bool all_;
  std::vector<int64_t> index_, count_;
};

// Scores of one block of keys and one panel of queries (48 KiB) stay in the second-level cache, and
// the sequences that matter most are one block.
constexpr int64_t kBlockKeys = 256;

// Whether the backward wants a path's output from the forward: where one block holds all keys, it
// sums delta from the weights instead; the images of a group each need the group's text output for
// the gate's gradient. Also in dvla_fast/ops/dual_attention.py.
inline bool needs_image_out(const Sizes& z) { return z.N > kBlockKeys; }
inline bool needs_text_out(const Sizes& z) { return z.G != 1 || std::max(z.N, z.S) > kBlockKeys; }

// `tokens` keys in equal blocks of at most kBlockKeys.
struct Blocks {
  explicit Blocks(int64_t tokens)
      : count(ceil_div(tokens, kBlockKeys)), size(count ? ceil_div(tokens, count) : 0) {}
  int64_t count, size;
};

template <class acc_t>
struct Tile {
  const acc_t* data;
  int64_t ld;
};

// Keys [first, first + count) of the kept ones as a tile: in place where they lie ready, else
// copied to `scratch` (count, width).
template <class scalar_t>
inline Tile<Acc<scalar_t>> key_tile(const Matrix<scalar_t>& from, const int64_t* index,
                                    int64_t first, int64_t count, int64_t width,
                                    Acc<scalar_t>* scratch) {
  using acc_t = Acc<scalar_t>;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    if (!index && from.column == 1) return {from.data + first * from.row, from.row};
  }
  load_rows<scalar_t>(from, index, first, count, width, acc_t(1), scratch, width);
  return {scratch, width};
}

// One path of one head: which keys and values, and which of them count.
template <class scalar_t>
struct Path {
  Matrix<scalar_t> key, value;
  const int64_t* index;
  int64_t count;
};

// The same, and where their gradients go.
template <class scalar_t>
struct GradPath : Path<scalar_t> {
  scalar_t *grad_key, *grad_value;
  int64_t grad_row;
  // Keys and values are the same tokens, whose gradient is the sum of both.
  bool same() const { return grad_key == grad_value; }
};

}  // namespace dvla_fast::attention
