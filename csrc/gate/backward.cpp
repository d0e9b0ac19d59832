// Backward of the gated layer, chunk by chunk as the forward (plan.h): keys and values are
// projected again, and the gradients of a chunk's tokens leave complete, what comes in for the
// updated tokens included. What chunks have in common is added up in slots. With absorbed weights
// (absorb.h) the chunks sum up the gradient of the absorbed query, from which those of the query
// and of the keys' weight follow at the end.
#include <ATen/Dispatch.h>
#include <ATen/ops/add.h>
#include <ATen/ops/zeros.h>

#include <numeric>
#include <vector>

#include "gate/absorb.h"
#include "gate/gated_attention.h"
#include "gate/problem.h"
#include "gate/sums.h"

namespace dvla_fast {
namespace gate {
namespace {

// The slots' sums of the weights' gradients take this many times the weights at most.
constexpr int64_t kMostSlots = 16;
// Rows of one thread's part of a weight's gradient in half types, where threads share it.
constexpr int64_t kPartRows = 96;
// Columns by which rows of a buffer that is read down its columns are longer than what they hold:
// rows a multiple of a large power of two apart fall into the same few lines of the cache.
constexpr int64_t kSkew = 16;

// out (n) = the sum of rows [first, first + count) of `slots` (…, n), in order; `out` may be the
// first.
template <class acc_t>
void add_slots(const at::Tensor& slots, int64_t first, int64_t count, int64_t n, acc_t* out) {
  const acc_t* from = slots.const_data_ptr<acc_t>() + first * n;
  const auto part = [&](int64_t begin, int64_t end) {
    if (out != from) std::copy(from + begin, from + end, out + begin);
    for (int64_t i = 1; i < count; ++i) {
      const acc_t* row = from + i * n;
      for (int64_t j = begin; j < end; ++j) out[j] += row[j];
    }
  };
  parallel_items(n, part, 4096);
}

struct Saved {
  at::Tensor image_out, text_out, image_lse, text_lse;  // the outputs stored by token
  at::Tensor kept;  // see Problem::kept_rows; undefined: to be projected again
};

struct Grads {
  at::Tensor query, tokens, kv_weight, text_key, text_value, alpha, out_weight;
};

// What a thread reuses from chunk to chunk.
struct Buffers {
  Buffers(const Problem& z, bool kept, bool direct) : grad_mixed(z.buffer(z.P, z.width)) {
    if (!kept) kv = z.kept_buffer();
    grad_kept = z.absorbed ? z.kept_buffer() : z.buffer(z.N, 2 * z.width + kSkew);
    if (z.absorbed && !direct) grad_tokens = z.buffer(z.N, z.C);
  }
  at::Tensor kv, grad_kept;  // see Problem::kept_rows; the rows of keys are longer
  at::Tensor grad_mixed;     // (images * P, HD)
  at::Tensor grad_tokens;    // absorbed and not `direct`: (images * N, C)
};

template <class scalar_t>
class Backward {
 public:
  using acc_t = Acc<scalar_t>;

  Backward(const Problem& z, const OptionalTensor& grad_updated, const OptionalTensor& grad_fused,
           const Saved& saved, const Grads& grads)
      : z(z),
        grad_updated(grad_updated),
        grad_fused(grad_fused),
        saved(saved),
        grads(grads),
        slots(z.plan, z.T, std::clamp<int64_t>(z.B * z.N / (2 * z.width), 1, kMostSlots)),
        chunk_weight(z.absorbed ? narrow(grads.kv_weight, 0, z.width, z.width) : grads.kv_weight),
        kv_sums(sums_of(chunk_weight)),
        out_sums(sums_of(grads.out_weight)),
        wants_tokens(grads.tokens.dim() == 3),
        direct(wants_tokens && grads.tokens.scalar_type() == z.query.scalar_type()),
        out(z.out_weight, z.packing) {
    if (z.absorbed) {
      values.resize(z.H);
      each_head(z, [&](int64_t h) { values[h] = Factor<scalar_t>(value_weight(z, h), z.packing); });
    } else {
      if (wants_tokens) kv = Factor<scalar_t>(z.kv_weight, z.packing);
      if (!saved.kept.defined()) {
        projection = Factor<scalar_t>(transposed(z.kv_weight), z.packing);
      }
    }
    if (!z.apart) return;
    const int64_t rows = z.T * slots.per_group();
    query_sums = new_filled({rows, z.P * (z.absorbed ? z.H * z.C : z.width)}, 0, z.alpha.options());
    text_sums = new_filled({rows, z.P * z.width}, 0, z.alpha.options());
    if (z.absorbed) query = absorbed_query<scalar_t>(z);
  }

