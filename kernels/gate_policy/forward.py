"""The gate's decision, forward: token means, then everything else. See the package's docstring."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..beta_math import GIVEN, beta_step, divide
from ..beta_policy import bits_of, mode_of
from ..launching import Recorder, Step, run
from .shared import (
    Problem,
    gelu,
    mask_of,
    normalise,
    options,
    problem_of,
    state_dtype,
    weights_of,
)
from .shared import (
    cosine as cosine_of,
)

TOKENS = 128  # that a program of the means takes at a time
CHANNELS = 32  # 128 bytes of a float32 token


@triton.jit
def _token_mean(  # type: ignore[no-untyped-def]
    tokens, mask, outer, outer_step, token_step, channel_step, mask_outer, mask_token,
    length, channel, width,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Mean [BLOCK_C] in float64 over the tokens that count of one outer index; 0 if none does."""
    position = tl.arange(0, BLOCK_L)
    total = tl.zeros([BLOCK_C], tl.float64)
    count = tl.zeros([BLOCK_L], tl.int32)
    for start in range(0, length, BLOCK_L):
        token = (start + position).to(tl.int64)  # [BLOCK_L]
        keep = token < length
        if mask is not None:
            here = mask + outer * mask_outer + token * mask_token
            keep = keep & (tl.load(here, keep, other=0) != 0)
        x = tl.load(  # [BLOCK_L, BLOCK_C]
            tokens + outer * outer_step + token[:, None] * token_step
            + channel.to(tl.int64)[None, :] * channel_step,
            keep[:, None] & (channel < width)[None, :],
            other=0.0,
        )  # fmt: skip
        total += tl.sum(x.to(WIDE), 0).to(tl.float64)
        count += keep.to(tl.int32)
    return total * (1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float64))


