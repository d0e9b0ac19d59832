// Dual attention whose image keys and values are a projection of the image tokens. The images are
// walked over in chunks (plan.h): a chunk's keys and values are projected into a buffer that stays
// in the cache, attended, and forgotten; the backward pass projects them again. Where a text group
// is longer than a chunk, its text path runs apart, once.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// See attention/forward.cpp.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "gate/projected_attention.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "attention/dual_attention.h"
#include "attention/problem.h"
#include "gate/plan.h"

namespace dvla_fast {
namespace gate {
namespace {

using attention::Acc;
using attention::empty_by_token;
using attention::Gate;
using attention::kLanes;
using attention::padded;
using attention::Vec;
using OptionalTensor = std::optional<at::Tensor>;

// The slots' sums of the weight's gradient take this many times the weight at most.
constexpr int64_t kMostSlots = 16;
// Rows of one thread's part of a product that threads share.
constexpr int64_t kPartRows = 96;

// Tensor operations inside a kernel, on the caller's thread and on workers alike: no autograd, and
// no cast by the autocast of the caller.
struct PlainTensors {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

OptionalTensor narrow(const OptionalTensor& x, int64_t first, int64_t count) {
  return x ? OptionalTensor(x->narrow(0, first, count)) : std::nullopt;
}

// out (M, N) = a (M, K) b (K, N) for a long K, over which threads may share a product and so make
// the result depend on their number: here they share the rows of `out`, in parts that depend on M
// alone. (Products over a short K are never cut along it.)
at::Tensor& long_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  const int64_t rows = out.size(0), parts = std::clamp<int64_t>(rows / kPartRows, 1, 64);
  attention::parallel_items(parts, [&](int64_t begin, int64_t end) {
    const PlainTensors plain;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = rows * i / parts, count = rows * (i + 1) / parts - first;
      at::Tensor part = out.narrow(0, first, count);
      at::mm_out(part, a.narrow(0, first, count), b);
    }
  });
  return out;
}

// out (n) = the sum of rows [first, first + count) of `slots` (…, n), in order; out may be the
// first.
template <class acc_t>
void add_slots(const at::Tensor& slots, int64_t first, int64_t count, int64_t n, acc_t* out) {
  const acc_t* from = slots.const_data_ptr<acc_t>() + first * n;
  at::parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
    if (out != from) std::copy(from + begin, from + end, out + begin);
    for (int64_t i = 1; i < count; ++i) {
      const acc_t* row = from + i * n;
      for (int64_t j = begin; j < end; ++j) out[j] += row[j];
    }
  });
}

// What forward and backward share: the tensors, and the projection of a chunk.
struct Problem {
  Problem(const at::Tensor& query, const at::Tensor& image_tokens, const at::Tensor& kv_weight,
          const at::Tensor& text_key, const at::Tensor& text_value, const at::Tensor& alpha,
          const OptionalTensor& image_mask, const OptionalTensor& text_mask, double scale)
      : T(query.size(0)),
        H(query.size(1)),
        P(query.size(2)),
        D(query.size(3)),
        B(image_tokens.size(0)),
        N(image_tokens.size(1)),
        C(image_tokens.size(2)),
        S(text_key.size(2)),
        query(query),
        tokens(image_tokens),
        weight(kv_weight),
        text_key(text_key),
        text_value(text_value),
        alpha(alpha),
        image_mask(image_mask),
        text_mask(text_mask),
        scale(scale),
        plan(B, T, N * 2 * H * D * query.element_size()) {}

