// Backward of the gated layer, chunk by chunk as the forward (plan.h): keys and values are
// projected again, and the gradients of a chunk's tokens leave complete, what comes in for the
// updated tokens included. What chunks have in common is added up in slots.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// See attention/forward.cpp.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <ATen/Dispatch.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/sum.h>

#include <numeric>

#include "gate/gated_attention.h"
#include "gate/problem.h"

namespace dvla_fast {
namespace gate {
namespace {

// The slots' sums of the weights' gradients take this many times the weights at most.
constexpr int64_t kMostSlots = 16;
// Rows of one thread's part of a weight's gradient, where threads share it.
constexpr int64_t kPartRows = 96;
// A product over more rows than this a library may cut up along them, and differently so for other
// numbers of threads: it is taken in runs, longer where each run's result is rounded to half.
constexpr int64_t kRunRows = 128, kHalfRunRows = 1024;

// out (n) = the sum of rows [first, first + count) of `slots` (…, n), in order; `out` may be the
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

struct Saved {
  at::Tensor image_out, text_out, image_lse, text_lse;  // the outputs stored by token
  at::Tensor kv;                                        // undefined: to be projected again
};

struct Grads {
  at::Tensor query, tokens, kv_weight, text_key, text_value, alpha, out_weight;
};

// What a thread reuses from chunk to chunk.
struct Buffers {
  at::Tensor kv, grad_kv;        // (images * N, 2HD)
  at::Tensor mixed, grad_mixed;  // (images * P, HD)
  at::Tensor no_text;            // (1, H, P, D) zeros: output of a text path that runs apart
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
        kv_sums(sums_of(grads.kv_weight)),
        out_sums(sums_of(grads.out_weight)) {
    if (!z.apart) return;
    query_sums = at::zeros({z.T * slots.per_group(), z.P * z.width}, z.alpha.options());
    text_sums = at::zeros(query_sums.sizes(), z.alpha.options());
  }

