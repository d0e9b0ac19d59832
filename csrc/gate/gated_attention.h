// The gated layer around dual attention on the CPU, for a few images at a time: no keys, values or
// products of all images ever exist. See dvla_fast/ops/gated_attention.py for the meaning.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace dvla_fast {

// fused = dual attention with image keys and values = the halves of image_tokens kv_weight', times
// out_weight', 0 at masked text tokens; updated = image_tokens + mean of fused over text tokens.
//   image_tokens (B,N,C), which may be float32 where the rest is half; kv_weight (2HD,C), all key
//   heads first; out_weight (C,HD); text_mask also masks the query, so S = P; the rest as in
//   attention/dual_attention.h.
// Returns updated (B,N,C), fused (B,P,C), image_out, text_out, image_lse, text_lse, and
// what is kept besides: keys and values (B*N,2HD), or with absorbed weights (absorb.h) the weighted
// tokens (B*P,HC), whose image_lse has its rows in the order (token, head). The last five are empty
// unless `save`, and keys and values where they would be large.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
gated_attention_forward(const at::Tensor& query, const at::Tensor& image_tokens,
                        const at::Tensor& kv_weight, const at::Tensor& text_key,
                        const at::Tensor& text_value, const at::Tensor& alpha,
                        const at::Tensor& out_weight, const std::optional<at::Tensor>& image_mask,
                        const std::optional<at::Tensor>& text_mask, double scale, bool save);

// Gradients of query, image_tokens, kv_weight, text_key, text_value, alpha and out_weight, in this
// order, from those of updated and fused (nullopt: 0). That of image_tokens, which is a third of
// the work, is empty unless `tokens`: nothing asks for it where the layers below are frozen.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
gated_attention_backward(const std::optional<at::Tensor>& grad_updated,
                         const std::optional<at::Tensor>& grad_fused, const at::Tensor& query,
                         const at::Tensor& image_tokens, const at::Tensor& kv_weight,
                         const at::Tensor& text_key, const at::Tensor& text_value,
                         const at::Tensor& alpha, const at::Tensor& out_weight,
                         const std::optional<at::Tensor>& image_mask,
                         const std::optional<at::Tensor>& text_mask, const at::Tensor& image_out,
                         const at::Tensor& text_out, const at::Tensor& image_lse,
                         const at::Tensor& text_lse, const at::Tensor& kept, double scale,
                         bool tokens);

}  // namespace dvla_fast