  // Tokens of a chunk (images * N, C).
  at::Tensor rows_of(const Chunk& c) const {
    return tokens.narrow(0, c.image, c.images).reshape({c.images * N, C});
  }
  // Room for the keys and values of a chunk.
  at::Tensor kv_buffer() const {
    return at::empty({plan.most_images() * N, 2 * H * D}, query.options());
  }
  at::Tensor kv_rows(const at::Tensor& buffer, const Chunk& c) const {
    return buffer.narrow(0, 0, c.images * N);
  }
  // Keys (part 0) or values (part 1) of a buffer as (images, H, N, D).
  at::Tensor heads(const at::Tensor& buffer, const Chunk& c, int64_t part) const {
    const int64_t row = 2 * H * D;
    return buffer.as_strided({c.images, H, N, D}, {N * row, D, row, 1}, part * H * D);
  }
  void project(const at::Tensor& rows, const Chunk& c, const at::Tensor& buffer) const {
    at::Tensor kv = kv_rows(buffer, c);
    at::mm_out(kv, rows, weight.t());
  }
  // No keys: the text of a chunk whose text path runs apart, or the images of that text path.
  at::Tensor no_keys(int64_t outer) const { return at::empty({outer, H, 0, D}, query.options()); }
  at::Tensor by_token(int64_t outer, int64_t tokens) const {
    return empty_by_token(outer, H, tokens, D, query);
  }

  const int64_t T, H, P, D, B, N, C, S;
  const at::Tensor &query, &tokens, &weight, &text_key, &text_value, &alpha;
  const OptionalTensor &image_mask, &text_mask;
  const double scale;
  const Plan plan;
};

// share (H * D) = 1 - alpha of an image, each head's value D times; 0 up to `padding`.
template <class acc_t>
void text_share(const Gate<acc_t>& alpha, int64_t image, int64_t H, int64_t D, acc_t* share) {
  for (int64_t h = 0; h < H; ++h) std::fill_n(share + h * D, D, acc_t(1) - alpha(image, h));
}

// ---- forward

struct Saved {
  at::Tensor out, image_out, text_out, image_lse, text_lse;
};

at::Tensor part(const at::Tensor& x, int64_t first, int64_t count) {
  return x.defined() ? x.narrow(0, first, count) : x;
}

// out (images, H, P, D) of a chunk += (1 - alpha) text_out of its group.
template <class scalar_t>
void add_text(const Problem& z, const Saved& r, const Chunk& c) {
  using acc_t = Acc<scalar_t>;
  const int64_t width = z.H * z.D;
  const attention::Buffer<acc_t> share(width), sum(width), text(width);
  const scalar_t* from = r.text_out.const_data_ptr<scalar_t>() + c.group * z.P * width;
  scalar_t* to = r.out.mutable_data_ptr<scalar_t>() + c.image * z.P * width;
  const Gate<acc_t> alpha(z.alpha);
  for (int64_t i = 0; i < c.images; ++i) {
    text_share(alpha, c.image + i, z.H, z.D, share.get());
    for (int64_t p = 0; p < z.P; ++p, to += width) {
      attention::load_row(to, 1, width, acc_t(1), sum.get());
      attention::load_row(from + p * width, 1, width, acc_t(1), text.get());
      for (int64_t j = 0; j < width; ++j) sum.get()[j] += share.get()[j] * text.get()[j];
      attention::store_row<scalar_t>(sum.get(), width, to);
    }
  }
}

// The text path of every group alone: an attention without images, its gate shut.
void text_forward(const Problem& z, const Saved& r) {
  const at::Tensor none = z.no_keys(z.T), shut = at::zeros({z.T, z.H}, z.alpha.options());
  at::Tensor image_out, text_out, image_lse;
  if (r.text_lse.defined()) {
    image_out = z.by_token(z.T, z.P), text_out = z.by_token(z.T, z.P);
    image_lse = at::empty({z.T, z.H, z.P}, z.alpha.options());
  }
  dual_attention_forward_into(z.query, none, none, z.text_key, z.text_value, shut, std::nullopt,
                              z.text_mask, z.scale, r.text_out, image_out, text_out, image_lse,
                              r.text_lse);
}

