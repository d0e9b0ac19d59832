// Backward of dual attention, from the outputs and log-sum-exps that the forward saved. With
// E = exp(scores - lse), go the output's gradient weighted by the path's share of the gate and
// delta = rowsum(go O):
//     dV = E' go,   dS = E (go V' - delta),   dK = dS' q scale,   dQ = scale dS K.
// The text path is linear in go, so the images of a group first add up (1 - alpha) go and the text
// runs backward once. Sums over images go through a number of slots that depends on the shape
// alone, and are added in order: the result does not depend on the threads.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for a mistake (bug 105593);
// it goes by where the headers are read, so this comes before all of them.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include "attention/dual_attention.h"
#include "attention/micro_gemm.h"
#include "attention/problem.h"

namespace dvla_fast {
namespace attention {
namespace {

// Work items that a backward pass is cut into at least, where it has that many blocks.
constexpr int64_t kItems = 64;

// Scratch of one thread for one group's query and one image's (or the text's) gradient.
template <class acc_t>
struct Scratch {
  Scratch(int64_t tokens, int64_t width, const Panels<acc_t>& panels)
      : ld(padded<acc_t>(width)),
        q(panels.tokens * ld),
        q_panels(panels.lanes * width),
        text(panels.tokens * ld),
        go(panels.tokens * ld),
        go_panels(panels.lanes * width),
        out_row(ld),
        lse(panels.lanes),
        delta(panels.lanes),
        key(block(tokens) * width),
        value(block(tokens) * width),
        weights(block(tokens) * wide(panels)),
        slopes(block(tokens) * wide(panels)),
        grad_key(block(tokens) * ld),
        grad_value(block(tokens) * ld) {}

  static int64_t block(int64_t tokens) { return std::min(tokens, kBlockKeys); }
  static int64_t wide(const Panels<acc_t>& panels) {
    return std::min(panels.vecs, kMaxVecs) * kLanes<acc_t>;
  }

