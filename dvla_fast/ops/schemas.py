"""Every op schema of the library, in one place.

The schemas are defined here rather than in C++ so that they exist without a compiler too: then
Triton still serves GPUs through the same ops. The extension and the kernels only implement them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("dvla_fast", "DEF")


def implement_by_triton(op: str, kernel: Callable[..., Any], compiled: bool) -> None:
    """Puts ``kernel`` behind the second name of ``op``, and the first unless that is compiled."""
    for name in (f"{op}_triton",) if compiled else (op, f"{op}_triton"):
        torch.library.impl(f"dvla_fast::{name}", "CUDA", kernel, lib=LIBRARY)


def _define_both(schema: str) -> None:
    """An op, and under a second name its Triton kernels launched from Python.

    On a GPU the first name is compiled code where there is some: the CUDA kernels of the policy,
    and what repeats launches of Triton kernels (csrc/calls/replay.h).
    """
    for name in ("", "_triton"):
        LIBRARY.define(schema.replace("(", f"{name}(", 1))


_define_both(
    # query (T,H,P,D); image_* (B,H,N,D); text_* (T,H,S,D); alpha (B,H) float32, or float64 with
    # float64 inputs. out, image_out (B,H,P,D); text_out (T,H,P,D); image_lse (B,H,P),
    # text_lse (T,H,P): log-sum-exp of the scaled scores, -inf for a row with no key.
    # save=False: all but `out` are empty; else image_out and text_out may be, where the backward of
    # that device does without.
    "dual_attention_forward(Tensor query, Tensor image_key, Tensor image_value, Tensor text_key,"
    " Tensor text_value, Tensor alpha, Tensor? image_mask, Tensor? text_mask, float scale,"
    " bool save) -> (Tensor out, Tensor image_out, Tensor text_out, Tensor image_lse,"
    " Tensor text_lse)"
)
_define_both(
    "dual_attention_backward(Tensor grad_out, Tensor query, Tensor image_key, Tensor image_value,"
    " Tensor text_key, Tensor text_value, Tensor alpha, Tensor? image_mask, Tensor? text_mask,"
    " Tensor image_out, Tensor text_out, Tensor image_lse, Tensor text_lse, float scale)"
    " -> (Tensor grad_query, Tensor grad_image_key, Tensor grad_image_value,"
    " Tensor grad_text_key, Tensor grad_text_value, Tensor grad_alpha)"
)
LIBRARY.define(
    # The gated layer around dual attention. As dual_attention_forward with S = P, image keys and
    # values = the halves of image_tokens (B,N,C) kv_weight' (2HD,C), and out_weight (C,HD) behind.
    # image_tokens may be float32 where the rest is half. updated (B,N,C), fused (B,P,C).
    # kept: keys and values (B*N,2HD), empty where they are large and are better projected again;
    # with absorbed weights (csrc/gate/absorb.h) the weighted tokens (B*P,HC).
    "gated_attention_forward(Tensor query, Tensor image_tokens, Tensor kv_weight, Tensor text_key,"
    " Tensor text_value, Tensor alpha, Tensor out_weight, Tensor? image_mask, Tensor? text_mask,"
    " float scale, bool save) -> (Tensor updated, Tensor fused, Tensor image_out, Tensor text_out,"
    " Tensor image_lse, Tensor text_lse, Tensor kept)"
)
LIBRARY.define(
    # tokens: whether grad_image_tokens is wanted; (0,) if not.
    "gated_attention_backward(Tensor? grad_updated, Tensor? grad_fused, Tensor query,"
    " Tensor image_tokens, Tensor kv_weight, Tensor text_key, Tensor text_value, Tensor alpha,"
    " Tensor out_weight, Tensor? image_mask, Tensor? text_mask, Tensor image_out, Tensor text_out,"
    " Tensor image_lse, Tensor text_lse, Tensor kept, float scale, bool tokens=True)"
    " -> (Tensor grad_query, Tensor grad_image_tokens, Tensor grad_kv_weight, Tensor grad_text_key,"
    " Tensor grad_text_value, Tensor grad_alpha, Tensor grad_out_weight)"
)
_define_both(
    # The concentration is a tensor that broadcasts to logits, or (None) the number beside it.
    # Action: `action_logit` evaluates it, else `key` (2,) int64 samples, else the mean.
    # derivatives: (0,) unless asked for, else stacked d(log_prob), d(entropy) by the logit,
    # then, with a concentration tensor, d(log_prob), d(entropy) by the concentration.
    # check: an invalid value raises, on a GPU by an assertion in the kernel; else it gives NaN.
    "beta_policy_forward(Tensor logits, Tensor? concentration,"
    " float concentration_value, Tensor? action_logit, Tensor? key, bool save,"
    " bool check=False)"
    " -> (Tensor alpha, Tensor action_logit, Tensor log_prob, Tensor entropy,"
    " Tensor derivatives)"
)
_define_both(
    # Scales the saved derivatives by the gradients that came in (None: not used). The second
    # result is empty unless the derivatives hold those by the concentration.
    "beta_policy_backward(Tensor derivatives, Tensor? grad_log_prob,"
    " Tensor? grad_entropy) -> (Tensor grad_logits, Tensor grad_concentration)"
)
_define_both(
    # A gate's decision from image_tokens (B,N,C), text_tokens (T,P,C) and masks (B,N), (T,P):
    # state, network, policy. groups_per_decision: text groups that share a decision, 0: one an
    # image; A decisions. state_images: images of a group that make the state, 0: all. Without
    # weights, of the state's dtype, the state alone. The rest as in beta_policy_forward.
    # state (A,2C+1); hidden (A,K), before the activation, and derivatives (2,A), unless asked for
    # empty.
    "gate_policy_forward(Tensor image_tokens, Tensor text_tokens, Tensor? image_mask,"
    " Tensor? text_mask, int groups_per_decision, int state_images, Tensor? hidden_weight,"
    " Tensor? hidden_bias, Tensor? out_weight, Tensor? out_bias, float concentration,"
    " Tensor? action_logit, Tensor? key, bool save, bool check=False) -> (Tensor alpha,"
    " Tensor action_logit, Tensor log_prob, Tensor entropy, Tensor state, Tensor hidden,"
    " Tensor derivatives)"
)
_define_both(
    # grad_image (B,C) and grad_text (T,C): the gradient of each token that counts.
    "gate_policy_backward(Tensor? grad_log_prob, Tensor? grad_entropy, Tensor? grad_state,"
    " Tensor image_tokens, Tensor text_tokens, Tensor? image_mask, Tensor? text_mask,"
    " int groups_per_decision, int state_images, Tensor? hidden_weight, Tensor? out_weight,"
    " Tensor state, Tensor hidden, Tensor derivatives) -> (Tensor grad_image, Tensor grad_text,"
    " Tensor grad_hidden_weight, Tensor grad_hidden_bias, Tensor grad_out_weight,"
    " Tensor grad_out_bias)"
)
