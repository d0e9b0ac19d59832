// Softmax down the columns of a block of scores, and its derivative. Queries lie in the lanes, keys
// in the rows.
#pragma once

#include <algorithm>
#include <limits>

#include "attention/vec_math.h"

namespace dvla_fast::attention {

// A path without keys: output 0, log-sum-exp -inf.
template <class acc_t>
inline void no_keys(int64_t values, int64_t lanes, acc_t* out, acc_t* lse) {
  std::fill_n(out, values, acc_t(0));
  std::fill_n(lse, lanes, -std::numeric_limits<acc_t>::infinity());
}

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

// The end of a softmax over blocks: out (width, V * lanes) divided by the totals, and
// lse = scale peak + log total.
template <int V, class acc_t>
void normalise(const acc_t* peak, const acc_t* total, acc_t scale, int64_t width, acc_t* out,
               acc_t* lse) {
  constexpr int64_t lanes = kLanes<acc_t>, wide = V * lanes;
  for (int v = 0; v < V; ++v) {
    const auto sum = Vec<acc_t>::loadu(total + v * lanes);
    (Vec<acc_t>(scale) * Vec<acc_t>::loadu(peak + v * lanes) + sum.log()).store(lse + v * lanes);
    const auto share = Vec<acc_t>(acc_t(1)) / sum;
    for (int64_t d = 0; d < width; ++d) {
      acc_t* at = out + d * wide + v * lanes;
      (Vec<acc_t>::loadu(at) * share).store(at);
    }
  }
}

// weights = share exp(weights - lse), slopes = weights (slopes - delta), over (count, V * lanes)
// with row stride ld. `whole`: the block holds every key. Then the weights are normalised again,
// which undoes the rounding of lse, and delta is summed from them, and given back, rather than
// taken from the rounded output: what cancels in exact arithmetic (the slopes of a row add up to 0)
// cancels here.
template <int V, class acc_t>
void score_slopes(acc_t* weights, acc_t* slopes, int64_t ld, int64_t count, const acc_t* lse,
                  acc_t* delta, acc_t share, bool whole) {
  constexpr int64_t lanes = kLanes<acc_t>;
  Vec<acc_t> shift[V], factor[V], mean[V], total[V], sum[V];
  for (int v = 0; v < V; ++v) {
    shift[v] = Vec<acc_t>::loadu(lse + v * lanes);
    total[v] = sum[v] = Vec<acc_t>(acc_t(0));
  }
  for (int64_t begin = 0; begin < count; begin += kSumRows) {
    Vec<acc_t> part[V];
    for (int v = 0; v < V; ++v) part[v] = Vec<acc_t>(acc_t(0));
    for (int64_t n = begin; n < std::min(begin + kSumRows, count); ++n) {
      for (int v = 0; v < V; ++v) {
        const int64_t at = n * ld + v * lanes;
        const auto weight = exp_shifted(Vec<acc_t>::loadu(weights + at) - shift[v]);
        weight.store(weights + at);
        part[v] = part[v] + weight;
        sum[v] = at::vec::fmadd(weight, Vec<acc_t>::loadu(slopes + at), sum[v]);
      }
    }
    for (int v = 0; v < V; ++v) total[v] = total[v] + part[v];
  }
  for (int v = 0; v < V; ++v) {
    factor[v] = Vec<acc_t>(share);
    mean[v] = Vec<acc_t>::loadu(delta + v * lanes);
    if (!whole) continue;
    const auto norm = Vec<acc_t>(acc_t(1)) / total[v];
    factor[v] = factor[v] * norm;
    mean[v] = sum[v] * norm;
    mean[v].store(delta + v * lanes);
  }
  for (int64_t n = 0; n < count; ++n) {
    for (int v = 0; v < V; ++v) {
      const int64_t at = n * ld + v * lanes;
      const auto weight = Vec<acc_t>::loadu(weights + at) * factor[v];
      weight.store(weights + at);
      (weight * (Vec<acc_t>::loadu(slopes + at) - mean[v])).store(slopes + at);
    }
  }
}

}  // namespace dvla_fast::attention
