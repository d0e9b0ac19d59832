// Direct calls of ops from Python. The usual way to an op checks its arguments in Python and parses
// them by its schema, which takes longer than a small op itself.
//
// Each function takes the arguments of its namesake in dvla_fast/ops as they are, and returns what
// that returns; or None, having done nothing, unless they are plain tensors that fit together and
// no mode, trace or transform would see the call. Then Python goes on, and names what is wrong if
// anything is. cuda: whether there are kernels for CUDA tensors.
// check: whether values are checked; by default on CPUs.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>

namespace dvla_fast::direct {

pybind11::object beta_policy(pybind11::handle logits, pybind11::handle concentration,
                             pybind11::handle generator, std::optional<bool> check, bool cuda);

pybind11::object dual_attention(pybind11::handle query, pybind11::handle image_key,
                                pybind11::handle image_value, pybind11::handle text_key,
                                pybind11::handle text_value, pybind11::handle alpha,
                                pybind11::handle image_mask, pybind11::handle text_mask,
                                pybind11::handle scale, bool cuda);

// Casts as autocast asks. composed: as products around dual attention, as always on CUDA.
pybind11::object gated_attention(pybind11::handle query, pybind11::handle image_tokens,
                                 pybind11::handle kv_weight, pybind11::handle text_key,
                                 pybind11::handle text_value, pybind11::handle alpha,
                                 pybind11::handle out_weight, pybind11::handle image_mask,
                                 pybind11::handle text_mask, pybind11::handle scale, bool cuda,
                                 bool composed);

// draw: whether the action is drawn, else it is the policy's mean.
pybind11::object gate_policy(pybind11::handle image_tokens, pybind11::handle text_tokens,
                             pybind11::handle hidden_weight, pybind11::handle hidden_bias,
                             pybind11::handle out_weight, pybind11::handle out_bias,
                             pybind11::handle concentration, pybind11::handle groups_per_decision,
                             pybind11::handle state_images, pybind11::handle image_mask,
                             pybind11::handle text_mask, bool draw, pybind11::handle generator,
                             std::optional<bool> check, bool cuda);

}  // namespace dvla_fast::direct