  int64_t ld;                          // width, padded to whole vectors
  Buffer<acc_t> q, q_panels;           // the scaled query: (P, ld), and in panels of D rows
  Buffer<acc_t> text;                  // the text path's output (P, ld)
  Buffer<acc_t> go, go_panels;         // the output's gradient: (P, ld), and in panels of D rows
  Buffer<acc_t> out_row;               // (ld)
  Buffer<acc_t> lse, delta;            // (lanes of all panels)
  Buffer<acc_t> key, value;            // (block, D)
  Buffer<acc_t> weights, slopes;       // E' and dS' (block, lanes of a panel)
  Buffer<acc_t> grad_key, grad_value;  // (block, ld)
};

// One path of one head: keys, values and where their gradients go.
template <class scalar_t>
struct Path {
  Matrix<scalar_t> key, value;
  const int64_t* index;
  int64_t count;
  scalar_t *grad_key, *grad_value;
  int64_t grad_row;
};

// weights = exp(weights - lse), slopes = weights (slopes - delta), over (count, V * lanes).
// `whole`: the block holds every key. Then the weights are normalised again, which undoes the
// rounding of lse, and delta is summed from them rather than from the rounded output: what cancels
// in exact arithmetic (the slopes of a row add up to 0) cancels here.
template <int V, class acc_t>
void score_slopes(acc_t* weights, acc_t* slopes, int64_t count, const acc_t* lse,
                  const acc_t* delta, bool whole) {
  constexpr int64_t lanes = kLanes<acc_t>;
  Vec<acc_t> shift[V], share[V], mean[V], total[V], sum[V];
  for (int v = 0; v < V; ++v) {
    shift[v] = Vec<acc_t>::loadu(lse + v * lanes);
    total[v] = sum[v] = Vec<acc_t>(acc_t(0));
  }
  for (int64_t begin = 0; begin < count; begin += kSumRows) {
    Vec<acc_t> part[V];
    for (int v = 0; v < V; ++v) part[v] = Vec<acc_t>(acc_t(0));
    for (int64_t n = begin; n < std::min(begin + kSumRows, count); ++n) {
      for (int v = 0; v < V; ++v) {
        const int64_t at = (n * V + v) * lanes;
        const auto weight = exp_shifted(Vec<acc_t>::loadu(weights + at) - shift[v]);
        weight.store(weights + at);
        part[v] = part[v] + weight;
        sum[v] = at::vec::fmadd(weight, Vec<acc_t>::loadu(slopes + at), sum[v]);
      }
    }
    for (int v = 0; v < V; ++v) total[v] = total[v] + part[v];
  }
  for (int v = 0; v < V; ++v) {
    share[v] = Vec<acc_t>(acc_t(1));
    if (whole) share[v] = share[v] / total[v];
    mean[v] = whole ? sum[v] * share[v] : Vec<acc_t>::loadu(delta + v * lanes);
  }
  for (int64_t n = 0; n < count; ++n) {
    for (int v = 0; v < V; ++v) {
      const int64_t at = (n * V + v) * lanes;
      const auto weight = Vec<acc_t>::loadu(weights + at) * share[v];
      weight.store(weights + at);
      (weight * (Vec<acc_t>::loadu(slopes + at) - mean[v])).store(slopes + at);
    }
  }
}

// Keys [begin, begin + count) of a path against every query: their gradients, and their part of
// grad_query, added to `grad_q` (in panels of D rows, not yet scaled).
template <class scalar_t>
void block_backward(const Path<scalar_t>& path, int64_t begin, int64_t count,
                    const Panels<Acc<scalar_t>>& panels, int64_t width,
                    const Scratch<Acc<scalar_t>>& s, Acc<scalar_t>* grad_q) {
  using acc_t = Acc<scalar_t>;
  const auto key = key_tile(path.key, path.index, begin, count, width, s.key.get());
  const auto value = key_tile(path.value, path.index, begin, count, width, s.value.get());
  const int64_t ld = s.ld, ld_vecs = ld / kLanes<acc_t>;
  acc_t *weights = s.weights.get(), *slopes = s.slopes.get();
  acc_t *grad_key = s.grad_key.get(), *grad_value = s.grad_value.get();
  for (int64_t i = 0; i < panels.count; ++i) {
    const Panel panel = panels[i];
    const int64_t wide = panel.vecs * kLanes<acc_t>, at = panel.first * width;
    const acc_t* q_rows = s.q.get() + panel.first * ld;
    const acc_t* go_rows = s.go.get() + panel.first * ld;
    gemm<false>(count, panel.vecs, width, key.data, key.ld, s.q_panels.get() + at, wide, weights,
                wide, false);
    gemm<false>(count, panel.vecs, width, value.data, value.ld, s.go_panels.get() + at, wide,
                slopes, wide, false);
    with_vecs(panel.vecs, [&](auto V) {
      score_slopes<V()>(weights, slopes, count, s.lse.get() + panel.first,
                        s.delta.get() + panel.first, count == path.count);
    });
    gemm<false>(count, ld_vecs, panel.count, weights, wide, go_rows, ld, grad_value, ld, i > 0);
    gemm<false>(count, ld_vecs, panel.count, slopes, wide, q_rows, ld, grad_key, ld, i > 0);
    gemm<true>(width, panel.vecs, count, key.data, key.ld, slopes, wide, grad_q + at, wide, true);
  }
  for (int64_t j = 0; j < count; ++j) {
    const int64_t n = path.index ? path.index[begin + j] : begin + j;
    store_row(grad_value + j * ld, width, path.grad_value + n * path.grad_row);
    store_row(grad_key + j * ld, width, path.grad_key + n * path.grad_row);
  }
}

template <class scalar_t>
class Backward {
 public:
  using acc_t = Acc<scalar_t>;

  Backward(const Sizes& sizes, const at::Tensor& grad_out, const at::Tensor& query,
           const at::Tensor& image_key, const at::Tensor& image_value, const at::Tensor& text_key,
           const at::Tensor& text_value, const at::Tensor& alpha,
           const std::optional<at::Tensor>& image_mask, const std::optional<at::Tensor>& text_mask,
           const at::Tensor& image_out, const at::Tensor& text_out, const at::Tensor& image_lse,
           const at::Tensor& text_lse, double scale, const at::Tensor& grad_query,
           const at::Tensor& grad_image_key, const at::Tensor& grad_image_value,
           const at::Tensor& grad_text_key, const at::Tensor& grad_text_value,
           const at::Tensor& grad_alpha)
      : z(sizes),
        panels(z.P),
        image_blocks(z.N),
        text_blocks(z.S),
        image_slots(slots(z.G * image_blocks.count)),
        text_slots(slots(text_blocks.count)),
        grad_out(grad_out),
        query(query),
        image_key(image_key),
        image_value(image_value),
        text_key(text_key),
        text_value(text_value),
        image_out(image_out),
        text_out(text_out),
        alpha(alpha),
        image_lse(image_lse.const_data_ptr<acc_t>()),
        text_lse(text_lse.const_data_ptr<acc_t>()),
        image_kept(image_mask, z.B, z.N),
        text_kept(text_mask, z.T, z.S),
        scale(scale),
        grad_query(grad_query),
        grad_image_key(grad_image_key),
        grad_image_value(grad_image_value),
        grad_text_key(grad_text_key),
        grad_text_value(grad_text_value),
        grad_alpha(grad_alpha),
        query_sums(at::empty({z.T * z.H * (image_slots + text_slots), panels.lanes * z.D},
                             alpha.options())),
        text_sums(at::empty({z.T * z.H * image_slots, z.P * padded<acc_t>(z.D)}, alpha.options())) {
    // Masked keys are not visited; without queries no key is.
    if (!image_kept.all() || z.P == 0) grad_image_key.zero_(), grad_image_value.zero_();
    if (!text_kept.all() || z.P == 0) grad_text_key.zero_(), grad_text_value.zero_();
    if (z.P == 0) grad_alpha.zero_();
  }