  void run() const {
    const auto runs = [&](int64_t begin, int64_t end) {
      const PlainTensors plain;
      const Buffers buffers(z, saved.kept.defined(), direct);
      for (int64_t slot = begin; slot < end; ++slot) {
        for (int64_t i = slots.first(slot); i < slots.first(slot + 1); ++i) {
          const Chunk c = z.plan[i];
          const bool first = i == slots.first(slot);
          out_projection(c, slot, first, buffers);
          z.absorbed ? absorbed(c, slot, first, buffers) : projected(c, slot, first, buffers);
        }
      }
    };
    if (z.plan.parallel()) {
      parallel_items(slots.count(), runs);
    } else {
      runs(0, 1);
    }
    add_weight_slots(kv_sums, chunk_weight);
    add_weight_slots(out_sums, grads.out_weight);
    if (z.apart) text_backward();
  }

 private:
  // Whether sums have the dtype of the tensors.
  static constexpr bool kSame = std::is_same_v<scalar_t, acc_t>;

  // (slots, …) of a weight's gradient; a single one is the gradient itself where the dtype allows,
  // or where no second chunk is added to it.
  at::Tensor sums_of(const at::Tensor& weight) const {
    const bool rounded_once = z.plan.count() == 1 && z.B * std::max(z.N, z.P) <= kRun;
    if (slots.count() == 1 && (kSame || rounded_once)) return weight.unsqueeze(0);
    return new_empty({slots.count(), weight.size(0), weight.size(1)}, z.alpha.options());
  }

  void add_weight_slots(const at::Tensor& sums, const at::Tensor& weight) const {
    if (sums.is_alias_of(weight)) return;
    const at::Tensor sum = sums[0];
    add_slots(sums, 0, slots.count(), sum.numel(), sum.mutable_data_ptr<acc_t>());
    weight.copy_(sum);
  }

  // A chunk whose keys and values are projected.
  void projected(const Chunk& c, int64_t slot, bool first, const Buffers& b) const {
    const at::Tensor rows = z.attended_rows(c);
    const at::Tensor kept = z.chunk_rows(saved.kept, b.kv, z.N, c);
    if (!saved.kept.defined()) projection.multiply(rows, kept);
    const at::Tensor grad_rows = z.filled(b.grad_kept, z.N, c);
    attention_backward(c, slot, kept, grad_rows, b);
    const at::Tensor grad_kv = narrow(grad_rows, 1, 0, 2 * z.width);
    if (wants_tokens) grad_tokens(c, grad_kv);
    add_weight(transposed(grad_kv), rows, first, kv_sums[slot]);
  }

  // A chunk with absorbed weights.
  void absorbed(const Chunk& c, int64_t slot, bool first, const Buffers& b) const {
    add_text(c, slot, b, true);
    const at::Tensor grad_image = z.filled(b.grad_mixed, z.P, c);
    const at::Tensor weighted = z.chunk_rows(saved.kept, b.kv, z.P, c);
    const at::Tensor grad_weighted = z.filled(b.grad_kept, z.P, c), sums = kv_sums[slot];
    each_head(z, [&](int64_t h) {
      const at::Tensor grad = of_head(grad_image, h, z.D);
      values[h].multiply(grad, of_head(grad_weighted, h, z.C));
      add_product<scalar_t>(transposed(grad), of_head(weighted, h, z.C),
                            narrow(sums, 0, h * z.D, z.D), !first, Packing::kStrips);
    });
    const AbsorbedChunk a(z, query, c);
    const at::Tensor grad_query = new_empty(a.query.sizes(), z.query.options());
    const at::Tensor to = wants_tokens ? z.images(grads.tokens, c) : at::Tensor();
    const at::Tensor tokens = (direct ? to : z.filled(b.grad_tokens, z.N, c))
                                  .view({c.images, 1, z.N, z.C});  // keys and values both
    dual_attention_backward_into(
        one_head(z, grad_weighted), a.query, a.tokens, a.tokens, a.no_text, a.no_text, a.open,
        part(z.image_mask, c.image, c.images), std::nullopt, one_head(z, weighted), a.no_text,
        z.images(saved.image_lse, c), z.texts(saved.text_lse, c), z.scale, grad_query, tokens,
        tokens, a.no_text, a.no_text, new_empty({c.images, 1}, z.alpha.options()));
    add_query(c, slot, grad_query.const_data_ptr<scalar_t>());
    if (!wants_tokens) return;
    if (!direct) at::Tensor(to).copy_(tokens.squeeze(1));
    if (grad_updated) at::Tensor(to).add_(z.images(*grad_updated, c));
  }

