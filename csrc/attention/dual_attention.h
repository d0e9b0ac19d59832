// Dual attention on the CPU: cross-attention to an image and self-attention inside a text, sharing
// the query and mixed by a gate. See dvla_fast/ops/dual_attention.py for the meaning.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace dvla_fast {

// out = alpha softmax(q Ki' scale) Vi + (1 - alpha) softmax(q Kt' scale) Vt.
//   query (T,H,P,D); image_* (B,H,N,D); text_* (T,H,S,D), B a multiple of T; alpha (B,H) float32,
//   float64 with float64 inputs; masks (B,N), (T,S) bool, true = attend; any strides.
// Returns out, image_out (B,H,P,D), text_out (T,H,P,D), image_lse (B,H,P), text_lse (T,H,P); all
// but `out` are empty unless `save`, and the path outputs too where the backward can do without.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dual_attention_forward(
    const at::Tensor& query, const at::Tensor& image_key, const at::Tensor& image_value,
    const at::Tensor& text_key, const at::Tensor& text_value, const at::Tensor& alpha,
    const std::optional<at::Tensor>& image_mask, const std::optional<at::Tensor>& text_mask,
    double scale, bool save);

// The same, written into given tensors of unit column stride and otherwise any strides (the
// log-sum-exps contiguous); undefined ones are left out.
void dual_attention_forward_into(const at::Tensor& query, const at::Tensor& image_key,
                                 const at::Tensor& image_value, const at::Tensor& text_key,
                                 const at::Tensor& text_value, const at::Tensor& alpha,
                                 const std::optional<at::Tensor>& image_mask,
                                 const std::optional<at::Tensor>& text_mask, double scale,
                                 const at::Tensor& out, const at::Tensor& image_out,
                                 const at::Tensor& text_out, const at::Tensor& image_lse,
                                 const at::Tensor& text_lse);

// Gradients of query, image_key, image_value, text_key, text_value and alpha, in this order, from
// the results that the forward saved.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
dual_attention_backward(const at::Tensor& grad_out, const at::Tensor& query,
                        const at::Tensor& image_key, const at::Tensor& image_value,
                        const at::Tensor& text_key, const at::Tensor& text_value,
                        const at::Tensor& alpha, const std::optional<at::Tensor>& image_mask,
                        const std::optional<at::Tensor>& text_mask, const at::Tensor& image_out,
                        const at::Tensor& text_out, const at::Tensor& image_lse,
                        const at::Tensor& text_lse, double scale);

// The same, written into given tensors of unit column stride and otherwise any strides (grad_alpha
// contiguous). Where grad_image_key and grad_image_value are one tensor, it gets their sum; without
// text tokens, what the forward saved of the text is not read.
void dual_attention_backward_into(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& image_key,
    const at::Tensor& image_value, const at::Tensor& text_key, const at::Tensor& text_value,
    const at::Tensor& alpha, const std::optional<at::Tensor>& image_mask,
    const std::optional<at::Tensor>& text_mask, const at::Tensor& image_out,
    const at::Tensor& text_out, const at::Tensor& image_lse, const at::Tensor& text_lse,
    double scale, const at::Tensor& grad_query, const at::Tensor& grad_image_key,
    const at::Tensor& grad_image_value, const at::Tensor& grad_text_key,
    const at::Tensor& grad_text_value, const at::Tensor& grad_alpha);

}  // namespace dvla_fast
