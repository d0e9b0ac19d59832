// Forward of the gated layer. The images are walked over in chunks (plan.h): a chunk's keys and
// values are projected into a buffer that stays in the cache, attended, mixed with the text path,
// projected out and added to the tokens while those are still in the cache. Where a text group is
// longer than a chunk, its text path runs apart, once. Where weights are absorbed (absorb.h) there
// are no keys and values, and the text path runs apart always.
#include <ATen/Dispatch.h>

#include <vector>

#include "gate/absorb.h"
#include "gate/gated_attention.h"
#include "gate/problem.h"
#include "gate/sums.h"

namespace dvla_fast {
namespace gate {
namespace {

struct Results {
  at::Tensor updated, fused, image_out, text_out, image_lse, text_lse, kept;
  bool save() const { return image_out.defined(); }
};

// The text path of every group alone.
void text_path(const Problem& z, const Results& r) {
  const at::Tensor none = z.no_keys(z.T), left_out;
  dual_attention_forward_into(z.query, none, none, z.text_key, z.text_value, z.shut_gate(),
                              std::nullopt, z.text_mask, z.scale, r.text_out, left_out, left_out,
                              left_out, r.text_lse);
}

// The weights that every chunk is multiplied by.
template <class scalar_t>
struct Weights {
  explicit Weights(const Problem& z) : out(transposed(z.out_weight), z.packing) {
    if (!z.absorbed) {
      kv = Factor<scalar_t>(transposed(z.kv_weight), z.packing);
    } else {
      values.resize(z.H);
      each_head(z, [&](int64_t h) {
        values[h] = Factor<scalar_t>(transposed(value_weight(z, h)), z.packing);
      });
    }
  }
  Factor<scalar_t> kv, out;
  std::vector<Factor<scalar_t>> values;  // absorbed: of each head
};

// mixed (images * P, HD) of a chunk, by way of its keys and values, in `buffer` if not to be kept.
template <class scalar_t>
void attend(const Problem& z, const Results& r, const Weights<scalar_t>& weights, const Chunk& c,
            const at::Tensor& buffer, const at::Tensor& mixed) {
  const at::Tensor kv = z.chunk_rows(r.kept, buffer, z.N, c);
  weights.kv.multiply(z.rows_of(c), kv);
  const at::Tensor none = z.apart ? z.no_keys(1) : at::Tensor();
  // Apart, the text's results are there already.
  const at::Tensor text_out = z.apart ? at::Tensor() : z.texts(r.text_out, c);
  const at::Tensor text_lse = z.apart ? at::Tensor() : z.texts(r.text_lse, c);
  dual_attention_forward_into(
      z.texts(z.query, c), z.keys(kv, 0, c), z.keys(kv, 1, c),
      z.apart ? none : z.texts(z.text_key, c), z.apart ? none : z.texts(z.text_value, c),
      z.images(z.alpha, c), part(z.image_mask, c.image, c.images),
      z.apart ? std::nullopt : part(z.text_mask, c.group, c.groups), z.scale, z.heads(mixed, c),
      z.images(r.image_out, c), text_out, z.images(r.image_lse, c), text_lse);
  if (!z.apart) return;
  scalar_t* to = mixed.mutable_data_ptr<scalar_t>();
  mix(z, c, r.text_out.const_data_ptr<scalar_t>(), to, true, to);
}

// The same with absorbed weights, `query` being absorbed and `buffer` for the weighted tokens.
template <class scalar_t>
void attend_absorbed(const Problem& z, const Results& r, const Weights<scalar_t>& weights,
                     const at::Tensor& query, const Chunk& c, const at::Tensor& buffer,
                     const at::Tensor& mixed) {
  const AbsorbedChunk a(z, query, c);
  const at::Tensor weighted = z.chunk_rows(r.kept, buffer, z.P, c), left_out;
  dual_attention_forward_into(a.query, a.tokens, a.tokens, a.no_text, a.no_text, a.open,
                              part(z.image_mask, c.image, c.images), std::nullopt, z.scale,
                              one_head(z, weighted), left_out, left_out, z.images(r.image_lse, c),
                              left_out);
  const at::Tensor image =
      r.save() ? z.token_rows(z.images(r.image_out, c)) : z.filled(mixed, z.P, c);
  each_head(z, [&](int64_t h) {
    weights.values[h].multiply(of_head(weighted, h, z.C), of_head(image, h, z.D));
  });
  mix(z, c, r.text_out.const_data_ptr<scalar_t>(), image.const_data_ptr<scalar_t>(), false,
      mixed.mutable_data_ptr<scalar_t>());
}

// From the mixture of a chunk to its part of the results.
template <class scalar_t>
void finish(const Problem& z, const Results& r, const Weights<scalar_t>& weights, const Chunk& c,
            const at::Tensor& mixed) {
  const at::Tensor fused = z.images(r.fused, c);  // [images, P, C]
  weights.out.multiply(z.filled(mixed, z.P, c), fused.view({c.images * z.P, z.C}));
  z.drop_masked(fused, c);
  add_to_tokens(z, c, shared_sum(z, c, fused), r.updated);
}

template <class scalar_t>
void forward(const Problem& z, const Results& r) {
  if (z.apart) text_path(z, r);
  const Weights<scalar_t> weights(z);
  const at::Tensor query = z.absorbed ? absorbed_query<scalar_t>(z) : at::Tensor();
  const auto chunks = [&](int64_t begin, int64_t end) {
    const PlainTensors plain;
    const at::Tensor buffer = r.kept.defined() ? at::Tensor() : z.kept_buffer(),
                     mixed = z.buffer(z.P, z.width);
    for (int64_t i = begin; i < end; ++i) {
      const Chunk c = z.plan[i];
      if (z.absorbed) {
        attend_absorbed<scalar_t>(z, r, weights, query, c, buffer, mixed);
      } else {
        attend<scalar_t>(z, r, weights, c, buffer, mixed);
      }
      finish(z, r, weights, c, mixed);
    }
  };
  if (z.plan.parallel()) {
    parallel_items(z.plan.count(), chunks);
  } else {
    chunks(0, z.plan.count());
  }
}

}  // namespace
}  // namespace gate

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
gated_attention_forward(const at::Tensor& query, const at::Tensor& image_tokens,
                        const at::Tensor& kv_weight, const at::Tensor& text_key,
                        const at::Tensor& text_value, const at::Tensor& alpha,
                        const at::Tensor& out_weight, const std::optional<at::Tensor>& image_mask,
                        const std::optional<at::Tensor>& text_mask, double scale, bool save) {
  const gate::PlainTensors plain;
  const gate::Problem z(query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight,
                        image_mask, text_mask, scale);
  gate::Results r;
  r.updated = new_empty({z.B, z.N, z.C}, image_tokens.options());
  r.fused = new_empty({z.B, z.P, z.C}, query.options());
  if (save || z.apart) r.text_out = z.by_token(z.T, z.P);
  if (save) {
    r.image_out = z.by_token(z.B, z.P);
    r.image_lse = new_empty({z.B, z.H, z.P}, alpha.options());
    r.text_lse = new_empty({z.T, z.H, z.P}, alpha.options());
    if (z.kept()) r.kept = z.kept_rows(z.B);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(),
                                  "gated_attention_forward",
                                  [&] { gate::forward<scalar_t>(z, r); });
  const auto or_empty = [](const at::Tensor& x, const at::Tensor& like) {
    return x.defined() ? x : new_empty({0}, like.options());
  };
  if (!save) r.text_out = at::Tensor();
  return {r.updated,
          r.fused,
          or_empty(r.image_out, query),
          or_empty(r.text_out, query),
          or_empty(r.image_lse, alpha),
          or_empty(r.text_lse, alpha),
          or_empty(r.kept, query)};
}

}  // namespace dvla_fast