  // The gradient of a chunk's mixture, and its part of the out-projection's.
  void out_projection(const Chunk& c, int64_t slot, bool first, const Buffers& b) const {
    const at::Tensor grad = fused_gradient(c).view({c.images * z.P, z.C});
    out.multiply(grad, z.filled(b.grad_mixed, z.P, c));
    const at::Tensor mixed = new_empty({c.images * z.P, z.width}, z.query.options());
    mix(z, c, saved.text_out.const_data_ptr<scalar_t>(),
        saved.image_out.const_data_ptr<scalar_t>() + c.image * z.P * z.width, false,
        mixed.mutable_data_ptr<scalar_t>());
    add_weight(transposed(grad), mixed, first, out_sums[slot]);
  }

  // What flows into `fused` of a chunk (images, P, C), by itself and by the updated tokens; rows a
  // little apart.
  at::Tensor fused_gradient(const Chunk& c) const {
    const at::Tensor direct =
        grad_fused ? z.images(*grad_fused, c)
                   : at::zeros({1, 1, 1}, z.query.options()).expand({c.images, z.P, z.C});
    const at::Tensor grad =
        narrow(new_empty({c.images, z.P, z.C + kSkew}, z.query.options()), 2, 0, z.C);
    if (grad_updated) {
      const at::Tensor added =
          shared_sum(z, c, z.images(*grad_updated, c)).to(z.query.scalar_type());
      at::Tensor to = grad;
      at::add_out(to, direct, added);
    } else {
      grad.copy_(direct);
    }
    z.drop_masked(grad, c);
    return grad;
  }

  // Gradients of a chunk's keys and values, of its gates, and of what only its groups share.
  void attention_backward(const Chunk& c, int64_t slot, const at::Tensor& kv,
                          const at::Tensor& grad_kv, const Buffers& b) const {
    const at::Tensor none = z.apart ? z.no_keys(1) : at::Tensor();
    const at::Tensor grad_query = z.apart ? z.by_token(1, z.P) : z.texts(grads.query, c);
    dual_attention_backward_into(
        z.heads(b.grad_mixed, c), z.texts(z.query, c), z.keys(kv, 0, c), z.keys(kv, 1, c),
        z.apart ? none : z.texts(z.text_key, c), z.apart ? none : z.texts(z.text_value, c),
        z.images(z.alpha, c), part(z.image_mask, c.image, c.images),
        z.apart ? std::nullopt : part(z.text_mask, c.group, c.groups), z.images(saved.image_out, c),
        z.apart ? none : z.texts(saved.text_out, c), z.images(saved.image_lse, c),
        z.texts(saved.text_lse, c), z.scale, grad_query, z.keys(grad_kv, 0, c),
        z.keys(grad_kv, 1, c), z.apart ? none : z.texts(grads.text_key, c),
        z.apart ? none : z.texts(grads.text_value, c), z.images(grads.alpha, c));
    if (!z.apart) return;
    add_query(c, slot, grad_query.const_data_ptr<scalar_t>());
    add_text(c, slot, b, false);
  }

  // Where a slot sums up what belongs to a group.
  acc_t* shared_row(const at::Tensor& sums, int64_t group, int64_t slot) const {
    const int64_t row = group * slots.per_group() + slot % slots.per_group();
    return sums.mutable_data_ptr<acc_t>() + row * sums.size(1);
  }

  // Adds a chunk's gradient of its groups' queries to their sums.
  void add_query(const Chunk& c, int64_t slot, const scalar_t* grad) const {
    const int64_t n = query_sums.size(1);
    std::vector<acc_t> row(n);
    for (int64_t group = c.group; group < c.group + c.groups; ++group, grad += n) {
      attention::load_row(grad, 1, n, acc_t(1), row.data());
      acc_t* sum = shared_row(query_sums, group, slot);
      for (int64_t j = 0; j < n; ++j) sum[j] += row[j];
    }
  }

