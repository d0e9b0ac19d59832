// The policy Beta(a, b) with a = kappa p, b = kappa q, p = sigmoid(x), q = 1 - p, in closed form.
//
// The action is carried as its logit l = log(alpha / (1 - alpha)). With d = l - x and the Stirling
// remainders delta(z) = lgamma(z) - (z - 1/2) log z + z - 1/2 log 2 pi,
//   log_prob = kappa [p d - log(1 + p (e^d - 1))] - log alpha - log(1 - alpha)
//              + 1/2 log(kappa p q / 2 pi) - [delta(a) + delta(b) - delta(kappa)]
// (the saddle-point form: no difference of large lgammas). With epsilon(z) = psi(z) - log z,
//   entropy  = 1/2 log(2 pi p q / kappa) + [delta(a) + delta(b) - delta(kappa)]
//              - (a - 1) epsilon(a) - (b - 1) epsilon(b) + (kappa - 2) epsilon(kappa),
// in which the leading logarithms have been cancelled on paper. Densities are computed in double
// for every dtype; sampling works in the dtype of the logits.
#pragma once

#include "beta/philox.h"

namespace dvla_fast {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

// What remains of lgamma, psi and psi' at z once their leading terms are taken away. Below 8 the
// argument is raised by 8 with the product P = z (z + 1) ... (z + 7); log P is left to the caller,
// who takes one logarithm of several products (P = 1 from 8 on).
struct Remainders {
  double delta_plus_log_p;  // delta(z) + log P, delta(z) = lgamma(z) - Stirling's formula
  double product;           // P
  double epsilon;           // psi(z) - log z
  double tau;               // (z - 1) psi'(z) - 1
  double trigamma;          // psi'(z)
};

// A product of factors u + constant, with its first and half its second derivative by u.
struct Product {
  double value, first, half_second;

