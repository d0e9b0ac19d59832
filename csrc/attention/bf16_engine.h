// The work on one head in bfloat16 products with float32 sums. As in the float engine, queries lie
// in the columns of scores and keys in the rows; every operand is packed once in the order that the
// products want (bf16_gemm.h), or taken by vectors where it lies.
#pragma once

#include "attention/bf16_gemm.h"

#if defined(__AVX512BF16__)

#include <cmath>

#include "attention/problem.h"
#include "attention/scratch.h"
#include "attention/softmax.h"

namespace dvla_fast::attention {

// 2^x within 3e-6 of itself, 0 below 2^-149: for weights that are rounded to bfloat16.
inline __m512 exp2_coarse(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // in this order NaN stays
  const __m512 k = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, k);
  __m512 sum = _mm512_set1_ps(0x1.5d87fep-10f);  // ln(2)^n / n!, n = 5 to 0
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0x1.3b2ab6p-7f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0x1.c6b08ep-5f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0x1.ebfbe0p-3f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0x1.62e430p-1f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, k);
}

// A pair of rounded rows of 16 values to two rows of a row-major operand.
inline void store_pair(__m512i halves, bf16* low, bf16* high) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm512_castsi512_si256(halves));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), _mm512_extracti64x4_epi64(halves, 1));
}

// scores (count, 16 V) to weights exp(scale (score - peak)) in pairs of rows, (keys, 16 V), 0 from
// `count` on; running peaks, of the scores without the scale, and totals as in softmax_block. The
// peak is subtracted first: a difference of scores that were scaled apart from their peak would be
// off by the rounding of a score, which of large ones is no small exponent.
template <int V>
inline void softmax_pairs(const float* scores, int64_t count, int64_t keys, float scale, bool first,
                          float* peak, float* total, float* out, int64_t width, bf16* weights) {
  constexpr int64_t wide = 16 * V;
  const __m512 factor = _mm512_set1_ps(scale * kLog2e);
  __m512 top[V], sum[V];
  for (int v = 0; v < V; ++v) {
    top[v] = _mm512_loadu_ps((first ? scores : peak) + 16 * v);
    sum[v] = _mm512_setzero_ps();
  }
  for (int64_t n = 0; n < count; ++n) {
    for (int v = 0; v < V; ++v) {
      const __m512 score = _mm512_loadu_ps(scores + n * wide + 16 * v);
      top[v] = scale < 0 ? _mm512_min_ps(top[v], score) : _mm512_max_ps(top[v], score);
    }
  }
  const auto weight = [&](int64_t n, int v) {
    const __m512 score = _mm512_loadu_ps(scores + n * wide + 16 * v);
    const __m512 w = exp2_coarse(_mm512_mul_ps(factor, _mm512_sub_ps(score, top[v])));
    sum[v] = _mm512_add_ps(sum[v], w);
    return w;
  };
  int64_t n = 0;
  for (; n + 2 <= count; n += 2) {
    for (int v = 0; v < V; ++v) {
      const __m512 low = weight(n, v), high = weight(n + 1, v);
      _mm512_storeu_si512(weights + n * wide + 32 * v, interleave(round_pair(low, high)));
    }
  }
  for (; n < keys; n += 2) {
    for (int v = 0; v < V; ++v) {
      const __m512 low = n < count ? weight(n, v) : _mm512_setzero_ps();
      _mm512_storeu_si512(weights + n * wide + 32 * v,
                          interleave(round_pair(low, _mm512_setzero_ps())));
    }
  }
  for (int v = 0; v < V; ++v) {
    if (!first) {
      const __m512 rise = _mm512_sub_ps(_mm512_loadu_ps(peak + 16 * v), top[v]);
      const __m512 shrink = exp2_coarse(_mm512_mul_ps(factor, rise));
      sum[v] = _mm512_fmadd_ps(_mm512_loadu_ps(total + 16 * v), shrink, sum[v]);
      for (int64_t d = 0; d < width; ++d) {
        float* at = out + d * wide + 16 * v;
        _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), shrink));
      }
    }
    _mm512_storeu_ps(peak + 16 * v, top[v]);
    _mm512_storeu_ps(total + 16 * v, sum[v]);
  }
}

// Where the derivatives of a block's scores go: the weights and slopes row by row with row stride
// ld, and the slopes of a panel also in pairs of rows.
struct Slopes {
  bf16 *weights, *slopes;
  int64_t ld;
  bf16* pairs;
};

