"""The gated layer as PyTorch users write it without this library: the peers of ``test_gate.py``.

The equations of :class:`dvla_fast.RLAGate` in eager PyTorch from the gate's own weights. The text
is expanded to one copy an image first, and everything runs once an image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dvla_fast import RLAGate

Result = tuple[Tensor, Tensor, Tensor, Tensor]
Layer = Callable[[RLAGate, Tensor, Tensor], Result]


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


def _layer(
    gate: RLAGate,
    image_tokens: Tensor,
    text_tokens: Tensor,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Result:
    """image_tokens (B, N, d), text_tokens (1, P, text_dim), one decision for all images.

    Returns the new image tokens (B, N, d), H (B, P, d), and the log-density and entropy (1,) of
    the policy at its mean, which is the gate used.
    """
    images, heads = image_tokens.shape[0], gate.num_heads

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, L, D]

    texts = gate.text_projection(text_tokens.expand(images, -1, -1))  # [B, P, d]
    image_mean = image_tokens.mean(1, dtype=torch.float32).mean(0, keepdim=True)
    text_mean = texts.mean(1, dtype=torch.float32).mean(0, keepdim=True)
    cosine = F.cosine_similarity(image_mean, text_mean, dim=-1).unsqueeze(-1)
    state = torch.cat((image_mean, text_mean, cosine), dim=-1)
    mean = torch.sigmoid(gate.policy.network(state).squeeze(-1))
    policy = torch.distributions.Beta(10 * mean, 10 * (1 - mean), validate_args=False)
    alpha = mean.detach()

    query, text_key, text_value = (split(x) for x in gate.text_qkv(texts).chunk(3, -1))
    image_key, image_value = (split(x) for x in gate.image_kv(image_tokens).chunk(2, -1))
    image = attention(query, image_key, image_value)
    text = attention(query, text_key, text_value)
    mixed = torch.lerp(text, image, alpha.to(image.dtype))
    fused = gate.out_projection(mixed.transpose(1, 2).flatten(2))
    updated = image_tokens + fused.mean(1, keepdim=True)
    return updated, fused, policy.log_prob(alpha), policy.entropy()


def eager_matmul(gate: RLAGate, image_tokens: Tensor, text_tokens: Tensor) -> Result:
    """Attention as two products and a softmax."""
    return _layer(gate, image_tokens, text_tokens, _softmax_attention)


def eager_sdpa(gate: RLAGate, image_tokens: Tensor, text_tokens: Tensor) -> Result:
    """Attention by PyTorch's fused operator."""
    return _layer(gate, image_tokens, text_tokens, F.scaled_dot_product_attention)


def compiled() -> Layer:
    """torch.compile of :func:`eager_matmul`, a graph for the shape at hand alone."""
    torch.compiler.reset()
    return torch.compile(eager_matmul, fullgraph=True, dynamic=False)
