// The state of a gate, [mean of image tokens | mean of text tokens | their cosine], and its
// derivative. Means of tokens first, then of the images, or texts, of a decision: each counts alike
// whatever its number of tokens.
#pragma once

#include <ATen/Dispatch.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "attention/problem.h"
#include "attention/rows.h"

namespace dvla_fast::policy {

using attention::Acc;
using OptionalTensor = std::optional<at::Tensor>;

// Tokens that are added up in their own precision before they join the sum in float64.
constexpr int64_t kRunTokens = 32;
// Pairs of vectors that are summed at a time, in registers (of which there are 16 or more).
constexpr int kSumPairs = 6;
// torch.nn.functional.cosine_similarity: the smallest norm it divides by.
constexpr double kSmallestNorm = 1e-8;

struct Shape {
  Shape(const at::Tensor& image_tokens, const at::Tensor& text_tokens, int64_t groups_per_decision,
        int64_t state_images)
      : B(image_tokens.size(0)),
        T(text_tokens.size(0)),
        C(image_tokens.size(2)),
        features(2 * C + 1),
        G(B / T),
        used(state_images == 0 ? G : state_images),
        images(groups_per_decision == 0 ? 1 : groups_per_decision * used),
        texts(groups_per_decision == 0 ? 1 : groups_per_decision),
        A(groups_per_decision == 0 ? B : T / groups_per_decision) {}
  // The i-th image, or text, of a decision.
  int64_t image(int64_t decision, int64_t i) const {
    if (A == B && images == 1) return decision;
    return (decision * texts + i / used) * G + i % used;
  }
  int64_t text(int64_t decision, int64_t i) const {
    return A == B && images == 1 ? decision / G : decision * texts + i;
  }
  int64_t B, T, C, features;
  int64_t G, used;        // images of a text group, and of those that make the state
  int64_t images, texts;  // of a decision
  int64_t A;              // decisions
};

// Which of the tokens of an outer index count.
class Tokens {
 public:
  Tokens(const at::Tensor& x, const OptionalTensor& mask) : tokens_(x.size(1)) {
    if (!mask) return;
    keep_ = mask->const_data_ptr<bool>(), outer_ = mask->stride(0), step_ = mask->stride(1);
  }
  bool operator()(int64_t outer, int64_t token) const {
    return keep_ == nullptr || keep_[outer * outer_ + token * step_];
  }
  int64_t count(int64_t outer) const {
    if (keep_ == nullptr) return tokens_;
    int64_t count = 0;
    for (int64_t n = 0; n < tokens_; ++n) count += (*this)(outer, n);
    return count;
  }