void attend_chunk(const Problem& z, const Saved& r, const Chunk& c, const at::Tensor& buffer,
                  bool apart) {
  const bool save = r.image_out.defined();
  const at::Tensor none = apart ? z.no_keys(1) : at::Tensor();
  const auto text = [&](const at::Tensor& x) { return part(x, c.group, c.groups); };
  const auto image = [&](const at::Tensor& x) { return part(x, c.image, c.images); };
  z.project(z.rows_of(c), c, buffer);
  at::Tensor text_out, text_lse;
  if (save) {  // apart: the group's text results are there already, and those of no text go nowhere
    text_out = apart ? z.by_token(1, z.P) : text(r.text_out);
    text_lse = apart ? at::empty({1, z.H, z.P}, z.alpha.options()) : text(r.text_lse);
  }
  dual_attention_forward_into(
      text(z.query), z.heads(buffer, c, 0), z.heads(buffer, c, 1), apart ? none : text(z.text_key),
      apart ? none : text(z.text_value), image(z.alpha), narrow(z.image_mask, c.image, c.images),
      apart ? std::nullopt : narrow(z.text_mask, c.group, c.groups), z.scale, image(r.out),
      image(r.image_out), text_out, image(r.image_lse), text_lse);
}

template <class scalar_t>
void forward(const Problem& z, const Saved& r) {
  const bool apart = !z.plan.whole_groups();
  if (apart) text_forward(z, r);
  const auto chunks = [&](int64_t begin, int64_t end) {
    const PlainTensors plain;
    const at::Tensor buffer = z.kv_buffer();
    for (int64_t i = begin; i < end; ++i) {
      attend_chunk(z, r, z.plan[i], buffer, apart);
      if (apart) add_text<scalar_t>(z, r, z.plan[i]);
    }
  };
  if (z.plan.parallel()) {
    attention::parallel_items(z.plan.count(), chunks);
  } else {
    chunks(0, z.plan.count());
  }
}

// ---- backward

struct Grads {
  at::Tensor query, tokens, weight, text_key, text_value, alpha;
};

template <class scalar_t>
class Backward {
 public:
  using acc_t = Acc<scalar_t>;

  Backward(const Problem& z, const at::Tensor& grad_out, const Saved& saved, const Grads& grads)
      : z(z),
        grad_out(grad_out),
        saved(saved),
        grads(grads),
        apart(!z.plan.whole_groups()),
        width(z.H * z.D),
        slots(z.plan, z.T,
              std::clamp<int64_t>(z.B * z.N / std::max<int64_t>(1, 2 * width), 1, kMostSlots)),
        weight_sums(kSame && slots.count() == 1
                        ? grads.weight.unsqueeze(0)
                        : at::empty({slots.count(), 2 * width, z.C}, z.alpha.options())) {
    if (!apart) return;
    query_sums = at::zeros({z.T * slots.per_group(), z.P * width}, z.alpha.options());
    text_sums = at::zeros(query_sums.sizes(), z.alpha.options());
  }

  void run() const {
    const auto runs = [&](int64_t begin, int64_t end) {
      const PlainTensors plain;
      const Buffers buffers{z.kv_buffer(), z.kv_buffer()};
      for (int64_t slot = begin; slot < end; ++slot) {
        for (int64_t i = slots.first(slot); i < slots.first(slot + 1); ++i) {
          chunk(z.plan[i], slot, i == slots.first(slot), buffers);
        }
      }
    };
    if (z.plan.parallel()) {
      attention::parallel_items(slots.count(), runs);
    } else {
      runs(0, 1);
    }
    if (!weight_sums.is_alias_of(grads.weight)) {
      const at::Tensor sum = weight_sums[0];
      add_slots(weight_sums, 0, slots.count(), sum.numel(), sum.mutable_data_ptr<acc_t>());
      grads.weight.copy_(sum);
    }
    if (apart) text_backward();
  }

 private:
  struct Buffers {
    at::Tensor kv, grad_kv;
  };

  void chunk(const Chunk& c, int64_t slot, bool first, const Buffers& buffers) const {
    const at::Tensor rows = z.rows_of(c);
    z.project(rows, c, buffers.kv);
    attention_chunk(c, slot, buffers);
    const at::Tensor grad_kv = z.kv_rows(buffers.grad_kv, c);
    at::Tensor grad_rows = grads.tokens.narrow(0, c.image, c.images).view({c.images * z.N, z.C});
    at::mm_out(grad_rows, grad_kv, z.weight);
    add_weight(grad_kv.t(), rows, first, weight_sums[slot]);
  }

