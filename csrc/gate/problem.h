// What forward and backward of the gated layer share: the tensors, a chunk's share of them, and the
// products and mixtures of a chunk.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <vector>

#include "attention/dual_attention.h"
#include "attention/problem.h"
#include "gate/plan.h"
#include "gate/product.h"
#include "tensors.h"

namespace dvla_fast::gate {

using attention::Acc;
using OptionalTensor = std::optional<at::Tensor>;

// Where all tokens take no more bytes than this, in the type of sums, weights are packed a strip at
// a time: whole, the packed copies would be a large part of the memory that a call takes.
constexpr int64_t kFewTokens = 2 * 1024 * 1024;

// Tensor operations inside a kernel, on the caller's thread and on workers alike: no autograd, and
// no cast by the autocast of the caller.
struct PlainTensors {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Rows [first, first + count) of what may be absent.
inline at::Tensor part(const at::Tensor& x, int64_t first, int64_t count) {
  return x.defined() ? narrow(x, 0, first, count) : x;
}

inline OptionalTensor part(const OptionalTensor& x, int64_t first, int64_t count) {
  return x ? OptionalTensor(narrow(*x, 0, first, count)) : std::nullopt;
}

// (T, 1, P, 1), true where text_mask (T, P) says that there is no token.
inline at::Tensor unseen(const at::Tensor& text_mask) {
  return text_mask.logical_not().unsqueeze(1).unsqueeze(-1);
}

struct Problem {
  // A masked text token is asked by nothing and asks nothing: its query counts as 0, for 0 times
  // the NaN that may be there would reach the gradients.
  Problem(const at::Tensor& query, const at::Tensor& image_tokens, const at::Tensor& kv_weight,
          const at::Tensor& text_key, const at::Tensor& text_value, const at::Tensor& alpha,
          const at::Tensor& out_weight, const OptionalTensor& image_mask,
          const OptionalTensor& text_mask, double scale)
      : T(query.size(0)),
        H(query.size(1)),
        P(query.size(2)),
        D(query.size(3)),
        B(image_tokens.size(0)),
        N(image_tokens.size(1)),
        C(image_tokens.size(2)),
        width(H * D),
        query(text_mask ? query.masked_fill(unseen(*text_mask), 0) : query),
        tokens(image_tokens),
        kv_weight(kv_weight),
        text_key(text_key),
        text_value(text_value),
        alpha(alpha),
        out_weight(out_weight),
        image_mask(image_mask),
        text_mask(text_mask),
        scale(scale),
        absorbed(absorbs(H, P, D, N, C)),
        plan(B, T, query.element_size() * (absorbed ? N * C + 2 * P * H * C : 2 * N * width),
             absorbed ? query.element_size() * 6 * width * C : 0),
        apart(absorbed || !plan.whole_groups()),
        packing(!plan.parallel() && B * N * C * alpha.element_size() <= kFewTokens
                    ? Packing::kStrips
                    : Packing::kWhole),
        mean_share(shares()) {
    if (text_mask) dropped = unseen(*text_mask);
  }

  at::Tensor texts(const at::Tensor& x, const Chunk& c) const { return part(x, c.group, c.groups); }
  at::Tensor images(const at::Tensor& x, const Chunk& c) const {
    return part(x, c.image, c.images);
  }
  // Tokens of a chunk (images * N, C) in the dtype of the products.
  at::Tensor rows_of(const Chunk& c) const {
    return images(tokens, c).reshape({c.images * N, C}).to(query.scalar_type());
  }

  // The same with 0 for what is masked out: its gradient is 0, and 0 times the NaN that may be
  // there would reach the weights.
  at::Tensor attended_rows(const Chunk& c) const {
    const at::Tensor rows = rows_of(c);
    if (!image_mask) return rows;
    const at::Tensor keep = narrow(*image_mask, 0, c.image, c.images);
    return rows.masked_fill(keep.logical_not().reshape({-1, 1}), 0);
  }

  // A buffer for `rows` rows of an image, of all images of a chunk.
  at::Tensor buffer(int64_t rows, int64_t columns) const {
    return new_empty({plan.most_images() * rows, columns}, query.options());
  }
  // What the backward pass gets of every image, and a buffer for a chunk's where it gets none: keys
  // and values (images * N, 2HD), or with absorbed weights the weighted tokens (images * P, HC).
  at::Tensor kept_rows(int64_t images) const {
    return absorbed ? new_empty({images * P, H * C}, query.options())
                    : new_empty({images * N, 2 * width}, query.options());
  }
  at::Tensor kept_buffer() const { return kept_rows(plan.most_images()); }
  bool kept() const { return absorbed || plan.kept(); }

