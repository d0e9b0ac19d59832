// Weight absorption. Where all heads' queries together are fewer than the tokens are wide, the
// weights of keys and values are cheaper applied to the queries and to the weighted tokens than to
// the tokens:
//     softmax(q (z Wk')') z Wv' = (softmax((q Wk) z') z) Wv'.
// Then the image path is one attention of one head whose P * H queries, keys and values are as wide
// as the tokens, and no keys and values exist. Its rows are in the order (token, head), so that the
// rows of a head are a matrix.
#pragma once

#include "gate/problem.h"

namespace dvla_fast::gate {

// f(h) for every head, split over threads where the caller's are not at work already.
template <class F>
inline void each_head(const Problem& z, const F& f) {
  parallel_items(z.H, [&](int64_t begin, int64_t end) {
    const PlainTensors plain;
    for (int64_t h = begin; h < end; ++h) f(h);
  });
}

// The columns of a head in a matrix (rows, H * columns).
inline at::Tensor of_head(const at::Tensor& x, int64_t h, int64_t columns) {
  return narrow(x, 1, h * columns, columns);
}

// Weight (D, C) of a head's keys and of its values.
inline at::Tensor key_weight(const Problem& z, int64_t h) {
  return narrow(z.kv_weight, 0, h * z.D, z.D);
}
inline at::Tensor value_weight(const Problem& z, int64_t h) {
  return narrow(z.kv_weight, 0, z.width + h * z.D, z.D);
}

// The query of a head as a matrix (T * P, D).
inline at::Tensor query_rows(const Problem& z, int64_t h) {
  const at::Tensor& q = z.query;
  if (z.T > 1 && q.stride(0) != z.P * q.stride(2)) return q.select(1, h).flatten(0, 1);
  return strided(q, {z.T * z.P, z.D}, {q.stride(2), q.stride(3)},
                 q.storage_offset() + h * q.stride(1));
}

// Rows (outer * P, H * C) as the queries of one head (outer, 1, P * H, C).
inline at::Tensor one_head(const Problem& z, const at::Tensor& rows) {
  return rows.view({rows.size(0) / z.P, 1, z.P * z.H, z.C});
}

// q Wk of every head, (T * P, H * C).
template <class scalar_t>
at::Tensor absorbed_query(const Problem& z) {
  const at::Tensor all = new_empty({z.T * z.P, z.H * z.C}, z.query.options());
  each_head(z, [&](int64_t h) {
    const Factor<scalar_t> weight(key_weight(z, h), z.packing);
    weight.multiply(query_rows(z, h), of_head(all, h, z.C));
  });
  return all;
}

// What the attention of a chunk is called with: its tokens (images, 1, N, C), which are keys and
// values both, no text, and a gate that lets the image through.
struct AbsorbedChunk {
  AbsorbedChunk(const Problem& z, const at::Tensor& query, const Chunk& c)
      : query(one_head(z, narrow(query, 0, c.group * z.P, c.groups * z.P))),
        tokens(z.rows_of(c).view({c.images, 1, z.N, z.C})),
        no_text(new_empty({c.groups, 1, 0, z.C}, query.options())),
        open(new_filled({c.images, 1}, 1, z.alpha.options())) {}
  at::Tensor query, tokens, no_text, open;
};

}  // namespace dvla_fast::gate
