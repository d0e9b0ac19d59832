// Backward of dual attention, from the outputs and log-sum-exps that the forward saved. With
// E = exp(scores - lse), go the output's gradient, share the path's share of the gate and
// delta = rowsum(go O):
//     dV = share E' go,   dS = share E (go V' - delta),   dK = dS' q scale,   dQ = scale dS K.
// The text path is linear in go, so the images of a group first add up (1 - alpha) go and the text
// runs backward once; the gate's gradient is the difference of the paths' deltas, summed.
#include <ATen/Dispatch.h>

#include "attention/dual_attention.h"
#include "attention/engine.h"

namespace dvla_fast {
namespace attention {
namespace {

// Work items that a phase is cut into, at most and at least, and how many images an item takes
// where there are plenty: each item carries sums for every head it meets.
constexpr int64_t kMostItems = 64, kFewestItems = 16, kImagesPerItem = 4;

// The units (images x heads x blocks of keys) of one group, cut into runs; a run adds up its part
// of what belongs to the group in slots of its own, one a head. With many images a run takes them
// image by image, so that what is read and written of an image is near in time; with few, head by
// head and of one head alone, which needs the fewest slots. All from the shape alone, so that
// results do not depend on the threads.
struct Cut {
  Cut(int64_t groups, int64_t images, int64_t heads, int64_t key_blocks)
      : images(images), heads(heads), blocks(std::max<int64_t>(1, key_blocks)) {
    const int64_t most = ceil_div(kMostItems, groups), fewest = ceil_div(kFewestItems, groups);
    const int64_t by_image = images / kImagesPerItem;
    by_head = by_image < fewest;
    if (by_head) {
      const int64_t units_of_head = std::max<int64_t>(1, images * blocks);
      runs = heads * std::clamp<int64_t>(most / std::max<int64_t>(1, heads), 1, units_of_head);
      return;
    }
    runs = std::min(most, by_image);
    slots = std::min(heads, (ceil_div(units(), runs) + 2 * (blocks - 1)) / blocks);
  }
  int64_t units() const { return images * heads * blocks; }
  int64_t begin(int64_t run) const { return units() * run / runs; }
  int64_t image(int64_t unit) const {
    return by_head ? unit / blocks % images : unit / blocks / heads;
  }
  int64_t head(int64_t unit) const {
    return by_head ? unit / blocks / images : unit / blocks % heads;
  }
  // Slot of a head in a run, -1 where the run does not meet it.
  int64_t slot(int64_t run, int64_t of_head) const {
    if (begin(run) == begin(run + 1)) return -1;
    if (by_head) return head(begin(run)) == of_head ? 0 : -1;
    const int64_t first = begin(run) / blocks, last = (begin(run + 1) - 1) / blocks;
    const int64_t offset = (of_head - first % heads + heads) % heads;
    return offset <= last - first ? offset : -1;
  }
  int64_t images, heads, blocks, runs = 1, slots = 1;
  bool by_head = false;
};

template <class scalar_t>
class Backward {
 public:
  using E = Engine<scalar_t>;
  using acc_t = typename E::acc_t;

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
        grad_q_size(panels.lanes * E::out_rows(z.D)),
        image_blocks(z.N),
        text_blocks(z.S),
        image_cut(z.T, z.G, z.H, image_blocks.count),
        text_cut(z.T, 1, z.H, text_blocks.count),
        whole_heads(z.G == 1 && (z.T * z.H >= kFewestItems ||
                                 std::max(image_blocks.count, text_blocks.count) <= 1)),
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
        grad_alpha(grad_alpha.mutable_data_ptr<acc_t>()) {
    // Masked keys are not visited; without queries no key is.
    if (!image_kept.all() || z.P == 0) grad_image_key.zero_(), grad_image_value.zero_();
    if (!text_kept.all() || z.P == 0) grad_text_key.zero_(), grad_text_value.zero_();
    if (z.P == 0) grad_alpha.zero_();
    if (whole_heads) return;
    const auto sums = [&](const Cut& cut, int64_t width) {
      return new_empty({z.T * cut.runs * cut.slots, width}, alpha.options());
    };
    image_query_sums = sums(image_cut, grad_q_size);
    if (z.S == 0) return;
    text_query_sums = sums(text_cut, grad_q_size);
    text_sums = sums(image_cut, z.P * padded<acc_t>(z.D));
  }