  // Adds a chunk's gradient of its groups' text paths, which is (1 - alpha) grad_mixed, to their
  // sums, and the text's part to those of its gates. `with_image`: the image path's too, which is
  // alpha grad_mixed, and takes its place.
  void add_text(const Chunk& c, int64_t slot, const Buffers& b, bool with_image) const {
    const int64_t n = z.P * z.width, group_images = z.B / z.T;
    const attention::Gate<acc_t> alpha(z.alpha);
    std::vector<acc_t> row(z.width), text(z.width), image(z.width), share(z.width), change(z.width);
    scalar_t* grad_mixed = b.grad_mixed.mutable_data_ptr<scalar_t>();
    const scalar_t* image_out = saved.image_out.template const_data_ptr<scalar_t>() + c.image * n;
    for (int64_t i = c.image; i < c.image + c.images; ++i) {
      const int64_t group = i / group_images;
      const scalar_t* text_out = saved.text_out.template const_data_ptr<scalar_t>() + group * n;
      acc_t* text_sum = shared_row(text_sums, group, slot);
      for (int64_t j = 0; j < z.width; ++j) share[j] = alpha(i, j / z.D);
      std::fill(change.begin(), change.end(), acc_t(0));
      for (int64_t p = 0; p < z.P; ++p, grad_mixed += z.width) {
        attention::load_row(grad_mixed, 1, z.width, acc_t(1), row.data());
        attention::load_row(text_out + p * z.width, 1, z.width, acc_t(1), text.data());
        for (int64_t j = 0; j < z.width; ++j) {
          text_sum[p * z.width + j] += (acc_t(1) - share[j]) * row[j];
          change[j] -= row[j] * text[j];
        }
        if (!with_image) continue;
        attention::load_row(image_out + p * z.width, 1, z.width, acc_t(1), image.data());
        for (int64_t j = 0; j < z.width; ++j) change[j] += row[j] * image[j];
        for (int64_t j = 0; j < z.width; ++j) row[j] *= share[j];
        attention::store_row(row.data(), z.width, grad_mixed);
      }
      image_out += n;
      acc_t* grad_alpha = grads.alpha.template mutable_data_ptr<acc_t>() + i * z.H;
      for (int64_t h = 0; h < z.H; ++h) {
        const acc_t* head = change.data() + h * z.D;
        const auto sum = acc_t(std::accumulate(head, head + z.D, 0.0));
        grad_alpha[h] = with_image ? sum : grad_alpha[h] + sum;
      }
    }
  }

  // The tokens' gradient: what came in for the updated ones, and by way of keys and values.
  void grad_tokens(const Chunk& c, const at::Tensor& grad_kv) const {
    const at::Tensor to = z.images(grads.tokens, c).view({c.images * z.N, z.C});
    if (to.scalar_type() == grad_kv.scalar_type()) {
      if (grad_updated) z.images(grads.tokens, c).copy_(z.images(*grad_updated, c));
      kv.multiply(grad_kv, to, grad_updated.has_value());
      return;
    }
    const at::Tensor product = new_empty({to.size(0), z.C}, grad_kv.options());
    kv.multiply(grad_kv, product);
    to.copy_(product);
    if (grad_updated) z.images(grads.tokens, c).add_(z.images(*grad_updated, c));
  }

  // sum (M, K) = or, but for the first, += a (M, rows) b (rows, K).
  void add_weight(const at::Tensor& a, const at::Tensor& b, bool first,
                  const at::Tensor& sum) const {
    const int64_t rows = sum.size(0);
    // The library's products are cut up here.
    const bool shared = !Factor<scalar_t>::kPacked && !kSame && !z.plan.parallel();
    const int64_t parts = shared ? std::clamp<int64_t>(rows / kPartRows, 1, 64) : 1;
    parallel_items(parts, [&](int64_t begin, int64_t end) {
      const PlainTensors plain;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = rows * i / parts, count = rows * (i + 1) / parts - from;
        add_product<scalar_t>(narrow(a, 0, from, count), b, narrow(sum, 0, from, count), !first,
                              z.packing);
      }
    });
  }

  // The text path of every group, from the sum over its images, and the query's gradient.
  void text_backward() const {
    const int64_t n = z.P * z.width;
    const at::Tensor grad = z.by_token(z.T, z.P);
    std::vector<acc_t> sum(n);
    for (int64_t t = 0; t < z.T; ++t) {
      add_slots(text_sums, t * slots.per_group(), slots.per_group(), n, sum.data());
      attention::store_row(sum.data(), n, grad.mutable_data_ptr<scalar_t>() + t * n);
    }
    const at::Tensor none = z.no_keys(z.T), shut = z.shut_gate();
    dual_attention_backward_into(grad, z.query, none, none, z.text_key, z.text_value, shut,
                                 std::nullopt, z.text_mask, saved.text_out, saved.text_out,
                                 saved.text_lse, saved.text_lse, z.scale, grads.query, none, none,
                                 grads.text_key, grads.text_value, z.shut_gate());
    const at::Tensor by_image = z.absorbed ? absorbed_gradient() : shared_gradient();
    grads.query.copy_(by_image.view({z.T, z.P, z.H, z.D}).transpose(1, 2).add_(grads.query));
  }

