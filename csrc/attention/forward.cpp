// Forward of dual attention: which head is computed when, and where its result goes. What happens
// inside a head is the engine's. The text path runs once per group.
#include <ATen/Dispatch.h>

#include "attention/dual_attention.h"
#include "attention/engine.h"

namespace dvla_fast {
namespace attention {
namespace {

template <class scalar_t>
class Forward {
 public:
  using E = Engine<scalar_t>;
  using acc_t = typename E::acc_t;
  using operand_t = typename E::operand_t;

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
        text_lse(text_lse) {
    if (z.G == 1) return;
    const int64_t tokens = z.T * z.H * panels.lanes;
    const bool widened = std::is_same_v<operand_t, acc_t>;
    shared_q = new_empty({tokens * E::depth(z.D)}, (widened ? alpha : query).options());
    shared_text = new_empty({tokens * E::out_rows(z.D)}, alpha.options());
  }

  void run() const {
    // Items of one panel where there are few heads, so that every thread has work; the results do
    // not depend on it.
    const int64_t few = 4 * at::get_num_threads();
    const int64_t text_cuts = z.T * z.H < few ? panels.count : 1;
    const int64_t image_cuts = z.B * z.H < few ? panels.count : 1;
    if (z.G == 1) {
      each(z.T * z.H, image_cuts, [&](int64_t item, const Range& range, const Scratch& s) {
        text_item(item, range, s, s.q, s.text);
        image_item(item, range, s, s.q, s.text);
      });
      return;
    }
    operand_t* q = shared_q.mutable_data_ptr<operand_t>();
    acc_t* text = shared_text.mutable_data_ptr<acc_t>();
    each(z.T * z.H, text_cuts, [&](int64_t item, const Range& range, const Scratch& s) {
      const int64_t token = item * panels.lanes + range.start();
      text_item(item, range, s, q + token * E::depth(z.D), text + token * E::out_rows(z.D));
    });
    each(z.B * z.H, image_cuts, [&](int64_t item, const Range& range, const Scratch& s) {
      const int64_t group_head = item / z.H / z.G * z.H + item % z.H;
      const int64_t token = group_head * panels.lanes + range.start();
      image_item(item, range, s, q + token * E::depth(z.D), text + token * E::out_rows(z.D));
    });
  }

 private:
  using Range = PanelRange<acc_t>;

  struct Scratch : E::Attend {
    Scratch(Arena& arena, int64_t tokens, int64_t width, const Panels<acc_t>& panels)
        : E::Attend(arena, tokens, width, panels),
          q(arena.take<operand_t>(panels.lanes * E::depth(width))),
          text(arena.take<acc_t>(panels.lanes * E::out_rows(width))),
          image(arena.take<acc_t>(panels.lanes * E::out_rows(width))),
          lse(arena.take<acc_t>(panels.lanes)) {}
    operand_t* q;         // panels of depth rows
    acc_t *text, *image;  // panels of out_rows rows
    acc_t* lse;           // (lanes)
  };

  // f(head, range of panels, scratch) for every (outer, head), each in `cuts` separate items.
  template <class F>
  void each(int64_t heads, int64_t cuts, const F& f) const {
    if (z.P == 0) return;
    parallel_items(heads * cuts, [&](int64_t begin, int64_t end) {
      const auto scratch = on_arena<Scratch>(std::max(z.N, z.S), z.D, panels);
      [[maybe_unused]] const typename E::Session session;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t cut = item % cuts;
        const Range range{panels, panels.count * cut / cuts, panels.count * (cut + 1) / cuts};
        f(item / cuts, range, scratch);
      }
    });
  }

