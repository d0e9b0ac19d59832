// The policy on CPU: blocks of elements, each stage a loop that vectorises.
//
// A block goes through: mean and shapes (double) -> draw of the action (dtype of the logits; the
// few refused proposals are gathered and proposed again) -> densities and derivatives (double).
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "beta/beta_math.h"
#include "beta/beta_policy.h"
#include "beta/philox_lanes.h"
#include "parallel.h"

namespace dvla_fast {
namespace {

constexpr int kBlock = 256;
constexpr std::int64_t kGrain = 8 * kBlock;

enum Invalid : int { kValid = 0, kBadLogit = 1, kBadKappa = 2, kBadAction = 4 };

template <class T>
DVLA_HD T saturate(double x) {
  constexpr double limit = Format<T>::largest;
  return static_cast<T>(min_(max_(x, -limit), limit));
}

constexpr int padded(int count) { return std::min(kBlock, (count + 15) / 16 * 16); }

// One block in flight. Lanes beyond `count`, up to the padding, hold a harmless policy. The action
// is a value of the logits' dtype, kept in double: loops over one width need fewer registers.
struct Block {
  std::int64_t start;
  int count;
  alignas(64) double logit[kBlock], kappa[kBlock], log_kappa[kBlock];
  alignas(64) double p[kBlock], q[kBlock], log_p[kBlock], log_q[kBlock];
  alignas(64) double action[kBlock];
};

template <class T>
int load(Block& block, const BetaBuffers<T>& io, std::int64_t start) {
  block.start = start;
  block.count = static_cast<int>(std::min<std::int64_t>(kBlock, io.n - start));
  int nan_logits = 0, bad_kappas = 0;
  for (int i = 0; i < block.count; ++i) {
    const T x = io.logits[start + i];
    block.logit[i] = static_cast<double>(x);
    nan_logits |= x != x;
  }
  for (int i = block.count; i < padded(block.count); ++i) block.logit[i] = 0.0;
  std::fill_n(block.kappa, padded(block.count), io.kappa_value);
  if (io.kappa != nullptr) {
    for (int i = 0; i < block.count; ++i) {
      const T k = io.kappa[start + i];
      block.kappa[i] = static_cast<double>(k);
      bad_kappas |= !(k > T(0) && k <= Format<T>::largest);
    }
#pragma omp simd
    for (int i = 0; i < padded(block.count); ++i) block.log_kappa[i] = log_(block.kappa[i]);
  } else {
    std::fill_n(block.log_kappa, padded(block.count), log_(io.kappa_value));
  }
#pragma omp simd
  for (int i = 0; i < padded(block.count); ++i) {
    const Policy policy = make_policy(block.logit[i], block.kappa[i], block.log_kappa[i]);
    block.logit[i] = policy.logit;
    block.p[i] = policy.p, block.q[i] = policy.q;
    block.log_p[i] = policy.log_p, block.log_q[i] = policy.log_q;
  }
  return (nan_logits ? kBadLogit : kValid) | (bad_kappas ? kBadKappa : kValid);
}

// The Gamma shapes of a block, and the proposals accepted so far.
template <class T>
struct Gammas {
  alignas(64) T a[kBlock], b[kBlock];
  alignas(64) T d_a[kBlock], c_a[kBlock], d_b[kBlock], c_b[kBlock];
  alignas(64) T log1p_a[kBlock], log1p_b[kBlock];
  alignas(64) std::int32_t open[kBlock];  // bit 0: a still waits for a proposal; bit 1: b
};

template <class T>
struct Proposals {
  alignas(64) T log1p_a[kBlock], log1p_b[kBlock], margin_a[kBlock], margin_b[kBlock];
};

// Random words of some lanes, and with double precision their further bits.
struct RandomWords {
  alignas(64) std::uint32_t element[kBlock], words[4][kBlock], low[4][kBlock];

  // Those of block `block` of the listed lanes, counted from `first`.
  template <class T>
  void draw(const Stream& stream, Element first, const int* lanes, int count, std::uint32_t block) {
    const int width = padded(count);
    for (int j = 0; j < width; ++j) {
      element[j] = first.low + static_cast<std::uint32_t>(lanes[j]);
    }
    draw_lanes(stream, element, first.high, width, block, words);
    if constexpr (sizeof(T) == 8) {
      if (block < kLowBits) draw_lanes(stream, element, first.high, width, block | kLowBits, low);
    }
  }

