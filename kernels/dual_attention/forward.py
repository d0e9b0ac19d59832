"""Dual attention, forward: one launch computes both softmaxes and their gated mix.

    O_image = softmax(Q Kᵢᵀ · scale) Vᵢ          cross-attention, per image
    O_text  = softmax(Q Kₜᵀ · scale) Vₜ          self-attention inside the text, per group
    out     = α · O_image + (1 − α) · O_text

B = T·G images: the G images of a text group are consecutive and share Q, Kₜ and Vₜ, which are read
through their own strides and never expanded.

    query        (T, H, P, D)   any strides; float32, float16 or bfloat16
    image_key    (B, H, N, D)   likewise; so is image_value
    text_key     (T, H, S, D)   likewise; so is text_value
    alpha        (B, H)         float32, any strides (0 where it is expanded)
    image_mask   (B, N)         bool, True = attend; text_mask (T, S)
    out          (B, H, P, D)   stored (B, P, H, D); so are image_out and text_out (T, H, P, D)
    image_lse    (B, H, P)      float32, ln Σ exp(score); -inf without a key; text_lse (T, H, P)

A program owns BLOCK_P query rows of one (group, head). It computes their text attention once, keeps
it in registers, and then walks over up to IMAGES images of the group, mixing each into `out`. One
launch instead of two: at few-shot sizes a launch costs more than the text attention itself, and a
second kernel would send O_text through memory. When a group's images are spread over several
programs for the sake of parallelism, each of those repeats the (small) text attention; for G = 1,
or once a grid fills the device, that is once per group or per 16 images (`launch.py`).

Keys stream through an online softmax in base 2 (scores are scaled by scale · log₂e), accumulated in
float32. Nothing of size P × N exists.

The head dimension is padded to a power of two. Two dots of 32 + 16 in place of one of 64 were tried
for D = 48: on sm_90 with 64 rows a quarter less tensor-core work, 11 % fewer instructions and no
more registers, but with 16 rows three times the HMMA instructions and spills. At D = 24 there is
nothing to gain: a half-type product takes steps of 16. What the padding costs is arithmetic alone,
as masked elements are never read, and few-shot sizes are not bound by arithmetic.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import Recorder, Step, run
from .arguments import (
    Layout,
    by_token,
    layouts_of,
    needs_wide_offsets,
    options_of,
    problem_of,
    strides_of,
)
from .launch import Device, choose, device_of, remembered

# out, image_out, text_out, image_lse, text_lse
Results: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,  # [BLOCK_P, BLOCK_D]
    key,  # pointer to (length, D)
    value,  # pointer to (length, D)
    mask,  # pointer to (length,), or None
    length,
    key_l, key_d, value_l, value_d, mask_l,
    score_scale,  # scale · log₂e
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Softmax attention of a block of rows over all keys: ([BLOCK_P, BLOCK_D], lse₂ [BLOCK_P])."""
    position = tl.arange(0, BLOCK_L)
    offset_l = position.to(INDEX)
    offset_d = tl.arange(0, BLOCK_D).to(INDEX)
    in_head = tl.arange(0, BLOCK_D) < HEAD_DIM
    key_offsets = offset_d[:, None] * key_d + offset_l[None, :] * key_l * UNIT  # [BLOCK_D, BLOCK_L]
    value_offsets = (  # [BLOCK_L, BLOCK_D]
        offset_l[:, None] * value_l * UNIT + offset_d[None, :] * value_d
    )

    top = tl.full([BLOCK_P], float("-inf"), tl.float32)  # running row maximum
    total = tl.zeros([BLOCK_P], tl.float32)  # running Σ exp2(score - top)
    out = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_L):
        keep = start + position < length  # [BLOCK_L]
        first = tl.cast(start, tl.int64)
        if HAS_MASK:
            keep = keep & (tl.load(mask + first * mask_l + offset_l * mask_l, keep, other=0) != 0)
        # What a mask hides is not even read: NaN in the padding must not reach 0 · NaN.
        k = tl.load(  # [BLOCK_D, BLOCK_L]
            key + first * key_l * UNIT + key_offsets, in_head[:, None] & keep[None, :], other=0.0
        )
        v = tl.load(  # [BLOCK_L, BLOCK_D]
            value + first * value_l * UNIT + value_offsets,
            keep[:, None] & in_head[None, :],
            other=0.0,
        )
        score = tl.dot(query, k, input_precision=PRECISION) * score_scale  # [BLOCK_P, BLOCK_L]
        score = tl.where(keep[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # A row that has met no key yet has top = -inf; -inf - -inf would be NaN.
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(score - finite_top[:, None])  # [BLOCK_P, BLOCK_L]
        shrink = tl.exp2(top - finite_top)
        total = total * shrink + tl.sum(weight, 1)
        out = out * shrink[:, None]
        out = tl.dot(weight.to(v.dtype), v, out, input_precision=PRECISION)
        top = new_top
    empty = total == 0.0
    out = out / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), top + tl.log2(total))
    return out, lse


