"""Dual attention, backward: the gradients of the five tensors and of the gate, no atomics.

With dO the gradient of `out`, W the softmax weights that the saved log-sum-exps give back, and
δ = Σ_d dO · O the row sums that a softmax's gradient takes from its weights:

    dα = Σ_rows (δ_image − δ_text)
    image path, per image:   dV = α Wᵀ dO      dS = α W ∘ (dO Vᵀ − δ_image)      dK = scale · dSᵀ Q
    text path, per group:    the same with Σ_images (1 − α) dO for α dO, in which it is linear
    dQ = scale · (Σ_images dS Kᵢ + dS_text Kₜ)

Shapes, dtypes and strides of inputs are those of ``forward.py``; further

    grad_out     (B, H, P, D)   any strides
    image_out, text_out, image_lse, text_lse: what the forward saved
    gradients    shaped like their tensors, stored (outer, tokens, H, D); alpha's (B, H) float32

Two paths, chosen by the launch table. Where one tile holds all query rows (few-shot sizes), a
program owns the rows of one (group, head) and a run of the group's images: it walks over the keys
of each, writes their gradients at once and sums dQ on chip. If the run is the whole group (always
so for G = 1) it goes on to the text, and that one launch is all. Else each run leaves its sums of
dQ and of (1 − α) dO, and a second launch adds them up in order and runs the text path.

Longer queries go through the same kernel in row blocks for dQ alone; then a kernel that owns a
block of keys and walks over the rows makes dK and dV. Nothing of size P × N exists.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import Recorder, Step, run
from .arguments import by_token, layouts_of
from .backward_plan import plan
from .launch import device_of

# of query, image_key, image_value, text_key, text_value, alpha
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _load_lse(pointer, inside):  # type: ignore[no-untyped-def]
    """Base-2 log-sum-exps [BLOCK_P]; +inf, which makes every weight 0, for rows without a key."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    lse = tl.load(pointer, inside, other=float("-inf")) * LOG2_E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _score_gradient(  # type: ignore[no-untyped-def]
    query,  # [BLOCK_P, BLOCK_D]
    grad,  # [BLOCK_P, BLOCK_D]
    lse,  # [BLOCK_P], base 2
    delta,  # [BLOCK_P]
    key,  # [BLOCK_L, BLOCK_D]
    value,  # [BLOCK_L, BLOCK_D]
    keep,  # [BLOCK_L]
    score_scale,  # scale · log₂e
    PRECISION: tl.constexpr,
):
    """Weights of one tile and the gradient of its scores, both [BLOCK_L, BLOCK_P].

    Keys come first: they are many even where the rows are few, as tensor cores want it, and dK and
    dV then take the tile from registers as it is.
    """
    score = tl.dot(key, tl.trans(query), input_precision=PRECISION) * score_scale
    score = tl.where(keep[:, None], score, float("-inf"))
    weight = tl.exp2(score - lse[None, :])
    grad_weight = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    return weight, weight * (grad_weight - delta[None, :])


