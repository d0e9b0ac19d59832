// The policy on CUDA: one thread an element, one launch. The same mathematics and the same random
// stream as on the CPU (beta_math.h, philox.h). Nothing synchronises: an invalid value stops the
// kernel where it is asked to check, else its results are NaN.
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/macros/Macros.h>
#include <torch/library.h>

#include "beta/beta_math.h"
#include "beta/beta_policy.h"

namespace dvla_fast {
namespace {

constexpr int kThreads = 128;

template <class T>
__device__ T draw(const Stream& stream, std::int64_t index, T a, T b) {
  const Element element{static_cast<std::uint32_t>(index),
                        static_cast<std::uint32_t>(static_cast<std::uint64_t>(index) >> 32)};
  const GammaShape<T> shape_a = gamma_shape(a), shape_b = gamma_shape(b);
  T log1p_a = T(0), log1p_b = T(0);
  bool open_a = true, open_b = true;
  for (std::uint32_t attempt = 0; (open_a || open_b) && attempt < kMaxAttempts; ++attempt) {
    const Proposal<T> made =
        propose<T>(draw_attempt<T>(stream, element, attempt), shape_a, shape_b);
    if (open_a && made.margin_a > T(0)) log1p_a = made.log1p_a, open_a = false;
    if (open_b && made.margin_b > T(0)) log1p_b = made.log1p_b, open_b = false;
  }
  T action = action_of(shape_a.d, shape_b.d, log1p_a, log1p_b);
  if (a < T(1) || b < T(1)) {
    action += boost_of<T>(stream.draw(element, kBoostBlock), a, b);
  }
  return action;
}

template <class T>
__device__ T saturate(double x) {
  constexpr double limit = Format<T>::largest;
  return x != x ? static_cast<T>(x) : static_cast<T>(min_(max_(x, -limit), limit));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    beta_policy_kernel(BetaBuffers<T> io, const std::int64_t* key, bool check) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= io.n) return;
  const double logit = static_cast<double>(io.logits[i]);
  const double kappa = io.kappa ? static_cast<double>(io.kappa[i]) : io.kappa_value;
  const bool bad_logit = io.bad_logit(i), bad_kappa = io.bad_kappa(i),
             bad_action = io.bad_action(i);
  if (check) {
    CUDA_KERNEL_ASSERT(!bad_logit && "dvla_fast: logits: NaN found");
    CUDA_KERNEL_ASSERT(!bad_kappa && "dvla_fast: concentration: expected positive finite values");
    CUDA_KERNEL_ASSERT(!bad_action && "dvla_fast: action_logit: NaN found");
  }
  const bool valid = !bad_logit && !bad_kappa && !bad_action;
  const double log_kappa = log_(kappa);
  const Policy policy = make_policy(logit, kappa, log_kappa);
  const Whole whole = whole_remainders(kappa, log_kappa);
  T action = static_cast<T>(policy.logit);
  if (io.given_action) {
    action = saturate<T>(static_cast<double>(io.given_action[i]));
  } else if (key) {
    action = draw<T>(stream_of(key[0], key[1]), i, static_cast<T>(policy.kappa * policy.p),
                     static_cast<T>(policy.kappa * policy.q));
  }
  if (!valid) action = static_cast<T>(NAN);
  const Step step = policy_step<sizeof(T) == 8>(policy, whole, static_cast<double>(action));
  const double poison = valid ? 0.0 : static_cast<double>(NAN);
  io.alpha[i] = static_cast<T>(step.alpha + poison);
  io.action[i] = action;
  io.log_prob[i] = saturate<T>(step.log_prob + poison);
  io.entropy[i] = saturate<T>(step.entropy + poison);
  if (!io.derivatives) return;
  io.derivatives[i] = saturate<T>(step.log_prob_by_logit + poison);
  io.derivatives[io.n + i] = saturate<T>(step.entropy_by_logit + poison);
  if (!io.kappa) return;
  io.derivatives[2 * io.n + i] = saturate<T>(step.log_prob_by_kappa + poison);
  io.derivatives[3 * io.n + i] = saturate<T>(step.entropy_by_kappa + poison);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    beta_backward_kernel(const T* derivatives, Incoming<T> log_prob, Incoming<T> entropy,
                         T* grad_logits, T* grad_kappa, std::int64_t n) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const T by_log_prob = log_prob.at(i), by_entropy = entropy.at(i);
  grad_logits[i] = fma_(derivatives[i], by_log_prob, derivatives[n + i] * by_entropy);
  if (!grad_kappa) return;
  grad_kappa[i] = fma_(derivatives[2 * n + i], by_log_prob, derivatives[3 * n + i] * by_entropy);
}

template <class T>
void backward(const BetaBackwardCall& call) {
  if (call.n() == 0) return;
  const auto blocks = static_cast<unsigned>((call.n() + kThreads - 1) / kThreads);
  beta_backward_kernel<T><<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      call.derivatives<T>(), call.by_log_prob<T>(), call.by_entropy<T>(), call.grad_logits<T>(),
      call.grad_kappa<T>(), call.n());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
BetaResult forward(const BetaCall& call, const std::int64_t* key, bool check) {
  const auto io = call.buffers<T>();
  if (io.n > 0) {
    const auto blocks = static_cast<unsigned>((io.n + kThreads - 1) / kThreads);
    beta_policy_kernel<T>
        <<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(io, key, check);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return call.result();
}

}  // namespace

BetaResult beta_policy_forward_cuda(const at::Tensor& logits,
                                    const std::optional<at::Tensor>& concentration,
                                    double concentration_value,
                                    const std::optional<at::Tensor>& action_logit,
                                    const std::optional<at::Tensor>& key, bool save, bool check) {
  const c10::DeviceGuard guard(logits.device());
  const BetaCall call(logits, concentration, concentration_value, action_logit, save);
  const std::int64_t* words = key_of(key, action_logit);
  if (logits.scalar_type() == at::kDouble) return forward<double>(call, words, check);
  TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat, "logits: expected float32 or float64, got ",
                   logits.scalar_type());
  return forward<float>(call, words, check);
}

std::tuple<at::Tensor, at::Tensor> beta_policy_backward_cuda(
    const at::Tensor& derivatives, const std::optional<at::Tensor>& grad_log_prob,
    const std::optional<at::Tensor>& grad_entropy) {
  const c10::DeviceGuard guard(derivatives.device());
  const BetaBackwardCall call(derivatives, grad_log_prob, grad_entropy);
  if (derivatives.scalar_type() == at::kDouble) {
    backward<double>(call);
  } else {
    backward<float>(call);
  }
  return call.result();
}

}  // namespace dvla_fast

TORCH_LIBRARY_IMPL(dvla_fast, CUDA, m) {
  m.impl("beta_policy_forward", &dvla_fast::beta_policy_forward_cuda);
  m.impl("beta_policy_backward", &dvla_fast::beta_policy_backward_cuda);
}
