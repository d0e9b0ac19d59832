// Forward of dual attention. The queries lie in vector lanes: with Q' (D, lanes) packed once per
// text group, a block of scores is K Q' and the output is V' exp(scores), so keys and values are
// read as they lie, every reduction over keys is vertical, and the scores of a block never leave
// the cache. The text path runs once per group.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for a mistake (bug 105593);
// it goes by where the headers are read, so this comes before all of them.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "attention/dual_attention.h"
#include "attention/micro_gemm.h"
#include "attention/problem.h"

namespace dvla_fast {
namespace attention {
namespace {

// One path of one head: which keys and values, and which of them count.
template <class scalar_t>
struct Path {
  Matrix<scalar_t> key, value;
  const int64_t* index;
  int64_t count;
};

template <class acc_t>
struct Scratch {
  Scratch(int64_t tokens, int64_t width, int64_t lanes)
      : key(std::min(tokens, kBlockKeys) * width),
        value(std::min(tokens, kBlockKeys) * width),
        scores(std::min(tokens, kBlockKeys) * lanes),
        out(lanes * width),
        rows(lanes * padded<acc_t>(width)),
        peak(lanes),
        total(lanes),
        lse(lanes) {}
  Buffer<acc_t> key, value;        // (block, D)
  Buffer<acc_t> scores;            // (block, lanes)
  Buffer<acc_t> out;               // (D, lanes)
  Buffer<acc_t> rows;              // (lanes, D padded)
  Buffer<acc_t> peak, total, lse;  // (lanes)
};

// scores (count, V * lanes) to exp(scores - peak), with the running peak and total of each lane and
// what is already in `out` (width, V * lanes) rescaled to the new peak.
template <int V, class acc_t>
void softmax_block(acc_t* scores, int64_t count, bool first, acc_t* peak, acc_t* total, acc_t* out,
                   int64_t width) {
  constexpr int64_t lanes = kLanes<acc_t>, wide = V * lanes;
  Vec<acc_t> top[V], sum[V];
  for (int v = 0; v < V; ++v) top[v] = Vec<acc_t>::loadu((first ? scores : peak) + v * lanes);
  for (int64_t n = 0; n < count; ++n) {
    for (int v = 0; v < V; ++v) {
      top[v] = at::vec::maximum(top[v], Vec<acc_t>::loadu(scores + n * wide + v * lanes));
    }
  }
  for (int v = 0; v < V; ++v) sum[v] = Vec<acc_t>(acc_t(0));
  for (int64_t begin = 0; begin < count; begin += kSumRows) {
    Vec<acc_t> part[V];
    for (int v = 0; v < V; ++v) part[v] = Vec<acc_t>(acc_t(0));
    for (int64_t n = begin; n < std::min(begin + kSumRows, count); ++n) {
      for (int v = 0; v < V; ++v) {
        acc_t* at = scores + n * wide + v * lanes;
        const Vec<acc_t> weight = exp_shifted(Vec<acc_t>::loadu(at) - top[v]);
        weight.store(at);
        part[v] = part[v] + weight;
      }
    }
    for (int v = 0; v < V; ++v) sum[v] = sum[v] + part[v];
  }
  for (int v = 0; v < V; ++v) {
    if (!first) {
      const Vec<acc_t> shrink = exp_shifted(Vec<acc_t>::loadu(peak + v * lanes) - top[v]);
      sum[v] = at::vec::fmadd(Vec<acc_t>::loadu(total + v * lanes), shrink, sum[v]);
      for (int64_t d = 0; d < width; ++d) {
        acc_t* at = out + d * wide + v * lanes;
        (Vec<acc_t>::loadu(at) * shrink).store(at);
      }
    }
    top[v].store(peak + v * lanes);
    sum[v].store(total + v * lanes);
  }
}

// out (width, V * lanes) and lse (V * lanes) of one panel of queries over all keys of a path;
// q (width, V * lanes) is already scaled.
template <int V, class scalar_t>
void attend(const Path<scalar_t>& path, const Acc<scalar_t>* q, int64_t width,
            const Scratch<Acc<scalar_t>>& s, Acc<scalar_t>* out, Acc<scalar_t>* lse) {
  using acc_t = Acc<scalar_t>;
  constexpr int64_t lanes = kLanes<acc_t>, wide = V * lanes;
  if (path.count == 0) {
    std::fill(out, out + width * wide, acc_t(0));
    std::fill(lse, lse + wide, -std::numeric_limits<acc_t>::infinity());
    return;
  }
  const Blocks blocks(path.count);
  for (int64_t begin = 0; begin < path.count; begin += blocks.size) {
    const int64_t count = std::min(blocks.size, path.count - begin);
    const bool first = begin == 0;
    const auto key = key_tile(path.key, path.index, begin, count, width, s.key.get());
    const auto value = key_tile(path.value, path.index, begin, count, width, s.value.get());
    acc_t* scores = s.scores.get();
    gemm_rows<false, kTileRows, V>(count, width, key.data, key.ld, q, wide, scores, wide, false);
    softmax_block<V>(scores, count, first, s.peak.get(), s.total.get(), out, width);
    gemm_rows<true, kTileRows, V>(width, count, value.data, value.ld, scores, wide, out, wide,
                                  !first);
  }
  for (int v = 0; v < V; ++v) {
    const auto total = Vec<acc_t>::loadu(s.total.get() + v * lanes);
    (Vec<acc_t>::loadu(s.peak.get() + v * lanes) + total.log()).store(lse + v * lanes);
    const auto share = Vec<acc_t>(acc_t(1)) / total;
    for (int64_t d = 0; d < width; ++d) {
      acc_t* at = out + d * wide + v * lanes;
      (Vec<acc_t>::loadu(at) * share).store(at);
    }
  }
}

template <class scalar_t>
class Forward {
 public:
  using acc_t = Acc<scalar_t>;

