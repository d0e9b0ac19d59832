"""The plain-PyTorch meaning of every op: the oracle of the tests and the fallback of the library.

Nothing here is fast. Everything works in any floating dtype (half types are computed in float32),
on any device, and differentiates through autograd alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

STIRLING = 8  # Stirling's series is exact to rounding from here on
_LOG_2_PI = math.log(2 * math.pi)


def in_own_precision(x: Tensor) -> torch.autocast:
    """A context in which products on the device of ``x`` have the dtype of their operands.

    Under autocast they would be rounded to a half type, whatever they were widened to before.
    """
    device = "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
    return torch.autocast(device_type=device, enabled=False)


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
    with in_own_precision(query):
        attended = without_masked(tokens, image_mask)
        projected = (attended @ kv_weight.to(compute).T).unflatten(-1, (2, query.shape[1], -1))
        key, value = (part.transpose(1, 2) for part in projected.unbind(2))  # [B, H, N, D]
        text = (text_key.to(compute), text_value.to(compute))
        rows = without_masked(query, None if text_mask is None else text_mask.unsqueeze(1))
        mixed = dual_attention(
            rows.to(compute), key, value, *text, alpha, image_mask, text_mask, scale
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
    count: Tensor | int = max(1, fused.shape[1])
    if text_mask is not None:
        groups, rows = text_mask.shape
        keep = text_mask.unsqueeze(1).expand(groups, fused.shape[0] // groups, rows).flatten(0, 1)
        fused = fused.masked_fill(~keep.unsqueeze(-1), 0)
        count = keep.sum(1).clamp_min(1).view(-1, 1, 1)
    wide = torch.promote_types(fused.dtype, torch.float32)
    added = fused.sum(1, keepdim=True, dtype=wide) / count
    return image_tokens + added.to(image_tokens.dtype), fused


def without_masked(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """tokens (…, L, C) with 0 where mask (…, L) is False, whatever is there, NaN included.

    What is not attended has gradient 0, and 0 times NaN would reach the weights.
    """
    return tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention over (…, H, L, D); rows whose every key is masked give exactly 0."""
    if mask is not None:
        k, v = (without_masked(x, mask[..., None, :]) for x in (k, v))
    with in_own_precision(q):
        return attention_weights(q, k, mask, scale) @ v


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax over the keys (…, H, L, D) of each query (…, H, P, D): (…, H, P, L).

    mask (…, L), True = attend: masked keys get exactly 0, also in rows where all are masked.
    """
    with in_own_precision(q):
        scores = q @ k.transpose(-2, -1) * scale
    if mask is None:
        return torch.softmax(scores, dim=-1)
    keep = mask[..., None, None, :]  # [..., 1, 1, L]
    weights = torch.softmax(scores.masked_fill(~keep, torch.finfo(scores.dtype).min), dim=-1)
    return weights * keep


def gate_state(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    groups_per_decision: int,
    state_images: int,
) -> Tensor:
    """[mean of image tokens ‖ mean of text tokens ‖ their cosine], (A, 2C + 1).

    Arguments as in :func:`dvla_fast.functional.gate_state`; ``state_images`` 0: all.
    """
    groups = text_tokens.shape[0]
    if state_images:  # [B, N, C] -> the first images of every group
        first = (slice(None), slice(state_images))
        image_tokens = image_tokens.unflatten(0, (groups, -1))[first].flatten(0, 1)
        if image_mask is not None:
            image_mask = image_mask.unflatten(0, (groups, -1))[first].flatten(0, 1)
    image = masked_mean(image_tokens, image_mask)  # [B', C]
    text = masked_mean(text_tokens, text_mask)  # [T, C]
    if groups_per_decision == 0:
        text = text.repeat_interleave(image.shape[0] // groups, dim=0)
    else:
        decisions = groups // groups_per_decision
        image = image.unflatten(0, (decisions, -1)).mean(1)  # [A, C]
        text = text.unflatten(0, (decisions, -1)).mean(1)
    cosine = F.cosine_similarity(image, text, dim=-1).unsqueeze(-1)
    return torch.cat((image, text, cosine), dim=-1)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (X, L, d) over the unmasked tokens, (X, d); 0 where none is left.

    In at least float32: long sums in bfloat16 would drift. Written as a sum, whose gradient is a
    view of one row, where that of a mean fills a tensor of the size of ``x``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.sum(1, dtype=wide) / x.shape[1]
    keep = mask.unsqueeze(-1)
    total = x.masked_fill(~keep, 0).sum(1, dtype=wide)
    return total / keep.sum(1).clamp_min(1)


def state_logits(
    state: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    """The policy's network: state (A, 2C + 1) -> (A, outputs), in at least float32.

    The two pooled vectors are normalised apart from each other: image tokens are a raw residual
    stream, often tens of times larger than projected text, and would drown it in a shared norm.
    Weights of a half type are widened: they are small, the logit is not.
    """
    with in_own_precision(state):
        state = state.to(torch.promote_types(hidden_weight.dtype, torch.float32))
        weights = (hidden_weight, hidden_bias, out_weight, out_bias)
        first, first_bias, last, last_bias = (w.to(state.dtype) for w in weights)
        hidden = F.gelu(F.linear(normalised_state(state), first, first_bias))
        return F.linear(hidden, last, last_bias)


def normalised_state(state: Tensor) -> Tensor:
    """The two pooled vectors of states (A, 2C + 1), each of mean 0 and variance 1."""
    width = state.shape[-1] // 2
    image, text, cosine = state.split([width, width, 1], dim=-1)
    parts = (F.layer_norm(image, (width,)), F.layer_norm(text, (width,)), cosine)
    return torch.cat(parts, dim=-1)


def beta_policy(
    logits: Tensor,
    concentration: Tensor,
    action_logit: Tensor | None,
    deterministic: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Beta(κp, κ(1 − p)) with p = sigmoid(logits): (alpha, action_logit, log_prob, entropy).

    Everything is computed in float64 and returned in the dtype of ``logits``; what is beyond its
    range saturates, and has no gradient there.
    """
    dtype = logits.dtype
    wide_logits, kappa = logits.double().clamp(-300, 300), concentration.double()  # as the kernels
    # An invalid element is NaN throughout: a negative κ has densities that look like numbers.
    valid = (kappa > 0) & torch.isfinite(kappa) & ~torch.isnan(wide_logits)
    if action_logit is not None:
        valid = valid & ~torch.isnan(action_logit)
    kappa, wide_logits = (x.where(valid, torch.nan) for x in (kappa, wide_logits))
    a = kappa * torch.sigmoid(wide_logits)
    b = kappa * torch.sigmoid(-wide_logits)
    if action_logit is not None:
        drawn = action_logit.detach().double()
    elif deterministic:
        drawn = wide_logits.detach()
    else:
        drawn = _log_gamma_draw(a, generator) - _log_gamma_draw(b, generator)
    limit = torch.finfo(dtype).max
    action_logit = drawn.clamp(-limit, limit).to(dtype).where(valid, torch.nan)
    action = action_logit.double()
    peak = log_peak(a, b)
    spread = F.logsigmoid(action) + F.logsigmoid(-action)  # log α(1 − α)
    log_prob = peak + kappa * _match(wide_logits, action) - spread
    entropy = (
        a.log() + b.log() - 2 * kappa.log() - peak
        - (a - 1) * _digamma_rest(a)
        - (b - 1) * _digamma_rest(b)
        + (kappa - 2) * _digamma_rest(kappa)
    )  # fmt: skip
    alpha = torch.sigmoid(action).to(dtype)
    log_prob, entropy = (x.clamp(-limit, limit).to(dtype) for x in (log_prob, entropy))
    return alpha, action_logit, log_prob, entropy