  void run() const {
    if (z.P == 0) return;
    if (whole_heads) {
      each(z.T * z.H,
           [&](int64_t item, const Scratch& s) { head_item(item / z.H, item % z.H, s); });
      return;
    }
    each(z.T * image_cut.runs, [&](int64_t item, const Scratch& s) {
      image_item(item / image_cut.runs, item % image_cut.runs, s);
    });
    if (z.S > 0) {
      each(z.T * text_cut.runs, [&](int64_t item, const Scratch& s) {
        text_item(item / text_cut.runs, item % text_cut.runs, s);
      });
      if (text_cut.blocks == 1) return;  // the text's items have done the rest
    }
    each(z.T * z.H, [&](int64_t item, const Scratch& s) { query_item(item / z.H, item % z.H, s); });
  }

 private:
  struct Scratch : E::Differentiate {
    Scratch(Arena& arena, int64_t tokens, int64_t width, const Panels<acc_t>& panels)
        : E::Differentiate(arena, tokens, width, panels),
          out_row(arena.take<acc_t>(this->ld)),
          grad_q(arena.take<acc_t>(panels.lanes * E::out_rows(width))) {}
    acc_t* out_row;  // (ld)
    acc_t* grad_q;   // panels of E::out_rows rows
  };

  template <class F>
  void each(int64_t items, const F& f) const {
    parallel_items(items, [&](int64_t begin, int64_t end) {
      const auto scratch = on_arena<Scratch>(std::max(z.N, z.S), z.D, panels);
      [[maybe_unused]] const typename E::Session session;
      for (int64_t item = begin; item < end; ++item) f(item, scratch);
    });
  }

  // Both paths of one head of one image that has its text to itself.
  void head_item(int64_t t, int64_t h, const Scratch& s) const {
    E::load_query(query(t, h), panels, z.D, scale, s);
    load_gradient(t, h, s);
    std::fill_n(s.grad_q, grad_q_size, acc_t(0));
    const acc_t share = alpha(t, h);
    const double image_part = whole_path(image_path(t, h), image_lse, image_out, t, h, share, s);
    const double text_part =
        whole_path(text_path(t, h), text_lse, text_out, t, h, acc_t(1) - share, s);
    grad_alpha[t * z.H + h] = acc_t(image_part - text_part);
    store_query(t, h, s);
  }

  // All blocks of a path; the sum over queries of delta.
  double whole_path(const GradPath<scalar_t>& path, const acc_t* lse, const Reader<scalar_t>& out,
                    int64_t outer, int64_t h, acc_t share, const Scratch& s) const {
    if (path.count == 0) return 0;
    load_lse(lse + (outer * z.H + h) * z.P, s);
    const Blocks blocks(path.count);
    if (blocks.count > 1) load_delta(out(outer, h), s);
    for (int64_t begin = 0; begin < path.count; begin += blocks.size) {
      E::block(path, begin, std::min(blocks.size, path.count - begin), share, panels, z.D, scale, s,
               s.grad_q);
    }
    return sum_delta(s);
  }

  // A run of the images' units of a group.
  void image_item(int64_t t, int64_t run, const Scratch& s) const {
    int64_t loaded = -1;
    const int64_t first = image_cut.begin(run), blocks = image_cut.blocks;
    for (int64_t unit = first; unit < image_cut.begin(run + 1); ++unit) {
      const int64_t pair = unit / blocks, part = unit % blocks;
      const int64_t b = t * z.G + image_cut.image(unit), h = image_cut.head(unit);
      const int64_t slot = image_cut.slot(run, h);
      acc_t* grad_q = sum(image_query_sums, image_cut, t, run, slot);
      acc_t* grad_text = z.S > 0 ? sum(text_sums, image_cut, t, run, slot) : nullptr;
      const int64_t heads = image_cut.by_head ? 1 : z.H;
      if (pair - first / blocks < heads && (unit == first || part == 0)) {  // a head's first
        std::fill_n(grad_q, grad_q_size, acc_t(0));
        if (grad_text) std::fill_n(grad_text, z.P * s.ld, acc_t(0));
      }
      const GradPath<scalar_t> path = image_path(b, h);
      const bool one_block = path.count <= image_blocks.size;
      if (loaded != pair) {
        E::load_query(query(t, h), panels, z.D, scale, s);
        load_gradient(b, h, s);
        load_lse(image_lse + (b * z.H + h) * z.P, s);
        if (!one_block) load_delta(image_out(b, h), s);
        loaded = pair;
      }
      const acc_t share = alpha(b, h);
      const int64_t begin = part * image_blocks.size;
      const int64_t count = std::min(image_blocks.size, path.count - begin);
      if (count > 0) E::block(path, begin, count, share, panels, z.D, scale, s, grad_q);
      if (part > 0) continue;
      const double image_part = path.count > 0 ? sum_delta(s) : 0.0;
      const double text_part = grad_text ? share_with_text(t, h, share, grad_text, s) : 0.0;
      grad_alpha[b * z.H + h] = acc_t(image_part - text_part);
    }
  }

