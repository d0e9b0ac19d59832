"""The gated layer around dual attention, from image tokens to image tokens.

    Kᵢ, Vᵢ = halves of Z Wₖᵥᵀ;  H = dual attention of (Q, Kᵢ, Vᵢ, Kₜ, Vₜ, α) Wₒᵀ, 0 at masked text;
    Z ← Z + mean of H over the text tokens

(DVLA-RL, method §3.) On the CPU the images are taken a few at a time, so that what lies between the
tokens and H stays in the cache and never exists for all images; the backward pass keeps keys and
values where they are few (32 MiB) and projects them again where they are many. Where the queries of
all heads are clearly fewer than C, the weights of keys and values are absorbed: applied to the
queries and to the weighted tokens, softmax(q (Z Wₖᵀ)ᵀ) Z Wᵥᵀ = (softmax((q Wₖ) Zᵀ) Z) Wᵥᵀ. On CUDA
and under ``torch.func`` it is two matrix products around
:func:`dvla_fast.functional.dual_attention`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dvla_fast import _extension, backends, reference
from dvla_fast.arguments import expect_tensor
from dvla_fast.ops import schemas
from dvla_fast.ops.dual_attention import (
    candidates,
    check_devices,
    check_groups,
    check_query,
    check_tensor,
    check_text_and_gate,
    dual_attention,
    expand_alpha,
    expect_shape,
    finite_scale,
    stored_by_token,
)

_KEPT_BYTES = 32 * 2**20  # kKeptBytes of csrc/gate/plan.h


def gated_attention(
    query: Tensor,
    image_tokens: Tensor,
    kv_weight: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    alpha: Tensor,
    out_weight: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Lets text ask the image tokens and itself, and adds the answer to the image tokens.

    B images of N tokens of width C; T text groups of P tokens, B a multiple of T; H heads of width
    D. Like a linear layer, it computes in the autocast dtype where autocast is on.

    Args:
        query: (T, H, P, D), float32, float16, bfloat16 or (reference and C++) float64.
        image_tokens: (B, N, C), dtype of ``query``, or float32 where that is a half type; under
            autocast of one half type the other one, too.
        kv_weight: (2·H·D, C), dtype of ``query``: the rows of the keys, head after head, then those
            of the values.
        text_key: (T, H, P, D), dtype of ``query``.
        text_value: (T, H, P, D), dtype of ``query``.
        alpha: gate in [0, 1], a floating tensor of shape (), (B,) or (B, H).
        out_weight: (C, H·D), dtype of ``query``.
        image_mask: (B, N) bool, True = attend. A path with no key left contributes exactly 0.
        text_mask: (T, P) bool, True = a token: masked ones are not attended, and have H = 0.
        scale: factor of the scores, a finite float32 number; default D^-1/2. A constant of a
            compiled graph: each value makes a graph of its own.
        backend: ``"cpp"``, ``"triton"`` (products around the Triton attention) or ``"reference"``;
            default the best for the inputs.

    Returns:
        The new image tokens (B, N, C) in the dtype of ``image_tokens``, and H (B, P, C) in that of
        ``query``. First-order gradients flow to all tensors but the masks.

    Raises:
        TypeError: a dtype is not supported or does not fit the query's; a mask is not bool.
        ValueError: shapes or devices do not fit together, or ``scale`` is NaN or infinite.
        BackendError: the backend asked for cannot run with these inputs.
    """
    if backend is None and _extension.runs_plainly():
        # With as little of Python as it takes, as in dual_attention.
        results = _extension.calls.gated_attention(
            query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight,
            image_mask, text_mask, scale, _extension.triton_available(), False,
        )  # fmt: skip
        if results is not None:
            return cast(tuple[Tensor, Tensor], results)
    named = {
        "query": query, "image_tokens": image_tokens, "kv_weight": kv_weight,
        "text_key": text_key, "text_value": text_value, "out_weight": out_weight,
    }  # fmt: skip
    for name, tensor in named.items():
        expect_tensor(name, tensor)
    query, kv_weight, text_key, text_value, out_weight = _autocast(
        query, kv_weight, text_key, text_value, out_weight
    )
    if _is_other_half(image_tokens, query):
        updated, fused = gated_attention(
            query, image_tokens.float(), kv_weight, text_key, text_value, alpha, out_weight,
            image_mask=image_mask, text_mask=text_mask, scale=scale, backend=backend,
        )  # fmt: skip
        return updated.to(image_tokens.dtype), fused
    _check(
        query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight,
        image_mask, text_mask,
    )  # fmt: skip
    scale = finite_scale(scale, query.shape[-1])
    gate = expand_alpha(alpha, image_tokens.shape[0], query.shape[1], query.dtype)
    arguments = (
        query, image_tokens, kv_weight, text_key, text_value, gate, out_weight,
        image_mask, text_mask, scale,
    )  # fmt: skip
    chosen = backends.choose("gated_attention", candidates(query), backend)
    if chosen == "reference":
        return reference.gated_attention(*arguments)
    # torch.func transforms what PyTorch's own operations and dual_attention compose.
    if chosen == "triton" or _extension.needs_python_autograd():
        return _composed(*arguments, backend)
    forward = torch.ops.dvla_fast.gated_attention_forward.default
    updated, fused, *_ = forward(*arguments, False)
    return updated, fused


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts as a linear layer does; image tokens keep their dtype, for they pass through."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def _is_other_half(image_tokens: Tensor, query: Tensor) -> bool:
    """Whether image tokens are of one half type, and autocast computes in the other one."""
    device = query.device
    if {image_tokens.dtype, query.dtype} != {torch.float16, torch.bfloat16}:
        return False
    if image_tokens.device != device or device.type == "meta":  # autocast knows no meta device
        return False
    return torch.is_autocast_enabled(device.type)


