// The op beta_policy_forward; its schema and meaning are in dvla_fast/ops/schemas.py.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>
#include <vector>

#include "beta/elementary.h"

namespace dvla_fast {

using BetaResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

BetaResult beta_policy_forward_cpu(const at::Tensor& logits,
                                   const std::optional<at::Tensor>& concentration,
                                   double concentration_value,
                                   const std::optional<at::Tensor>& action_logit,
                                   const std::optional<at::Tensor>& key, bool save, bool check);

BetaResult beta_policy_forward_cuda(const at::Tensor& logits,
                                    const std::optional<at::Tensor>& concentration,
                                    double concentration_value,
                                    const std::optional<at::Tensor>& action_logit,
                                    const std::optional<at::Tensor>& key, bool save, bool check);

std::tuple<at::Tensor, at::Tensor> beta_policy_backward_cpu(
    const at::Tensor& derivatives, const std::optional<at::Tensor>& grad_log_prob,
    const std::optional<at::Tensor>& grad_entropy);

std::tuple<at::Tensor, at::Tensor> beta_policy_backward_cuda(
    const at::Tensor& derivatives, const std::optional<at::Tensor>& grad_log_prob,
    const std::optional<at::Tensor>& grad_entropy);

// What both implementations read and write: contiguous buffers of n elements. A null `kappa` means
// the number beside it, a null `given_action` the mean or a draw, a null `derivatives` none.
template <class T>
struct BetaBuffers {
  const T* logits;
  const T* kappa;
  double kappa_value;
  const T* given_action;
  T* alpha;
  T* action;
  T* log_prob;
  T* entropy;
  T* derivatives;
  std::int64_t n;

  DVLA_HD bool bad_logit(std::int64_t i) const { return logits[i] != logits[i]; }
  DVLA_HD bool bad_kappa(std::int64_t i) const {
    return kappa && !(kappa[i] > T(0) && kappa[i] <= Format<T>::largest);
  }
  DVLA_HD bool bad_action(std::int64_t i) const {
    return given_action && given_action[i] != given_action[i];
  }
};

// An empty tensor beside another. Past the dispatcher on a CPU, where that is a good part of the
// time for a few states.
inline at::Tensor made(at::IntArrayRef sizes, const at::Tensor& beside) {
  if (beside.is_cpu()) return at::detail::empty_cpu(sizes, beside.scalar_type());
  return at::empty(sizes, beside.options());
}

// The tensors of one call, alive for as long as its buffers are used.
class BetaCall {
 public:
  BetaCall(const at::Tensor& logits, const std::optional<at::Tensor>& concentration, double value,
           const std::optional<at::Tensor>& action_logit, bool save)
      : logits_(logits.contiguous()), value_(value), save_(save) {
    if (concentration) kappa_ = concentration->expand(logits.sizes()).contiguous();
    if (action_logit) given_ = action_logit->contiguous();
    for (at::Tensor* out : {&alpha_, &action_, &log_prob_, &entropy_}) {
      *out = made(logits.sizes(), logits_);
    }
    std::vector<std::int64_t> shape{0};
    if (save) {
      shape.assign(logits.sizes().begin(), logits.sizes().end());
      shape.insert(shape.begin(), concentration ? 4 : 2);
    }
    derivatives_ = made(shape, logits_);
  }

  template <class T>
  BetaBuffers<T> buffers() const {
    return {logits_.const_data_ptr<T>(),
            kappa_.defined() ? kappa_.const_data_ptr<T>() : nullptr,
            kappa_.defined() ? 1.0 : value_,
            given_.defined() ? given_.const_data_ptr<T>() : nullptr,
            alpha_.mutable_data_ptr<T>(),
            action_.mutable_data_ptr<T>(),
            log_prob_.mutable_data_ptr<T>(),
            entropy_.mutable_data_ptr<T>(),
            save_ ? derivatives_.mutable_data_ptr<T>() : nullptr,
            logits_.numel()};
  }

  BetaResult result() const { return {alpha_, action_, log_prob_, entropy_, derivatives_}; }

 private:
  at::Tensor logits_, kappa_, given_, alpha_, action_, log_prob_, entropy_, derivatives_;
  double value_;
  bool save_;
};

// A gradient that came in: absent (null), the same everywhere (step 0) or an element each (step 1).
template <class T>
struct Incoming {
  const T* data;
  std::int64_t step;

  DVLA_HD T at(std::int64_t i) const { return data ? data[i * step] : T(0); }
};

// The tensors of one backward call: out = derivatives[row] * by_log_prob + derivatives[row + 1] *
// by_entropy, for the logits (row 0) and, where there are four rows, for the concentration (row 2).
class BetaBackwardCall {
 public:
  BetaBackwardCall(const at::Tensor& derivatives, const std::optional<at::Tensor>& grad_log_prob,
                   const std::optional<at::Tensor>& grad_entropy)
      : derivatives_(derivatives.contiguous()) {
    const auto shape = derivatives_.sizes().slice(1);
    grad_logits_ = made(shape, derivatives_);
    const bool kappa = derivatives_.size(0) == 4;
    grad_kappa_ = made(kappa ? shape : at::IntArrayRef{0}, derivatives_);
    if (grad_log_prob) log_prob_ = dense(*grad_log_prob);
    if (grad_entropy) entropy_ = dense(*grad_entropy);
  }

  template <class T>
  Incoming<T> by_log_prob() const {
    return incoming<T>(log_prob_);
  }
  template <class T>
  Incoming<T> by_entropy() const {
    return incoming<T>(entropy_);
  }
  template <class T>
  const T* derivatives() const {
    return derivatives_.const_data_ptr<T>();
  }
  template <class T>
  T* grad_logits() const {
    return grad_logits_.mutable_data_ptr<T>();
  }
  template <class T>
  T* grad_kappa() const {
    return derivatives_.size(0) == 4 ? grad_kappa_.mutable_data_ptr<T>() : nullptr;
  }
  std::int64_t n() const { return grad_logits_.numel(); }
  std::tuple<at::Tensor, at::Tensor> result() const { return {grad_logits_, grad_kappa_}; }

 private:
  // The gradient of a sum arrives as one number expanded: it is read as such.
  static bool constant(const at::Tensor& grad) {
    for (const auto stride : grad.strides()) {
      if (stride != 0) return false;
    }
    return true;
  }
  static at::Tensor dense(const at::Tensor& grad) {
    return constant(grad) ? grad : grad.contiguous();
  }
  template <class T>
  static Incoming<T> incoming(const at::Tensor& grad) {
    if (!grad.defined()) return {nullptr, 0};
    return {grad.const_data_ptr<T>(), constant(grad) ? 0 : 1};
  }

  at::Tensor derivatives_, grad_logits_, grad_kappa_, log_prob_, entropy_;
};

// The key of a call that draws; nullptr for one that does not.
inline const std::int64_t* key_of(const std::optional<at::Tensor>& key,
                                  const std::optional<at::Tensor>& action_logit) {
  if (!key || action_logit) return nullptr;
  TORCH_CHECK(key->numel() == 2 && key->scalar_type() == at::kLong && key->is_contiguous(),
              "key: expected a contiguous int64 tensor of 2 elements");
  return key->const_data_ptr<std::int64_t>();
}

}  // namespace dvla_fast