  // Adds the text's share of the image's gradient in s.go to its sum; sum of go * text output.
  double share_with_text(int64_t t, int64_t h, acc_t image_share, acc_t* grad_text,
                         const Scratch& s) const {
    const Matrix<scalar_t> out = text_out(t, h);
    double sum = 0;
    clear_last(s.out_row, s.ld);
    for (int64_t first = 0; first < z.P; first += kSumRows) {
      Vec<acc_t> part(acc_t(0));
      for (int64_t p = first; p < std::min(z.P, first + kSumRows); ++p) {
        const acc_t* go = s.go + p * s.ld;
        load_row(out.data + p * out.row, out.column, z.D, acc_t(1), s.out_row);
        part = add_products(go, s.out_row, s.ld, part);
        add_scaled(grad_text + p * s.ld, go, acc_t(1) - image_share, s.ld);
      }
      sum += sum_lanes(part);
    }
    return sum;
  }

  // A run of the text's units of a group: head by head, block by block.
  void text_item(int64_t t, int64_t run, const Scratch& s) const {
    int64_t loaded = -1;
    for (int64_t unit = text_cut.begin(run); unit < text_cut.begin(run + 1); ++unit) {
      const int64_t h = text_cut.head(unit), part = unit % text_cut.blocks;
      acc_t* grad_q = sum(text_query_sums, text_cut, t, run, text_cut.slot(run, h));
      const GradPath<scalar_t> path = text_path(t, h);
      if (loaded != h) {
        std::fill_n(grad_q, grad_q_size, acc_t(0));
        E::load_query(query(t, h), panels, z.D, scale, s);
        std::fill_n(s.go, z.P * s.ld, acc_t(0));
        for (int64_t i = 0; i < image_cut.runs; ++i) {
          const int64_t slot = image_cut.slot(i, h);
          if (slot >= 0) {
            add_scaled(s.go, sum(text_sums, image_cut, t, i, slot), acc_t(1), z.P * s.ld);
          }
        }
        E::pack_gradient(panels, z.D, s);
        load_lse(text_lse + (t * z.H + h) * z.P, s);
        if (path.count > text_blocks.size) load_delta(text_out(t, h), s);
        loaded = h;
      }
      const int64_t begin = part * text_blocks.size;
      const int64_t count = std::min(text_blocks.size, path.count - begin);
      if (count > 0) E::block(path, begin, count, acc_t(1), panels, z.D, scale, s, grad_q);
      if (text_cut.blocks == 1) query_item(t, h, s);
    }
  }

  // Adds up the parts of grad_query.
  void query_item(int64_t t, int64_t h, const Scratch& s) const {
    std::fill_n(s.grad_q, grad_q_size, acc_t(0));
    for (const auto& [sums, cut] :
         {std::pair(&image_query_sums, &image_cut), std::pair(&text_query_sums, &text_cut)}) {
      for (int64_t run = 0; sums->defined() && run < cut->runs; ++run) {
        const int64_t slot = cut->slot(run, h);
        if (slot < 0) continue;
        add_scaled(s.grad_q, sum(*sums, *cut, t, run, slot), acc_t(1), grad_q_size);
      }
    }
    store_query(t, h, s);
  }