 private:
  const bool* keep_ = nullptr;
  int64_t tokens_, outer_ = 0, step_ = 0;
};

// Two vectors of values in the type of sums; of `n` values, the rest 0.
template <class scalar_t>
inline std::pair<attention::Vec<Acc<scalar_t>>, attention::Vec<Acc<scalar_t>>> load_two(
    const scalar_t* from, int64_t n) {
  using V = attention::Vec<Acc<scalar_t>>;
  if constexpr (std::is_same_v<scalar_t, Acc<scalar_t>>) {
    if (n >= 2 * V::size()) return {V::loadu(from), V::loadu(from + V::size())};
    if (n <= V::size()) return {V::loadu(from, n), V(scalar_t(0))};
    return {V::loadu(from), V::loadu(from + V::size(), n - V::size())};
  } else {
    using H = attention::Vec<scalar_t>;
    const auto [low, high] =
        at::vec::convert_to_float(n >= H::size() ? H::loadu(from) : H::loadu(from, n));
    return {low, high};
  }
}

// sums (columns, in whole pairs of vectors) = the sum of those of `tokens` rows that count, in as
// many pairs of registers at a time: nothing but the tokens passes through memory.
template <int kPairs, class scalar_t, class Keep>
inline void sum_rows(const scalar_t* from, int64_t step, int64_t tokens, int64_t columns,
                     const Keep& keep, Acc<scalar_t>* sums) {
  using V = attention::Vec<Acc<scalar_t>>;
  constexpr int64_t wide = 2 * V::size(), least = kPairs > 1 ? kPairs * wide : 1;
  int64_t column = 0;
  for (; column + least <= columns; column += kPairs * wide) {
    V sum[2 * kPairs];
    std::fill_n(sum, 2 * kPairs, V(0));
    const int64_t count = std::min(kPairs * wide, columns - column);
    for (int64_t n = 0; n < tokens; ++n) {
      if (!keep(n)) continue;
      const scalar_t* row = from + n * step + column;
#pragma GCC unroll 6
      for (int p = 0; p < kPairs; ++p) {
        const auto [low, high] = load_two(row + p * wide, kPairs > 1 ? wide : count);
        sum[2 * p] = sum[2 * p] + low, sum[2 * p + 1] = sum[2 * p + 1] + high;
      }
    }
#pragma GCC unroll 12
    for (int v = 0; v < 2 * kPairs; ++v) sum[v].store(sums + column + v * V::size());
  }
  if constexpr (kPairs > 1) {
    sum_rows<kPairs / 2>(from + column, step, tokens, columns - column, keep, sums + column);
  }
}

// Rows `ld` apart of out (x.size(0), C) = means of the tokens that count, 0 where none does.
template <class wide_t>
void token_means(const at::Tensor& tokens, const OptionalTensor& mask, wide_t* out, int64_t ld) {
  const at::Tensor x = tokens.stride(2) == 1 ? tokens : tokens.contiguous();
  const int64_t L = x.size(1), C = x.size(2);
  const Tokens keep(x, mask);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "gate_policy_means", [&] {
        const scalar_t* data = x.const_data_ptr<scalar_t>();
        constexpr int64_t wide = 2 * attention::kLanes<Acc<scalar_t>>;
        parallel_items(x.size(0), [&](int64_t begin, int64_t end) {
          std::vector<Acc<scalar_t>> run(attention::ceil_div(C, wide) * wide);
          std::vector<double> total(C);
          for (int64_t i = begin; i < end; ++i) {
            const double share = 1.0 / std::max<int64_t>(1, keep.count(i));
            if (L > kRunTokens) std::fill(total.begin(), total.end(), 0.0);
            for (int64_t first = 0; first < L; first += kRunTokens) {
              sum_rows<kSumPairs>(
                  data + i * x.stride(0) + first * x.stride(1), x.stride(1),
                  std::min(kRunTokens, L - first), C, [&](int64_t n) { return keep(i, first + n); },
                  run.data());
              if (L <= kRunTokens) break;  // the only run
              for (int64_t c = 0; c < C; ++c) total[c] += run[c];
            }
            const auto write = [&](const auto& sums) {
              for (int64_t c = 0; c < C; ++c)
                out[i * ld + c] = static_cast<wide_t>(sums[c] * share);
            };
            L > kRunTokens ? write(total) : write(run);
          }
        });
      });
}

// Eight values side by side, in float64 (compilers' vectors: those of ATen convert no float to it).
using Eight = double __attribute__((vector_size(8 * sizeof(double))));

template <class wide_t>
inline Eight load_eight(const wide_t* from) {
  wide_t values __attribute__((vector_size(8 * sizeof(wide_t))));
  std::memcpy(&values, from, sizeof(values));
  return __builtin_convertvector(values, Eight);
}