  DVLA_HD void multiply(double factor) {
    half_second = fma_(half_second, factor, first);
    first = fma_(first, factor, value);
    value *= factor;
  }
};

// z > 0 with its logarithm: recurrence up to y >= 8, then asymptotic series in 1/y^2.
DVLA_HD Remainders remainders(double z, double log_z) {
  const bool small = z < 8.0;
  const double x = small ? z : 1.0;  // keeps the product finite where it is not used
  // The factors pair up: with u = x (x + 7), P = u (u + 6) (u + 10) (u + 12).
  const double u = x * (x + 7.0), slope = fma_(x, 2.0, 7.0);  // slope = du/dx
  Product of_u{u, 1.0, 0.0};
  of_u.multiply(u + 6.0);
  of_u.multiply(u + 10.0);
  of_u.multiply(u + 12.0);
  const double product = of_u.value;
  const double first = of_u.first * slope;                                       // P'
  const double half_second = fma_(of_u.half_second * slope, slope, of_u.first);  // P''/2
  const double y = small ? z + 8.0 : z;
  const double shared = 1.0 / (y * product);
  const double r = shared * product;  // 1/y
  const double per_product = shared * y;
  const double z2 = r * r;

  const double d = r * delta_series(z2);
  const double e = -fma_(epsilon_series(z2), z2, 0.5 * r);
  const double t = fma_(trigamma_series(z2), z2, 0.5 * r);  // y psi'(y) - 1
  const double tau_large = t - r - t * r;

  const double log_y = log_(y);
  const double harmonic = first * per_product;  // sum of 1/(x + i)
  const double squares = fma_(harmonic, harmonic, -2.0 * half_second * per_product);
  const double rise = (y - 0.5) * log_y - (x - 0.5) * log_z - 8.0;
  const double trigamma_y = fma_(r, t, r);
  const double trigamma = small ? trigamma_y + squares : trigamma_y;
  return {small ? d + rise : d, small ? product : 1.0, small ? e - harmonic + (log_y - log_z) : e,
          small ? fma_(z - 1.0, trigamma, -1.0) : tau_large, trigamma};
}

// The remainders at kappa, with the logarithm taken.
struct Whole {
  double delta, epsilon, tau, trigamma;
};

DVLA_HD Whole whole_remainders(double kappa, double log_kappa) {
  const Remainders r = remainders(kappa, log_kappa);
  return {r.delta_plus_log_p - log_(r.product), r.epsilon, r.tau, r.trigamma};
}

// Everything about the policy that does not depend on the action.
struct Policy {
  double logit, kappa, log_kappa;
  double p, q;  // mean and its complement
  double log_p, log_q;
};

// Logits beyond +-300 count as 300: p is then 1e-130, and 1/p^2 still a number.
DVLA_HD Policy make_policy(double raw_logit, double kappa, double log_kappa) {
  const double logit = min_(max_(raw_logit, -300.0), 300.0);
  const double e = exp_(-abs_(logit));
  const auto [soft, larger] = softplus_parts(e);
  const double smaller = e * larger;
  const bool up = logit >= 0.0;
  return {logit,
          kappa,
          log_kappa,
          up ? larger : smaller,
          up ? smaller : larger,
          min_(logit, 0.0) - soft,
          -max_(logit, 0.0) - soft};
}

// One policy step's results, and its derivatives by the logit and by kappa.
struct Step {
  double alpha, log_prob, entropy;
  double log_prob_by_logit, entropy_by_logit, log_prob_by_kappa, entropy_by_kappa;
};

// p d - log(1 + p (e^d - 1)), minus the relative entropy of p to alpha. The same holds with (p, d)
// and (q, -d): the smaller probability is taken, where both terms are small with their difference,
// unless its exponential comes near the largest number.
DVLA_HD double match_exact(const Policy& policy, double d) {
  const bool p_is_smaller = policy.p <= policy.q;
  const bool grows = (p_is_smaller ? d : -d) > 600.0;
  const bool by_p = p_is_smaller != grows;
  const double side = by_p ? policy.p : policy.q, other = by_p ? policy.q : policy.p;
  const double x = by_p ? d : -d;
  const ExpParts e = exp_parts(x);
  const double u = fma_(side, fma_(e.scale, e.less_one, e.scale), other);
  return side * x - log_of(u, side * fma_(e.scale, e.less_one, e.scale - 1.0));
}

// `whole` are the remainders at kappa. kExact: full double precision; without it two logarithms
// already at hand are subtracted instead, which costs digits that float32 does not hold.
// Derivatives that are not stored cost nothing: the compiler drops what is unused.
template <bool kExact>
DVLA_HD Step policy_step(const Policy& policy, const Whole& whole, double action) {
  const double p = policy.p, q = policy.q, kappa = policy.kappa;
  const double a = kappa * p, b = kappa * q;
  const Remainders ra = remainders(a, policy.log_kappa + policy.log_p);
  const Remainders rb = remainders(b, policy.log_kappa + policy.log_q);
  const double remainder =
      ra.delta_plus_log_p + rb.delta_plus_log_p - whole.delta - log_(ra.product * rb.product);

  const double d = action - policy.logit;
  const double magnitude = abs_(action), tail = exp_(-magnitude);
  const auto [soft, larger] = softplus_parts(tail);
  double match;
  if constexpr (kExact) {
    match = match_exact(policy, d);
  } else {
    match = p * (min_(action, 0.0) - soft - policy.log_p) -
            q * (max_(action, 0.0) + soft + policy.log_q);
  }
  const double minus_log_spread = magnitude + 2.0 * soft;  // -log alpha - log(1 - alpha)
  const double log_pq = policy.log_p + policy.log_q;

  Step step;
  step.alpha = action >= 0.0 ? larger : tail * larger;
  step.log_prob = kappa * match + minus_log_spread + 0.5 * (policy.log_kappa + log_pq) -
                  kHalfLog2Pi - remainder;
  step.entropy = 0.5 * (log_pq - policy.log_kappa) + kHalfLog2Pi + remainder -
                 (a - 1.0) * ra.epsilon - (b - 1.0) * rb.epsilon + (kappa - 2.0) * whole.epsilon;
  const double slope = kappa * p * q;  // da/dlogit
  step.log_prob_by_logit = slope * (d - (ra.epsilon - rb.epsilon));
  step.entropy_by_logit = slope * (rb.tau - ra.tau);
  step.log_prob_by_kappa = match - p * ra.epsilon - q * rb.epsilon + whole.epsilon;
  step.entropy_by_kappa = whole.tau - p * ra.tau - q * rb.tau - whole.trigamma;
  return step;
}

// ---- Sampling: a ratio of two Gammas, by Marsaglia and Tsang, "A simple method for generating
// gamma variables" (2000). G = d (1 + t)^3 with d = z - 1/3, t = x / sqrt(9 d), x normal, accepted
// when log u < 3 d lambda(t), lambda(t) = log(1 + t) - t + t^2/2 - t^3/3: their test with the
// cancellation between its terms done on paper.

template <class T>
struct GammaShape {
  T d, c;  // c = 1 / sqrt(9 d)
};

// Shape z, raised by one where z < 1 (then G(z) = G(z + 1) U^(1/z) puts it right).
template <class T>
DVLA_HD GammaShape<T> gamma_shape(T z) {
  const T d = (z < T(1) ? z + T(1) : z) - T(1.0 / 3);
  return {d, T(1) / std::sqrt(T(9) * d)};
}

// A proposal is refused with probability below 0.05. The bound only ends loops over NaN: shapes so
// large that the test overflows keep log(1 + t) = 0, which is right for them.
constexpr std::uint32_t kMaxAttempts = 64;

// A proposal for both Gammas of one element: accepted where the margin is positive.
template <class T>
struct Proposal {
  T log1p_a, log1p_b, margin_a, margin_b;
};

template <class T>
DVLA_HD T acceptance_margin(T t, T log1p_t, T d, T log_u) {
  // Below 0.3 by a series, above it as it stands.
  const T t2 = t * t;
  const T series = -t2 * t2 * acceptance_series<T>(t);
  const T direct = log1p_t - t + t2 * (T(0.5) - t * T(1.0 / 3));
  return T(3) * d * (abs_(t) < T(0.3) ? series : direct) - log_u;
}

// A number in (0, 1]; double precision takes 32 further random bits.
template <class T>
DVLA_HD T uniform_of(std::uint32_t word, std::uint32_t low) {
  if constexpr (sizeof(T) == 8) {
    return fma_(T(low) + T(0.5), T(0x1p-64), T(word) * T(0x1p-32));
  }
  return (T(word) + T(0.5)) * T(0x1p-32);
}

// Blocks of an element's stream: attempts count up from 0; these bits open further streams.
constexpr std::uint32_t kLowBits = 0x40000000u;
constexpr std::uint32_t kBoostBlock = 0x80000000u;

// The random words of one proposal, and further bits for double precision.
struct Draw {
  Words words, low;
};

template <class T>
DVLA_HD Draw draw_attempt(const Stream& stream, Element element, std::uint32_t attempt) {
  const Words words = stream.draw(element, attempt);
  return {words, sizeof(T) == 8 ? stream.draw(element, attempt | kLowBits) : Words{0, 0, 0, 0}};
}

template <class T>
DVLA_HD Proposal<T> propose(const Draw& draw, GammaShape<T> a, GammaShape<T> b) {
  const Words w = draw.words, low = draw.low;
  const T minus_log = max_(-log_(uniform_of<T>(w.w0, low.w0)), T(0));
  const T radius = std::sqrt(T(2) * minus_log);  // Box-Muller
  const CosSin<T> angle = uniform_angle<T>(w.w1);
  // A cube of a negative number is no Gamma: such proposals are refused below.
  const T lowest = T(-0.9999);
  const T ta = a.c * radius * angle.cos, tb = b.c * radius * angle.sin;
  const T ka = max_(ta, lowest), kb = max_(tb, lowest);
  Proposal<T> out;
  out.log1p_a = log1p_(ka);
  out.log1p_b = log1p_(kb);
  const T margin_a = acceptance_margin(ka, out.log1p_a, a.d, log_(uniform_of<T>(w.w2, low.w2)));
  const T margin_b = acceptance_margin(kb, out.log1p_b, b.d, log_(uniform_of<T>(w.w3, low.w3)));
  out.margin_a = ta > lowest ? margin_a : T(-1);
  out.margin_b = tb > lowest ? margin_b : T(-1);
  return out;
}

// log U^(1/z) for z < 1, else 0; bounded so that a difference of two never meets inf - inf.
template <class T>
DVLA_HD T log_boost(T z, std::uint32_t word, std::uint32_t low) {
  const T boost = log_(uniform_of<T>(word, low)) / max_(z, Format<T>::smallest);
  return z < T(1) ? max_(boost, -Format<T>::largest / T(4)) : T(0);
}

// The action's share of both boosts, from the words of the element's own block.
template <class T>
DVLA_HD T boost_of(const Words& w, T a, T b) {
  return log_boost(a, w.w0, w.w2) - log_boost(b, w.w1, w.w3);
}

// The action before boosts, log G(a) - log G(b), with the large logarithms taken as one.
template <class T>
DVLA_HD T action_of(T d_a, T d_b, T log1p_a, T log1p_b) {
  return log_(d_a / d_b) + T(3) * (log1p_a - log1p_b);
}

}  // namespace dvla_fast