  // s.grad_q, scaled, to its place.
  void store_query(int64_t t, int64_t h, const Scratch& s) const {
    const Vec<acc_t> factor(static_cast<acc_t>(scale));
    for (int64_t i = 0; i < grad_q_size; i += kLanes<acc_t>) {
      (factor * Vec<acc_t>::loadu(s.grad_q + i)).store(s.grad_q + i);
    }
    for (int64_t i = 0; i < panels.count; ++i) {
      store_panel<scalar_t>(s.grad_q + panels[i].first * E::out_rows(z.D), panels[i], z.D, s.go,
                            s.ld, grad_query(t, h), grad_query.row());
    }
  }

  // The output's gradient of an image, for its engine.
  void load_gradient(int64_t b, int64_t h, const Scratch& s) const {
    load_rows<scalar_t>(grad_out(b, h), nullptr, 0, z.P, z.D, acc_t(1), s.go, s.ld);
    E::pack_gradient(panels, z.D, s);
  }

  void load_lse(const acc_t* lse, const Scratch& s) const {
    std::copy_n(lse, z.P, s.lse);
    std::fill(s.lse + z.P, s.lse + panels.lanes, acc_t(0));
    std::fill(s.delta + z.P, s.delta + panels.lanes, acc_t(0));
  }

  // delta = rowsum(go out), where no single block holds all keys.
  void load_delta(const Matrix<scalar_t>& out, const Scratch& s) const {
    clear_last(s.out_row, s.ld);
    for (int64_t p = 0; p < z.P; ++p) {
      load_row(out.data + p * out.row, out.column, z.D, acc_t(1), s.out_row);
      s.delta[p] = dot(s.go + p * s.ld, s.out_row, s.ld);
    }
  }

  double sum_delta(const Scratch& s) const {
    double sum = 0;
    for (int64_t p = 0; p < z.P; ++p) sum += s.delta[p];
    return sum;
  }

  GradPath<scalar_t> image_path(int64_t b, int64_t h) const {
    return {{image_key(b, h), image_value(b, h), image_kept.index(b), image_kept.count(b)},
            grad_image_key(b, h),
            grad_image_value(b, h),
            grad_image_key.row()};
  }
  GradPath<scalar_t> text_path(int64_t t, int64_t h) const {
    return {{text_key(t, h), text_value(t, h), text_kept.index(t), text_kept.count(t)},
            grad_text_key(t, h),
            grad_text_value(t, h),
            grad_text_key.row()};
  }

  acc_t* sum(const at::Tensor& sums, const Cut& cut, int64_t t, int64_t run, int64_t slot) const {
    return sums.mutable_data_ptr<acc_t>() +
           ((t * cut.runs + run) * cut.slots + slot) * sums.size(1);
  }

  const Sizes z;
  const Panels<acc_t> panels;
  const int64_t grad_q_size;
  const Blocks image_blocks, text_blocks;
  const Cut image_cut, text_cut;
  const bool whole_heads;  // one item does everything of a head, without sums in memory
  const Reader<scalar_t> grad_out, query, image_key, image_value, text_key, text_value;
  const Reader<scalar_t> image_out, text_out;
  const Gate<acc_t> alpha;
  const acc_t *image_lse, *text_lse;  // (B, H, P), (T, H, P) contiguous
  const KeptKeys image_kept, text_kept;
  const double scale;
  const Writer<scalar_t> grad_query, grad_image_key, grad_image_value, grad_text_key;
  const Writer<scalar_t> grad_text_value;
  acc_t* const grad_alpha;  // (B, H) contiguous
  // One row a (group, run, slot): parts of grad_query in panels of D rows, by the images and by the
  // text, and of the text's gradient, (1 - alpha) grad_out, (P, D padded). Without text no text's.
  at::Tensor image_query_sums, text_query_sums, text_sums;
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
  const at::Tensor grad_alpha = new_empty({z.B, z.H}, alpha.options());
  dual_attention_backward_into(grad_out, query, image_key, image_value, text_key, text_value, alpha,
                               image_mask, text_mask, image_out, text_out, image_lse, text_lse,
                               scale, grad_query, grad_image_key, grad_image_value, grad_text_key,
                               grad_text_value, grad_alpha);
  return {grad_query, grad_image_key, grad_image_value, grad_text_key, grad_text_value, grad_alpha};
}

}  // namespace dvla_fast
