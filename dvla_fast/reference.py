"""The plain-PyTorch meaning of every op: the oracle of the tests and the fallback of the library.

Nothing here is fast. Everything works in any floating dtype (half types are computed in float32),
on any device, and differentiates through autograd alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dual_attention(
    query: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    alpha: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """α·softmax(q Kᵢᵀ·scale) Vᵢ + (1 − α)·softmax(q Kₜᵀ·scale) Vₜ (DVLA-RL's gated mix).

    Shapes as in :func:`dvla_fast.functional.dual_attention`; ``alpha`` is already (B, H).
    Returns (B, H, P, D) in the query's dtype.
    """
    groups, batch = query.shape[0], image_key.shape[0]
    compute = torch.promote_types(query.dtype, torch.float32)
    q, ik, iv, tk, tv = (
        x.to(compute) for x in (query, image_key, image_value, text_key, text_value)
    )
    fold = (groups, batch // groups)  # (T, G): each image meets its own group's text by broadcast
    image_out = _attend(
        q.unsqueeze(1),  # [T, 1, H, P, D]
        ik.unflatten(0, fold),  # [T, G, H, N, D]
        iv.unflatten(0, fold),
        None if image_mask is None else image_mask.unflatten(0, fold),
        scale,
    )
    text_out = _attend(q, tk, tv, text_mask, scale).unsqueeze(1)  # [T, 1, H, P, D]
    gate = alpha.to(compute).unflatten(0, fold)[..., None, None]  # [T, G, H, 1, 1]
    mixed = gate * image_out + (1 - gate) * text_out
    return mixed.flatten(0, 1).to(query.dtype)


def gated_attention(
    query: Tensor,
    image_tokens: Tensor,
    kv_weight: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    alpha: Tensor,
    out_weight: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Projection of the image tokens, :func:`dual_attention`, projection out, and the addition.

    Shapes as in :func:`dvla_fast.functional.gated_attention`; ``alpha`` is already (B, H).
    Returns the new image tokens (B, N, C) and H (B, P, C).
    """
    compute = torch.promote_types(query.dtype, torch.float32)
    tokens = image_tokens.to(compute)
    projected = (tokens @ kv_weight.to(compute).T).unflatten(-1, (2, query.shape[1], -1))
    key, value = (part.transpose(1, 2) for part in projected.unbind(2))  # [B, H, N, D]
    text = (text_key.to(compute), text_value.to(compute))
    mixed = dual_attention(
        query.to(compute), key, value, *text, alpha, image_mask, text_mask, scale
    )
    fused = mixed.transpose(1, 2).flatten(2) @ out_weight.to(compute).T
    updated, fused = add_to_tokens(tokens, fused, text_mask)
    return updated.to(image_tokens.dtype), fused.to(query.dtype)


def add_to_tokens(
    image_tokens: Tensor, fused: Tensor, text_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """image_tokens (B, N, C) + mean of fused (B, P, C) over unmasked text tokens, and fused.

    fused becomes 0 at masked text tokens; text_mask (T, P).
    """
    count: Tensor | int = fused.shape[1]
    if text_mask is not None:
        groups, rows = text_mask.shape
        keep = text_mask.unsqueeze(1).expand(groups, fused.shape[0] // groups, rows).flatten(0, 1)
        fused = fused.masked_fill(~keep.unsqueeze(-1), 0)
        count = keep.sum(1).clamp_min(1).view(-1, 1, 1)
    wide = torch.promote_types(fused.dtype, torch.float32)
    added = fused.sum(1, keepdim=True, dtype=wide) / count
    return image_tokens + added.to(image_tokens.dtype), fused


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention over (…, H, L, D); rows whose every key is masked give exactly 0."""
    scores = q @ k.transpose(-2, -1) * scale
    if mask is None:
        return torch.softmax(scores, dim=-1) @ v
    v = v.masked_fill(~mask[..., None, :, None], 0)  # whatever is there, NaN included
    keep = mask[..., None, None, :]  # [..., 1, 1, L]
    weights = torch.softmax(scores.masked_fill(~keep, torch.finfo(scores.dtype).min), dim=-1)
    return weights * keep @ v


def beta_policy(
    logits: Tensor,
    concentration: Tensor,
    action_logit: Tensor | None,
    deterministic: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Beta(κp, κ(1 − p)) with p = sigmoid(logits): (alpha, action_logit, log_prob, entropy).

    Everything is computed in float64 and returned in the dtype of ``logits``.
    """
    dtype = logits.dtype
    wide_logits, kappa = logits.double().clamp(-300, 300), concentration.double()  # as the kernels
    a = kappa * torch.sigmoid(wide_logits)
    b = kappa * torch.sigmoid(-wide_logits)
    if action_logit is None:
        drawn = (
            wide_logits.detach()
            if deterministic
            else _log_gamma_draw(a, generator) - _log_gamma_draw(b, generator)
        )
        limit = torch.finfo(dtype).max
        action_logit = drawn.clamp(-limit, limit).to(dtype)
    action = action_logit.detach().double()
    log_alpha = torch.nn.functional.logsigmoid(action)
    log_rest = torch.nn.functional.logsigmoid(-action)
    log_norm = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(kappa)
    log_prob = (a - 1) * log_alpha + (b - 1) * log_rest - log_norm
    entropy = (
        log_norm
        - (a - 1) * torch.digamma(a)
        - (b - 1) * torch.digamma(b)
        + (kappa - 2) * torch.digamma(kappa)
    )
    alpha = torch.sigmoid(action).to(dtype)
    return alpha, action_logit.detach(), log_prob.to(dtype), entropy.to(dtype)


def _log_gamma_draw(a: Tensor, generator: torch.Generator | None) -> Tensor:
    """log G with G ~ Gamma(a, 1); for a < 1 by log G(a) = log G(a + 1) + log(U)/a, no underflow."""
    a = a.detach()
    small = a < 1
    gamma = torch._standard_gamma(torch.where(small, a + 1, a), generator=generator)
    uniform = torch.rand(a.shape, dtype=a.dtype, device=a.device, generator=generator)
    uniform = uniform.clamp_min(math.ldexp(1.0, -53))
    return torch.log(gamma) + torch.where(small, torch.log(uniform) / a, torch.zeros_like(a))
