// The work on one head in float32 or float64 (half types are converted as they are read). The
// queries lie in vector lanes: with Q' (D, lanes) packed, a block of scores is K Q' and the output
// is V' exp(scores), so keys and values are read as they lie and every reduction over keys is
// vertical.
#pragma once

#include <cmath>
#include <limits>

#include "attention/micro_gemm.h"
#include "attention/problem.h"
#include "attention/scratch.h"
#include "attention/softmax.h"

namespace dvla_fast::attention {

template <class scalar_type>
struct FloatEngine {
  using scalar_t = scalar_type;
  using acc_t = Acc<scalar_t>;
  using operand_t = acc_t;  // of packed queries

  // What a thread sets up before, and takes down after, its share of the work.
  struct Session {};

  // Rows of a packed panel.
  static int64_t depth(int64_t width) { return width; }
  // Rows that a panel of results takes, of which the first D count.
  static int64_t out_rows(int64_t width) { return width; }

  // ---- Forward

  struct Attend {
    Attend(Arena& arena, int64_t tokens, int64_t width, const Panels<acc_t>& panels)
        : key(arena.take<acc_t>(std::min(tokens, kBlockKeys) * width)),
          value(arena.take<acc_t>(std::min(tokens, kBlockKeys) * width)),
          scores(arena.take<acc_t>(std::min(tokens, kBlockKeys) * panels.panel_lanes())),
          rows(arena.take<acc_t>(panels.panel_lanes() * padded<acc_t>(width))),
          peak(arena.take<acc_t>(panels.lanes)),
          total(arena.take<acc_t>(panels.lanes)) {}
    acc_t *key, *value;   // (block, D)
    acc_t* scores;        // (block, lanes)
    acc_t* rows;          // (lanes, D padded)
    acc_t *peak, *total;  // (lanes)
  };

  // Queries [panel.first, + panel.count), scaled, to (width, lanes of the panel).
  static void pack_query(const Matrix<scalar_t>& query, const Panel& panel, int64_t width,
                         double scale, const Attend& s, operand_t* to) {
    const int64_t ld = padded<acc_t>(width);
    load_rows<scalar_t>(query, nullptr, panel.first, panel.count, width, acc_t(scale), s.rows, ld);
    rows_to_panel(s.rows, ld, width, panel, to);
  }

  // out, in panels of out_rows, and lse of a run of panels of queries over all keys of a path.
  static void attend(const Path<scalar_t>& path, const PanelRange<acc_t>& range, const operand_t* q,
                     int64_t width, double /* q is scaled */, const Attend& s, acc_t* out,
                     acc_t* lse) {
    if (path.count == 0) return no_keys<acc_t>(range.lanes() * width, range.lanes(), out, lse);
    const Blocks blocks(path.count);
    for (int64_t begin = 0; begin < path.count; begin += blocks.size) {
      const int64_t count = std::min(blocks.size, path.count - begin);
      const bool first = begin == 0;
      const auto key = key_tile(path.key, path.index, begin, count, width, s.key);
      const auto value = key_tile(path.value, path.index, begin, count, width, s.value);
      const Ahead ahead = fetch_ahead(key, value, width, s.key);
      range.each([&](auto V, int64_t lane) {
        constexpr int64_t wide = V() * kLanes<acc_t>;
        acc_t* sums = out + lane * width;
        gemm_rows<false, false, kTileRows, V()>(count, width, key.data, key.ld, q + lane * width,
                                                wide, s.scores, wide, 0, false, ahead);
        softmax_block<V()>(s.scores, count, first, s.peak + lane, s.total + lane, sums, width);
        gemm_rows<true, false, kTileRows, V()>(width, count, value.data, value.ld, s.scores, wide,
                                               sums, wide, 0, !first);
      });
    }
    range.each([&](auto V, int64_t lane) {
      normalise<V()>(s.peak + lane, s.total + lane, acc_t(1), width, out + lane * width,
                     lse + lane);
    });
  }

  // ---- Backward

  // One group's query, one image's (or the text's) output gradient, and one block of keys.
  struct Differentiate {
    Differentiate(Arena& arena, int64_t tokens, int64_t width, const Panels<acc_t>& panels)
        : ld(padded<acc_t>(width)),
          strip(panels.strip_lanes()),
          q(arena.take<acc_t>(panels.tokens * ld)),
          q_panels(arena.take<acc_t>(panels.lanes * width)),
          go(arena.take<acc_t>(panels.tokens * ld)),
          go_panels(arena.take<acc_t>(panels.lanes * width)),
          lse(arena.take<acc_t>(panels.lanes)),
          delta(arena.take<acc_t>(panels.lanes)),
          key(arena.take<acc_t>(std::min(tokens, kBlockKeys) * width)),
          value(arena.take<acc_t>(std::min(tokens, kBlockKeys) * width)),
          weights(arena.take<acc_t>(std::min(tokens, kBlockKeys) * strip)),
          slopes(arena.take<acc_t>(std::min(tokens, kBlockKeys) * strip)),
          grad_key(arena.take<acc_t>(std::min(tokens, kBlockKeys) * ld)),
          grad_value(arena.take<acc_t>(std::min(tokens, kBlockKeys) * ld)) {}

