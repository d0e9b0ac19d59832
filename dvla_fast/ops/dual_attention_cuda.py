"""Dual attention on CUDA: the Triton forward, and a backward in plain PyTorch matrix products.

The backward works from the saved log-sum-exps, so it never forms more than one path's weights at
a time; it runs on any device, which is how it is tested. A Triton backward will take its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvla_fast.ops import schemas


def _forward(*args: object) -> tuple[Tensor, ...]:
    from dvla_fast.kernels.dual_attention import forward  # Triton is imported on first use

    results: tuple[Tensor, ...] = forward(*args)
    return results


def backward(
    grad_out: Tensor,
    query: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    alpha: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_out: Tensor,
    text_out: Tensor,
    image_lse: Tensor,
    text_lse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of the five tensors and of alpha, shapes of the op schema.

    The text path does not depend on the image, so what flows into it is summed over the images of
    a group first, and its backward runs once per group.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[0]
    fold = (groups, image_key.shape[0] // groups)
    grad = grad_out.to(wide).unflatten(0, fold)  # [T, G, H, P, D]
    gate = alpha.to(wide).unflatten(0, fold)[..., None, None]  # [T, G, H, 1, 1]

    grad_query, grad_image_key, grad_image_value = _path_backward(
        gate * grad,
        query.to(wide).unsqueeze(1),
        image_key.to(wide).unflatten(0, fold),
        image_value.to(wide).unflatten(0, fold),
        None if image_mask is None else image_mask.unflatten(0, fold),
        image_out.to(wide).unflatten(0, fold),
        image_lse.unflatten(0, fold),
        scale,
    )
    grad_text_query, grad_text_key, grad_text_value = _path_backward(
        ((1 - gate) * grad).sum(1),
        query.to(wide),
        text_key.to(wide),
        text_value.to(wide),
        text_mask,
        text_out.to(wide),
        text_lse,
        scale,
    )
    difference = image_out.to(wide).unflatten(0, fold) - text_out.to(wide).unsqueeze(1)
    grad_alpha = (grad * difference).sum((-2, -1)).flatten(0, 1)
    grads = (
        grad_query.sum(1) + grad_text_query,
        grad_image_key.flatten(0, 1),
        grad_image_value.flatten(0, 1),
        grad_text_key,
        grad_text_value,
    )
    return (*(_stored_by_token(g, query.dtype) for g in grads), grad_alpha.to(alpha.dtype))


def _path_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One attention path, (…, H, L, D): gradients of query, key and value from d(out) = grad."""
    if mask is not None:  # masked keys may hold anything, NaN included: 0 * NaN is not 0
        gone = ~mask[..., None, :, None]
        key, value = key.masked_fill(gone, 0), value.masked_fill(gone, 0)
    scores = query @ key.transpose(-2, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None, None, :], -torch.inf)
    weights = torch.exp(scores - lse.masked_fill(torch.isneginf(lse), 0)[..., None])
    grad_weights = grad @ value.transpose(-2, -1)
    grad_scores = weights * (grad_weights - (grad * out).sum(-1, keepdim=True)) * scale
    return (
        grad_scores @ key,
        grad_scores.transpose(-2, -1) @ query,
        weights.transpose(-2, -1) @ grad,
    )


def _stored_by_token(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """(outer, H, L, D) stored as (outer, L, H, D), as projections want it."""
    return grad.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


for _name, _kernel in (("dual_attention_forward", _forward), ("dual_attention_backward", backward)):
    torch.library.impl(f"dvla_fast::{_name}", "CUDA", _kernel, lib=schemas.LIBRARY)
