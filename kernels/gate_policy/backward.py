"""The gate's decision, backward: decisions, then weights and rows. See the package's docstring."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..beta_math import divide, like
from ..beta_policy import one_or_all
from ..launching import Recorder, Step, run
from .shared import (
    Problem,
    gelu,
    mask_of,
    normalise,
    normalise_backward,
    options,
    problem_of,
    weights_of,
)
from .shared import (
    cosine as cosine_of,
)

TOKENS = 256  # of a mask, that a program takes at a time
CHANNELS = 256
DECISIONS, UNITS, FEATURES = 16, 8, 32  # of a tile of weight gradients


@triton.jit
def _logit_gradient(  # type: ignore[no-untyped-def]
    derivatives, log_prob, log_prob_step, entropy, entropy_step, decision, decisions,
):  # fmt: skip
    """Gradient of the logits [BLOCK_A] from those of log_prob and entropy, None: 0."""
    inside = decision < decisions
    grad = tl.zeros(decision.shape, derivatives.dtype.element_ty)
    if entropy is not None:
        by = tl.load(entropy + decision * entropy_step, inside, other=0.0)
        grad = by * tl.load(derivatives + decisions + decision, inside, other=0.0)
    if log_prob is not None:
        by = tl.load(log_prob + decision * log_prob_step, inside, other=0.0)
        grad = tl.fma(tl.load(derivatives + decision, inside, other=0.0), by, grad)
    return grad


@triton.jit
def _cosine_backward(x, y, grad):  # type: ignore[no-untyped-def]
    """What the gradient [BLOCK_A] of the cosine adds to those of the rows x and y."""
    cosine, x_norm, y_norm = cosine_of(x, y)
    slope = grad.to(tl.float64)
    both = (slope / (x_norm * y_norm))[:, None]
    # A norm below the smallest is a constant.
    along_x = tl.where(x_norm > like(x_norm, 1e-8), slope * cosine / (x_norm * x_norm), 0.0)
    along_y = tl.where(y_norm > like(y_norm, 1e-8), slope * cosine / (y_norm * y_norm), 0.0)
    wide_x, wide_y = x.to(tl.float64), y.to(tl.float64)
    add_x = both * wide_y - along_x[:, None] * wide_x
    add_y = both * wide_x - along_y[:, None] * wide_y
    return add_x.to(x.dtype), add_y.to(y.dtype)


@triton.jit(do_not_specialize=["log_prob_step", "entropy_step", "decisions", "units"])
def gate_backward_kernel(  # type: ignore[no-untyped-def]
    derivatives, log_prob, log_prob_step, entropy, entropy_step, grad_state,
    hidden_weight, out_weight, state, hidden,
    grad_means, inputs, grad_hidden,  # (A, 2C), (A, 2C + 1), (A, K)
    decisions, units, width,
    NETWORK: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: one program per BLOCK_A decisions."""
    WIDE: tl.constexpr = state.dtype.element_ty
    decision = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)  # [BLOCK_A]
    channel = tl.arange(0, BLOCK_C)
    inside = decision < decisions
    in_width = (channel < width)[None, :]
    keep = inside[:, None] & in_width
    left = (decision * (2 * width + 1))[:, None] + channel[None, :]  # image part of a state
    x = tl.load(state + left, keep, other=0.0)
    y = tl.load(state + left + width, keep, other=0.0)
    last = decision * (2 * width + 1) + 2 * width
    grad_x = tl.zeros([BLOCK_A, BLOCK_C], WIDE)
    grad_y = grad_x
    grad_cosine = tl.zeros([BLOCK_A], WIDE)
    if grad_state is not None:
        grad_x = tl.load(grad_state + left, keep, other=0.0)
        grad_y = tl.load(grad_state + left + width, keep, other=0.0)
        grad_cosine = tl.load(grad_state + last, inside, other=0.0)
    if NETWORK:
        slope = _logit_gradient(
            derivatives, log_prob, log_prob_step, entropy, entropy_step, decision, decisions
        )
        of_x = tl.zeros([BLOCK_A, BLOCK_C], WIDE)
        of_y = of_x
        for start in range(0, units, BLOCK_K):
            unit = start + tl.arange(0, BLOCK_K)
            exists = unit < units
            here = decision[:, None] * units + unit[None, :]
            there = inside[:, None] & exists[None, :]
            out = tl.load(out_weight + unit, exists, other=0.0)
            before = tl.load(hidden + here, there, other=0.0)
            grad = slope[:, None] * out[None, :] * gelu(before)[1]  # [BLOCK_A, BLOCK_K]
            tl.store(grad_hidden + here, grad, there)
            by_image, by_text, by_cosine = weights_of(
                hidden_weight, unit, units, channel, width, BLOCK_C
            )
            of_x += tl.sum(grad[:, :, None] * by_image[None, :, :], 1)
            of_y += tl.sum(grad[:, :, None] * by_text[None, :, :], 1)
            grad_cosine += tl.sum(grad * by_cosine[None, :], 1)
        norm, factor = normalise(x, in_width, width)
        grad_x += normalise_backward(of_x, norm, factor, in_width, width)
        tl.store(inputs + left, norm, keep)
        norm, factor = normalise(y, in_width, width)
        grad_y += normalise_backward(of_y, norm, factor, in_width, width)
        tl.store(inputs + left + width, norm, keep)
        tl.store(inputs + last, tl.load(state + last, inside, other=0.0), inside)
    add_x, add_y = _cosine_backward(x, y, grad_cosine)
    grad_x += add_x
    grad_y += add_y
    to = (decision * (2 * width))[:, None] + channel[None, :]
    tl.store(grad_means + to, grad_x, keep)
    tl.store(grad_means + to + width, grad_y, keep)