  // Packs the queries of some panels, and attends from them to the text.
  void text_item(int64_t item, const Range& range, const Scratch& s, operand_t* q,
                 acc_t* text) const {
    const int64_t t = item / z.H, h = item % z.H;
    for (int64_t i = range.first; i < range.last; ++i) {
      const int64_t lane = panels[i].first - range.start();
      E::pack_query(query(t, h), panels[i], z.D, scale, s, q + lane * E::depth(z.D));
    }
    const Path<scalar_t> path{text_key(t, h), text_value(t, h), text_kept.index(t),
                              text_kept.count(t)};
    E::attend(path, range, q, z.D, scale, s, text, s.lse);
    write(text, range, text_out, text_lse, t, h, s);
  }

  // The image path, mixed with the text path of its group.
  void image_item(int64_t item, const Range& range, const Scratch& s, const operand_t* q,
                  const acc_t* text) const {
    const int64_t b = item / z.H, h = item % z.H;
    const Path<scalar_t> path{image_key(b, h), image_value(b, h), image_kept.index(b),
                              image_kept.count(b)};
    acc_t* mixed = s.image;
    E::attend(path, range, q, z.D, scale, s, mixed, s.lse);
    write(mixed, range, image_out, image_lse, b, h, s);
    const Vec<acc_t> image_share(alpha(b, h)), text_share(acc_t(1) - alpha(b, h));
    const int64_t values = E::out_rows(z.D) * range.lanes();
    for (int64_t j = 0; j < values; j += kLanes<acc_t>) {
      const auto text_part = text_share * Vec<acc_t>::loadu(text + j);
      at::vec::fmadd(image_share, Vec<acc_t>::loadu(mixed + j), text_part).store(mixed + j);
    }
    store(mixed, range, out(b, h), out.row(), s);
  }

  void write(const acc_t* values, const Range& range, const Writer<scalar_t>& to,
             const at::Tensor& lse, int64_t outer, int64_t head, const Scratch& s) const {
    if (to) store(values, range, to(outer, head), to.row(), s);
    if (!lse.defined()) return;
    acc_t* lse_row = lse.mutable_data_ptr<acc_t>() + (outer * z.H + head) * z.P;
    std::copy_n(s.lse, std::min(range.lanes(), z.P - range.start()), lse_row + range.start());
  }

  void store(const acc_t* values, const Range& range, scalar_t* to, int64_t row,
             const Scratch& s) const {
    for (int64_t i = range.first; i < range.last; ++i) {
      const int64_t lane = panels[i].first - range.start();
      store_panel<scalar_t>(values + lane * E::out_rows(z.D), panels[i], z.D, s.rows,
                            padded<acc_t>(z.D), to, row);
    }
  }

  const Sizes z;
  const Panels<acc_t> panels;
  const Reader<scalar_t> query, image_key, image_value, text_key, text_value;
  const Gate<acc_t> alpha;
  const KeptKeys image_kept, text_kept;
  const double scale;
  const Writer<scalar_t> out, image_out, text_out;
  const at::Tensor image_lse, text_lse;  // (B, H, P), (T, H, P) contiguous
  at::Tensor shared_q, shared_text;      // (T, H) x panels, where images share them
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
    if (attention::needs_image_out(z)) {
      image_out = attention::empty_by_token(z.B, z.H, z.P, z.D, query);
    }
    if (attention::needs_text_out(z)) {
      text_out = attention::empty_by_token(z.T, z.H, z.P, z.D, query);
    }
    image_lse = new_empty({z.B, z.H, z.P}, alpha.options());
    text_lse = new_empty({z.T, z.H, z.P}, alpha.options());
  }
  dual_attention_forward_into(query, image_key, image_value, text_key, text_value, alpha,
                              image_mask, text_mask, scale, out, image_out, text_out, image_lse,
                              text_lse);
  const auto or_empty = [](const at::Tensor& x, const at::Tensor& like) {
    return x.defined() ? x : new_empty({0}, like.options());
  };
  return {out, or_empty(image_out, query), or_empty(text_out, query), or_empty(image_lse, alpha),
          or_empty(text_lse, alpha)};
}

}  // namespace dvla_fast
