// The policy's network on the CPU: state -> [layer norm of its image part | of its text part |
// cosine] -> hidden layer with GELU -> logit, and its derivative.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cmath>

#include "attention/micro_gemm.h"
#include "attention/rows.h"
#include "attention/scratch.h"
#include "gate/product.h"
#include "policy/state.h"

namespace dvla_fast::policy {

using attention::kLanes;
using attention::Vec;

constexpr double kNormEpsilon = 1e-5;  // torch.nn.functional.layer_norm
// Decisions, and hidden units, whose products are taken together: as many as their sums and the
// operands fill the register file (32 vector registers with AVX-512, 16 below).
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 4, kUnits = 4;
#else
constexpr int kRows = 4, kUnits = 3;
#endif

// x (n) normalised to mean 0 and variance 1; the reciprocal of its deviation.
template <class wide_t>
double normalise(const wide_t* x, int64_t n, wide_t* out) {
  const double mean = sum_terms(n, [=](const auto& at) { return at(x); }) / n;
  const double squares =
      sum_terms(n, [=](const auto& at) { return (at(x) - mean) * (at(x) - mean); });
  const double factor = 1 / std::sqrt(squares / n + kNormEpsilon);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<wide_t>((x[i] - mean) * factor);
  return factor;
}

// grad, of the normalised values y, becomes that of what was normalised.
template <class wide_t>
void normalise_backward(const wide_t* y, double factor, int64_t n, wide_t* grad) {
  const double mean = sum_terms(n, [=](const auto& at) { return at(grad); }) / n;
  const double along = sum_terms(n, [=](const auto& at) { return at(grad) * at(y); }) / n;
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = static_cast<wide_t>(factor * (grad[i] - mean - along * y[i]));
  }
}

// Phi(x), which GELU(x) = x Phi(x) is made of, and from it GELU's derivative, Phi(x) + x phi(x).
template <class wide_t>
inline Vec<wide_t> normal_cdf(const Vec<wide_t>& x) {
  return Vec<wide_t>(wide_t(0.5)) *
         (Vec<wide_t>(wide_t(1)) + (x * Vec<wide_t>(wide_t(M_SQRT1_2))).erf());
}
template <class wide_t>
inline Vec<wide_t> gelu_slope(const Vec<wide_t>& x, const Vec<wide_t>& cdf) {
  const Vec<wide_t> density =
      (x * x * Vec<wide_t>(wide_t(-0.5))).exp() * Vec<wide_t>(wide_t(0.5 * M_SQRT1_2 * M_2_SQRTPI));
  return cdf + x * density;
}

// f(first, count) over n values in vectors.
template <class wide_t, class F>
inline void each_vector(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kLanes<wide_t>) f(i, std::min(kLanes<wide_t>, n - i));
}

template <class wide_t>
class Network {
 public:
  // Weights of the dtype wide_t.
  Network(const Shape& z, const at::Tensor& hidden_weight, const at::Tensor& out_weight)
      : z_(z),
        units_(hidden_weight.size(0)),
        ld_(attention::padded<wide_t>(z.features)),
        hidden_weight_(hidden_weight.contiguous()),
        out_weight_(out_weight.contiguous()),
        weight_(hidden_weight_.const_data_ptr<wide_t>()),
        out_(out_weight_.const_data_ptr<wide_t>()) {}

