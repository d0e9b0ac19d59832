"""Dual attention straight from the image tokens, whose keys and values it projects on the way.

    Kᵢ, Vᵢ = halves of Z Wᵀ;  out = dual attention of (Q, Kᵢ, Vᵢ, Kₜ, Vₜ, α)

On the CPU the images are taken a few at a time, so that keys and values stay in the cache and never
exist for all images; nothing of their size is kept for the backward pass either, which projects
them again. Elsewhere it is a matrix product and :func:`dvla_fast.functional.dual_attention`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dvla_fast import _extension, backends, reference
from dvla_fast.ops import schemas
from dvla_fast.ops.dual_attention import (
    check_devices,
    check_groups,
    check_tensor,
    check_text_and_gate,
    dual_attention,
    expand_alpha,
    expect_shape,
    forward_fake,
)


def projected_dual_attention(
    query: Tensor,
    image_tokens: Tensor,
    kv_weight: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    alpha: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`dual_attention` of image keys and values ``image_tokens @ kv_weight.T``.

    B images of N tokens of width C; the other letters as in :func:`dual_attention`. Like a linear
    layer, it computes in the autocast dtype where autocast is on.

    Args:
        query: (T, H, P, D), float32, float16, bfloat16 or (reference and C++) float64.
        image_tokens: (B, N, C), dtype of ``query``; so are the next three.
        kv_weight: (2·H·D, C): the rows of the keys, head after head, then those of the values.
        text_key: (T, H, S, D).
        text_value: (T, H, S, D).
        alpha: gate in [0, 1], a floating tensor of shape (), (B,) or (B, H).
        image_mask: (B, N) bool, True = attend. A path with no key left contributes exactly 0.
        text_mask: (T, S) bool, likewise.
        scale: factor of the scores; default D^-1/2.
        backend: ``"cpp"``, ``"triton"`` (a product, then the Triton attention) or ``"reference"``;
            default the best for the inputs.

    Returns:
        (B, H, P, D), stored so that ``out.transpose(1, 2).flatten(2)`` costs no copy. First-order
        gradients flow to the five tensors, and to ``alpha`` when it requires grad.

    Raises:
        TypeError: a dtype is not supported or differs from the query's; a mask is not bool.
        ValueError: shapes or devices do not fit together.
        BackendError: the backend asked for cannot run with these inputs.
    """
    tensors = (query, image_tokens, kv_weight, text_key, text_value)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        tensors = tuple(x if x.dtype == torch.float64 else x.to(narrow) for x in tensors)
    _check(*tensors, alpha, image_mask, text_mask)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    gate = expand_alpha(alpha, image_tokens.shape[0], query.shape[1], tensors[0].dtype)
    chosen = backends.choose("projected_dual_attention", _candidates(tensors[0]), backend)
    if chosen == "triton":
        return _composed(*tensors, gate, image_mask, text_mask, scale)
    if chosen == "reference":
        return reference.projected_dual_attention(*tensors, gate, image_mask, text_mask, scale)
    if _extension.needs_python_autograd():
        out: Tensor = _ProjectedDualAttention.apply(*tensors, gate, image_mask, text_mask, scale)[0]
        return out
    forward = torch.ops.dvla_fast.projected_dual_attention_forward.default
    return forward(*tensors, gate, image_mask, text_mask, scale, False)[0]


def _candidates(query: Tensor) -> tuple[tuple[str, str | None], ...]:
    """The implementations for these inputs, best first, each with why it cannot run."""
    on_cpu = query.device.type == "cpu"
    cpp = "the inputs are not on the CPU" if not on_cpu else _extension.problem
    triton = _extension.triton_problem(query.device, query.dtype, query.shape[-1])
    return (("triton", triton), ("cpp", cpp), ("reference", None))


def _composed(
    query: Tensor,
    image_tokens: Tensor,
    kv_weight: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    gate: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """A product of the tokens and the attention of the device."""
    heads = query.shape[1]
    projected = F.linear(image_tokens, kv_weight).unflatten(-1, (2, heads, -1))  # [B, N, 2, H, D]
    image_key, image_value = (part.transpose(1, 2) for part in projected.unbind(2))
    return dual_attention(
        query, image_key, image_value, text_key, text_value, gate,
        image_mask=image_mask, text_mask=text_mask, scale=scale,
    )  # fmt: skip


class _ProjectedDualAttention(torch.autograd.Function):
    """Forward and backward ops joined; the four saved results are outputs, as torch.func needs."""

    @staticmethod
    def forward(
        query: Tensor,
        image_tokens: Tensor,
        kv_weight: Tensor,
        text_key: Tensor,
        text_value: Tensor,
        alpha: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, ...]:
        return torch.ops.dvla_fast.projected_dual_attention_forward.default(
            query, image_tokens, kv_weight, text_key, text_value, alpha,
            image_mask, text_mask, scale, True,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, *_unused):  # type: ignore[no-untyped-def]
        grads = torch.ops.dvla_fast.projected_dual_attention_backward.default(
            grad_out, *ctx.saved_tensors, ctx.scale
        )
        return *grads, None, None, None


torch.library.register_fake(
    "dvla_fast::projected_dual_attention_forward", forward_fake, lib=schemas.LIBRARY
)


@torch.library.register_fake("dvla_fast::projected_dual_attention_backward", lib=schemas.LIBRARY)
def _backward_fake(  # type: ignore[no-untyped-def]
    grad_out, query, image_tokens, kv_weight, text_key, text_value, alpha, image_mask, text_mask,
    image_out, text_out, image_lse, text_lse, scale,
):  # fmt: skip
    def stored_by_token(x: Tensor) -> Tensor:
        """A gradient is stored (T, L, H, D), as projections want it."""
        outer, heads, rows, width = x.shape
        return x.new_empty(outer, rows, heads, width).transpose(1, 2)

    return (
        stored_by_token(query),
        image_tokens.new_empty(image_tokens.shape),
        kv_weight.new_empty(kv_weight.shape),
        stored_by_token(text_key),
        stored_by_token(text_value),
        alpha.new_empty(alpha.shape),
    )


def _check(
    query: Tensor,
    image_tokens: Tensor,
    kv_weight: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    alpha: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
) -> None:
    """Raises before any work when the arguments do not fit together."""
    named = {
        "query": query,
        "image_tokens": image_tokens,
        "kv_weight": kv_weight,
        "text_key": text_key,
        "text_value": text_value,
    }
    for (name, tensor), dims in zip(named.items(), (4, 3, 2, 4, 4)):
        check_tensor(name, tensor, dims, query.dtype)
    _, heads, _, width = query.shape
    batch, keys, channels = image_tokens.shape
    check_groups(query, batch, "image_tokens")
    expect_shape("kv_weight", kv_weight, (2 * heads * width, channels))
    check_text_and_gate(query, (batch, keys), text_key, text_value, alpha, image_mask, text_mask)
    check_devices(query, named, alpha=alpha, image_mask=image_mask, text_mask=text_mask)