  // The rows of a buffer that a chunk fills.
  at::Tensor filled(const at::Tensor& buffer, int64_t rows, const Chunk& c) const {
    return narrow(buffer, 0, 0, c.images * rows);
  }
  // The rows of what is kept of all images, or of a buffer, that belong to a chunk.
  at::Tensor chunk_rows(const at::Tensor& kept, const at::Tensor& buffer, int64_t rows,
                        const Chunk& c) const {
    return kept.defined() ? narrow(kept, 0, c.image * rows, c.images * rows)
                          : filled(buffer, rows, c);
  }
  // Keys (which = 0) or values (1) of rows (images * N, 2HD or longer) as (images, H, N, D).
  at::Tensor keys(const at::Tensor& rows, int64_t which, const Chunk& c) const {
    const int64_t row = rows.stride(0);
    return strided(rows, {c.images, H, N, D}, {N * row, D, row, 1},
                   rows.storage_offset() + which * width);
  }
  // A buffer (images * P, HD) as (images, H, P, D).
  at::Tensor heads(const at::Tensor& buffer, const Chunk& c) const {
    return strided(buffer, {c.images, H, P, D}, {P * width, D, width, 1}, buffer.storage_offset());
  }

  // (outer, H, P, D), stored by token, as (outer * P, HD).
  at::Tensor token_rows(const at::Tensor& x) const {
    return strided(x, {x.size(0) * P, width}, {width, 1}, x.storage_offset());
  }

  // An attention without keys: the text of a chunk whose text path runs apart, or the images of
  // that text path, with its gate shut.
  at::Tensor no_keys(int64_t outer) const { return new_empty({outer, H, 0, D}, query.options()); }
  at::Tensor shut_gate() const { return new_filled({T, H}, 0, alpha.options()); }
  at::Tensor by_token(int64_t outer, int64_t count) const {
    return attention::empty_by_token(outer, H, count, D, query);
  }

  // Zeroes the masked text tokens of x (images, P, C), contiguous.
  void drop_masked(const at::Tensor& x, const Chunk& c) const {
    if (!dropped.defined()) return;
    x.view({c.groups, c.images / c.groups, P, C}).masked_fill_(texts(dropped, c), 0);
  }

  const int64_t T, H, P, D, B, N, C, width;  // width = H * D
  const at::Tensor query;
  const at::Tensor &tokens, &kv_weight, &text_key, &text_value, &alpha, &out_weight;
  const OptionalTensor &image_mask, &text_mask;
  const double scale;
  const bool absorbed;  // scores are taken against the tokens themselves (absorb.h)
  const Plan plan;
  const bool apart;             // the text path runs apart from the chunks
  const Packing packing;        // of the weights
  const at::Tensor mean_share;  // (B, 1) contiguous: one over the number of text tokens
  at::Tensor dropped;           // (T, 1, P, 1) text tokens masked out

 private:
  at::Tensor shares() const {
    if (!text_mask) return new_filled({B, 1}, 1.0 / std::max<int64_t>(1, P), alpha.options());
    const at::Tensor kept = text_mask->sum(1, true).clamp_min(1).to(alpha.scalar_type());
    return kept.reciprocal().expand({T, B / T}).reshape({B, 1}).contiguous();
  }
};

// to = (weighted ? 1 : alpha) image + (1 - alpha) text for the images of a chunk.
//   text (T, P, HD), image and to (images, P, HD) contiguous; image may be `to`.
template <class scalar_t>
void mix(const Problem& z, const Chunk& c, const scalar_t* text, const scalar_t* image,
         bool weighted, scalar_t* to) {
  using acc_t = Acc<scalar_t>;
  const attention::Gate<acc_t> alpha(z.alpha);
  const int64_t group = z.B / z.T;
  const int64_t n = z.P * z.width;  // values of an image
  parallel_items(c.images, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> image_share(z.width), text_share(z.width), a(z.width), b(z.width);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < z.width; ++j) {
        const acc_t share = alpha(c.image + i, j / z.D);
        image_share[j] = weighted ? acc_t(1) : share;
        text_share[j] = acc_t(1) - share;
      }
      const scalar_t* from = text + (c.image + i) / group * n;
      for (int64_t p = 0; p < n; p += z.width) {
        attention::load_row(image + i * n + p, 1, z.width, acc_t(1), a.data());
        attention::load_row(from + p, 1, z.width, acc_t(1), b.data());
        for (int64_t j = 0; j < z.width; ++j) a[j] = image_share[j] * a[j] + text_share[j] * b[j];
        attention::store_row<scalar_t>(a.data(), z.width, to + i * n + p);
      }
    }
  });
}

}  // namespace dvla_fast::gate