    int64_t ld, strip;             // width padded to whole vectors; lanes of a strip
    acc_t *q, *q_panels;           // the scaled query: (P, ld), and in panels of D rows
    acc_t *go, *go_panels;         // the output's gradient: (P, ld), and in panels of D rows
    acc_t *lse, *delta;            // (lanes of all panels)
    acc_t *key, *value;            // (block, D)
    acc_t *weights, *slopes;       // E' and dS' (block, strip)
    acc_t *grad_key, *grad_value;  // (block, ld)
  };

  static void load_query(const Matrix<scalar_t>& query, const Panels<acc_t>& panels, int64_t width,
                         double scale, const Differentiate& s) {
    load_rows<scalar_t>(query, nullptr, 0, panels.tokens, width, acc_t(scale), s.q, s.ld);
    to_panels(s.q, panels, width, s.ld, s.q_panels);
  }

  // After s.go (P, ld) was filled.
  static void pack_gradient(const Panels<acc_t>& panels, int64_t width, const Differentiate& s) {
    to_panels(s.go, panels, width, s.ld, s.go_panels);
  }

  // Keys [begin, begin + count) of a path against every query: their gradients, and their part of
  // grad_query, added to `grad_q` (in panels of D rows, not yet scaled). `share`: the path's share
  // of the gate. Where the block holds every key of the path, delta comes out in s.delta, else it
  // goes in.
  static void block(const GradPath<scalar_t>& path, int64_t begin, int64_t count, acc_t share,
                    const Panels<acc_t>& panels, int64_t width, double /* q is scaled */,
                    const Differentiate& s, acc_t* grad_q) {
    const auto key = key_tile(path.key, path.index, begin, count, width, s.key);
    const auto value = key_tile(path.value, path.index, begin, count, width, s.value);
    const Ahead ahead = fetch_ahead(key, value, width, s.key);
    // Straight to its place where rows lie one after another in the accumulation type.
    const bool direct = std::is_same_v<scalar_t, acc_t> && !path.index;
    acc_t *grad_key = s.grad_key, *grad_value = s.grad_value;
    int64_t ld = s.ld;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (direct) {
        grad_key = path.grad_key + begin * path.grad_row;
        grad_value = path.grad_value + begin * path.grad_row;
        ld = path.grad_row;
      }
    }
    if (path.same()) grad_value = grad_key;
    for (int64_t first = 0; first < panels.count; first += kStripPanels) {
      const int64_t last = std::min(panels.count, first + kStripPanels);
      const int64_t token = panels[first].first;
      PanelRange<acc_t>{panels, first, last}.each([&](auto V, int64_t lane) {
        constexpr int64_t wide = V() * kLanes<acc_t>;
        const int64_t at = token + lane;
        acc_t *weights = s.weights + lane, *slopes = s.slopes + lane;
        gemm_rows<false, false, kTileRows, V()>(count, width, key.data, key.ld,
                                                s.q_panels + at * width, wide, weights, s.strip, 0,
                                                false, ahead);
        gemm_rows<false, false, kTileRows, V()>(count, width, value.data, value.ld,
                                                s.go_panels + at * width, wide, slopes, s.strip, 0,
                                                false);
        score_slopes<V()>(weights, slopes, s.strip, count, s.lse + at, s.delta + at, share,
                          count == path.count);
        gemm_rows<true, false, kTileRows, V()>(width, count, key.data, key.ld, slopes, s.strip,
                                               grad_q + at * width, wide, 0, true);
      });
      const int64_t end = panels[last - 1].first + panels[last - 1].count;
      gemm<false>(count, width, end - token, s.weights, s.strip, s.go + token * s.ld, s.ld,
                  grad_value, ld, first > 0);
      gemm<false>(count, width, end - token, s.slopes, s.strip, s.q + token * s.ld, s.ld, grad_key,
                  ld, first > 0 || path.same());
    }
    if (!direct) {
      if (!path.same()) {
        store_rows(grad_value, ld, path.index, begin, count, width, path.grad_value, path.grad_row);
      }
      store_rows(grad_key, ld, path.index, begin, count, width, path.grad_key, path.grad_row);
    }
  }

 private:
  // What a product with keys fetches unless they were copied: the keys of the fourth tile from the
  // one at work, and the values, which come next.
  static Ahead fetch_ahead(const Tile<acc_t>& key, const Tile<acc_t>& value, int64_t width,
                           const acc_t* copy) {
    constexpr int64_t size = sizeof(acc_t);
    if (key.data == copy) return {};
    return {key.data + 4 * kTileRows * key.ld, value.data, key.ld * size, value.ld * size,
            width * size};
  }

  static void to_panels(const acc_t* rows, const Panels<acc_t>& panels, int64_t width, int64_t ld,
                        acc_t* to) {
    for (int64_t i = 0; i < panels.count; ++i) {
      const Panel panel = panels[i];
      rows_to_panel(rows + panel.first * ld, ld, width, panel, to + panel.first * width);
    }
  }
};

}  // namespace dvla_fast::attention