def _composed(
    query: Tensor,
    image_tokens: Tensor,
    kv_weight: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    gate: Tensor,
    out_weight: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Products of all images around the attention of ``backend``."""
    tokens = reference.without_masked(image_tokens.to(query.dtype), image_mask)
    projected = F.linear(tokens, kv_weight).unflatten(-1, (2, query.shape[1], -1))
    image_key, image_value = (part.transpose(1, 2) for part in projected.unbind(2))
    rows = reference.without_masked(query, None if text_mask is None else text_mask.unsqueeze(1))
    mixed = dual_attention(
        rows, image_key, image_value, text_key, text_value, gate,
        image_mask=image_mask, text_mask=text_mask, scale=scale, backend=backend,
    )  # fmt: skip
    fused = F.linear(mixed.transpose(1, 2).flatten(2), out_weight)
    return reference.add_to_tokens(image_tokens, fused, text_mask)


@torch.library.register_fake("dvla_fast::gated_attention_forward", lib=schemas.LIBRARY)
def _forward_fake(  # type: ignore[no-untyped-def]
    query, image_tokens, kv_weight, text_key, text_value, alpha, out_weight, image_mask, text_mask,
    scale, save,
):  # fmt: skip
    groups, heads, rows, width = query.shape
    batch, keys, channels = image_tokens.shape
    results = (
        image_tokens.new_empty(image_tokens.shape),
        query.new_empty(batch, rows, channels),
    )
    if not save or torch.compiler.is_exporting():  # whose sizes may not depend on shapes
        return (
            *results,
            *(query.new_empty(0) for _ in range(2)),
            *(alpha.new_empty(0) for _ in range(2)),
            query.new_empty(0),
        )
    columns = 2 * heads * width
    if _absorbs(heads, rows, width, keys, channels):
        kept = query.new_empty(batch * rows, heads * channels)
    elif batch * keys * columns * query.element_size() <= _KEPT_BYTES:
        kept = query.new_empty(batch * keys, columns)
    else:
        kept = query.new_empty(0)
    return (
        *results,
        query.new_empty(batch, rows, heads, width).transpose(1, 2),
        query.new_empty(groups, rows, heads, width).transpose(1, 2),
        alpha.new_empty(batch, heads, rows),
        alpha.new_empty(groups, heads, rows),
        kept,
    )


def _absorbs(heads: int, rows: int, width: int, keys: int, channels: int) -> bool:
    """As ``absorbs`` of csrc/gate/plan.h."""
    inner = heads * width
    projected = 2 * keys * channels * inner + 2 * rows * keys * inner
    absorbed = 2 * heads * rows * keys * channels + rows * channels * inner
    return rows > 0 and 9 * absorbed < 5 * projected


@torch.library.register_fake("dvla_fast::gated_attention_backward", lib=schemas.LIBRARY)
def _backward_fake(  # type: ignore[no-untyped-def]
    grad_updated, grad_fused, query, image_tokens, kv_weight, text_key, text_value, alpha,
    out_weight, image_mask, text_mask, image_out, text_out, image_lse, text_lse, kept, scale,
    tokens=True,
):  # fmt: skip
    return (
        stored_by_token(query),
        image_tokens.new_empty(image_tokens.shape if tokens else 0),
        kv_weight.new_empty(kv_weight.shape),
        stored_by_token(text_key),
        stored_by_token(text_value),
        alpha.new_empty(alpha.shape),
        out_weight.new_empty(out_weight.shape),
    )


def _check(
    query: Tensor,
    image_tokens: Tensor,
    kv_weight: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    alpha: Tensor,
    out_weight: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
) -> None:
    """Raises before any work when the arguments do not fit together."""
    check_query(query)
    named = {
        "kv_weight": kv_weight,
        "text_key": text_key,
        "text_value": text_value,
        "out_weight": out_weight,
    }
    for (name, tensor), dims in zip(named.items(), (2, 4, 4, 2)):
        check_tensor(name, tensor, dims, query.dtype)
    passed = image_tokens.dtype == torch.float32 and query.dtype != torch.float64
    check_tensor("image_tokens", image_tokens, 3, torch.float32 if passed else query.dtype)
    _, heads, _, width = query.shape
    batch, keys, channels = image_tokens.shape
    check_groups(query, batch, "image_tokens")
    expect_shape("kv_weight", kv_weight, (2 * heads * width, channels))
    expect_shape("out_weight", out_weight, (channels, heads * width))
    expect_shape("text_key", text_key, tuple(query.shape))
    check_text_and_gate(query, (batch, keys), text_key, text_value, alpha, image_mask, text_mask)
    check_devices(
        query, named, image_tokens=image_tokens, alpha=alpha,
        image_mask=image_mask, text_mask=text_mask,
    )  # fmt: skip