  void run() const {
    if (z.P == 0) return;
    const int64_t heads = z.T * z.H;
    if (image_slots == 1 && text_slots == 1) {
      parallel_items(heads, [&](int64_t begin, int64_t end) {
        const Scratch<acc_t> scratch(std::max(z.N, z.S), z.D, panels);
        for (int64_t item = begin; item < end; ++item) {
          image_item(item, 0, scratch);
          text_item(item, 0, scratch);
          query_item(item, scratch);
        }
      });
      return;
    }
    each(heads * image_slots, [&](int64_t item, const Scratch<acc_t>& s) {
      image_item(item / image_slots, item % image_slots, s);
    });
    each(heads * text_slots, [&](int64_t item, const Scratch<acc_t>& s) {
      text_item(item / text_slots, item % text_slots, s);
    });
    each(heads, [&](int64_t item, const Scratch<acc_t>& s) { query_item(item, s); });
  }

 private:
  // Depends on the shape alone.
  int64_t slots(int64_t blocks) const {
    return std::max<int64_t>(1,
                             std::min(blocks, ceil_div(kItems, std::max<int64_t>(1, z.T * z.H))));
  }

  template <class F>
  void each(int64_t items, const F& f) const {
    parallel_items(items, [&](int64_t begin, int64_t end) {
      const Scratch<acc_t> scratch(std::max(z.N, z.S), z.D, panels);
      for (int64_t item = begin; item < end; ++item) f(item, scratch);
    });
  }

  acc_t* query_sum(int64_t group_head, int64_t slot) const {
    return query_sums.mutable_data_ptr<acc_t>() +
           (group_head * (image_slots + text_slots) + slot) * panels.lanes * z.D;
  }
  acc_t* text_sum(int64_t group_head, int64_t slot) const {
    return text_sums.mutable_data_ptr<acc_t>() +
           (group_head * image_slots + slot) * z.P * padded<acc_t>(z.D);
  }

  // The slot-th part of the images of a group: blocks of keys, image by image.
  void image_item(int64_t group_head, int64_t slot, const Scratch<acc_t>& s) const {
    const int64_t t = group_head / z.H, h = group_head % z.H, blocks = z.G * image_blocks.count;
    load_query(t, h, s);
    acc_t *grad_q = query_sum(group_head, slot), *grad_text = text_sum(group_head, slot);
    std::fill_n(grad_q, panels.lanes * z.D, acc_t(0));
    std::fill_n(grad_text, z.P * s.ld, acc_t(0));
    int64_t loaded = -1;
    const int64_t last = blocks * (slot + 1) / image_slots;
    for (int64_t block = blocks * slot / image_slots; block < last; ++block) {
      const int64_t g = block / image_blocks.count, part = block % image_blocks.count;
      const int64_t b = t * z.G + g;
      if (loaded != b) load_image_gradient(b, h, part == 0 ? grad_text : nullptr, s);
      loaded = b;
      const Path<scalar_t> path{image_key(b, h),     image_value(b, h),    image_kept.index(b),
                                image_kept.count(b), grad_image_key(b, h), grad_image_value(b, h),
                                grad_image_key.row()};
      run_block(path, part * image_blocks.size, image_blocks.size, s, grad_q);
    }
    // An image without keys has no block: its gradient still belongs to the text.
    if (image_blocks.count > 0 || slot > 0) return;
    for (int64_t g = 0; g < z.G; ++g) load_image_gradient(t * z.G + g, h, grad_text, s);
  }