// As score_slopes, from scores and products go V' (count, 16 V) with row stride ld, rounded: rows
// from `count` to `keys`, a multiple of 2, become 0.
template <int V>
inline void slope_pairs(float* scores, const float* products, int64_t ld, int64_t count,
                        int64_t keys, float scale, const float* lse, float* delta, float share,
                        bool whole, const Slopes& to) {
  const __m512 factor = _mm512_set1_ps(scale), log2e = _mm512_set1_ps(kLog2e);
  __m512 shift[V], part[V], mean[V], total[V], sum[V];
  for (int v = 0; v < V; ++v) {
    shift[v] = _mm512_loadu_ps(lse + 16 * v);
    total[v] = sum[v] = _mm512_setzero_ps();
  }
  for (int64_t n = 0; n < count; ++n) {
    for (int v = 0; v < V; ++v) {
      float* at = scores + n * ld + 16 * v;
      // Rounded as the peak in lse was, see softmax_pairs.
      const __m512 score = _mm512_mul_ps(factor, _mm512_loadu_ps(at));
      const __m512 w = exp2_coarse(_mm512_mul_ps(log2e, _mm512_sub_ps(score, shift[v])));
      _mm512_storeu_ps(at, w);
      total[v] = _mm512_add_ps(total[v], w);
      sum[v] = _mm512_fmadd_ps(w, _mm512_loadu_ps(products + n * ld + 16 * v), sum[v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    part[v] = _mm512_set1_ps(share);
    mean[v] = _mm512_loadu_ps(delta + 16 * v);
    if (!whole) continue;
    mean[v] = _mm512_div_ps(sum[v], total[v]);
    part[v] = _mm512_div_ps(part[v], total[v]);
    _mm512_storeu_ps(delta + 16 * v, mean[v]);
  }
  const __m512 zero = _mm512_setzero_ps();
  for (int64_t n = 0; n < keys; n += 2) {
    for (int v = 0; v < V; ++v) {
      __m512 w[2] = {zero, zero}, slope[2] = {zero, zero};
      for (int i = 0; i < 2; ++i) {
        if (n + i >= count) continue;
        const int64_t at = (n + i) * ld + 16 * v;
        w[i] = _mm512_mul_ps(_mm512_loadu_ps(scores + at), part[v]);
        slope[i] = _mm512_mul_ps(w[i], _mm512_sub_ps(_mm512_loadu_ps(products + at), mean[v]));
      }
      const __m512i weight_halves = round_pair(w[0], w[1]);
      const __m512i slope_halves = round_pair(slope[0], slope[1]);
      const int64_t at = n * to.ld + 16 * v;
      store_pair(weight_halves, to.weights + at, to.weights + at + to.ld);
      store_pair(slope_halves, to.slopes + at, to.slopes + at + to.ld);
      _mm512_storeu_si512(to.pairs + n * 16 * V + 32 * v, interleave(slope_halves));
    }
  }
}

struct Bf16Engine {
  using scalar_t = bf16;
  using acc_t = float;
  using operand_t = bf16;
  using Session = TileSession;

  // The head dimension padded for its place in a product: as its depth, its rows, its columns.
  static int64_t depth(int64_t width) { return round_up(width, kDepthStep); }
  static int64_t out_rows(int64_t width) { return round_up(width, kRowStep); }
  static int64_t columns(int64_t width) { return round_up(width, kTile); }
  static int64_t block_keys(int64_t tokens) {
    return round_up(std::min(tokens, kBlockKeys), kDepthStep);
  }

  // ---- Forward

  struct Attend {
    Attend(Arena& arena, int64_t tokens, int64_t width, const Panels<float>& panels)
        : Attend(arena, block_keys(tokens), width, panels.panel_lanes(), panels.lanes) {}
    Attend(Arena& arena, int64_t block, int64_t width, int64_t lanes, int64_t all_lanes)
        : key(arena.take<bf16>(std::max(block, lanes) * depth(width))),
          pairs(arena.take<bf16>(block * columns(width))),
          value(arena.take<bf16>(kTiles ? block * out_rows(width) : 0)),
          scores(arena.take<float>(block * lanes)),
          weights(arena.take<bf16>(block * lanes)),
          rows(arena.take<float>(lanes * padded<float>(width))),
          peak(arena.take<float>(all_lanes)),
          total(arena.take<float>(all_lanes)) {}
    bf16* key;            // (block, depth)
    bf16 *pairs, *value;  // values in pairs of rows, and for tiles (D, block)
    float* scores;        // (block, lanes)
    bf16* weights;        // (block, lanes) in pairs of rows
    float* rows;          // (lanes, D padded)
    float *peak, *total;  // (lanes)
  };

  static void pack_query(const Matrix<bf16>& query, const Panel& panel, int64_t width,
                         double /* scores are scaled */, const Attend& s, bf16* to) {
    const int64_t lanes = panel.vecs * kTile, deep = depth(width);
    pack_rows(query, nullptr, panel.first, panel.count, lanes, width, deep, s.key);
    transpose_pairs(s.key, deep / 2, lanes, deep / 2, to, lanes);
  }

  static void attend(const Path<bf16>& path, const PanelRange<float>& range, const bf16* q,
                     int64_t width, double scale, const Attend& s, float* out, float* lse) {
    const int64_t deep = depth(width), rows = out_rows(width), wide_rows = columns(width);
    if (path.count == 0) return no_keys<float>(range.lanes() * rows, range.lanes(), out, lse);
    const Blocks blocks(path.count);
    for (int64_t begin = 0; begin < path.count; begin += blocks.size) {
      const int64_t count = std::min(blocks.size, path.count - begin);
      const int64_t keys = round_up(count, kDepthStep), tiles = round_up(count, kRowStep);
      const auto value = left_rows(path.value, path.index, begin, count, tiles, width, s.key);
      pack_pairs(value.data, value.ld, count, width, keys, wide_rows, s.pairs,
                 fetch_ahead(path.value, path.key, path.index, begin, width));
      turn(s.pairs, wide_rows, rows, keys, s.value);
      const auto key = left_rows(path.key, path.index, begin, count, tiles, width, s.key);
      range.each([&](auto V, int64_t lane) {
        constexpr int64_t wide = kTile * V();
        float* sums = out + lane * rows;
        bf16_gemm_columns<V()>(tiles, deep, key.data, key.ld, q + lane * deep, wide, s.scores, wide,
                               false);
        softmax_pairs<V()>(s.scores, count, keys, static_cast<float>(scale), begin == 0,
                           s.peak + lane, s.total + lane, sums, width, s.weights);
        turned_product<V()>(rows, keys, s.pairs, wide_rows, s.value, s.weights, wide, sums,
                            begin > 0);
      });
    }
    range.each([&](auto V, int64_t lane) {
      normalise<V()>(s.peak + lane, s.total + lane, static_cast<float>(scale), width,
                     out + lane * rows, lse + lane);
    });
  }

  // ---- Backward

  struct Differentiate {
    Differentiate(Arena& arena, int64_t tokens, int64_t width, const Panels<float>& panels)
        : ld(padded<float>(width)),
          strip(round_up(panels.strip_lanes(), kDepthStep)),
          // A strip's last product over queries may run 16 lanes past the last panel.
          queries(panels.lanes + kTile),
          block(block_keys(tokens)),
          q_pairs(arena.take<bf16>(queries * columns(width))),
          q_panels(arena.take<bf16>(panels.lanes * depth(width))),
          go(arena.take<float>(panels.tokens * ld)),
          go_rows(arena.take<bf16>(panels.lanes * depth(width))),
          go_pairs(arena.take<bf16>(queries * columns(width))),
          go_panels(arena.take<bf16>(panels.lanes * depth(width))),
          lse(arena.take<float>(panels.lanes)),
          delta(arena.take<float>(panels.lanes)),
          key(arena.take<bf16>(block * depth(width))),
          value(arena.take<bf16>(block * depth(width))),
          key_pairs(arena.take<bf16>(block * columns(width))),
          key_columns(arena.take<bf16>(kTiles ? block * out_rows(width) : 0)),
          scores(arena.take<float>(block * strip)),
          products(arena.take<float>(block * strip)),
          weights(arena.take<bf16>(block * strip)),
          slopes(arena.take<bf16>(block * strip)),
          slope_pairs(arena.take<bf16>(block * kMaxVecs * kTile)),
          grad_key(arena.take<float>(block * columns(width))),
          grad_value(arena.take<float>(block * columns(width))) {}

    int64_t ld, strip, queries, block;
    bf16 *q_pairs, *q_panels;  // the query: in pairs of rows, and in panels of depth rows
    float* go;                 // the output's gradient (P, ld)
    bf16 *go_rows, *go_pairs, *go_panels;  // the same, rounded: (lanes, depth), as the query
    float *lse, *delta;                    // (lanes of all panels)
    bf16 *key, *value;                     // (block, depth)
    bf16 *key_pairs, *key_columns;         // in pairs of rows, and for tiles (D, block)
    float *scores, *products;              // (block, strip)
    bf16 *weights, *slopes;                // (block, strip)
    bf16* slope_pairs;                     // (block, lanes of a panel) in pairs of rows
    float *grad_key, *grad_value;          // (block, D)
  };

  static void load_query(const Matrix<bf16>& query, const Panels<float>& panels, int64_t width,
                         double /* scores are scaled */, const Differentiate& s) {
    pack_rows(query, nullptr, 0, panels.tokens, panels.lanes, width, depth(width), s.go_rows);
    pack_queries(s.go_rows, panels, width, s.queries, s.q_pairs, s.q_panels);
  }

  static void pack_gradient(const Panels<float>& panels, int64_t width, const Differentiate& s) {
    const int64_t deep = depth(width);
    for (int64_t p = 0; p < panels.lanes; ++p) {
      bf16* row = s.go_rows + p * deep;
      if (p < panels.tokens) store_row(s.go + p * s.ld, width, row);
      std::fill(row + (p < panels.tokens ? width : 0), row + deep, bf16(0.0f));
    }
    pack_queries(s.go_rows, panels, width, s.queries, s.go_pairs, s.go_panels);
  }

  static void block(const GradPath<bf16>& path, int64_t begin, int64_t count, float share,
                    const Panels<float>& panels, int64_t width, double scale,
                    const Differentiate& s, float* grad_q) {
    const int64_t deep = depth(width), rows = out_rows(width), columns = Bf16Engine::columns(width);
    const int64_t keys = round_up(count, kDepthStep), tiles = round_up(count, kRowStep);
    const auto value = left_rows(path.value, path.index, begin, count, tiles, width, s.value);
    const auto key = left_rows(path.key, path.index, begin, count, tiles, width, s.key);
    pack_pairs(key.data, key.ld, count, width, keys, columns, s.key_pairs,
               fetch_ahead(path.key, path.value, path.index, begin, width));
    turn(s.key_pairs, columns, rows, keys, s.key_columns);
    // Vectors write the gradients where they belong, if one product makes them.
    const bool direct = !kTiles && !path.index && !path.same() && panels.count <= kStripPanels;
    for (int64_t first = 0; first < panels.count; first += kStripPanels) {
      const int64_t last = std::min(panels.count, first + kStripPanels);
      const int64_t token = panels[first].first;
      const int64_t tokens = panels[last - 1].first + panels[last - 1].count - token;
      const int64_t queries = round_up(tokens, kDepthStep);
      for (int64_t i = first; i < last; ++i) {
        const Panel panel = panels[i];
        const int64_t wide = panel.vecs * kTile, at = panel.first - token;
        bf16_gemm(tiles, wide, deep, key.data, key.ld, s.q_panels + panel.first * deep, wide,
                  s.scores + at, s.strip, false);
        bf16_gemm(tiles, wide, deep, value.data, value.ld, s.go_panels + panel.first * deep, wide,
                  s.products + at, s.strip, false);
        const Slopes to{s.weights + at, s.slopes + at, s.strip, s.slope_pairs};
        with_vecs(panel.vecs, [&](auto V) {
          attention::slope_pairs<V()>(s.scores + at, s.products + at, s.strip, count, keys,
                                      static_cast<float>(scale), s.lse + panel.first,
                                      s.delta + panel.first, share, count == path.count, to);
          turned_product<V()>(rows, keys, s.key_pairs, columns, s.key_columns, s.slope_pairs, wide,
                              grad_q + panel.first * rows, true);
        });
      }
      // The sums over queries run over padding, too, where infinite keys have made NaN.
      for (int64_t n = 0; queries > tokens && n < tiles; ++n) {
        std::fill_n(s.weights + n * s.strip + tokens, queries - tokens, bf16(0.0f));
        std::fill_n(s.slopes + n * s.strip + tokens, queries - tokens, bf16(0.0f));
      }
      if (direct) {
        const int64_t row = path.grad_row;
        bf16_gemm_rounded(count, width, queries, s.weights, s.strip, s.go_pairs, columns, 1.0f,
                          path.grad_value + begin * row, row);
        bf16_gemm_rounded(count, width, queries, s.slopes, s.strip, s.q_pairs, columns,
                          static_cast<float>(scale), path.grad_key + begin * row, row);
        return;
      }
      bf16_gemm(tiles, columns, queries, s.weights, s.strip, s.go_pairs + token * columns, columns,
                s.grad_value, columns, first > 0);
      bf16_gemm(tiles, columns, queries, s.slopes, s.strip, s.q_pairs + token * columns, columns,
                s.grad_key, columns, first > 0);
    }
    const __m512 factor = _mm512_set1_ps(static_cast<float>(scale));
    for (int64_t i = 0; i < count * columns; i += kTile) {
      const __m512 scaled = _mm512_mul_ps(factor, _mm512_loadu_ps(s.grad_key + i));
      const __m512 added = path.same() ? _mm512_loadu_ps(s.grad_value + i) : _mm512_setzero_ps();
      _mm512_storeu_ps(s.grad_key + i, _mm512_add_ps(scaled, added));
    }
    if (!path.same()) {
      store_rows(s.grad_value, columns, path.index, begin, count, width, path.grad_value,
                 path.grad_row);
    }
    store_rows(s.grad_key, columns, path.index, begin, count, width, path.grad_key, path.grad_row);
  }

 private:
  // Pairs of rows (keys, columns) as a left-hand side (rows, keys), which tiles want turned round.
  static void turn(const bf16* pairs, int64_t columns, int64_t rows, int64_t keys, bf16* turned) {
    if constexpr (kTiles) transpose_pairs(pairs, columns, keys / 2, rows, turned, keys / 2);
  }

  // c (rows, wide) = or, where `add`, += that left-hand side times b (keys, wide), wide = 16 V.
  template <int V>
  static void turned_product(int64_t rows, int64_t keys, const bf16* pairs, int64_t columns,
                             const bf16* turned, const bf16* b, int64_t wide, float* c, bool add) {
    if constexpr (kTiles) {
      bf16_gemm_columns<V>(rows, keys, turned, keys, b, wide, c, wide, add);
    } else {
      bf16_gemm_rows<true, V>(rows, keys, pairs, columns, b, wide, c, wide, add, 0xFFFF);
    }
  }

  // Whether vectors take the rows of `from` as they lie.
  static bool lie_ready(const Matrix<bf16>& from, const int64_t* index, int64_t width) {
    return !kTiles && !index && from.column == 1 && width % kDepthStep == 0;
  }

  // Rows [first, first + count) of `from` to the left of a product, `rows` of them: where they lie,
  // else copied to `scratch` (rows, depth).
  static Tile<bf16> left_rows(const Matrix<bf16>& from, const int64_t* index, int64_t first,
                              int64_t count, int64_t rows, int64_t width, bf16* scratch) {
    if (lie_ready(from, index, width)) return {from.data + first * from.row, from.row};
    pack_rows(from, index, first, count, rows, width, depth(width), scratch);
    return {scratch, depth(width)};
  }

  // What is fetched while rows of `now` are packed where they lie: those of the 16th row from the
  // one at work, and those of `next`.
  static Ahead fetch_ahead(const Matrix<bf16>& now, const Matrix<bf16>& next, const int64_t* index,
                           int64_t first, int64_t width) {
    if (!lie_ready(now, index, width)) return {};
    constexpr int64_t size = sizeof(bf16);
    return {now.data + (first + 16) * now.row, next.data + first * next.row, now.row * size,
            next.row * size, width * size};
  }

  // to (rows, deep) = rows [first, first + count) of `from`; the rest is 0.
  static void pack_rows(const Matrix<bf16>& from, const int64_t* index, int64_t first,
                        int64_t count, int64_t rows, int64_t width, int64_t deep, bf16* to) {
    for (int64_t i = 0; i < count; ++i, to += deep) {
      const bf16* row = from.data + (index ? index[first + i] : first + i) * from.row;
      if (from.column != 1) {
        for (int64_t d = 0; d < width; ++d) to[d] = row[d * from.column];
        std::fill(to + width, to + deep, bf16(0.0f));
        continue;
      }
      for (int64_t d = 0; d < deep; d += 32) {
        _mm512_mask_storeu_epi16(to + d, first_of_32(deep - d),
                                 _mm512_maskz_loadu_epi16(first_of_32(width - d), row + d));
      }
    }
    if (rows > count) std::fill_n(to, (rows - count) * deep, bf16(0.0f));
  }

  // Rows (lanes, depth) to pairs of rows (`queries` of them) and to panels.
  static void pack_queries(const bf16* rows, const Panels<float>& panels, int64_t width,
                           int64_t queries, bf16* pairs, bf16* to) {
    const int64_t deep = depth(width);
    pack_pairs(rows, deep, panels.lanes, width, queries, columns(width), pairs);
    for (int64_t i = 0; i < panels.count; ++i) {
      const int64_t wide = panels[i].vecs * kTile, first = panels[i].first;
      transpose_pairs(rows + first * deep, deep / 2, wide, deep / 2, to + first * deep, wide);
    }
  }
};

}  // namespace dvla_fast::attention

#endif
