"""Dual attention: cross-attention to an image and self-attention inside a text, mixed by a gate.

    out = α · softmax(Q Kᵢᵀ · scale) Vᵢ + (1 − α) · softmax(Q Kₜᵀ · scale) Vₜ

(DVLA-RL, the gated attention of method §3.) The images of a text group share Q, Kₜ and Vₜ.
"""

from __future__ import annotations

import functools
import math
from typing import cast

import torch
from torch import Tensor

from dvla_fast import _extension, backends, reference
from dvla_fast.arguments import expect_number, expect_tensor
from dvla_fast.ops import schemas
from dvla_fast.ops.first_order import first_order

_BLOCK_KEYS = 256  # kBlockKeys of csrc/attention/problem.h
_LARGEST = torch.finfo(torch.float32).max
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dual_attention(
    query: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    alpha: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mixes image attention and text attention of one shared query by the gate α, in one pass.

    B images fall into T text groups of G = B/T consecutive images; H heads, P query tokens, S text
    key tokens, N image tokens, head dimension D. Strides are free: a (B, L, H, D) tensor viewed as
    (B, H, L, D) costs no copy, and the result is stored so that ``out.transpose(1, 2).flatten(2)``
    costs none either.

    Args:
        query: (T, H, P, D), float32, float16, bfloat16 or (reference and C++) float64.
        image_key: (B, H, N, D), dtype of ``query``; so are the next three.
        image_value: (B, H, N, D).
        text_key: (T, H, S, D).
        text_value: (T, H, S, D).
        alpha: gate in [0, 1], a floating tensor of shape (), (B,) or (B, H). The range is the
            caller's word: it is not read, which would stall a GPU.
        image_mask: (B, N) bool, True = attend. A path with no key left contributes exactly 0.
        text_mask: (T, S) bool, likewise.
        scale: factor of the scores, a finite float32 number; default D^-1/2. A constant of a
            compiled graph: each value makes a graph of its own.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; default the best for the inputs.

    Returns:
        (B, H, P, D) in the dtype of ``query``. First-order gradients flow to the five tensors, and
        to ``alpha`` when it requires grad.

    Raises:
        TypeError: a dtype is not supported or differs from the query's; a mask is not bool;
            ``scale`` is no number.
        ValueError: shapes or devices do not fit together, or ``scale`` is NaN or infinite.
        BackendError: the backend asked for cannot run with these inputs.
    """
    if backend is None and _extension.runs_plainly():
        # With as little of Python as it takes: it would cost a third of the time of a few images.
        out = _extension.calls.dual_attention(
            query, image_key, image_value, text_key, text_value, alpha, image_mask, text_mask,
            scale, _extension.triton_available(),
        )  # fmt: skip
        if out is not None:
            return cast(Tensor, out)
    _check(query, image_key, image_value, text_key, text_value, alpha, image_mask, text_mask)
    scale = finite_scale(scale, query.shape[-1])
    gate = expand_alpha(alpha, image_key.shape[0], image_key.shape[1], query.dtype)
    tensors = (query, image_key, image_value, text_key, text_value, gate)
    chosen = backends.choose("dual_attention", candidates(query), backend)
    if chosen == "reference":
        return reference.dual_attention(*tensors, image_mask, text_mask, scale)
    if _extension.needs_python_autograd():
        return cast(Tensor, _DualAttention.apply(*tensors, image_mask, text_mask, scale)[0])
    forward = torch.ops.dvla_fast.dual_attention_forward.default
    return forward(*tensors, image_mask, text_mask, scale, False)[0]


def candidates(query: Tensor) -> tuple[tuple[str, str | None], ...]:
    """The implementations for these inputs, best first, each with why it cannot run."""
    device = query.device
    cpp = "the inputs are not on the CPU" if device.type != "cpu" else _extension.problem
    triton = _extension.triton_problem(device, query.dtype, query.shape[-1])
    return (("triton", triton), ("cpp", cpp), ("reference", None))


def finite_scale(scale: float | None, width: int) -> float:
    """The scale asked for, or D^-1/2; raises unless it is a number, finite in float32."""
    if scale is None:
        return 1.0 / math.sqrt(width)
    expect_number("scale", scale)
    if not -_LARGEST <= scale <= _LARGEST:  # written so that NaN is outside
        raise ValueError(f"scale: expected a finite float32 number, got {scale}")
    return scale


def expand_alpha(alpha: Tensor, batch: int, heads: int, dtype: torch.dtype) -> Tensor:
    """(), (B,) or (B, H) to (B, H) in the accumulation dtype, as a view where possible."""
    if alpha.dim() == 1:
        alpha = alpha.unsqueeze(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (alpha if alpha.dtype == wide else alpha.to(wide)).expand(batch, heads)


_DualAttentionBackward = first_order(
    torch.ops.dvla_fast.dual_attention_backward.default, "dual_attention"
)


class _DualAttention(torch.autograd.Function):
    """Forward and backward ops joined; the four saved results are outputs, as torch.func needs."""

    generate_vmap_rule = True  # from those of the two ops, below

    @staticmethod
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
    ) -> tuple[Tensor, ...]:
        return torch.ops.dvla_fast.dual_attention_forward.default(
            query, image_key, image_value, text_key, text_value, alpha,
            image_mask, text_mask, scale, True,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, grad_out, *_unused):  # type: ignore[no-untyped-def]
        grads = _DualAttentionBackward.apply(grad_out, *ctx.saved_tensors, ctx.scale)
        return *grads, None, None, None


@torch.library.register_fake("dvla_fast::dual_attention_forward", lib=schemas.LIBRARY)
def _forward_fake(  # type: ignore[no-untyped-def]
    query, image_key, image_value, text_key, text_value, alpha, image_mask, text_mask, scale, save
):
    groups, heads, rows, width = query.shape
    batch = image_key.shape[0]

    def out_like() -> Tensor:
        return query.new_empty(batch, rows, heads, width).transpose(1, 2)

    wide = alpha.dtype
    if not save or torch.compiler.is_exporting():  # whose sizes may not depend on shapes
        return (
            out_like(),
            *(query.new_empty(0) for _ in range(2)),
            *(alpha.new_empty(0) for _ in range(2)),
        )
    # On the CPU, a path whose keys fit one block is differentiated without its output.
    on_cpu = query.device.type == "cpu"
    one_block = image_key.shape[2] <= _BLOCK_KEYS
    own_text = one_block and text_key.shape[2] <= _BLOCK_KEYS and batch == groups
    text_out = query.new_empty(groups, rows, heads, width).transpose(1, 2)
    return (
        out_like(),
        query.new_empty(0) if on_cpu and one_block else out_like(),
        query.new_empty(0) if on_cpu and own_text else text_out,
        query.new_empty(batch, heads, rows, dtype=wide),
        query.new_empty(groups, heads, rows, dtype=wide),
    )


def stored_by_token(x: Tensor) -> Tensor:
    """Like x (outer, H, L, D), stored (outer, L, H, D), as projections want a gradient."""
    outer, heads, rows, width = x.shape
    return x.new_empty(outer, rows, heads, width).transpose(1, 2)


@torch.library.register_fake("dvla_fast::dual_attention_backward", lib=schemas.LIBRARY)
def _backward_fake(  # type: ignore[no-untyped-def]
    grad_out, query, image_key, image_value, text_key, text_value, alpha, image_mask, text_mask,
    image_out, text_out, image_lse, text_lse, scale,
):  # fmt: skip
    grads = (stored_by_token(x) for x in (query, image_key, image_value, text_key, text_value))
    return (*grads, alpha.new_empty(alpha.shape))


def _fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """A vmapped tensor with its mapped dimension joined to the first one of its own."""
    if tensor is None or (dim is None and tensor.shape == (0,)):  # (0,): a result not saved
        return tensor
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _vmapped(op, info, in_dims, *inputs):  # type: ignore[no-untyped-def]
    """Maps over images and text groups at once: B becomes size·B and T becomes size·T."""
    size = info.batch_size
    folded = (
        _fold(x, dim, size) if x is None or isinstance(x, Tensor) else x
        for x, dim in zip(inputs, in_dims, strict=True)
    )
    results = op(*folded)
    dims = tuple(None if x.shape == (0,) else 0 for x in results)
    unfolded = (
        x if dim is None else x.unflatten(0, (size, x.shape[0] // size))
        for x, dim in zip(results, dims, strict=True)
    )
    return tuple(unfolded), dims


for _op in (
    torch.ops.dvla_fast.dual_attention_forward.default,
    torch.ops.dvla_fast.dual_attention_backward.default,
):
    torch.library.register_vmap(_op, functools.partial(_vmapped, _op), lib=schemas.LIBRARY)


def _check(
    query: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    alpha: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
) -> None:
    """Raises before any work when the arguments do not fit together."""
    check_query(query)
    named = {
        "image_key": image_key,
        "image_value": image_value,
        "text_key": text_key,
        "text_value": text_value,
    }
    for name, tensor in named.items():
        check_tensor(name, tensor, 4, query.dtype)
    _, heads, _, width = query.shape
    batch, _, keys, _ = image_key.shape
    check_groups(query, batch, "image_key")
    expect_shape("image_key", image_key, (batch, heads, keys, width))
    expect_shape("image_value", image_value, (batch, heads, keys, width))
    check_text_and_gate(query, (batch, keys), text_key, text_value, alpha, image_mask, text_mask)
    check_devices(query, named, alpha=alpha, image_mask=image_mask, text_mask=text_mask)


def check_query(query: Tensor) -> None:
    """What the other arguments are compared with: first of all, so that none is blamed for it."""
    expect_tensor("query", query)
    if query.dtype not in _DTYPES:
        raise TypeError(f"query: dtype {query.dtype} is not one of {_DTYPES}")
    check_tensor("query", query, 4, query.dtype)


def check_tensor(name: str, tensor: Tensor, dims: int, dtype: torch.dtype) -> None:
    """Type, rank and dtype of an argument; ``dtype`` is the query's."""
    expect_tensor(name, tensor)
    if tensor.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: dtype {tensor.dtype} differs from query's {dtype}")


def check_groups(query: Tensor, batch: int, images: str) -> None:
    """The query's sizes, and the images (the argument of that name) in its groups."""
    groups, heads, _, width = query.shape
    if heads == 0 or width == 0:
        raise ValueError(f"query: shape {tuple(query.shape)} has no head or no dimension")
    if groups == 0:
        raise ValueError(f"query: shape {tuple(query.shape)} has no text group")
    if batch % groups:
        raise ValueError(
            f"{images}: {batch} images do not fall into the query's {groups} text groups evenly"
        )


def check_text_and_gate(
    query: Tensor,
    images: tuple[int, int],
    text_key: Tensor,
    text_value: Tensor,
    alpha: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
) -> None:
    """Shapes of the text, the gate and the masks for ``images`` = (B, N)."""
    groups, heads, _, width = query.shape
    batch = images[0]
    expect_shape("text_key", text_key, (groups, heads, text_key.shape[2], width))
    expect_shape("text_value", text_value, (groups, heads, text_key.shape[2], width))
    expect_tensor("alpha", alpha)
    if not alpha.is_floating_point():
        raise TypeError(f"alpha: expected a floating tensor, got {alpha.dtype}")
    if alpha.shape not in ((), (batch,), (batch, heads)):
        raise ValueError(
            f"alpha: shape {tuple(alpha.shape)}, expected (), ({batch},) or ({batch}, {heads})"
        )
    for name, mask, shape in (
        ("image_mask", image_mask, images),
        ("text_mask", text_mask, (groups, text_key.shape[2])),
    ):
        if mask is None:
            continue
        expect_tensor(name, mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: expected bool (True = attend), got {mask.dtype}")
        expect_shape(name, mask, shape)


def check_devices(query: Tensor, named: dict[str, Tensor], **others: Tensor | None) -> None:
    """Every tensor is where the query is."""
    device = query.device
    for name, tensor in (*named.items(), *others.items()):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}, query on {device}")


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