def _match(logit: Tensor, action: Tensor) -> Tensor:
    """p log(α/p) + (1 − p) log((1 − α)/(1 − p)) of the logits of p and α, without cancellation.

    p·d − log(1 + p(e^d − 1)) with d the difference of the logits, for p up to ½; the same holds for
    1 − p and −d.
    """
    sign = torch.where(logit > 0, -1.0, 1.0)
    logit, action = sign * logit, sign * action
    p, d = torch.sigmoid(logit), action - logit
    near = torch.log1p(p * torch.expm1(d.clamp_max(1.0)))
    far = F.logsigmoid(-logit) - F.logsigmoid(-action)  # the same; loses digits where d is small
    return p * d - torch.where(d < 1.0, near, far)


def log_peak(a: Tensor, b: Tensor) -> Tensor:
    """Log-density of the logit of a draw from Beta(a, b) at its mode, log(a/b).

    As a difference of log Γ it would lose the digits of a + b.
    """
    whole = a + b
    rest = _log_gamma_rest(whole) - _log_gamma_rest(a) - _log_gamma_rest(b)
    return 0.5 * (a.log() + b.log() - whole.log() - _LOG_2_PI) + rest


def _log_gamma_rest(x: Tensor) -> Tensor:
    """The rest of log Γ(x) after (x − ½) log x − x + ½ log 2π."""
    low = x.clamp_max(STIRLING)
    direct = torch.lgamma(low) - (low - 0.5) * low.log() + low - 0.5 * _LOG_2_PI
    return torch.where(x < STIRLING, direct, stirling(x.clamp_min(STIRLING))[0])


def _digamma_rest(x: Tensor) -> Tensor:
    """ψ(x) − log x."""
    low, high = x.clamp_max(STIRLING), x.clamp_min(STIRLING)
    direct = torch.digamma(low) - low.log()
    return torch.where(x < STIRLING, direct, stirling(high)[1] - 0.5 / high)


def stirling(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rest of log Γ(x) after (x − ½) log x − x + ½ log 2π, and its derivative; x ≥ 8."""
    r = 1.0 / (x * x)
    numerators = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
    value, slope = torch.zeros_like(x), torch.zeros_like(x)
    for n in range(len(numerators) - 1, -1, -1):
        value = value * r + numerators[n]
        slope = slope * r - (2 * n + 1) * numerators[n]
    return value / x, slope * r


def _log_gamma_draw(a: Tensor, generator: torch.Generator | None) -> Tensor:
    """log G with G ~ Gamma(a, 1); for a < 1 by log G(a) = log G(a + 1) + log(U)/a, no underflow."""
    a = a.detach()
    if a.is_meta:  # torch 2.11 knows no shape of its sampler's result
        return torch.empty_like(a)
    a = a.where(a > 0, 1.0)  # PyTorch's sampler never returns from NaN
    small = a < 1
    gamma = torch._standard_gamma(torch.where(small, a + 1, a), generator=generator)
    uniform = torch.rand(a.shape, dtype=a.dtype, device=a.device, generator=generator)
    uniform = uniform.clamp_min(math.ldexp(1.0, -53))
    return torch.log(gamma) + torch.where(small, torch.log(uniform) / a, torch.zeros_like(a))
