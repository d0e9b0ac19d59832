"""How PyTorch users compute dual attention without this library: the peers of the benchmarks.

Each takes (query, image_key, image_value, text_key, text_value, alpha) as
:func:`dvla_fast.functional.dual_attention` does, with alpha (B, H), and expands the text to one
copy an image, as these operators need it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[..., Tensor]


def _expand(text: Tensor, batch: int) -> Tensor:
    """(T, H, L, D) to (B, H, L, D): a view for one text, a copy for several."""
    groups = text.shape[0]
    if groups == 1:
        return text.expand(batch, -1, -1, -1)
    return text if groups == batch else text.repeat_interleave(batch // groups, 0)


def matmul_softmax(
    q: Tensor, ik: Tensor, iv: Tensor, tk: Tensor, tv: Tensor, alpha: Tensor
) -> Tensor:
    """Two plain attentions and a weighted sum."""
    batch, scale = ik.shape[0], q.shape[-1] ** -0.5
    q, tk, tv = (_expand(x, batch) for x in (q, tk, tv))
    gate = alpha[..., None, None].to(q.dtype)
    image = torch.softmax(q @ ik.transpose(-1, -2) * scale, dim=-1) @ iv
    text = torch.softmax(q @ tk.transpose(-1, -2) * scale, dim=-1) @ tv
    return gate * image + (1 - gate) * text


def sdpa_lerp(q: Tensor, ik: Tensor, iv: Tensor, tk: Tensor, tv: Tensor, alpha: Tensor) -> Tensor:
    """Two calls of the fused attention of PyTorch and one lerp."""
    batch = ik.shape[0]
    q, tk, tv = (_expand(x, batch) for x in (q, tk, tv))
    gate = alpha[..., None, None].to(q.dtype)
    image = F.scaled_dot_product_attention(q, ik, iv)
    text = F.scaled_dot_product_attention(q, tk, tv)
    return torch.lerp(text, image, gate)


def compiled(attention: Attention) -> Attention:
    """torch.compile of a peer, a graph for the shape at hand alone."""
    torch.compiler.reset()  # Dynamo refuses more than a few graphs of one function
    return torch.compile(attention, fullgraph=True, dynamic=False)


def flex_attention_lerp(
    q: Tensor, ik: Tensor, iv: Tensor, tk: Tensor, tv: Tensor, alpha: Tensor
) -> Tensor:
    """Two calls of FlexAttention and one lerp; to be compiled. It has no backward on CPUs."""
    from torch.nn.attention.flex_attention import flex_attention

    batch = ik.shape[0]
    q, tk, tv = (_expand(x, batch) for x in (q, tk, tv))
    gate = alpha[..., None, None].to(q.dtype)
    return torch.lerp(flex_attention(q, tk, tv), flex_attention(q, ik, iv), gate)