@triton.jit
def _spread_row(  # type: ignore[no-untyped-def]
    out, grad_means, mask, mask_outer, mask_token, length, outer, first, count, members, width,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[outer, :C] = the sum of `count` rows from `first` on, per token and member of a mean."""
    tokens = tl.zeros([BLOCK_L], tl.int32)
    for start in range(0, length, BLOCK_L):
        token = start + tl.arange(0, BLOCK_L)
        keep = token < length
        if mask is not None:
            here = mask + outer * mask_outer + token.to(tl.int64) * mask_token
            keep = keep & (tl.load(here, keep, other=0) != 0)
        tokens += keep.to(tl.int32)
    shares = tl.maximum(tl.sum(tokens, 0), 1).to(tl.int64) * members
    for begin in range(0, width, BLOCK_C):
        channel = begin + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_C], out.dtype.element_ty)
        for start in range(0, count, BLOCK_D):
            row = start + tl.arange(0, BLOCK_D)
            there = (row < count)[:, None] & (channel < width)[None, :]
            here = (first + row)[:, None] * (2 * width) + channel[None, :]
            total += tl.sum(tl.load(grad_means + here, there, other=0.0), 0)
        share = divide(total, tl.zeros_like(total) + shares)
        tl.store(out + outer * width + channel, share, channel < width)


@triton.jit
def _weight_gradients(  # type: ignore[no-untyped-def]
    derivatives, log_prob, log_prob_step, entropy, entropy_step, hidden, inputs, grad_hidden,
    grad_hidden_weight, grad_hidden_bias, grad_out_weight, grad_out_bias,
    tile, decisions, units, features,
    BLOCK_D: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_U, BLOCK_F] of W₁'s gradient; the first of a row of tiles: the others' too."""
    across = tl.cdiv(features, BLOCK_F)
    unit = tile // across * BLOCK_U + tl.arange(0, BLOCK_U)
    feature = tile % across * BLOCK_F + tl.arange(0, BLOCK_F)
    WIDE: tl.constexpr = inputs.dtype.element_ty
    weight = tl.zeros([BLOCK_U, BLOCK_F], WIDE)
    bias = tl.zeros([BLOCK_U], WIDE)
    out = tl.zeros([BLOCK_U], WIDE)
    out_bias = tl.zeros([BLOCK_D], WIDE)
    for start in range(0, decisions, BLOCK_D):
        decision = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        there = (decision < decisions)[:, None] & (unit < units)[None, :]
        here = decision[:, None] * units + unit[None, :]  # [BLOCK_D, BLOCK_U]
        grad = tl.load(grad_hidden + here, there, other=0.0)
        x = tl.load(  # [BLOCK_D, BLOCK_F]
            inputs + decision[:, None] * features + feature[None, :],
            (decision < decisions)[:, None] & (feature < features)[None, :],
            other=0.0,
        )
        weight += tl.sum(grad[:, :, None] * x[:, None, :], 0)
        if tile % across == 0:
            slope = _logit_gradient(
                derivatives, log_prob, log_prob_step, entropy, entropy_step, decision, decisions
            )
            before = tl.load(hidden + here, there, other=0.0)
            bias += tl.sum(grad, 0)
            out += tl.sum(slope[:, None] * gelu(before)[0], 0)
            out_bias += slope
    to = grad_hidden_weight + unit.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(to, weight, (unit < units)[:, None] & (feature < features)[None, :])
    if tile % across == 0:
        tl.store(grad_hidden_bias + unit, bias, unit < units)
        tl.store(grad_out_weight + unit, out, unit < units)
    if tile == 0:
        tl.store(grad_out_bias, tl.sum(out_bias, 0))


@triton.jit(
    do_not_specialize=[
        "log_prob_step", "entropy_step", "images", "groups", "group", "used", "span", "members",
        "texts", "share", "image_length", "text_length", "decisions", "units",
    ]
)  # fmt: skip
def gate_spread_kernel(  # type: ignore[no-untyped-def]
    derivatives, log_prob, log_prob_step, entropy, entropy_step, hidden, inputs, grad_hidden,
    grad_means, image_mask, image_mask_b, image_mask_n, text_mask, text_mask_t, text_mask_p,
    grad_image, grad_text,  # (B, C), (T, C)
    grad_hidden_weight, grad_hidden_bias, grad_out_weight, grad_out_bias,
    images, groups, group, used, span, members, texts, share, image_length, text_length,
    decisions, units, width,
    NETWORK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Grid: one program per image, per text, and per tile of W₁, in this order.

    span: images of a decision, used or not; share: decisions of a text.
    """
    program = tl.program_id(0)
    if program < images:
        outer = program.to(tl.int64)
        # An image that makes no state has a sum of no rows.
        count = (outer % group < used).to(tl.int32)
        _spread_row(
            grad_image, grad_means, image_mask, image_mask_b, image_mask_n, image_length,
            outer, outer // span, count, members, width, BLOCK_D, BLOCK_L, BLOCK_C,
        )  # fmt: skip
    elif program < images + groups:
        outer = (program - images).to(tl.int64)
        _spread_row(
            grad_text, grad_means + width, text_mask, text_mask_t, text_mask_p, text_length,
            outer, outer * share // texts, share, texts, width, BLOCK_D, BLOCK_L, BLOCK_C,
        )  # fmt: skip
    elif NETWORK:
        _weight_gradients(
            derivatives, log_prob, log_prob_step, entropy, entropy_step, hidden, inputs,
            grad_hidden, grad_hidden_weight, grad_hidden_bias, grad_out_weight, grad_out_bias,
            program - images - groups, decisions, units, 2 * width + 1, BLOCK_D, BLOCK_U, BLOCK_F,
        )  # fmt: skip


def backward(
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_state: Tensor | None,
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    groups_per_decision: int,
    state_images: int,
    hidden_weight: Tensor | None,
    out_weight: Tensor | None,
    state: Tensor,
    hidden: Tensor,
    derivatives: Tensor,
    *,
    recorder: Recorder | None = None,
) -> tuple[Tensor, ...]:
    """Two launches; arguments and results as the op's (``dvla_fast/ops/schemas.py``).

    Args:
        recorder: is told the launches where they are all there is to a call.

    Returns:
        (grad_image, grad_text, grad_hidden_weight, grad_hidden_bias, grad_out_weight,
        grad_out_bias): of each token that counts (B, C), (T, C), and of the weights.
    """
    z = problem_of(image_tokens, text_tokens, groups_per_decision, state_images)
    units = 0 if hidden_weight is None else hidden_weight.shape[0]
    network = units > 0 and not (grad_log_prob is None and grad_entropy is None)
    features = 2 * z.width + 1
    sizes = ((units, features), (units,), (1, units), (1,)) if units else ((0,),) * 4
    make = state.new_empty if network else state.new_zeros
    rows = (state.new_empty(z.images, z.width), state.new_empty(z.groups, z.width))
    outputs = (*rows, *(make(size) for size in sizes))
    between = (
        state.new_empty(z.decisions, 2 * z.width),
        state.new_empty((z.decisions, features) if network else 0),
        state.new_empty((z.decisions, units) if network else 0),
    )
    like = derivatives[0] if network else state
    incoming = [x for grad in (grad_log_prob, grad_entropy) for x in one_or_all(grad, like)]
    weights = (hidden_weight, out_weight) if network else (None, None)
    saved = (state, hidden, derivatives)
    masks = ((image_mask, image_tokens.shape[1]), (text_mask, text_tokens.shape[1]))
    steps = (
        decisions_step(z, incoming, grad_state, weights, saved, between),
        spread_step(z, incoming, saved, between, masks, outputs, units if network else 0),
    )
    launched = run(steps, state)
    if recorder is not None and (network or not units):  # else zeros are among the results
        recorder(outputs, between, launched)
    return outputs


def decisions_step(
    z: Problem,
    incoming: list[Any],
    grad_state: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None],
    saved: tuple[Tensor, Tensor, Tensor],
    between: tuple[Tensor, Tensor, Tensor],
) -> Step:
    """The first launch, touching no data (meta tensors do)."""
    state, hidden, derivatives = (x.contiguous() for x in saved)
    units = 0 if weights[0] is None else weights[0].shape[0]
    arguments = (
        derivatives, *incoming, None if grad_state is None else grad_state.contiguous(),
        *(x if x is None else x.contiguous() for x in weights),
        state, hidden, *between, z.decisions, units, z.width,
    )  # fmt: skip
    constants = {
        "NETWORK": units > 0,
        "BLOCK_A": z.block_decisions(),
        "BLOCK_K": z.block_of(units),
        "BLOCK_C": z.block_width(),
        **options(),
    }
    grid = (-(-z.decisions // z.block_decisions()),)
    return gate_backward_kernel, grid, arguments, constants


def spread_step(
    z: Problem,
    incoming: list[Any],
    saved: tuple[Tensor, Tensor, Tensor],
    between: tuple[Tensor, Tensor, Tensor],
    masks: tuple[tuple[Tensor | None, int], tuple[Tensor | None, int]],
    outputs: tuple[Tensor, ...],
    units: int,
) -> Step:
    """The second launch; ``masks``: with the number of tokens; ``units`` 0: no weights."""
    _, hidden, derivatives = (x.contiguous() for x in saved)
    grad_means, inputs, grad_hidden = between
    (image_mask, image_length), (text_mask, text_length) = masks
    arguments = (
        derivatives, *incoming, hidden, inputs, grad_hidden, grad_means,
        *mask_of(image_mask), *mask_of(text_mask), *outputs,
        z.images, z.groups, z.group, z.used, z.images // z.decisions, z.members, z.texts, z.share,
        image_length, text_length, z.decisions, units, z.width,
    )  # fmt: skip
    constants = {
        "NETWORK": units > 0,
        "BLOCK_D": min(DECISIONS, triton.next_power_of_2(z.decisions)),
        "BLOCK_L": TOKENS,
        "BLOCK_C": CHANNELS,
        "BLOCK_U": UNITS,
        "BLOCK_F": FEATURES,
        **options(4),
    }
    tiles = -(-units // UNITS) * -(-(2 * z.width + 1) // FEATURES)
    return gate_spread_kernel, (z.images + z.groups + tiles,), arguments, constants