  // The slot-th part of the text keys.
  void text_item(int64_t group_head, int64_t slot, const Scratch<acc_t>& s) const {
    const int64_t t = group_head / z.H, h = group_head % z.H;
    load_query(t, h, s);
    acc_t* grad_q = query_sum(group_head, image_slots + slot);
    std::fill_n(grad_q, panels.lanes * z.D, acc_t(0));
    std::copy_n(text_sum(group_head, 0), z.P * s.ld, s.go.get());
    for (int64_t i = 1; i < image_slots; ++i) {
      add_scaled(s.go.get(), text_sum(group_head, i), acc_t(1), z.P * s.ld);
    }
    for (int64_t p = 0; p < z.P; ++p) {
      s.delta.get()[p] = dot(s.go.get() + p * s.ld, s.text.get() + p * s.ld, s.ld);
    }
    load_panels(text_lse + group_head * z.P, s);
    const Path<scalar_t> path{text_key(t, h),     text_value(t, h),    text_kept.index(t),
                              text_kept.count(t), grad_text_key(t, h), grad_text_value(t, h),
                              grad_text_key.row()};
    const int64_t last = text_blocks.count * (slot + 1) / text_slots;
    for (int64_t i = text_blocks.count * slot / text_slots; i < last; ++i) {
      run_block(path, i * text_blocks.size, text_blocks.size, s, grad_q);
    }
  }

  // Adds up the parts of grad_query.
  void query_item(int64_t group_head, const Scratch<acc_t>& s) const {
    const int64_t t = group_head / z.H, h = group_head % z.H, n = panels.lanes * z.D;
    acc_t* sum = query_sum(group_head, 0);
    for (int64_t i = 1; i < image_slots + text_slots; ++i) {
      add_scaled(sum, query_sum(group_head, i), acc_t(1), n);
    }
    const Vec<acc_t> factor(static_cast<acc_t>(scale));
    for (int64_t i = 0; i < n; i += kLanes<acc_t>) {
      (factor * Vec<acc_t>::loadu(sum + i)).store(sum + i);
    }
    for (int64_t i = 0; i < panels.count; ++i) {
      store_panel<scalar_t>(sum + panels[i].first * z.D, panels[i], z.D, s.go.get(), s.ld,
                            grad_query(t, h), grad_query.row());
    }
  }

  void run_block(const Path<scalar_t>& path, int64_t begin, int64_t size, const Scratch<acc_t>& s,
                 acc_t* grad_q) const {
    const int64_t count = std::min(size, path.count - begin);  // < 1 where a mask leaves few keys
    if (count > 0) block_backward(path, begin, count, panels, z.D, s, grad_q);
  }

  // The query, scaled, and the text path's output of one group.
  void load_query(int64_t t, int64_t h, const Scratch<acc_t>& s) const {
    load_rows<scalar_t>(query(t, h), nullptr, 0, z.P, z.D, acc_t(scale), s.q.get(), s.ld);
    load_rows<scalar_t>(text_out(t, h), nullptr, 0, z.P, z.D, acc_t(1), s.text.get(), s.ld);
    for (int64_t i = 0; i < panels.count; ++i) {
      const Panel panel = panels[i];
      rows_to_panel(s.q.get() + panel.first * s.ld, s.ld, z.D, panel,
                    s.q_panels.get() + panel.first * z.D);
    }
  }

  // An image's share of the output's gradient, and delta. The owner of the image's first block
  // passes `grad_text`, where the text's share is added, and writes the gradient of alpha.
  void load_image_gradient(int64_t b, int64_t h, acc_t* grad_text, const Scratch<acc_t>& s) const {
    const acc_t share = alpha(b, h);
    const Matrix<scalar_t> from = grad_out(b, h), out = image_out(b, h);
    std::fill(s.out_row.get() + z.D, s.out_row.get() + s.ld, acc_t(0));
    double grad_share = 0;
    load_rows<scalar_t>(from, nullptr, 0, z.P, z.D, acc_t(1), s.go.get(), s.ld);
    for (int64_t p = 0; p < z.P; ++p) {
      acc_t* go = s.go.get() + p * s.ld;
      load_row(out.data + p * out.row, out.column, z.D, acc_t(1), s.out_row.get());
      const acc_t image_part = dot(go, s.out_row.get(), s.ld);
      s.delta.get()[p] = share * image_part;
      if (grad_text) {
        grad_share += image_part - dot(go, s.text.get() + p * s.ld, s.ld);
        add_scaled(grad_text + p * s.ld, go, acc_t(1) - share, s.ld);
      }
      for (int64_t d = 0; d < s.ld; d += kLanes<acc_t>) {
        (Vec<acc_t>(share) * Vec<acc_t>::loadu(go + d)).store(go + d);
      }
    }
    if (grad_text) grad_alpha.mutable_data_ptr<acc_t>()[b * z.H + h] = acc_t(grad_share);
    load_panels(image_lse + (b * z.H + h) * z.P, s);
  }