  // Gradients of a chunk's keys and values, of its gates, and of what only its groups share.
  void attention_chunk(const Chunk& c, int64_t slot, const Buffers& b) const {
    const auto text = [&](const at::Tensor& x) { return part(x, c.group, c.groups); };
    const auto image = [&](const at::Tensor& x) { return part(x, c.image, c.images); };
    const at::Tensor none = apart ? z.no_keys(1) : at::Tensor();
    const at::Tensor grad_query = apart ? z.by_token(1, z.P) : text(grads.query);
    dual_attention_backward_into(
        image(grad_out), text(z.query), z.heads(b.kv, c, 0), z.heads(b.kv, c, 1),
        apart ? none : text(z.text_key), apart ? none : text(z.text_value), image(z.alpha),
        narrow(z.image_mask, c.image, c.images),
        apart ? std::nullopt : narrow(z.text_mask, c.group, c.groups), image(saved.image_out),
        text(saved.text_out), image(saved.image_lse), text(saved.text_lse), z.scale, grad_query,
        z.heads(b.grad_kv, c, 0), z.heads(b.grad_kv, c, 1), apart ? none : text(grads.text_key),
        apart ? none : text(grads.text_value), image(grads.alpha));
    if (apart) add_shared(c, c.group * slots.per_group() + slot % slots.per_group(), grad_query);
  }

  // Adds a chunk's gradient of its group's query, and (1 - alpha) grad_out, to row `at` of the
  // sums.
  void add_shared(const Chunk& c, int64_t at, const at::Tensor& grad_query) const {
    const int64_t n = z.P * width;
    acc_t* query_sum = query_sums.mutable_data_ptr<acc_t>() + at * n;
    acc_t* text_sum = text_sums.mutable_data_ptr<acc_t>() + at * n;
    const attention::Buffer<acc_t> row(n), share(width);
    attention::load_row(grad_query.const_data_ptr<scalar_t>(), 1, n, acc_t(1), row.get());
    for (int64_t j = 0; j < n; ++j) query_sum[j] += row.get()[j];
    const Gate<acc_t> alpha(z.alpha);
    const attention::Reader<scalar_t> reader(grad_out);
    for (int64_t b = c.image; b < c.image + c.images; ++b) {
      for (int64_t h = 0; h < z.H; ++h) {
        const auto from = reader(b, h);
        const acc_t factor = acc_t(1) - alpha(b, h);
        for (int64_t p = 0; p < z.P; ++p) {
          acc_t* to = text_sum + p * width + h * z.D;
          attention::load_row(from.data + p * from.row, from.column, z.D, factor, row.get());
          for (int64_t d = 0; d < z.D; ++d) to[d] += row.get()[d];
        }
      }
    }
  }

  // The text path of every group, from the sum over its images, and the query's gradient.
  void text_backward() const {
    const int64_t n = z.P * width, per_group = slots.per_group();
    const at::Tensor go = z.by_token(z.T, z.P), query = at::empty({z.T, n}, z.alpha.options());
    const attention::Buffer<acc_t> sum(n);
    for (int64_t t = 0; t < z.T; ++t) {
      add_slots(text_sums, t * per_group, per_group, n, sum.get());
      attention::store_row(sum.get(), n, go.mutable_data_ptr<scalar_t>() + t * n);
      add_slots(query_sums, t * per_group, per_group, n, query.mutable_data_ptr<acc_t>() + t * n);
    }
    const at::Tensor none = z.no_keys(z.T), shut = at::zeros({z.T, z.H}, z.alpha.options());
    dual_attention_backward_into(
        go, z.query, none, none, z.text_key, z.text_value, shut, std::nullopt, z.text_mask,
        saved.text_out, saved.text_out, saved.text_lse, saved.text_lse, z.scale, grads.query, none,
        none, grads.text_key, grads.text_value, at::empty({z.T, z.H}, z.alpha.options()));
    const PlainTensors plain;
    grads.query.copy_(query.view({z.T, z.P, z.H, z.D}).transpose(1, 2).add_(grads.query));
  }