  void run() const {
    const auto runs = [&](int64_t begin, int64_t end) {
      const PlainTensors plain;
      const Buffers buffers{z.buffer(saved.kv.defined() ? 0 : z.N, 2 * z.width),
                            z.buffer(z.N, 2 * z.width), z.buffer(z.P, z.width),
                            z.buffer(z.P, z.width), z.by_token(1, z.P).zero_()};
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
    add_weight_slots(kv_sums, grads.kv_weight);
    add_weight_slots(out_sums, grads.out_weight);
    if (z.apart) text_backward();
  }

 private:
  // Whether sums have the dtype of the tensors.
  static constexpr bool kSame = std::is_same_v<scalar_t, acc_t>;

  // (slots, …) of a weight's gradient; a single one is the gradient itself where the dtype allows.
  at::Tensor sums_of(const at::Tensor& weight) const {
    if (kSame && slots.count() == 1) return weight.unsqueeze(0);
    return at::empty({slots.count(), weight.size(0), weight.size(1)}, z.alpha.options());
  }

  void add_weight_slots(const at::Tensor& sums, const at::Tensor& weight) const {
    if (sums.is_alias_of(weight)) return;
    const at::Tensor sum = sums[0];
    add_slots(sums, 0, slots.count(), sum.numel(), sum.mutable_data_ptr<acc_t>());
    weight.copy_(sum);
  }

  void chunk(const Chunk& c, int64_t slot, bool first, const Buffers& b) const {
    const at::Tensor rows = z.rows_of(c);
    at::Tensor kv = z.kv_rows(saved.kv, b.kv, c);
    if (!saved.kv.defined()) at::mm_out(kv, rows, z.kv_weight.t());
    out_projection(c, slot, first, b);
    attention_backward(c, slot, kv, b);
    const at::Tensor grad_kv = z.filled(b.grad_kv, z.N, c);
    grad_tokens(c, grad_kv);
    add_weight(grad_kv.t(), rows, first, kv_sums[slot]);
  }

  // The gradient of a chunk's mixture, and its part of the out-projection's.
  void out_projection(const Chunk& c, int64_t slot, bool first, const Buffers& b) const {
    const at::Tensor grad = fused_gradient(c).view({c.images * z.P, z.C});
    at::Tensor grad_mixed = z.filled(b.grad_mixed, z.P, c);
    at::mm_out(grad_mixed, grad, z.out_weight);
    mix(z, c, saved.text_out.const_data_ptr<scalar_t>(),
        saved.image_out.const_data_ptr<scalar_t>() + c.image * z.P * z.width, false,
        b.mixed.mutable_data_ptr<scalar_t>());
    add_weight(grad.t(), z.filled(b.mixed, z.P, c), first, out_sums[slot]);
  }

  // What flows into `fused` of a chunk (images, P, C), by itself and by the updated tokens.
  at::Tensor fused_gradient(const Chunk& c) const {
    const at::Tensor direct =
        grad_fused ? z.images(*grad_fused, c)
                   : at::zeros({1, 1, 1}, z.query.options()).expand({c.images, z.P, z.C});
    const at::Tensor grad = at::empty({c.images, z.P, z.C}, z.query.options());
    if (grad_updated) {
      const at::Tensor added =
          at::sum(z.images(*grad_updated, c), 1, true, z.alpha.scalar_type())  // [images, 1, C]
              .mul_(z.images(z.mean_share, c).unsqueeze(1))
              .to(z.query.scalar_type());
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
                          const Buffers& b) const {
    const at::Tensor none = z.apart ? z.no_keys(1) : at::Tensor();
    const at::Tensor grad_query = z.apart ? z.by_token(1, z.P) : z.texts(grads.query, c);
    dual_attention_backward_into(
        z.heads(b.grad_mixed, c), z.texts(z.query, c), z.keys(kv, 0, c), z.keys(kv, 1, c),
        z.apart ? none : z.texts(z.text_key, c), z.apart ? none : z.texts(z.text_value, c),
        z.images(z.alpha, c), part(z.image_mask, c.image, c.images),
        z.apart ? std::nullopt : part(z.text_mask, c.group, c.groups), z.images(saved.image_out, c),
        z.apart ? b.no_text : z.texts(saved.text_out, c), z.images(saved.image_lse, c),
        z.texts(saved.text_lse, c), z.scale, grad_query, z.keys(b.grad_kv, 0, c),
        z.keys(b.grad_kv, 1, c), z.apart ? none : z.texts(grads.text_key, c),
        z.apart ? none : z.texts(grads.text_value, c), z.images(grads.alpha, c));
    if (!z.apart) return;
    add_shared(c, c.group * slots.per_group() + slot % slots.per_group(),
               grad_query.const_data_ptr<scalar_t>(), b.grad_mixed.const_data_ptr<scalar_t>());
  }

  // Adds a chunk's gradient of its group's query, and its gradient of the text path's output, which
  // is (1 - alpha) grad_mixed, to that row of the sums; and the text's part to those of its gates.
  void add_shared(const Chunk& c, int64_t row_of_sums, const scalar_t* grad_query,
                  const scalar_t* grad_mixed) const {
    const int64_t n = z.P * z.width;
    acc_t* query_sum = query_sums.mutable_data_ptr<acc_t>() + row_of_sums * n;
    acc_t* text_sum = text_sums.mutable_data_ptr<acc_t>() + row_of_sums * n;
    std::vector<acc_t> row(z.width), text(z.width), share(z.width), products(z.width);
    for (int64_t p = 0; p < z.P; ++p) {
      attention::load_row(grad_query + p * z.width, 1, z.width, acc_t(1), row.data());
      for (int64_t j = 0; j < z.width; ++j) query_sum[p * z.width + j] += row[j];
    }
    const attention::Gate<acc_t> alpha(z.alpha);
    const scalar_t* text_out = saved.text_out.template const_data_ptr<scalar_t>() + c.group * n;
    acc_t* grad_alpha = grads.alpha.template mutable_data_ptr<acc_t>() + c.image * z.H;
    for (int64_t b = c.image; b < c.image + c.images; ++b, grad_alpha += z.H) {
      for (int64_t j = 0; j < z.width; ++j) share[j] = acc_t(1) - alpha(b, j / z.D);
      std::fill(products.begin(), products.end(), acc_t(0));
      for (int64_t p = 0; p < z.P; ++p, grad_mixed += z.width) {
        attention::load_row(grad_mixed, 1, z.width, acc_t(1), row.data());
        attention::load_row(text_out + p * z.width, 1, z.width, acc_t(1), text.data());
        for (int64_t j = 0; j < z.width; ++j) {
          text_sum[p * z.width + j] += share[j] * row[j];
          products[j] += row[j] * text[j];
        }
      }
      for (int64_t h = 0; h < z.H; ++h) {
        const acc_t* head = products.data() + h * z.D;
        grad_alpha[h] -= acc_t(std::accumulate(head, head + z.D, 0.0));
      }
    }
  }

  // The tokens' gradient: what came in for the updated ones, and by way of keys and values.
  void grad_tokens(const Chunk& c, const at::Tensor& grad_kv) const {
    at::Tensor to = z.images(grads.tokens, c).view({c.images * z.N, z.C});
    const bool same = to.scalar_type() == grad_kv.scalar_type();
    if (same && !grad_updated) {
      at::mm_out(to, grad_kv, z.kv_weight);
      return;
    }
    if (!grad_updated) {
      to.copy_(at::mm(grad_kv, z.kv_weight));
      return;
    }
    const at::Tensor passed = z.images(*grad_updated, c).reshape({c.images * z.N, z.C});
    if (same) {
      at::addmm_out(to, passed, grad_kv, z.kv_weight);
    } else {
      at::add_out(to, passed, at::mm(grad_kv, z.kv_weight));
    }
  }

  // sum (M, K) = or, but for the first, += a (M, rows) b (rows, K).
  void add_weight(const at::Tensor& a, const at::Tensor& b, bool first,
                  const at::Tensor& sum) const {
    const int64_t rows = sum.size(0);
    const int64_t parts = z.plan.parallel() ? 1 : std::clamp<int64_t>(rows / kPartRows, 1, 64);
    attention::parallel_items(parts, [&](int64_t begin, int64_t end) {
      const PlainTensors plain;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = rows * i / parts, count = rows * (i + 1) / parts - from;
        add_product(a.narrow(0, from, count), b, first, sum.narrow(0, from, count));
      }
    });
  }

  static void add_product(const at::Tensor& a, const at::Tensor& b, bool first, at::Tensor sum) {
    const int64_t rows = b.size(0), run = kSame ? kRunRows : kHalfRunRows;
    for (int64_t from = 0; from == 0 || from < rows; from += run, first = false) {
      const int64_t count = std::min(run, rows - from);
      const at::Tensor left = a.narrow(1, from, count), right = b.narrow(0, from, count);
      if (kSame) {
        sum.addmm_(left, right, first ? 0 : 1);
      } else {
        const at::Tensor product = at::mm(left, right);
        first ? sum.copy_(product) : sum.add_(product);
      }
    }
  }

  // The text path of every group, from the sum over its images, and the query's gradient.
  void text_backward() const {
    const int64_t n = z.P * z.width, per_group = slots.per_group();
    const at::Tensor grad = z.by_token(z.T, z.P), query = at::empty({z.T, n}, z.alpha.options());
    std::vector<acc_t> sum(n);
    for (int64_t t = 0; t < z.T; ++t) {
      add_slots(text_sums, t * per_group, per_group, n, sum.data());
      attention::store_row(sum.data(), n, grad.mutable_data_ptr<scalar_t>() + t * n);
      add_slots(query_sums, t * per_group, per_group, n, query.mutable_data_ptr<acc_t>() + t * n);
    }
    const at::Tensor none = z.no_keys(z.T), shut = z.shut_gate();
    dual_attention_backward_into(grad, z.query, none, none, z.text_key, z.text_value, shut,
                                 std::nullopt, z.text_mask, saved.text_out, saved.text_out,
                                 saved.text_lse, saved.text_lse, z.scale, grads.query, none, none,
                                 grads.text_key, grads.text_value, z.shut_gate());
    grads.query.copy_(query.view({z.T, z.P, z.H, z.D}).transpose(1, 2).add_(grads.query));
  }

  const Problem& z;
  const OptionalTensor &grad_updated, &grad_fused;
  const Saved& saved;
  const Grads& grads;
  const Slots slots;
  const at::Tensor kv_sums, out_sums;  // (slots, 2HD, C), (slots, C, HD)
  at::Tensor query_sums, text_sums;    // (T * slots per group, P * HD)
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
                         const at::Tensor& text_lse, const at::Tensor& kv, double scale) {
  const gate::PlainTensors plain;
  const gate::Problem z(query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight,
                        image_mask, text_mask, scale);
  const auto stored_by_token = [](const at::Tensor& x) {
    return x.transpose(1, 2).contiguous().transpose(1, 2);
  };
  const gate::Saved saved{stored_by_token(image_out), stored_by_token(text_out),
                          image_lse.contiguous(), text_lse.contiguous(),
                          z.plan.kept() ? kv.contiguous() : at::Tensor()};
  const gate::Grads grads{z.by_token(z.T, z.P),
                          at::empty({z.B, z.N, z.C}, image_tokens.options()),
                          at::empty({2 * z.width, z.C}, query.options()),
                          z.by_token(z.T, z.P),
                          z.by_token(z.T, z.P),
                          at::empty({z.B, z.H}, alpha.options()),
                          at::empty({z.C, z.width}, query.options())};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "gated_attention_backward",
      [&] { gate::Backward<scalar_t>(z, grad_updated, grad_fused, saved, grads).run(); });
  return {grads.query,      grads.tokens, grads.kv_weight, grads.text_key,
          grads.text_value, grads.alpha,  grads.out_weight};
}

}  // namespace dvla_fast