  // s.go to panels, and lse and delta padded to whole vectors.
  void load_panels(const acc_t* lse, const Scratch<acc_t>& s) const {
    std::copy_n(lse, z.P, s.lse.get());
    std::fill(s.lse.get() + z.P, s.lse.get() + panels.lanes, acc_t(0));
    std::fill(s.delta.get() + z.P, s.delta.get() + panels.lanes, acc_t(0));
    for (int64_t i = 0; i < panels.count; ++i) {
      const Panel panel = panels[i];
      rows_to_panel(s.go.get() + panel.first * s.ld, s.ld, z.D, panel,
                    s.go_panels.get() + panel.first * z.D);
    }
  }

  const Sizes z;
  const Panels<acc_t> panels;
  const Blocks image_blocks, text_blocks;
  const int64_t image_slots, text_slots;
  const Reader<scalar_t> grad_out, query, image_key, image_value, text_key, text_value;
  const Reader<scalar_t> image_out, text_out;
  const Gate<acc_t> alpha;
  const acc_t *image_lse, *text_lse;  // (B, H, P), (T, H, P) contiguous
  const KeptKeys image_kept, text_kept;
  const double scale;
  const Writer<scalar_t> grad_query, grad_image_key, grad_image_value, grad_text_key;
  const Writer<scalar_t> grad_text_value;
  const at::Tensor grad_alpha;  // (B, H) contiguous
  at::Tensor query_sums;        // (T, H, image slots + text slots) x panels of D rows
  at::Tensor text_sums;         // (T, H, image slots, P, D padded): sum of (1 - alpha) grad_out
};

}  // namespace
}  // namespace attention

void dual_attention_backward_into(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& image_key,
    const at::Tensor& image_value, const at::Tensor& text_key, const at::Tensor& text_value,
    const at::Tensor& alpha, const std::optional<at::Tensor>& image_mask,
    const std::optional<at::Tensor>& text_mask, const at::Tensor& image_out,
    const at::Tensor& text_out, const at::Tensor& image_lse, const at::Tensor& text_lse,
    double scale, const at::Tensor& grad_query, const at::Tensor& grad_image_key,
    const at::Tensor& grad_image_value, const at::Tensor& grad_text_key,
    const at::Tensor& grad_text_value, const at::Tensor& grad_alpha) {
  const attention::Sizes sizes(query, image_key, text_key);
  const at::Tensor image_sums = image_lse.contiguous(), text_sums = text_lse.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "dual_attention_backward", [&] {
        const attention::Backward<scalar_t> backward(
            sizes, grad_out, query, image_key, image_value, text_key, text_value, alpha, image_mask,
            text_mask, image_out, text_out, image_sums, text_sums, scale, grad_query,
            grad_image_key, grad_image_value, grad_text_key, grad_text_value, grad_alpha);
        backward.run();
      });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
dual_attention_backward(const at::Tensor& grad_out, const at::Tensor& query,
                        const at::Tensor& image_key, const at::Tensor& image_value,
                        const at::Tensor& text_key, const at::Tensor& text_value,
                        const at::Tensor& alpha, const std::optional<at::Tensor>& image_mask,
                        const std::optional<at::Tensor>& text_mask, const at::Tensor& image_out,
                        const at::Tensor& text_out, const at::Tensor& image_lse,
                        const at::Tensor& text_lse, double scale) {
  const attention::Sizes z(query, image_key, text_key);
  const auto result = [&](int64_t outer, int64_t tokens) {
    return attention::empty_by_token(outer, z.H, tokens, z.D, query);
  };
  const at::Tensor grad_query = result(z.T, z.P);
  const at::Tensor grad_image_key = result(z.B, z.N), grad_image_value = result(z.B, z.N);
  const at::Tensor grad_text_key = result(z.T, z.S), grad_text_value = result(z.T, z.S);
  const at::Tensor grad_alpha = at::empty({z.B, z.H}, alpha.options());
  dual_attention_backward_into(grad_out, query, image_key, image_value, text_key, text_value, alpha,
                               image_mask, text_mask, image_out, text_out, image_lse, text_lse,
                               scale, grad_query, grad_image_key, grad_image_value, grad_text_key,
                               grad_text_value, grad_alpha);
  return {grad_query, grad_image_key, grad_image_value, grad_text_key, grad_text_value, grad_alpha};
}

}  // namespace dvla_fast