# Sizes are not specialised: the code is the same whether they are 1 or divide by 16, and a new
# batch size must not compile a new kernel.
@triton.jit(do_not_specialize=["group_size", "heads", "rows", "image_keys", "text_keys", "images"])
def dual_attention_forward_kernel(  # type: ignore[no-untyped-def]
    query, image_key, image_value, text_key, text_value, alpha, image_mask, text_mask,
    out, image_out, text_out, image_lse, text_lse,
    query_t, query_h, query_p, query_d,
    image_key_b, image_key_h, image_key_n, image_key_d,
    image_value_b, image_value_h, image_value_n, image_value_d,
    text_key_t, text_key_h, text_key_s, text_key_d,
    text_value_t, text_value_h, text_value_s, text_value_d,
    alpha_b, alpha_h, image_mask_b, image_mask_n, text_mask_t, text_mask_s,
    score_scale, group_size, heads, rows, image_keys, text_keys, images,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_IMAGE_MASK: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Grid: one program per (row block, head, run of images, group), the first fastest."""
    LN_2: tl.constexpr = 0.6931471805599453
    row_blocks = tl.cdiv(rows, BLOCK_P)
    runs = tl.cdiv(group_size, images)
    program = tl.program_id(0)
    row_start = (program % row_blocks) * BLOCK_P
    program = program // row_blocks
    # What multiplies an outer stride is 64-bit: a batch may be larger than 2³¹ elements.
    head = (program % heads).to(tl.int64)
    program = program // heads
    run = program % runs
    group = (program // runs).to(tl.int64)

    row = row_start + tl.arange(0, BLOCK_P)
    dim = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (dim < HEAD_DIM)[None, :]  # [BLOCK_P, BLOCK_D]
    offset_p = tl.arange(0, BLOCK_P).to(INDEX)
    offset_d = dim.to(INDEX)
    first_row = row_start.to(tl.int64)
    q = tl.load(  # [BLOCK_P, BLOCK_D]
        query + (group * query_t + head * query_h + first_row * query_p) * UNIT
        + offset_p[:, None] * query_p * UNIT + offset_d[None, :] * query_d,
        inside,
        other=0.0,
    )  # fmt: skip
    # Outputs are stored (…, P, H, D): within one program, row p lies H·D elements after row p - 1.
    width = heads * HEAD_DIM
    out_offsets = offset_p[:, None] * width + offset_d[None, :]  # [BLOCK_P, BLOCK_D]

    text, lse = _attend(
        q,
        text_key + (group * text_key_t + head * text_key_h) * UNIT,
        text_value + (group * text_value_t + head * text_value_h) * UNIT,
        text_mask + group * text_mask_t if HAS_TEXT_MASK else text_mask,
        text_keys,
        text_key_s, text_key_d, text_value_s, text_value_d, text_mask_s,
        score_scale,
        HEAD_DIM, BLOCK_P, BLOCK_S, BLOCK_D, HAS_TEXT_MASK, PRECISION, INDEX, UNIT,
    )  # fmt: skip
    if SAVE and run == 0:
        text_base = (group * rows + first_row) * width + head * HEAD_DIM
        tl.store(text_out + text_base + out_offsets, text, inside)
        lse_base = (group * heads + head) * rows
        tl.store(text_lse + lse_base + row, lse * LN_2, row < rows)

    for member in range(run * images, tl.minimum(run * images + images, group_size)):
        batch = group * group_size + member
        image, lse = _attend(
            q,
            image_key + (batch * image_key_b + head * image_key_h) * UNIT,
            image_value + (batch * image_value_b + head * image_value_h) * UNIT,
            image_mask + batch * image_mask_b if HAS_IMAGE_MASK else image_mask,
            image_keys,
            image_key_n, image_key_d, image_value_n, image_value_d, image_mask_n,
            score_scale,
            HEAD_DIM, BLOCK_P, BLOCK_N, BLOCK_D, HAS_IMAGE_MASK, PRECISION, INDEX, UNIT,
        )  # fmt: skip
        gate = tl.load(alpha + batch * alpha_b + head * alpha_h)
        mixed = gate * image + (1.0 - gate) * text
        base = (batch * rows + first_row) * width + head * HEAD_DIM
        tl.store(out + base + out_offsets, mixed, inside)
        if SAVE:
            tl.store(image_out + base + out_offsets, image, inside)
            tl.store(image_lse + (batch * heads + head) * rows + row, lse * LN_2, row < rows)


def forward(
    query: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    alpha: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float,
    save: bool,
    *,
    precision: str = "ieee",
    recorder: Recorder | None = None,
) -> Results:
    """Launches the kernel; shapes as in the module docstring, already checked by the public op.

    Args:
        save: also return what a backward needs; else the last four results are empty.
        precision: how float32 products run: ``"ieee"`` (float32 arithmetic), ``"tf32x3"`` (tensor
            cores, three products to nearly float32 accuracy; ``"ieee"`` above head dimension 128)
            or ``"tf32"``. Ignored by half types.
        recorder: is told the launch, which is all there is to a call.

    Returns:
        (out, image_out, text_out, image_lse, text_lse).

    Raises:
        TypeError: the dtype has no kernel.
        ValueError: the head dimension is above 256, or ``precision`` is unknown.
    """
    outputs = _allocate(query, image_key.shape[0], save)
    inputs = (query, image_key, image_value, text_key, text_value, alpha, image_mask, text_mask)
    launched = run([step(inputs, outputs, scale, save, precision)], query)
    if not launched:
        # No rows, or no images to carry the text along: nothing may stay uninitialised.
        for result in outputs:
            result.zero_()
    elif recorder is not None:
        recorder(outputs, (), launched)
    return outputs


def step(
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    scale: float,
    save: bool,
    precision: str = "ieee",
) -> Step:
    """The launch, touching no data (meta tensors do)."""
    query = inputs[0]
    assert query is not None
    grid, numbers, constants = _plan(
        layouts_of(inputs), query.dtype, device_of(query.device), scale, save, precision
    )
    return dual_attention_forward_kernel, grid, (*inputs, *outputs, *numbers), constants


@remembered
def _plan(
    layouts: tuple[Layout | None, ...],
    dtype: torch.dtype,
    device: Device,
    scale: float,
    save: bool,
    precision: str,
) -> tuple[tuple[int], tuple[float, ...], dict[str, Any]]:
    """Grid, the numbers that follow the tensors, and constants with options by name."""
    problem = problem_of(layouts, dtype, precision)
    launch = choose("forward", problem, device)
    assert launch is not None
    unit, strides = strides_of(layouts, dtype.itemsize)
    numbers = (
        *strides,
        # Rounded to float32 once: each rounding here errs in all scores, in the same direction.
        float(scale) * math.log2(math.e),
        problem.group_size, problem.heads, problem.rows, problem.image_keys, problem.text_keys,
        launch.images,
    )  # fmt: skip
    constants = {
        "HEAD_DIM": problem.head_dim,
        "BLOCK_P": launch.block_p,
        "BLOCK_N": launch.block_n,
        "BLOCK_S": launch.block_s,
        "BLOCK_D": launch.block_d,
        "HAS_IMAGE_MASK": layouts[6] is not None,
        "HAS_TEXT_MASK": layouts[7] is not None,
        "SAVE": save,
        "PRECISION": problem.precision,
        "INDEX": tl.int64 if needs_wide_offsets(layouts, launch) else tl.int32,
        "UNIT": unit,
        **options_of(launch),
    }
    runs = -(-problem.group_size // launch.images)
    row_blocks = -(-problem.rows // launch.block_p)
    return (row_blocks * problem.heads * runs * problem.groups,), numbers, constants


def _allocate(query: Tensor, batch: int, save: bool) -> Results:
    """The five results, uninitialised; see the module docstring for how they are stored."""
    groups, heads, rows, _ = query.shape
    out = by_token(query, batch)
    if not save:
        # Four tensors, not one: an op must not return the same tensor twice.
        image_out, text_out = query.new_empty(0), query.new_empty(0)
        image_lse, text_lse = (query.new_empty(0, dtype=torch.float32) for _ in range(2))
        return out, image_out, text_out, image_lse, text_lse
    return (
        out,
        by_token(query, batch),
        by_token(query, groups),
        query.new_empty(batch, heads, rows, dtype=torch.float32),
        query.new_empty(groups, heads, rows, dtype=torch.float32),
    )
