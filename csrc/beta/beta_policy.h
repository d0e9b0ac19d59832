// The op beta_policy_forward; its schema and meaning are in dvla_fast/ops/schemas.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>
#include <vector>

namespace dvla_fast {

using BetaResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

BetaResult beta_policy_forward_cpu(const at::Tensor& logits,
                                   const std::optional<at::Tensor>& concentration,
                                   double concentration_value,
                                   const std::optional<at::Tensor>& action_logit,
                                   const std::optional<at::Tensor>& key, bool save);

BetaResult beta_policy_forward_cuda(const at::Tensor& logits,
                                    const std::optional<at::Tensor>& concentration,
                                    double concentration_value,
                                    const std::optional<at::Tensor>& action_logit,
                                    const std::optional<at::Tensor>& key, bool save);

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
};

// The tensors of one call, alive for as long as its buffers are used.
class BetaCall {
 public:
  BetaCall(const at::Tensor& logits, const std::optional<at::Tensor>& concentration, double value,
           const std::optional<at::Tensor>& action_logit, bool save)
      : logits_(logits.contiguous()), value_(value), save_(save) {
    if (concentration) kappa_ = concentration->expand(logits.sizes()).contiguous();
    if (action_logit) given_ = action_logit->contiguous();
    for (at::Tensor* out : {&alpha_, &action_, &log_prob_, &entropy_}) {
      *out = at::empty(logits.sizes(), logits.options());
    }
    std::vector<std::int64_t> shape{0};
    if (save) {
      shape.assign(logits.sizes().begin(), logits.sizes().end());
      shape.insert(shape.begin(), concentration ? 4 : 2);
    }
    derivatives_ = at::empty(shape, logits.options());
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

// The key of a call that draws; nullptr for one that does not.
inline const std::int64_t* key_of(const std::optional<at::Tensor>& key,
                                  const std::optional<at::Tensor>& action_logit) {
  if (!key || action_logit) return nullptr;
  TORCH_CHECK(key->numel() == 2 && key->scalar_type() == at::kLong && key->is_contiguous(),
              "key: expected a contiguous int64 tensor of 2 elements");
  return key->const_data_ptr<std::int64_t>();
}

}  // namespace dvla_fast
