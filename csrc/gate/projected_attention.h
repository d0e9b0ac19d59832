// Dual attention on the CPU straight from the image tokens: keys and values are projected for a
// few images at a time and never exist for all of them. See dvla_fast/ops/projected_attention.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace dvla_fast {

// dual_attention_forward with image keys and values = the halves of image_tokens kv_weight'.
//   image_tokens (B,N,C); kv_weight (2HD,C), all key heads first; the rest, and what is returned,
//   as in attention/dual_attention.h.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
projected_dual_attention_forward(const at::Tensor& query, const at::Tensor& image_tokens,
                                 const at::Tensor& kv_weight, const at::Tensor& text_key,
                                 const at::Tensor& text_value, const at::Tensor& alpha,
                                 const std::optional<at::Tensor>& image_mask,
                                 const std::optional<at::Tensor>& text_mask, double scale,
                                 bool save);

// Gradients of query, image_tokens, kv_weight, text_key, text_value and alpha, in this order.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
projected_dual_attention_backward(const at::Tensor& grad_out, const at::Tensor& query,
                                  const at::Tensor& image_tokens, const at::Tensor& kv_weight,
                                  const at::Tensor& text_key, const at::Tensor& text_value,
                                  const at::Tensor& alpha,
                                  const std::optional<at::Tensor>& image_mask,
                                  const std::optional<at::Tensor>& text_mask,
                                  const at::Tensor& image_out, const at::Tensor& text_out,
                                  const at::Tensor& image_lse, const at::Tensor& text_lse,
                                  double scale);

}  // namespace dvla_fast