  Forward(const Sizes& sizes, const at::Tensor& query, const at::Tensor& image_key,
          const at::Tensor& image_value, const at::Tensor& text_key, const at::Tensor& text_value,
          const at::Tensor& alpha, const std::optional<at::Tensor>& image_mask,
          const std::optional<at::Tensor>& text_mask, double scale, const at::Tensor& out,
          const at::Tensor& image_out, const at::Tensor& text_out, const at::Tensor& image_lse,
          const at::Tensor& text_lse)
      : z(sizes),
        panels(z.P),
        query(query),
        image_key(image_key),
        image_value(image_value),
        text_key(text_key),
        text_value(text_value),
        alpha(alpha),
        image_kept(image_mask, z.B, z.N),
        text_kept(text_mask, z.T, z.S),
        scale(scale),
        out(out),
        image_out(image_out),
        text_out(text_out),
        image_lse(image_lse),
        text_lse(text_lse),
        q_panels(at::empty({z.T * z.H * panels.lanes * z.D}, alpha.options())),
        text_panels(at::empty(q_panels.sizes(), alpha.options())) {}

  void run() const {
    // Items of one panel where there are few heads, so that every thread has work; the results do
    // not depend on it.
    const bool split = z.T * z.H < 4 * at::get_num_threads();
    const int64_t text_cuts = split ? panels.count : 1;
    const int64_t image_cuts = z.B * z.H < 4 * at::get_num_threads() ? panels.count : 1;
    if (z.G == 1) {
      each(z.T * z.H, image_cuts, [&](int64_t item, int64_t i, const Scratch<acc_t>& s) {
        text_panel(item, i, s);
        image_panel(item, i, s);
      });
      return;
    }
    each(z.T * z.H, text_cuts,
         [&](int64_t item, int64_t i, const Scratch<acc_t>& s) { text_panel(item, i, s); });
    each(z.B * z.H, image_cuts,
         [&](int64_t item, int64_t i, const Scratch<acc_t>& s) { image_panel(item, i, s); });
  }

 private:
  // f(head, panel, scratch) for every (outer, head) and panel, each in `cuts` separate items.
  template <class F>
  void each(int64_t heads, int64_t cuts, const F& f) const {
    parallel_items(heads * cuts, [&](int64_t begin, int64_t end) {
      const int64_t lanes = std::min(panels.vecs, kMaxVecs) * kLanes<acc_t>;
      const Scratch<acc_t> scratch(std::max(z.N, z.S), z.D, lanes);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t cut = item % cuts;
        const int64_t first = panels.count * cut / cuts, last = panels.count * (cut + 1) / cuts;
        for (int64_t i = first; i < last; ++i) f(item / cuts, i, scratch);
      }
    });
  }

  acc_t* panel_at(const at::Tensor& buffer, int64_t group_head, const Panel& panel) const {
    return buffer.mutable_data_ptr<acc_t>() + (group_head * panels.lanes + panel.first) * z.D;
  }

  // Packs the queries of a panel, and their text path.
  void text_panel(int64_t item, int64_t i, const Scratch<acc_t>& s) const {
    const int64_t t = item / z.H, h = item % z.H;
    const Panel panel = panels[i];
    acc_t* q = panel_at(q_panels, item, panel);
    const int64_t ld = padded<acc_t>(z.D);
    load_rows<scalar_t>(query(t, h), nullptr, panel.first, panel.count, z.D, acc_t(scale),
                        s.rows.get(), ld);
    rows_to_panel(s.rows.get(), ld, z.D, panel, q);
    const Path<scalar_t> path{text_key(t, h), text_value(t, h), text_kept.index(t),
                              text_kept.count(t)};
    acc_t* mixed = panel_at(text_panels, item, panel);
    with_vecs(panel.vecs, [&](auto V) { attend<V()>(path, q, z.D, s, mixed, s.lse.get()); });
    if (text_out) write(mixed, panel, text_out, text_lse, t, h, s);
  }