  template <class T>
  Draw at(int j) const {
    const Words further =
        sizeof(T) == 8 ? Words{low[0][j], low[1][j], low[2][j], low[3][j]} : Words{0, 0, 0, 0};
    return {{words[0][j], words[1][j], words[2][j], words[3][j]}, further};
  }
};

// Proposals for the listed lanes; kEvery: all lanes in order, which spares the gathers.
template <bool kEvery, class T>
void propose_lanes(Proposals<T>& out, const Gammas<T>& gammas, const RandomWords& random,
                   const int* lanes, int count) {
#pragma omp simd
  for (int j = 0; j < padded(count); ++j) {
    const int lane = kEvery ? j : lanes[j];
    const Proposal<T> made = propose<T>(random.at<T>(j), {gammas.d_a[lane], gammas.c_a[lane]},
                                        {gammas.d_b[lane], gammas.c_b[lane]});
    out.log1p_a[j] = made.log1p_a;
    out.log1p_b[j] = made.log1p_b;
    out.margin_a[j] = made.margin_a;
    out.margin_b[j] = made.margin_b;
  }
}

// Keeps what is accepted of a first proposal for all lanes, and lists those that still wait.
template <class T>
int accept_first(Gammas<T>& gammas, const Proposals<T>& made, int* lanes, int count) {
#pragma omp simd
  for (int i = 0; i < padded(count); ++i) {
    const bool take_a = made.margin_a[i] > T(0), take_b = made.margin_b[i] > T(0);
    gammas.log1p_a[i] = take_a ? made.log1p_a[i] : T(0);
    gammas.log1p_b[i] = take_b ? made.log1p_b[i] : T(0);
    gammas.open[i] = (take_a ? 0 : 1) | (take_b ? 0 : 2);
  }
  int waiting = 0;
  for (int i = 0; i < count; ++i) {
    lanes[waiting] = i;
    waiting += gammas.open[i] != 0;
  }
  return waiting;
}

// The same for the lanes that wait, which move to the front of `lanes`.
template <class T>
int accept(Gammas<T>& gammas, const Proposals<T>& made, int* lanes, int count) {
  int waiting = 0;
  for (int j = 0; j < count; ++j) {
    const int lane = lanes[j];
    int open = gammas.open[lane];
    if ((open & 1) && made.margin_a[j] > T(0)) gammas.log1p_a[lane] = made.log1p_a[j], open &= ~1;
    if ((open & 2) && made.margin_b[j] > T(0)) gammas.log1p_b[lane] = made.log1p_b[j], open &= ~2;
    gammas.open[lane] = open;
    lanes[waiting] = lane;
    waiting += open != 0;
  }
  return waiting;
}

template <class T>
void sample(Block& block, const Stream& stream) {
  Gammas<T> gammas;
  Proposals<T> made;
  RandomWords random;
  int lanes[kBlock];
  const int width = padded(block.count);
#pragma omp simd
  for (int i = 0; i < width; ++i) {
    const T a = static_cast<T>(block.kappa[i] * block.p[i]);
    const T b = static_cast<T>(block.kappa[i] * block.q[i]);
    const GammaShape<T> shape_a = gamma_shape(a), shape_b = gamma_shape(b);
    gammas.a[i] = a, gammas.b[i] = b;
    gammas.d_a[i] = shape_a.d, gammas.c_a[i] = shape_a.c;
    gammas.d_b[i] = shape_b.d, gammas.c_b[i] = shape_b.c;
    lanes[i] = i;
  }
  // A block starts at a multiple of its size: adding a lane never carries into the high half.
  const auto start = static_cast<std::uint64_t>(block.start);
  const Element first{static_cast<std::uint32_t>(start), static_cast<std::uint32_t>(start >> 32)};
  random.draw<T>(stream, first, lanes, block.count, 0);
  propose_lanes<true>(made, gammas, random, lanes, block.count);
  int waiting = accept_first(gammas, made, lanes, block.count);
  for (std::uint32_t attempt = 1; waiting > 0 && attempt < kMaxAttempts; ++attempt) {
    for (int j = waiting; j < padded(waiting); ++j) lanes[j] = 0;
    random.draw<T>(stream, first, lanes, waiting, attempt);
    propose_lanes<false>(made, gammas, random, lanes, waiting);
    waiting = accept(gammas, made, lanes, waiting);
  }
  T action[kBlock];
#pragma omp simd
  for (int i = 0; i < width; ++i) {
    action[i] = action_of(gammas.d_a[i], gammas.d_b[i], gammas.log1p_a[i], gammas.log1p_b[i]);
  }
  int boosted = 0;
  for (int i = 0; i < block.count; ++i) {
    lanes[boosted] = i;
    boosted += (gammas.a[i] < T(1)) | (gammas.b[i] < T(1));
  }
  for (int j = boosted; j < padded(boosted); ++j) lanes[j] = 0;
  random.draw<T>(stream, first, lanes, boosted, kBoostBlock);
  T boost[kBlock];
#pragma omp simd
  for (int j = 0; j < padded(boosted); ++j) {
    const int lane = lanes[j];
    boost[j] = boost_of<T>(random.at<T>(j).words, gammas.a[lane], gammas.b[lane]);
  }
  for (int j = 0; j < boosted; ++j) action[lanes[j]] += boost[j];
  for (int i = 0; i < width; ++i) block.action[i] = static_cast<double>(action[i]);
}

template <class T>
int set_action(Block& block, const BetaBuffers<T>& io, const Stream* stream) {
  if (stream != nullptr) {
    sample<T>(block, *stream);
    return kValid;
  }
  for (int i = 0; i < padded(block.count); ++i) {
    block.action[i] = static_cast<double>(static_cast<T>(block.logit[i]));
  }
  if (io.given_action == nullptr) return kValid;
  int nan_actions = 0;
  for (int i = 0; i < block.count; ++i) {
    const T x = io.given_action[block.start + i];
    block.action[i] = static_cast<double>(saturate<T>(static_cast<double>(x)));
    nan_actions |= x != x;
  }
  return nan_actions ? kBadAction : kValid;
}

// Densities of a whole block into `out`, row after row: alpha, log_prob, entropy, derivatives.
template <bool kExact, bool kKappaVaries, bool kSave>
void evaluate(const Block& block, const Whole& whole, double (*out)[kBlock]) {
  // Scalars, not the struct: a struct copied inside the loop keeps it from vectorising.
  const double delta = whole.delta, epsilon = whole.epsilon, tau = whole.tau;
  const double trigamma = whole.trigamma;
#pragma omp simd
  for (int i = 0; i < padded(block.count); ++i) {
    const double kappa = block.kappa[i], log_kappa = block.log_kappa[i];
    const Policy policy{block.logit[i], kappa,          log_kappa,     block.p[i],
                        block.q[i],     block.log_p[i], block.log_q[i]};
    Whole at_kappa{delta, epsilon, tau, trigamma};
    if constexpr (kKappaVaries) at_kappa = whole_remainders(kappa, log_kappa);
    const Step step = policy_step<kExact>(policy, at_kappa, block.action[i]);
    out[0][i] = step.alpha;
    out[1][i] = step.log_prob;
    out[2][i] = step.entropy;
    if constexpr (kSave) {
      out[3][i] = step.log_prob_by_logit;
      out[4][i] = step.entropy_by_logit;
    }
    if constexpr (kSave && kKappaVaries) {
      out[5][i] = step.log_prob_by_kappa;
      out[6][i] = step.entropy_by_kappa;
    }
  }
}

template <class T>
void store(const Block& block, const BetaBuffers<T>& io, const double (*out)[kBlock], int rows) {
  const auto put = [&block](T* to, const double* from) {
    for (int i = 0; i < block.count; ++i) to[block.start + i] = saturate<T>(from[i]);
  };
  put(io.alpha, out[0]);
  put(io.action, block.action);
  put(io.log_prob, out[1]);
  put(io.entropy, out[2]);
  for (int row = 0; row < rows; ++row) put(io.derivatives + row * io.n, out[3 + row]);
}

// NaN for the elements of a block that hold an invalid value.
template <class T>
void poison(const Block& block, const BetaBuffers<T>& io, int rows) {
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  for (std::int64_t i = block.start; i < block.start + block.count; ++i) {
    if (!io.bad_logit(i) && !io.bad_kappa(i) && !io.bad_action(i)) continue;
    for (T* out : {io.alpha, io.action, io.log_prob, io.entropy}) out[i] = nan;
    for (int row = 0; row < rows; ++row) io.derivatives[row * io.n + i] = nan;
  }
}

template <class T>
int run(const BetaBuffers<T>& io, const Stream* stream, bool check) {
  const bool varies = io.kappa != nullptr, save = io.derivatives != nullptr;
  constexpr bool exact = sizeof(T) == 8;
  const auto kernel = varies
                          ? (save ? evaluate<exact, true, true> : evaluate<exact, true, false>)
                          : (save ? evaluate<exact, false, true> : evaluate<exact, false, false>);
  const Whole whole = whole_remainders(io.kappa_value, log_(io.kappa_value));
  std::atomic<int> invalid{kValid};
  const auto blocks = [&](std::int64_t begin, std::int64_t end) {
    Block block;
    alignas(64) double out[7][kBlock];
    for (auto index = begin; index < end; ++index) {
      int found = load(block, io, index * kBlock);
      if (found == kValid || !check) found |= set_action(block, io, stream);
      if (found != kValid && check) {
        invalid.fetch_or(found);
        return;
      }
      kernel(block, whole, out);
      const int rows = save ? (varies ? 4 : 2) : 0;
      store(block, io, out, rows);
      if (found != kValid) poison(block, io, rows);
    }
  };
  parallel_items((io.n + kBlock - 1) / kBlock, blocks, kGrain / kBlock);
  return invalid.load();
}

template <class T>
BetaResult forward(const BetaCall& call, const std::int64_t* key, bool check) {
  const Stream stream = key ? stream_of(key[0], key[1]) : Stream{};
  const int invalid = run(call.buffers<T>(), key ? &stream : nullptr, check);
  TORCH_CHECK_VALUE(!(invalid & kBadLogit), "logits: NaN found");
  TORCH_CHECK_VALUE(!(invalid & kBadKappa), "concentration: expected positive finite values");
  TORCH_CHECK_VALUE(!(invalid & kBadAction), "action_logit: NaN found");
  return call.result();
}

template <class T>
void backward(const BetaBackwardCall& call) {
  const std::int64_t n = call.n();
  const auto log_prob = call.by_log_prob<T>(), entropy = call.by_entropy<T>();
  const T* derivatives = call.derivatives<T>();
  const auto chain = [&](const T* slopes, T* out) {
    const auto part = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        out[i] = fma_(slopes[i], log_prob.at(i), slopes[n + i] * entropy.at(i));
      }
    };
    parallel_items(n, part, 16 * kGrain);
  };
  chain(derivatives, call.grad_logits<T>());
  if (T* grad_kappa = call.grad_kappa<T>()) chain(derivatives + 2 * n, grad_kappa);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> beta_policy_backward_cpu(
    const at::Tensor& derivatives, const std::optional<at::Tensor>& grad_log_prob,
    const std::optional<at::Tensor>& grad_entropy) {
  const BetaBackwardCall call(derivatives, grad_log_prob, grad_entropy);
  if (derivatives.scalar_type() == at::kDouble) {
    backward<double>(call);
  } else {
    backward<float>(call);
  }
  return call.result();
}

BetaResult beta_policy_forward_cpu(const at::Tensor& logits,
                                   const std::optional<at::Tensor>& concentration,
                                   double concentration_value,
                                   const std::optional<at::Tensor>& action_logit,
                                   const std::optional<at::Tensor>& key, bool save, bool check) {
  const BetaCall call(logits, concentration, concentration_value, action_logit, save);
  const std::int64_t* words = key_of(key, action_logit);
  if (logits.scalar_type() == at::kDouble) return forward<double>(call, words, check);
  TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat, "logits: expected float32 or float64, got ",
                   logits.scalar_type());
  return forward<float>(call, words, check);
}

}  // namespace dvla_fast