  // Logits (A), and hidden (A, K) before the activation unless it is null.
  void forward(const wide_t* state, const wide_t* hidden_bias, wide_t out_bias, wide_t* hidden,
               wide_t* logits) const {
    if (z_.A >= kManyRows) return forward_many(state, hidden_bias, out_bias, hidden, logits);
    parallel_items(attention::ceil_div(z_.A, kRows), [&](int64_t begin, int64_t end) {
      const auto s =
          attention::on_arena<Scratch>(kBlockRows * ld_, hidden ? 0 : kBlockRows * units_);
      const int64_t last = std::min(z_.A, end * kRows);
      for (int64_t a = begin * kRows; a < last; a += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, last - a);
        wide_t* to = hidden ? hidden + a * units_ : s.hidden;
        for (int64_t r = 0; r < rows; ++r) {
          attention::clear_last(s.input + r * ld_, ld_);
          load_input(state + (a + r) * z_.features, s.input + r * ld_);
        }
        // What is left of a tile is 0: arithmetic on denormal numbers found there would be slow.
        std::fill(s.input + rows * ld_, s.input + attention::ceil_div(rows, kRows) * kRows * ld_,
                  wide_t(0));
        for (int64_t unit = 0; unit < units_; unit += kUnits) {
          for (int64_t r = 0; r < rows; r += kRows) {
            products(s.input + r * ld_, unit, std::min<int64_t>(kRows, rows - r), hidden_bias,
                     to + r * units_);
          }
        }
        for (int64_t r = 0; r < rows; ++r) logits[a + r] = logit(to + r * units_, out_bias);
      }
    });
  }

  // From the logits' gradient (A): those of the weights, and that of the state, added to
  // grad_state (A, 2C + 1).
  void backward(const wide_t* state, const wide_t* hidden, const wide_t* grad_logits,
                wide_t* grad_hidden_weight, wide_t* grad_hidden_bias, wide_t* grad_out_weight,
                wide_t* grad_out_bias, wide_t* grad_state) const {
    std::vector<wide_t> input(z_.A * ld_, wide_t(0)), grad_hidden(z_.A * units_);
    std::vector<double> factors(2 * z_.A);
    parallel_items(z_.A, [&](int64_t begin, int64_t end) {
      for (int64_t a = begin; a < end; ++a) {
        const auto [image, text] = load_input(state + a * z_.features, input.data() + a * ld_);
        factors[2 * a] = image, factors[2 * a + 1] = text;
      }
    });
    out_layer(hidden, grad_logits, grad_hidden.data(), grad_hidden_bias, grad_out_weight,
              grad_out_bias);
    parallel_items(attention::ceil_div(units_, kBlockUnits), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kBlockUnits, last = std::min(units_, end * kBlockUnits);
      attention::gemm<true>(last - first, z_.features, z_.A, grad_hidden.data() + first, units_,
                            input.data(), ld_, grad_hidden_weight + first * z_.features,
                            z_.features, false);
    });
    parallel_items(attention::ceil_div(z_.A, kBlockUnits), [&](int64_t begin, int64_t end) {
      std::vector<wide_t> grads(kBlockUnits * z_.features);
      for (int64_t first = begin * kBlockUnits; first < std::min(z_.A, end * kBlockUnits);
           first += kBlockUnits) {
        const int64_t rows = std::min(kBlockUnits, z_.A - first);
        input_gradients(grad_hidden.data() + first * units_, rows, grads.data());
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t a = first + r;
          const wide_t* x = input.data() + a * ld_;
          wide_t* grad = grads.data() + r * z_.features;
          normalise_backward(x, factors[2 * a], z_.C, grad);
          normalise_backward(x + z_.C, factors[2 * a + 1], z_.C, grad + z_.C);
          wide_t* to = grad_state + a * z_.features;
          for (int64_t c = 0; c < z_.features; ++c) to[c] += grad[c];
        }
      }
    });
  }

 private:
  static constexpr int64_t kBlockUnits = 16;  // or decisions: what a thread takes at a time
  // Decisions whose inputs stay in the first-level cache while all units are taken.
  static constexpr int64_t kBlockRows = 16;

  // Decisions for which packing the weights takes less time than it saves, and of these so many
  // that inputs and hidden values stay in the second-level cache, and in memory that is not handed
  // back to the system.
  static constexpr int64_t kManyRows = 64, kChunkRows = 48;

  struct Scratch {
    Scratch(attention::Arena& arena, int64_t inputs, int64_t hidden)
        : input(arena.take<wide_t>(inputs)), hidden(arena.take<wide_t>(hidden)) {}
    wide_t *input, *hidden;
  };

  // The network's input from a state, and the factors of its two norms.
  std::pair<double, double> load_input(const wide_t* state, wide_t* input) const {
    const double image = normalise(state, z_.C, input);
    const double text = normalise(state + z_.C, z_.C, input + z_.C);
    input[2 * z_.C] = state[2 * z_.C];
    return {image, text};
  }

  // forward() as one product, which runs at twice the speed of the small ones of few decisions.
  void forward_many(const wide_t* state, const wide_t* hidden_bias, wide_t out_bias, wide_t* hidden,
                    wide_t* logits) const {
    const gate::Factor<wide_t> weight(hidden_weight_.t(), gate::Packing::kWhole);
    const auto options = hidden_weight_.options();
    parallel_items(attention::ceil_div(z_.A, kChunkRows), [&](int64_t begin, int64_t end) {
      std::vector<wide_t> input(kChunkRows * z_.features), own(hidden ? 0 : kChunkRows * units_);
      const int64_t last = std::min(z_.A, end * kChunkRows);
      for (int64_t a = begin * kChunkRows; a < last; a += kChunkRows) {
        const int64_t rows = std::min(kChunkRows, last - a);
        for (int64_t r = 0; r < rows; ++r) {
          load_input(state + (a + r) * z_.features, input.data() + r * z_.features);
        }
        wide_t* to = hidden ? hidden + a * units_ : own.data();
        weight.multiply(at::from_blob(input.data(), {rows, z_.features}, options),
                        at::from_blob(to, {rows, units_}, options));
        for (int64_t r = 0; r < rows; ++r) {
          wide_t* row = to + r * units_;
          for (int64_t unit = 0; unit < units_; ++unit) row[unit] += hidden_bias[unit];
          logits[a + r] = logit(row, out_bias);
        }
      }
    });
  }

  // hidden (rows, K) of units [unit, unit + kUnits), from kRows rows of input.
  void products(const wide_t* input, int64_t unit, int64_t rows, const wide_t* bias,
                wide_t* hidden) const {
    const int64_t units = std::min<int64_t>(kUnits, units_ - unit);
    const wide_t* weight[kUnits];
    for (int64_t u = 0; u < kUnits; ++u) {
      weight[u] = weight_ + (unit + std::min(u, units - 1)) * z_.features;
    }
    Vec<wide_t> sum[kRows][kUnits];
    for (auto& row : sum) std::fill_n(row, kUnits, Vec<wide_t>(wide_t(0)));
    const auto step = [&](int64_t i, auto load) {
      Vec<wide_t> w[kUnits];
      for (int u = 0; u < kUnits; ++u) w[u] = load(weight[u] + i);
      for (int r = 0; r < kRows; ++r) {
        const auto x = Vec<wide_t>::loadu(input + r * ld_ + i);
        for (int u = 0; u < kUnits; ++u) sum[r][u] = at::vec::fmadd(x, w[u], sum[r][u]);
      }
    };
    const int64_t whole = z_.features / kLanes<wide_t> * kLanes<wide_t>;
    for (int64_t i = 0; i < whole; i += kLanes<wide_t>) {
      step(i, [](const wide_t* from) { return Vec<wide_t>::loadu(from); });
    }
    if (const int64_t tail = z_.features - whole) {
      step(whole, [&](const wide_t* from) { return Vec<wide_t>::loadu(from, tail); });
    }
    // The lanes of all sums are added up at once, in the order of sum_lanes(): one after another
    // they would take longer than the products.
    constexpr int64_t lanes = kLanes<wide_t>;
    constexpr int64_t count = attention::ceil_div(kRows * kUnits, lanes) * lanes;
    alignas(64) wide_t by_sum[count * lanes] = {}, by_lane[lanes * count];
    for (int i = 0; i < kRows * kUnits; ++i) sum[i / kUnits][i % kUnits].store(by_sum + i * lanes);
    attention::transpose(by_sum, lanes, count, lanes, by_lane, count);
    for (int64_t half = lanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half * count; ++i) by_lane[i] += by_lane[i + half * count];
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t u = 0; u < units; ++u) {
        hidden[r * units_ + unit + u] = by_lane[r * kUnits + u] + bias[unit + u];
      }
    }
  }

  wide_t logit(const wide_t* hidden, wide_t bias) const {
    Vec<wide_t> sum(wide_t(0));
    each_vector<wide_t>(units_, [&](int64_t i, int64_t count) {
      const auto x = Vec<wide_t>::loadu(hidden + i, count);
      sum = at::vec::fmadd(x * normal_cdf(x), Vec<wide_t>::loadu(out_ + i, count), sum);
    });
    return attention::sum_lanes(sum) + bias;
  }

  // The layer from hidden values to the logit, backwards.
  void out_layer(const wide_t* hidden, const wide_t* grad_logits, wide_t* grad_hidden,
                 wide_t* grad_hidden_bias, wide_t* grad_out_weight, wide_t* grad_out_bias) const {
    std::fill_n(grad_hidden_bias, units_, wide_t(0));
    std::fill_n(grad_out_weight, units_, wide_t(0));
    double bias = 0;
    for (int64_t a = 0; a < z_.A; ++a) bias += grad_logits[a];
    *grad_out_bias = static_cast<wide_t>(bias);
    const int64_t vectors = attention::ceil_div(units_, kLanes<wide_t>);
    parallel_items(vectors, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        const int64_t i = v * kLanes<wide_t>, count = std::min(kLanes<wide_t>, units_ - i);
        const auto out = Vec<wide_t>::loadu(out_ + i, count);
        Vec<wide_t> of_bias(wide_t(0)), of_out(wide_t(0));
        for (int64_t a = 0; a < z_.A; ++a) {
          const Vec<wide_t> slope(grad_logits[a]);
          const auto x = Vec<wide_t>::loadu(hidden + a * units_ + i, count), cdf = normal_cdf(x);
          const Vec<wide_t> grad = slope * out * gelu_slope(x, cdf);
          grad.store(grad_hidden + a * units_ + i, count);
          of_bias = of_bias + grad;
          of_out = at::vec::fmadd(slope, x * cdf, of_out);
        }
        of_bias.store(grad_hidden_bias + i, count);
        of_out.store(grad_out_weight + i, count);
      }
    });
  }

  // grads (rows, 2C + 1) = grad_hidden (rows, K) hidden_weight. The product reads whole vectors,
  // which from the last rows of the weights would reach past their end: those are added apart.
  void input_gradients(const wide_t* grad_hidden, int64_t rows, wide_t* grads) const {
    const int64_t reach = attention::ceil_div(ld_, z_.features);  // rows that a row's vectors touch
    const int64_t whole = std::max<int64_t>(0, units_ - reach + 1);
    attention::gemm<false>(rows, z_.features, whole, grad_hidden, units_, weight_, z_.features,
                           grads, z_.features, false);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t unit = whole; unit < units_; ++unit) {
        const wide_t factor = grad_hidden[r * units_ + unit];
        const wide_t* weight = weight_ + unit * z_.features;
        for (int64_t c = 0; c < z_.features; ++c) grads[r * z_.features + c] += factor * weight[c];
      }
    }
  }

  const Shape& z_;
  const int64_t units_, ld_;  // K; 2C + 1 in whole vectors
  const at::Tensor hidden_weight_, out_weight_;
  const wide_t *weight_, *out_;
};

}  // namespace dvla_fast::policy