// The sum over n indices of what `term` makes of the values there: it gets a function that reads
// them from where they begin, one index as a double or eight. As many sums side by side as keep the
// adders busy.
template <class F>
inline double sum_terms(int64_t n, const F& term) {
  constexpr int64_t count = 4;
  Eight sums[count] = {};
  int64_t i = 0;
  for (; i + 8 * count <= n; i += 8 * count) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < count; ++j) {
      sums[j] += term([&](const auto* from) { return load_eight(from + i + 8 * j); });
    }
  }
  Eight sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (; i < n; ++i) {
    sum[i % 8] += term([&](const auto* from) { return static_cast<double>(from[i]); });
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

struct Cosine {
  template <class wide_t>
  Cosine(const wide_t* x, const wide_t* y, int64_t n) {
    const auto dot = [n](const wide_t* a, const wide_t* b) {
      return sum_terms(n, [=](const auto& at) { return at(a) * at(b); });
    };
    x_norm = std::max(std::sqrt(dot(x, x)), kSmallestNorm);
    y_norm = std::max(std::sqrt(dot(y, y)), kSmallestNorm);
    value = dot(x, y) / (x_norm * y_norm);
  }
  // grad_x += slope d(cosine)/dx, likewise grad_y.
  template <class wide_t>
  void backward(double slope, const wide_t* x, const wide_t* y, int64_t n, wide_t* grad_x,
                wide_t* grad_y) const {
    const double both = slope / (x_norm * y_norm);
    // A norm below the smallest is a constant.
    const double of_x = x_norm > kSmallestNorm ? slope * value / (x_norm * x_norm) : 0;
    const double of_y = y_norm > kSmallestNorm ? slope * value / (y_norm * y_norm) : 0;
    for (int64_t i = 0; i < n; ++i) {
      grad_x[i] += static_cast<wide_t>(both * y[i] - of_x * x[i]);
      grad_y[i] += static_cast<wide_t>(both * x[i] - of_y * y[i]);
    }
  }
  double x_norm, y_norm, value;
};

// out (n) = the mean of rows row_at(0), …, row_at(count - 1).
template <class wide_t, class F>
inline void mean_of(int64_t count, int64_t n, wide_t* out, const F& row_at) {
  std::copy_n(row_at(0), n, out);
  if (count == 1) return;
  for (int64_t i = 1; i < count; ++i) {
    const wide_t* row = row_at(i);
    for (int64_t c = 0; c < n; ++c) out[c] += row[c];
  }
  for (int64_t c = 0; c < n; ++c) out[c] /= static_cast<wide_t>(count);
}

// state (A, 2C + 1).
template <class wide_t>
void make_state(const Shape& z, const at::Tensor& image_tokens, const at::Tensor& text_tokens,
                const OptionalTensor& image_mask, const OptionalTensor& text_mask, wide_t* state) {
  const auto add_cosine = [&](wide_t* image) {
    wide_t* text = image + z.C;
    text[z.C] = static_cast<wide_t>(Cosine(image, text, z.C).value);
  };
  if (z.B == z.A && z.T == z.A) {  // the means are the state
    token_means(image_tokens, image_mask, state, z.features);
    token_means(text_tokens, text_mask, state + z.C, z.features);
    parallel_items(z.A, [&](int64_t begin, int64_t end) {
      for (int64_t a = begin; a < end; ++a) add_cosine(state + a * z.features);
    });
    return;
  }
  const std::unique_ptr<wide_t[]> image_means(new wide_t[z.T * z.used * z.C]),
      text_means(new wide_t[z.T * z.C]);
  if (z.used == z.G) {
    token_means(image_tokens, image_mask, image_means.get(), z.C);
  } else {
    for (int64_t t = 0; t < z.T; ++t) {
      const auto first = [&](const at::Tensor& x) { return x.narrow(0, t * z.G, z.used); };
      token_means(first(image_tokens),
                  image_mask ? OptionalTensor(first(*image_mask)) : std::nullopt,
                  image_means.get() + t * z.used * z.C, z.C);
    }
  }
  token_means(text_tokens, text_mask, text_means.get(), z.C);
  // The i-th used image of all, without those between groups that are not used.
  const auto row_of = [&](int64_t image) { return image / z.G * z.used + image % z.G; };
  parallel_items(z.A, [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a) {
      wide_t *image = state + a * z.features, *text = image + z.C;
      mean_of(z.images, z.C, image,
              [&](int64_t i) { return image_means.get() + row_of(z.image(a, i)) * z.C; });
      mean_of(z.texts, z.C, text, [&](int64_t i) { return text_means.get() + z.text(a, i) * z.C; });
      add_cosine(image);
    }
  });
}

// From grad (A, 2C + 1), of which the cosine's part is carried over to the means: the gradient of
// every token that counts of an image (B, C) and of a text (T, C).
template <class wide_t>
void state_backward(const Shape& z, const at::Tensor& image_tokens, const at::Tensor& text_tokens,
                    const OptionalTensor& image_mask, const OptionalTensor& text_mask,
                    const wide_t* state, wide_t* grad, wide_t* image_rows, wide_t* text_rows) {
  const Tokens image_keep(image_tokens, image_mask), text_keep(text_tokens, text_mask);
  std::fill_n(image_rows, z.B * z.C, wide_t(0));
  std::fill_n(text_rows, z.T * z.C, wide_t(0));
  const auto share = [](int64_t tokens, int64_t of) {
    return wide_t(1) / static_cast<wide_t>(std::max<int64_t>(1, tokens) * of);
  };
  const auto decision = [&](int64_t a) {
    const wide_t *image = state + a * z.features, *text = image + z.C;
    wide_t *of_image = grad + a * z.features, *of_text = of_image + z.C;
    Cosine(image, text, z.C).backward(of_text[z.C], image, text, z.C, of_image, of_text);
    for (int64_t i = 0; i < z.images; ++i) {
      const int64_t b = z.image(a, i);
      const wide_t factor = share(image_keep.count(b), z.images);
      for (int64_t c = 0; c < z.C; ++c) image_rows[b * z.C + c] = factor * of_image[c];
    }
    for (int64_t i = 0; i < z.texts; ++i) {
      const int64_t t = z.text(a, i);
      const wide_t factor = share(text_keep.count(t), z.texts);
      for (int64_t c = 0; c < z.C; ++c) text_rows[t * z.C + c] += factor * of_text[c];
    }
  };
  // Decisions that share a text are one thread's.
  const int64_t apart = std::min(z.A, z.T), each = z.A / std::max<int64_t>(1, apart);
  parallel_items(apart, [&](int64_t begin, int64_t end) {
    for (int64_t a = begin * each; a < end * each; ++a) decision(a);
  });
}

}  // namespace dvla_fast::policy