@triton.jit
def _walk_keys(  # type: ignore[no-untyped-def]
    query,  # [BLOCK_P, BLOCK_D]
    grad,  # [BLOCK_P, BLOCK_D], before the gate
    lse,  # [BLOCK_P], base 2
    delta,  # [BLOCK_P], before the gate
    gate,
    grad_query,  # [BLOCK_P, BLOCK_D], what is added to
    key,  # pointer to (length, D)
    value,  # pointer to (length, D)
    mask,  # pointer to (length,), or None
    grad_key,  # pointer to (length, D), rows `width` apart
    grad_value,  # pointer to (length, D), rows `width` apart
    length,
    key_l, key_d, value_l, value_d, mask_l, width,
    score_scale,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Adds dQ / scale of one path to `grad_query`; stores dK and dV if these are all rows."""
    position = tl.arange(0, BLOCK_L)
    offset_l = position.to(INDEX)
    offset_d = tl.arange(0, BLOCK_D).to(INDEX)
    in_head = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    key_offsets = offset_l[:, None] * key_l * UNIT + offset_d[None, :] * key_d
    value_offsets = offset_l[:, None] * value_l * UNIT + offset_d[None, :] * value_d
    grad_offsets = offset_l[:, None] * width + offset_d[None, :]
    for start in range(0, length, BLOCK_L):
        inside = start + position < length  # [BLOCK_L]
        first = tl.cast(start, tl.int64)
        keep = inside
        if HAS_MASK:  # what a mask hides is not even read: NaN there must not reach 0 · NaN
            keep = keep & (tl.load(mask + first * mask_l + offset_l * mask_l, keep, other=0) != 0)
        readable = keep[:, None] & in_head
        k = tl.load(key + first * key_l * UNIT + key_offsets, readable, other=0.0)
        v = tl.load(value + first * value_l * UNIT + value_offsets, readable, other=0.0)
        weight, grad_score = _score_gradient(
            query, grad, lse, delta, k, v, keep, score_scale, PRECISION
        )
        grad_score = (grad_score * gate).to(k.dtype)
        if ALL_ROWS:
            stored = inside[:, None] & in_head
            dv = tl.dot(weight.to(grad.dtype), grad, input_precision=PRECISION) * gate
            tl.store(grad_value + first * width + grad_offsets, dv, stored)
            dk = tl.dot(grad_score, query, input_precision=PRECISION) * scale
            tl.store(grad_key + first * width + grad_offsets, dk, stored)
        grad_query = tl.dot(tl.trans(grad_score), k, grad_query, input_precision=PRECISION)
    return grad_query


# Sizes are not specialised: the code is the same whether they are 1 or divide by 16, and a new
# batch size must not compile a new kernel.
@triton.jit(do_not_specialize=["group_size", "heads", "rows", "image_keys", "text_keys", "images"])
def dual_attention_backward_rows_kernel(  # type: ignore[no-untyped-def]
    grad_out, query, image_key, image_value, text_key, text_value, alpha, image_mask, text_mask,
    image_out, text_out, image_lse, text_lse,
    grad_query, grad_image_key, grad_image_value, grad_text_key, grad_text_value,
    grad_alpha,  # (B, H, row blocks)
    query_sum,  # (T, runs, H, P, D) float32, what each run adds to dQ / scale
    text_grad,  # (T, runs, H, P, D) float32, what each run adds to Σ (1 - α) dO
    image_delta,  # (B, H, P) float32
    text_delta,  # (T, H, P) float32
    grad_b, grad_h, grad_p, grad_d,
    query_t, query_h, query_p, query_d,
    image_key_b, image_key_h, image_key_n, image_key_d,
    image_value_b, image_value_h, image_value_n, image_value_d,
    text_key_t, text_key_h, text_key_s, text_key_d,
    text_value_t, text_value_h, text_value_s, text_value_d,
    alpha_b, alpha_h, image_mask_b, image_mask_n, text_mask_t, text_mask_s,
    score_scale, scale, group_size, heads, rows, image_keys, text_keys, images,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_IMAGE_MASK: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr,
    SHARED: tl.constexpr,  # several images share a text
    IMAGE_PATH: tl.constexpr,  # walk over the images of a run; else add up what the runs left
    TEXT_PATH: tl.constexpr,  # run the text path and store dQ; else leave the run's sums
    ALL_ROWS: tl.constexpr,  # a program holds every row: store the gradients of keys and values
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Grid: one program per (row block, head, run of images, group), the first fastest.

    Without IMAGE_PATH a program takes all runs of its group. Without ALL_ROWS it leaves the δ of
    its rows, and the sum of (1 - α) dO in the place of run 0, to the keys kernel.
    """
    row_blocks = tl.cdiv(rows, BLOCK_P)
    runs = tl.cdiv(group_size, images)
    program = tl.program_id(0)
    row_block = program % row_blocks
    row_start = row_block * BLOCK_P
    program = program // row_blocks
    # What multiplies an outer stride is 64-bit: a batch may be larger than 2³¹ elements.
    head = (program % heads).to(tl.int64)
    program = program // heads
    run = 0
    if IMAGE_PATH:
        run = program % runs
        program = program // runs
    group = program.to(tl.int64)

    row = row_start + tl.arange(0, BLOCK_P)
    in_rows = row < rows
    dim = tl.arange(0, BLOCK_D)
    inside = in_rows[:, None] & (dim < HEAD_DIM)[None, :]  # [BLOCK_P, BLOCK_D]
    offset_p = tl.arange(0, BLOCK_P).to(INDEX)
    offset_d = dim.to(INDEX)
    first_row = row_start.to(tl.int64)
    q = tl.load(  # [BLOCK_P, BLOCK_D]
        query + (group * query_t + head * query_h + first_row * query_p) * UNIT
        + offset_p[:, None] * query_p * UNIT + offset_d[None, :] * query_d,
        inside,
        other=0.0,
    )  # fmt: skip
    grad_base = grad_out + (head * grad_h + first_row * grad_p) * UNIT
    grad_offsets = offset_p[:, None] * grad_p * UNIT + offset_d[None, :] * grad_d
    # Tensors stored (…, P, H, D): row p lies H·D elements after row p - 1.
    width = heads * HEAD_DIM
    row_base = first_row * width + head * HEAD_DIM
    row_offsets = offset_p[:, None] * width + offset_d[None, :]
    # Sums of a run, (…, H, P, D); the next run's lie `run_size` further.
    run_size = heads.to(tl.int64) * rows * HEAD_DIM
    part = group * runs * run_size + (head * rows + first_row) * HEAD_DIM
    part_offsets = offset_p[:, None] * HEAD_DIM + offset_d[None, :]

    text_base = group * rows * width + row_base
    text_rows = (group * heads + head) * rows + row
    dq = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)  # dQ / scale
    shared_grad = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)  # Σ (1 - α) dO
    if IMAGE_PATH:
        first_member = run * images
        last_member = tl.minimum(first_member + images, group_size)
        for member in range(first_member, last_member):
            batch = group * group_size + member
            grad = tl.load(grad_base + batch * grad_b * UNIT + grad_offsets, inside, other=0.0)
            wide_grad = grad.to(tl.float32)
            image_base = batch * rows * width + row_base
            image = tl.load(image_out + image_base + row_offsets, inside, other=0.0)
            text = tl.load(text_out + text_base + row_offsets, inside, other=0.0)
            delta = tl.sum(wide_grad * image.to(tl.float32), 1)  # [BLOCK_P]
            gate = tl.load(alpha + batch * alpha_b + head * alpha_h)
            image_row = (batch * heads + head) * rows + row
            tl.store(
                grad_alpha + (batch * heads + head) * row_blocks + row_block,
                tl.sum(delta - tl.sum(wide_grad * text.to(tl.float32), 1), 0),
            )
            if not ALL_ROWS:
                tl.store(image_delta + image_row, delta, in_rows)
            dq = _walk_keys(
                q, grad, _load_lse(image_lse + image_row, in_rows), delta, gate, dq,
                image_key + (batch * image_key_b + head * image_key_h) * UNIT,
                image_value + (batch * image_value_b + head * image_value_h) * UNIT,
                image_mask + batch * image_mask_b if HAS_IMAGE_MASK else image_mask,
                grad_image_key + batch * image_keys * width + head * HEAD_DIM,
                grad_image_value + batch * image_keys * width + head * HEAD_DIM,
                image_keys,
                image_key_n, image_key_d, image_value_n, image_value_d, image_mask_n, width,
                score_scale, scale,
                HEAD_DIM, BLOCK_N, BLOCK_D, HAS_IMAGE_MASK, ALL_ROWS, PRECISION, INDEX, UNIT,
            )  # fmt: skip
        if SHARED:  # a second loop, since a sum kept during the first would cost it registers
            for member in range(first_member, last_member):
                batch = group * group_size + member
                grad = tl.load(grad_base + batch * grad_b * UNIT + grad_offsets, inside, other=0.0)
                gate = tl.load(alpha + batch * alpha_b + head * alpha_h)
                shared_grad += grad.to(tl.float32) * (1.0 - gate)
    else:
        for step in tl.range(0, runs, loop_unroll_factor=4):
            start = part + step * run_size
            dq += tl.load(query_sum + start + part_offsets, inside, other=0.0)
            shared_grad += tl.load(text_grad + start + part_offsets, inside, other=0.0)

    if TEXT_PATH:
        text = tl.load(text_out + text_base + row_offsets, inside, other=0.0)
        if SHARED:  # the gate is in the sum
            gate = 1.0
            grad = shared_grad.to(q.dtype)
            delta = tl.sum(shared_grad * text.to(tl.float32), 1)
            if not ALL_ROWS:
                tl.store(text_grad + part + part_offsets, shared_grad, inside)
        else:  # read again what the only image had: held meanwhile, it would fill registers
            gate = 1.0 - tl.load(alpha + group * alpha_b + head * alpha_h)
            grad = tl.load(grad_base + group * grad_b * UNIT + grad_offsets, inside, other=0.0)
            delta = tl.sum(grad.to(tl.float32) * text.to(tl.float32), 1)
        if not ALL_ROWS:
            tl.store(text_delta + text_rows, delta, in_rows)
        dq = _walk_keys(
            q, grad, _load_lse(text_lse + text_rows, in_rows), delta, gate, dq,
            text_key + (group * text_key_t + head * text_key_h) * UNIT,
            text_value + (group * text_value_t + head * text_value_h) * UNIT,
            text_mask + group * text_mask_t if HAS_TEXT_MASK else text_mask,
            grad_text_key + group * text_keys * width + head * HEAD_DIM,
            grad_text_value + group * text_keys * width + head * HEAD_DIM,
            text_keys,
            text_key_s, text_key_d, text_value_s, text_value_d, text_mask_s, width,
            score_scale, scale,
            HEAD_DIM, BLOCK_S, BLOCK_D, HAS_TEXT_MASK, ALL_ROWS, PRECISION, INDEX, UNIT,
        )  # fmt: skip
        tl.store(grad_query + text_base + row_offsets, dq * scale, inside)
    else:
        part += run * run_size
        tl.store(query_sum + part + part_offsets, dq, inside)
        tl.store(text_grad + part + part_offsets, shared_grad, inside)