@triton.jit(do_not_specialize=["rows", "images", "used", "group", "image_length", "text_length"])
def gate_means_kernel(  # type: ignore[no-untyped-def]
    image_tokens, image_b, image_n, image_c, image_mask, image_mask_b, image_mask_n,
    text_tokens, text_t, text_p, text_c, text_mask, text_mask_t, text_mask_p,
    means, rows, images, used, group, image_length, text_length, width,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: one program per (channel block, row of means), the first fastest."""
    WIDE: tl.constexpr = means.dtype.element_ty
    blocks = tl.cdiv(width, BLOCK_C)
    row = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    if row < images:
        outer = (row // used * group + row % used).to(tl.int64)
        mean = _token_mean(
            image_tokens, image_mask, outer, image_b, image_n, image_c, image_mask_b, image_mask_n,
            image_length, channel, width, BLOCK_L, BLOCK_C, WIDE,
        )  # fmt: skip
    else:
        outer = (row - images).to(tl.int64)
        mean = _token_mean(
            text_tokens, text_mask, outer, text_t, text_p, text_c, text_mask_t, text_mask_p,
            text_length, channel, width, BLOCK_L, BLOCK_C, WIDE,
        )  # fmt: skip
    tl.store(means + row.to(tl.int64) * width + channel, mean.to(WIDE), channel < width)


@triton.jit
def _mean_of_rows(  # type: ignore[no-untyped-def]
    rows, first, count, inside, channel, width,
    BLOCK_A: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Means [BLOCK_A, BLOCK_C] of `count` rows each, from row `first` [BLOCK_A] on."""
    member = tl.arange(0, BLOCK_I)
    total = tl.zeros([BLOCK_A, BLOCK_C], rows.dtype.element_ty)
    keep = inside[:, None, None] & (channel < width)[None, None, :]
    for start in range(0, count, BLOCK_I):
        row = first[:, None] + (start + member)[None, :]  # [BLOCK_A, BLOCK_I]
        there = keep & (start + member < count)[None, :, None]
        x = tl.load(rows + row[:, :, None] * width + channel[None, None, :], there, other=0.0)
        total += tl.sum(x, 1)
    return divide(total, tl.zeros_like(total) + count)


@triton.jit
def _network(  # type: ignore[no-untyped-def]
    x, y, cosine, hidden_weight, hidden_bias, out_weight, out_bias, hidden,
    decision, inside, units, channel, width,
    SAVE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Logits [BLOCK_A] from normalised means [BLOCK_A, BLOCK_C] and their cosine [BLOCK_A]."""
    logit = tl.zeros([BLOCK_A], x.dtype) + tl.load(out_bias)
    for start in range(0, units, BLOCK_K):
        unit = start + tl.arange(0, BLOCK_K)
        exists = unit < units
        by_image, by_text, by_cosine = weights_of(
            hidden_weight, unit, units, channel, width, BLOCK_C
        )
        total = tl.sum(x[:, None, :] * by_image[None, :, :], 2)  # [BLOCK_A, BLOCK_K]
        total += tl.sum(y[:, None, :] * by_text[None, :, :], 2)
        total += cosine[:, None] * by_cosine[None, :]
        total += tl.load(hidden_bias + unit, exists, other=0.0)[None, :]
        if SAVE:
            here = hidden + decision[:, None] * units + unit[None, :]
            tl.store(here, total, inside[:, None] & exists[None, :])
        out = tl.load(out_weight + unit, exists, other=0.0)
        logit += tl.sum(gelu(total)[0] * out[None, :], 1)
    return logit


@triton.jit(do_not_specialize=["decisions", "images", "texts", "share", "units", "kappa_bits"])
def gate_decide_kernel(  # type: ignore[no-untyped-def]
    image_means, text_means,
    hidden_weight, hidden_bias, out_weight, out_bias, kappa_bits, given, key,
    state, hidden, alpha, action, log_prob, entropy, derivatives,
    decisions, images, texts, share, units, width,
    NETWORK: tl.constexpr,
    MODE: tl.constexpr,
    SAVE: tl.constexpr,
    CHECK: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: one program per BLOCK_A decisions. share: decisions that read the same text."""
    WIDE: tl.constexpr = state.dtype.element_ty
    decision = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)  # [BLOCK_A]
    channel = tl.arange(0, BLOCK_C)
    inside = decision < decisions
    in_width = (channel < width)[None, :]
    x = _mean_of_rows(
        image_means, decision * images, images, inside, channel, width, BLOCK_A, BLOCK_I, BLOCK_C
    )
    y = _mean_of_rows(
        text_means, decision // share * texts, texts, inside, channel, width,
        BLOCK_A, BLOCK_I, BLOCK_C,
    )  # fmt: skip
    cosine = cosine_of(x, y)[0].to(WIDE)  # [BLOCK_A]
    row = state + decision * (2 * width + 1)
    tl.store(row[:, None] + channel[None, :], x, inside[:, None] & in_width)
    tl.store(row[:, None] + width + channel[None, :], y, inside[:, None] & in_width)
    tl.store(row + 2 * width, cosine, inside)
    if NETWORK:
        x, _ = normalise(x, in_width, width)
        y, _ = normalise(y, in_width, width)
        logit = _network(
            x, y, cosine, hidden_weight, hidden_bias, out_weight, out_bias, hidden,
            decision, inside, units, channel, width, SAVE, BLOCK_A, BLOCK_K, BLOCK_C,
        )  # fmt: skip
        kappa = tl.zeros([BLOCK_A], tl.float64)
        kappa += tl.cast(kappa_bits, tl.int64).to(tl.float64, bitcast=True)
        actions = logit
        if MODE == GIVEN:
            actions = tl.load(given + decision, inside, other=0.0)
        a, act, lp, h, lp_logit, h_logit, _, _ = beta_step(
            logit, kappa, actions, key, decision, inside, MODE, CHECK
        )
        tl.store(alpha + decision, a, inside)
        tl.store(action + decision, act, inside)
        tl.store(log_prob + decision, lp, inside)
        tl.store(entropy + decision, h, inside)
        if SAVE:
            tl.store(derivatives + decision, lp_logit, inside)
            tl.store(derivatives + decisions + decision, h_logit, inside)


def forward(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    groups_per_decision: int,
    state_images: int,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    concentration: float,
    action_logit: Tensor | None,
    key: Tensor | None,
    save: bool,
    check: bool = False,
    *,
    recorder: Recorder | None = None,
) -> tuple[Tensor, ...]:
    """Two launches; arguments and results as the op's (``dvla_fast/ops/schemas.py``).

    Args:
        check: stop the device at NaN; else the results of such decisions are NaN.
        recorder: is told the launches, which are all there is to a call.

    Returns:
        (alpha, action_logit, log_prob, entropy, state, hidden, derivatives).
    """
    z = problem_of(image_tokens, text_tokens, groups_per_decision, state_images)
    wide = state_dtype(image_tokens)

    def empty(*size: int) -> Tensor:
        return image_tokens.new_empty(size, dtype=wide)

    state = empty(z.decisions, 2 * z.width + 1)
    if hidden_weight is None:
        outputs = (*(empty(0) for _ in range(4)), state, empty(0), empty(0))
    else:
        hidden = empty(z.decisions, hidden_weight.shape[0]) if save else empty(0)
        derivatives = empty(2, z.decisions) if save else empty(0)
        outputs = (*(empty(z.decisions) for _ in range(4)), state, hidden, derivatives)
    means = empty(z.groups * z.used + z.groups, z.width)
    tokens = (image_tokens, text_tokens, image_mask, text_mask)
    weights = (hidden_weight, hidden_bias, out_weight, out_bias)
    policy = (concentration, action_logit, key)
    steps = (
        means_step(z, tokens, means),
        decide_step(z, means, weights, policy, outputs, save, check),
    )
    launched = run(steps, state)
    if recorder is not None:
        recorder(outputs, (means,), launched)
    return outputs


def means_step(z: Problem, tokens: tuple[Tensor | None, ...], means: Tensor) -> Step:
    """The first launch, touching no data (meta tensors do)."""
    image_tokens, text_tokens, image_mask, text_mask = tokens
    assert image_tokens is not None
    assert text_tokens is not None
    rows = means.shape[0]
    arguments = (
        image_tokens, *image_tokens.stride(), *mask_of(image_mask),
        text_tokens, *text_tokens.stride(), *mask_of(text_mask),
        means, rows, rows - z.groups, z.used, z.group,
        image_tokens.shape[1], text_tokens.shape[1], z.width,
    )  # fmt: skip
    constants = {"BLOCK_L": TOKENS, "BLOCK_C": CHANNELS, **options(4)}
    return gate_means_kernel, (rows * -(-z.width // CHANNELS),), arguments, constants


def decide_step(
    z: Problem,
    means: Tensor,
    weights: tuple[Tensor | None, ...],
    policy: tuple[float, Tensor | None, Tensor | None],
    outputs: tuple[Tensor, ...],
    save: bool,
    check: bool,
) -> Step:
    """The second launch; ``policy``: concentration, given actions, key."""
    alpha, action, log_prob, entropy, state, hidden, derivatives = outputs
    number, given, key = policy
    units = 0 if weights[0] is None else weights[0].shape[0]
    arguments = (
        means, means[means.shape[0] - z.groups :],
        *(x if x is None else x.contiguous() for x in weights),
        bits_of(number), given if given is None else given.contiguous(), key,
        state, hidden, alpha, action, log_prob, entropy, derivatives,
        z.decisions, z.members, z.texts, z.share, units, z.width,
    )  # fmt: skip
    constants = {
        "NETWORK": units > 0,
        "MODE": mode_of(given, key),
        "SAVE": save,
        "CHECK": check,
        "BLOCK_A": z.block_decisions(),
        "BLOCK_I": z.block_of(max(z.members, z.texts)),
        "BLOCK_K": z.block_of(units),
        "BLOCK_C": z.block_width(),
        "debug": check,
        **options(),
    }
    grid = (-(-z.decisions // z.block_decisions()),)
    return gate_decide_kernel, grid, arguments, constants