  // The sums over slots of the gradient of the (absorbed) query, (T * P, HD or HC).
  at::Tensor shared_gradient() const {
    const int64_t n = query_sums.size(1), per_group = slots.per_group();
    const at::Tensor sums =
        new_empty({z.T * z.P, z.absorbed ? z.H * z.C : z.width}, z.alpha.options());
    for (int64_t t = 0; t < z.T; ++t) {
      add_slots(query_sums, t * per_group, per_group, n, sums.mutable_data_ptr<acc_t>() + t * n);
    }
    return sums;
  }

  // By way of the absorbed query q Wk, that of the query, (T * P, HD), and that of Wk, to its
  // place.
  at::Tensor absorbed_gradient() const {
    const at::Tensor wide = shared_gradient();
    const at::Tensor query_grad = new_empty({z.T * z.P, z.width}, z.alpha.options());
    const auto type = z.alpha.scalar_type();
    each_head(z, [&](int64_t h) {
      const at::Tensor grad = of_head(wide, h, z.C);
      const Factor<acc_t> weight(transposed(key_weight(z, h).to(type)), z.packing);
      const Factor<acc_t> right(grad, Packing::kStrips);
      weight.multiply(grad, of_head(query_grad, h, z.D));
      const at::Tensor product = new_empty({z.D, z.C}, z.alpha.options());
      right.multiply(transposed(query_rows(z, h).to(type)), product);
      narrow(grads.kv_weight, 0, h * z.D, z.D).copy_(product);
    });
    return query_grad;
  }

  const Problem& z;
  const OptionalTensor &grad_updated, &grad_fused;
  const Saved& saved;
  const Grads& grads;
  const Slots slots;
  const at::Tensor chunk_weight;       // gradient of what chunks sum up: (2HD, C), absorbed (HD, C)
  const at::Tensor kv_sums, out_sums;  // (slots, as chunk_weight), (slots, C, HD)
  const bool wants_tokens;             // whether the tokens' gradient is asked for
  const bool direct;                   // it is, in the dtype of products
  const Factor<scalar_t> out;          // the weights, to the right of products
  Factor<scalar_t> kv, projection;     // the latter transposed
  std::vector<Factor<scalar_t>> values;  // absorbed: of each head
  at::Tensor query_sums, text_sums;  // (T * slots per group, P * HD), absorbed first (…, P * HC)
  at::Tensor query;                  // absorbed (T * P, HC)
};

}  // namespace
}  // namespace gate

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
gated_attention_backward(const std::optional<at::Tensor>& grad_updated,
                         const std::optional<at::Tensor>& grad_fused, const at::Tensor& query,
                         const at::Tensor& image_tokens, const at::Tensor& kv_weight,
                         const at::Tensor& text_key, const at::Tensor& text_value,
                         const at::Tensor& alpha, const at::Tensor& out_weight,
                         const std::optional<at::Tensor>& image_mask,
                         const std::optional<at::Tensor>& text_mask, const at::Tensor& image_out,
                         const at::Tensor& text_out, const at::Tensor& image_lse,
                         const at::Tensor& text_lse, const at::Tensor& kept, double scale,
                         bool tokens) {
  const gate::PlainTensors plain;
  const gate::Problem z(query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight,
                        image_mask, text_mask, scale);
  const auto stored_by_token = [](const at::Tensor& x) {
    return x.transpose(1, 2).contiguous().transpose(1, 2);
  };
  const gate::Saved saved{stored_by_token(image_out), stored_by_token(text_out),
                          image_lse.contiguous(), text_lse.contiguous(),
                          z.kept() ? kept.contiguous() : at::Tensor()};
  const gate::Grads grads{z.by_token(z.T, z.P),
                          tokens ? new_empty({z.B, z.N, z.C}, image_tokens.options())
                                 : new_empty({0}, image_tokens.options()),
                          new_empty({2 * z.width, z.C}, query.options()),
                          z.by_token(z.T, z.P),
                          z.by_token(z.T, z.P),
                          new_empty({z.B, z.H}, alpha.options()),
                          new_empty({z.C, z.width}, query.options())};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "gated_attention_backward",
      [&] { gate::Backward<scalar_t>(z, grad_updated, grad_fused, saved, grads).run(); });
  return {grads.query,      grads.tokens, grads.kv_weight, grads.text_key,
          grads.text_value, grads.alpha,  grads.out_weight};
}

}  // namespace dvla_fast
