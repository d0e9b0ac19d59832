// One decision of the gate: its state (state.h), the network (network.h), and the Beta policy
// (beta/), without a tensor operation in between.
#include "policy/gate_policy.h"

#include <ATen/ops/zeros.h>

#include <algorithm>

#include "beta/beta_policy.h"
#include "policy/network.h"

namespace dvla_fast {

using policy::OptionalTensor;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
gate_policy_forward(const at::Tensor& image_tokens, const at::Tensor& text_tokens,
                    const OptionalTensor& image_mask, const OptionalTensor& text_mask,
                    int64_t groups_per_decision, int64_t state_images,
                    const OptionalTensor& hidden_weight, const OptionalTensor& hidden_bias,
                    const OptionalTensor& out_weight, const OptionalTensor& out_bias,
                    double concentration, const OptionalTensor& action_logit,
                    const OptionalTensor& key, bool save, bool check) {
  const policy::Shape z(image_tokens, text_tokens, groups_per_decision, state_images);
  const bool is_double = image_tokens.scalar_type() == at::kDouble;
  const auto options = image_tokens.options().dtype(is_double ? at::kDouble : at::kFloat);
  const auto none = [&] { return at::empty({0}, options); };
  const at::Tensor state = at::empty({z.A, z.features}, options);
  const at::Tensor logits = at::empty({z.A}, options);
  at::Tensor hidden = none();
  bool undefined = false;
  AT_DISPATCH_FLOATING_TYPES(state.scalar_type(), "gate_policy_forward", [&] {
    scalar_t* rows = state.mutable_data_ptr<scalar_t>();
    policy::make_state(z, image_tokens, text_tokens, image_mask, text_mask, rows);
    if (!hidden_weight) return;
    if (save) hidden = at::empty({z.A, hidden_weight->size(0)}, options);
    const at::Tensor bias = hidden_bias->contiguous();
    policy::Network<scalar_t>(z, *hidden_weight, *out_weight)
        .forward(rows, bias.const_data_ptr<scalar_t>(), *out_bias->const_data_ptr<scalar_t>(),
                 save ? hidden.mutable_data_ptr<scalar_t>() : nullptr,
                 logits.mutable_data_ptr<scalar_t>());
    const scalar_t* values = logits.const_data_ptr<scalar_t>();
    undefined = check && std::any_of(values, values + z.A, [](scalar_t x) { return x != x; });
  });
  if (!hidden_weight) return {none(), none(), none(), none(), state, none(), none()};
  TORCH_CHECK_VALUE(!undefined,
                    "logits: NaN found; the tokens or the policy's weights are not finite");
  const auto [alpha, action, log_prob, entropy, derivatives] =
      beta_policy_forward_cpu(logits, std::nullopt, concentration, action_logit, key, save, check);
  return {alpha, action, log_prob, entropy, state, hidden, derivatives};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
gate_policy_backward(const OptionalTensor& grad_log_prob, const OptionalTensor& grad_entropy,
                     const OptionalTensor& grad_state, const at::Tensor& image_tokens,
                     const at::Tensor& text_tokens, const OptionalTensor& image_mask,
                     const OptionalTensor& text_mask, int64_t groups_per_decision,
                     int64_t state_images, const OptionalTensor& hidden_weight,
                     const OptionalTensor& out_weight, const at::Tensor& state,
                     const at::Tensor& hidden, const at::Tensor& derivatives) {
  const policy::Shape z(image_tokens, text_tokens, groups_per_decision, state_images);
  const auto options = state.options();
  const at::Tensor images = at::empty({z.B, z.C}, options), texts = at::empty({z.T, z.C}, options);
  const at::Tensor rows = state.contiguous(), before = hidden.contiguous();
  const at::Tensor grad = at::empty({z.A, z.features}, options);
  grad_state ? grad.copy_(*grad_state) : grad.zero_();
  const int64_t units = hidden_weight ? hidden_weight->size(0) : 0;
  const auto made = [&](at::IntArrayRef sizes) {
    return hidden_weight ? at::zeros(sizes, options) : at::empty({0}, options);
  };
  const at::Tensor of_hidden = made({units, z.features}), of_hidden_bias = made({units}),
                   of_out = made({1, units}), of_out_bias = made({1});
  AT_DISPATCH_FLOATING_TYPES(state.scalar_type(), "gate_policy_backward", [&] {
    if (hidden_weight && (grad_log_prob || grad_entropy)) {
      const at::Tensor logits =
          std::get<0>(beta_policy_backward_cpu(derivatives, grad_log_prob, grad_entropy));
      policy::Network<scalar_t>(z, *hidden_weight, *out_weight)
          .backward(rows.const_data_ptr<scalar_t>(), before.const_data_ptr<scalar_t>(),
                    logits.const_data_ptr<scalar_t>(), of_hidden.mutable_data_ptr<scalar_t>(),
                    of_hidden_bias.mutable_data_ptr<scalar_t>(),
                    of_out.mutable_data_ptr<scalar_t>(), of_out_bias.mutable_data_ptr<scalar_t>(),
                    grad.mutable_data_ptr<scalar_t>());
    }
    policy::state_backward(z, image_tokens, text_tokens, image_mask, text_mask,
                           rows.const_data_ptr<scalar_t>(), grad.mutable_data_ptr<scalar_t>(),
                           images.mutable_data_ptr<scalar_t>(), texts.mutable_data_ptr<scalar_t>());
  });
  return {images, texts, of_hidden, of_hidden_bias, of_out, of_out_bias};
}

}  // namespace dvla_fast
