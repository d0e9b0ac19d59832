// The gate's decision on the CPU in one call: pooled state, network, Beta policy. See
// dvla_fast/ops/gate_policy.py for the meaning.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace dvla_fast {

// image_tokens (B,N,C), text_tokens (T,P,C), masks (B,N), (T,P) bool, true = a token.
// groups_per_decision: text groups that share a decision, 0: one decision an image; A decisions.
// state_images: images of a text group that make the state, the first ones; 0: all.
// hidden_weight (K,2C+1), hidden_bias (K), out_weight (1,K), out_bias (1), of the state's dtype;
// without them the state alone is made. concentration, action_logit (A), key: as in
// beta/beta_policy.h.
// Returns alpha, action_logit, log_prob, entropy (A), state (A,2C+1), and if `save` the network's
// hidden values (A,K) before the activation and the policy's derivatives (2,A); else empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
gate_policy_forward(const at::Tensor& image_tokens, const at::Tensor& text_tokens,
                    const std::optional<at::Tensor>& image_mask,
                    const std::optional<at::Tensor>& text_mask, int64_t groups_per_decision,
                    int64_t state_images, const std::optional<at::Tensor>& hidden_weight,
                    const std::optional<at::Tensor>& hidden_bias,
                    const std::optional<at::Tensor>& out_weight,
                    const std::optional<at::Tensor>& out_bias, double concentration,
                    const std::optional<at::Tensor>& action_logit,
                    const std::optional<at::Tensor>& key, bool save, bool check);

// Gradients from those of log_prob, entropy (A) and state (A,2C+1), nullopt: 0. Returns those of
// every unmasked token of an image (B,C) and of a text (T,C), and of the four weights (empty where
// there are none).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
gate_policy_backward(const std::optional<at::Tensor>& grad_log_prob,
                     const std::optional<at::Tensor>& grad_entropy,
                     const std::optional<at::Tensor>& grad_state, const at::Tensor& image_tokens,
                     const at::Tensor& text_tokens, const std::optional<at::Tensor>& image_mask,
                     const std::optional<at::Tensor>& text_mask, int64_t groups_per_decision,
                     int64_t state_images, const std::optional<at::Tensor>& hidden_weight,
                     const std::optional<at::Tensor>& out_weight, const at::Tensor& state,
                     const at::Tensor& hidden, const at::Tensor& derivatives);

}  // namespace dvla_fast