@triton.jit(do_not_specialize=["group_size", "heads", "rows", "keys"])
def dual_attention_backward_keys_kernel(  # type: ignore[no-untyped-def]
    grad,  # (B, H, P, D), gradient of the output that each query row has here
    query,  # (T, H, P, D), those of B // group_size
    key,  # (B, H, L, D)
    value,  # (B, H, L, D)
    alpha,  # (B, H)
    mask,  # (B, L), or None
    lse,  # (B, H, P) float32
    delta,  # (B, H, P) float32
    grad_key, grad_value,  # (B, H, L, D) stored (B, L, H, D)
    grad_b, grad_h, grad_p, grad_d,
    query_t, query_h, query_p, query_d,
    key_b, key_h, key_l, key_d,
    value_b, value_h, value_l, value_d,
    alpha_b, alpha_h, mask_b, mask_l,
    score_scale, scale, group_size, heads, rows, keys,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GATE: tl.constexpr,  # "alpha", "rest" (1 - alpha), or "none"
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """dK and dV of one path. Grid: one program per (key block, head, outer index)."""
    key_blocks = tl.cdiv(keys, BLOCK_L)
    program = tl.program_id(0)
    key_start = (program % key_blocks) * BLOCK_L
    program = program // key_blocks
    head = (program % heads).to(tl.int64)
    batch = (program // heads).to(tl.int64)
    group = batch // group_size

    position = key_start + tl.arange(0, BLOCK_L)
    offset_l = tl.arange(0, BLOCK_L).to(INDEX)
    offset_p = tl.arange(0, BLOCK_P).to(INDEX)
    offset_d = tl.arange(0, BLOCK_D).to(INDEX)
    in_head = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    first_key = key_start.to(tl.int64)
    inside = position < keys  # [BLOCK_L]
    keep = inside
    if HAS_MASK:
        mask_base = mask + batch * mask_b + first_key * mask_l
        keep = keep & (tl.load(mask_base + offset_l * mask_l, keep, other=0) != 0)
    readable = keep[:, None] & in_head
    k = tl.load(  # [BLOCK_L, BLOCK_D]
        key + (batch * key_b + head * key_h + first_key * key_l) * UNIT
        + offset_l[:, None] * key_l * UNIT + offset_d[None, :] * key_d,
        readable,
        other=0.0,
    )  # fmt: skip
    v = tl.load(  # [BLOCK_L, BLOCK_D]
        value + (batch * value_b + head * value_h + first_key * value_l) * UNIT
        + offset_l[:, None] * value_l * UNIT + offset_d[None, :] * value_d,
        readable,
        other=0.0,
    )  # fmt: skip
    query_base = query + (group * query_t + head * query_h) * UNIT
    query_offsets = offset_p[:, None] * query_p * UNIT + offset_d[None, :] * query_d
    grad_base = grad + (batch * grad_b + head * grad_h) * UNIT
    grad_offsets = offset_p[:, None] * grad_p * UNIT + offset_d[None, :] * grad_d
    rows_base = (batch * heads + head) * rows

    dk = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for start in range(0, rows, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        in_rows = row < rows
        first = tl.cast(start, tl.int64)
        loaded = in_rows[:, None] & in_head
        q = tl.load(query_base + first * query_p * UNIT + query_offsets, loaded, other=0.0)
        do = tl.load(grad_base + first * grad_p * UNIT + grad_offsets, loaded, other=0.0)
        do = do.to(k.dtype)
        row_lse = _load_lse(lse + rows_base + row, in_rows)
        row_delta = tl.load(delta + rows_base + row, in_rows, other=0.0)
        weight, grad_score = _score_gradient(
            q, do, row_lse, row_delta, k, v, keep, score_scale, PRECISION
        )
        dv = tl.dot(weight.to(k.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(grad_score.to(k.dtype), q, dk, input_precision=PRECISION)
    gate = 1.0
    if GATE != "none":
        gate = tl.load(alpha + batch * alpha_b + head * alpha_h)
        if GATE == "rest":
            gate = 1.0 - gate
    width = heads * HEAD_DIM
    base = (batch * keys + first_key) * width + head * HEAD_DIM
    offsets = offset_l[:, None] * width + offset_d[None, :]
    tl.store(grad_key + base + offsets, dk * (scale * gate), inside[:, None] & in_head)
    tl.store(grad_value + base + offsets, dv * gate, inside[:, None] & in_head)


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
    *,
    precision: str = "ieee",
    recorder: Recorder | None = None,
) -> Gradients:
    """Launches the kernels; shapes as in the module docstring.

    Args:
        precision: how float32 products run, as in ``forward``.
        recorder: is told the launches where they are all there is to a call.

    Returns:
        Gradients of query, image_key, image_value, text_key, text_value and alpha.

    Raises:
        TypeError: the dtype has no kernel.
        ValueError: the head dimension is above 256, or ``precision`` is unknown.
    """
    inputs = (
        grad_out, query, image_key, image_value, text_key, text_value, alpha, image_mask, text_mask,
    )  # fmt: skip
    saved = (_stored_by_token(image_out), _stored_by_token(text_out), image_lse, text_lse)
    gradients = _allocate(inputs)
    if grad_out.numel() == 0:  # no rows or no images
        for gradient in gradients:
            gradient.zero_()
        return gradients
    launches, work = steps(inputs, saved, gradients, scale, precision)
    launched = run(launches, query)
    partial_alpha, *scratch = work
    if partial_alpha is not None:
        torch.sum(partial_alpha, -1, out=gradients[5])
    elif recorder is not None:
        recorder(gradients, [x for x in scratch if x is not None], launched)
    return gradients


def steps(
    inputs: tuple[Tensor | None, ...],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    scale: float,
    precision: str = "ieee",
) -> tuple[list[Step], list[Tensor | None]]:
    """The launches in order, and what they work in; touches no data.

    The first of the latter is dα by row block, where it needs a sum.
    """
    grad_out, query, *_ = inputs
    assert query is not None
    planned = plan(layouts_of(inputs), query.dtype, device_of(query.device), scale, precision)
    work = [
        None if shape is None else query.new_empty(shape, dtype=torch.float32)
        for shape in planned.workspaces
    ]
    partial_alpha, _, text_grad, image_delta, text_delta = work
    image_lse, text_lse = (lse.contiguous() for lse in saved[2:])
    tensors = (
        *inputs, *saved[:2], image_lse, text_lse, *gradients[:5],
        gradients[5] if partial_alpha is None else partial_alpha, *work[1:],
    )  # fmt: skip
    launches: list[Step] = [
        (dual_attention_backward_rows_kernel, grid, (*tensors, *planned.rows_numbers), constants)
        for grid, constants in planned.rows
    ]
    if planned.keys:
        _, _, *paths, alpha, image_mask, text_mask = inputs
        own_grad = grad_out if text_grad is None else text_grad[:, 0]
        image_grads, text_grads = gradients[1:3], gradients[3:5]
        ends = (
            (grad_out, query, *paths[:2], alpha, image_mask, image_lse, image_delta, *image_grads),
            (own_grad, query, *paths[2:], alpha, text_mask, text_lse, text_delta, *text_grads),
        )
        launches += [
            (dual_attention_backward_keys_kernel, grid, (*path, *numbers), constants)
            for path, (grid, numbers, constants) in zip(ends, planned.keys, strict=True)
        ]
    return launches, work


def _stored_by_token(tensor: Tensor) -> Tensor:
    """As the forward stores its results; a copy only of what went through other hands."""
    by_tokens = tensor.transpose(1, 2)
    return tensor if by_tokens.is_contiguous() else by_tokens.contiguous().transpose(1, 2)


def _allocate(inputs: tuple[Tensor | None, ...]) -> Gradients:
    """The six gradients, uninitialised."""
    *tensors, alpha = (x for x in inputs[1:7] if x is not None)
    gradients = (by_token(x, x.shape[0]) for x in tensors)
    return (*gradients, alpha.new_empty(alpha.shape))  # type: ignore[return-value]