  // The image path of a panel, mixed with the text path of its group.
  void image_panel(int64_t item, int64_t i, const Scratch<acc_t>& s) const {
    const int64_t b = item / z.H, h = item % z.H;
    const Panel panel = panels[i];
    const int64_t group_head = b / z.G * z.H + h;
    const acc_t* q = panel_at(q_panels, group_head, panel);
    const acc_t* text = panel_at(text_panels, group_head, panel);
    const Path<scalar_t> path{image_key(b, h), image_value(b, h), image_kept.index(b),
                              image_kept.count(b)};
    acc_t* mixed = s.out.get();
    with_vecs(panel.vecs, [&](auto V) { attend<V()>(path, q, z.D, s, mixed, s.lse.get()); });
    if (image_out) write(mixed, panel, image_out, image_lse, b, h, s);
    const Vec<acc_t> image_share(alpha(b, h)), text_share(acc_t(1) - alpha(b, h));
    for (int64_t j = 0; j < z.D * panel.vecs * kLanes<acc_t>; j += kLanes<acc_t>) {
      const auto text_part = text_share * Vec<acc_t>::loadu(text + j);
      at::vec::fmadd(image_share, Vec<acc_t>::loadu(mixed + j), text_part).store(mixed + j);
    }
    store_panel<scalar_t>(mixed, panel, z.D, s.rows.get(), padded<acc_t>(z.D), out(b, h),
                          out.row());
  }

  void write(const acc_t* values, const Panel& panel, const Writer<scalar_t>& to,
             const at::Tensor& lse, int64_t outer, int64_t head, const Scratch<acc_t>& s) const {
    store_panel<scalar_t>(values, panel, z.D, s.rows.get(), padded<acc_t>(z.D), to(outer, head),
                          to.row());
    acc_t* lse_row = lse.mutable_data_ptr<acc_t>() + (outer * z.H + head) * z.P;
    std::copy_n(s.lse.get(), panel.count, lse_row + panel.first);
  }

  const Sizes z;
  const Panels<acc_t> panels;
  const Reader<scalar_t> query, image_key, image_value, text_key, text_value;
  const Gate<acc_t> alpha;
  const KeptKeys image_kept, text_kept;
  const double scale;
  const Writer<scalar_t> out, image_out, text_out;
  const at::Tensor image_lse, text_lse;  // (B, H, P), (T, H, P) contiguous
  at::Tensor q_panels, text_panels;      // (T, H) x panels of D rows
};

}  // namespace
}  // namespace attention

void dual_attention_forward_into(const at::Tensor& query, const at::Tensor& image_key,
                                 const at::Tensor& image_value, const at::Tensor& text_key,
                                 const at::Tensor& text_value, const at::Tensor& alpha,
                                 const std::optional<at::Tensor>& image_mask,
                                 const std::optional<at::Tensor>& text_mask, double scale,
                                 const at::Tensor& out, const at::Tensor& image_out,
                                 const at::Tensor& text_out, const at::Tensor& image_lse,
                                 const at::Tensor& text_lse) {
  const attention::Sizes sizes(query, image_key, text_key);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "dual_attention_forward", [&] {
        const attention::Forward<scalar_t> forward(sizes, query, image_key, image_value, text_key,
                                                   text_value, alpha, image_mask, text_mask, scale,
                                                   out, image_out, text_out, image_lse, text_lse);
        forward.run();
      });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dual_attention_forward(
    const at::Tensor& query, const at::Tensor& image_key, const at::Tensor& image_value,
    const at::Tensor& text_key, const at::Tensor& text_value, const at::Tensor& alpha,
    const std::optional<at::Tensor>& image_mask, const std::optional<at::Tensor>& text_mask,
    double scale, bool save) {
  const attention::Sizes z(query, image_key, text_key);
  const at::Tensor out = attention::empty_by_token(z.B, z.H, z.P, z.D, query);
  at::Tensor image_out, text_out, image_lse, text_lse;
  if (save) {
    image_out = attention::empty_by_token(z.B, z.H, z.P, z.D, query);
    text_out = attention::empty_by_token(z.T, z.H, z.P, z.D, query);
    image_lse = at::empty({z.B, z.H, z.P}, alpha.options());
    text_lse = at::empty({z.T, z.H, z.P}, alpha.options());
  }
  dual_attention_forward_into(query, image_key, image_value, text_key, text_value, alpha,
                              image_mask, text_mask, scale, out, image_out, text_out, image_lse,
                              text_lse);
  if (save) return {out, image_out, text_out, image_lse, text_lse};
  const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
  return {out, none(query), none(query), none(alpha), none(alpha)};
}

}  // namespace dvla_fast