  // sum (2HD, C) = or, but for the first, += a (2HD, rows) b (rows, C).
  void add_weight(const at::Tensor& a, const at::Tensor& b, bool first, at::Tensor sum) const {
    if (kSame && z.plan.parallel()) {
      sum.addmm_(a, b, first ? 0 : 1);
    } else if (kSame && first) {
      long_product(sum, a, b);
    } else {
      at::Tensor product = at::empty({2 * width, z.C}, a.options());
      z.plan.parallel() ? at::mm_out(product, a, b) : long_product(product, a, b);
      first ? sum.copy_(product) : sum.add_(product);
    }
  }

  // Whether sums have the dtype of the tensors.
  static constexpr bool kSame = std::is_same_v<scalar_t, acc_t>;

  const Problem& z;
  const at::Tensor& grad_out;
  const Saved& saved;
  const Grads& grads;
  const bool apart;  // the text path runs apart from the chunks
  const int64_t width;
  const Slots slots;
  const at::Tensor weight_sums;      // (slots, 2HD, C)
  at::Tensor query_sums, text_sums;  // (T * slots per group, P * H * D)
};

}  // namespace
}  // namespace gate

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
projected_dual_attention_forward(const at::Tensor& query, const at::Tensor& image_tokens,
                                 const at::Tensor& kv_weight, const at::Tensor& text_key,
                                 const at::Tensor& text_value, const at::Tensor& alpha,
                                 const std::optional<at::Tensor>& image_mask,
                                 const std::optional<at::Tensor>& text_mask, double scale,
                                 bool save) {
  const gate::PlainTensors plain;
  const gate::Problem z(query, image_tokens, kv_weight, text_key, text_value, alpha, image_mask,
                        text_mask, scale);
  gate::Saved r;
  r.out = z.by_token(z.B, z.P);
  if (save || !z.plan.whole_groups()) r.text_out = z.by_token(z.T, z.P);
  if (save) {
    r.image_out = z.by_token(z.B, z.P);
    r.image_lse = at::empty({z.B, z.H, z.P}, alpha.options());
    r.text_lse = at::empty({z.T, z.H, z.P}, alpha.options());
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(),
                                  "projected_dual_attention_forward",
                                  [&] { gate::forward<scalar_t>(z, r); });
  if (save) return {r.out, r.image_out, r.text_out, r.image_lse, r.text_lse};
  const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
  return {r.out, none(query), none(query), none(alpha), none(alpha)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
projected_dual_attention_backward(const at::Tensor& grad_out, const at::Tensor& query,
                                  const at::Tensor& image_tokens, const at::Tensor& kv_weight,
                                  const at::Tensor& text_key, const at::Tensor& text_value,
                                  const at::Tensor& alpha,
                                  const std::optional<at::Tensor>& image_mask,
                                  const std::optional<at::Tensor>& text_mask,
                                  const at::Tensor& image_out, const at::Tensor& text_out,
                                  const at::Tensor& image_lse, const at::Tensor& text_lse,
                                  double scale) {
  const gate::PlainTensors plain;
  const gate::Problem z(query, image_tokens, kv_weight, text_key, text_value, alpha, image_mask,
                        text_mask, scale);
  const gate::Saved saved{at::Tensor(), image_out, text_out, image_lse.contiguous(),
                          text_lse.contiguous()};
  const gate::Grads grads{z.by_token(z.T, z.P),
                          at::empty({z.B, z.N, z.C}, query.options()),
                          at::empty({2 * z.H * z.D, z.C}, query.options()),
                          z.by_token(z.T, z.S),
                          z.by_token(z.T, z.S),
                          at::empty({z.B, z.H}, alpha.options())};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "projected_dual_attention_backward",
      [&] { gate::Backward<scalar_t>(z, grad_out, saved, grads).run(); });
  return {grads.query, grads.tokens, grads.weight, grads.text_key, grads.text_value, grads.alpha};
}

}  // namespace dvla_fast
