"""What the launchers share: checks of dtypes, strides as the kernels take them, offset widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .launch import (
    LARGEST_HEAD_DIM,
    LARGEST_TF32X3_HEAD_DIM,
    PRECISIONS,
    Launch,
    Problem,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INT32_MAX = 2**31 - 1
_VECTOR_BYTES = 16


# Shape and strides of a tensor, None where there is none: all that a launch depends on, and a key
# to remember it by.
Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def layouts_of(tensors: Sequence[Tensor | None]) -> tuple[Layout | None, ...]:
    """The layout of each tensor."""
    return tuple(None if x is None else (x.shape, x.stride()) for x in tensors)


def problem_of(layouts: Sequence[Layout | None], dtype: torch.dtype, precision: str) -> Problem:
    """What a launch is chosen by, from query, image_key, image_value and text_key.

    Raises TypeError or ValueError where no kernel exists.
    """
    query, image_key, _, text_key, *_ = layouts
    assert query is not None
    assert image_key is not None
    assert text_key is not None
    groups, heads, rows, head_dim = query[0]
    batch, _, image_keys, _ = image_key[0]
    text_keys = text_key[0][2]
    return Problem(
        dtype.itemsize, groups, batch // groups, heads, rows, image_keys, text_keys, head_dim,
        _arithmetic(dtype, head_dim, precision),
    )  # fmt: skip


def strides_of(layouts: Sequence[Layout | None], element_size: int) -> tuple[int, list[int]]:
    """(unit, strides of all tensors), the outer strides of those of 4 dimensions in that unit.

    A head stride of 24 elements, say, divides by 8 but not by 16, all that Triton tells apart in an
    integer argument: it would load element by element. Counted in units of 16 bytes and multiplied
    by a constant in the kernel, the stride shows that whole vectors may be loaded. The unit is 1
    where some stride is no multiple of it. An absent tensor is a mask and counts two strides of 0.
    """
    unit = _VECTOR_BYTES // element_size
    strides: list[list[int]] = []
    for layout in layouts:
        if layout is None:
            strides.append([0, 0])
        else:  # the stride of a dimension of size 1 means nothing and may be anything
            strides.append([step if size > 1 else 0 for size, step in zip(*layout, strict=True)])
    wide = [own for own in strides if len(own) == 4]
    head_dims = [layout[0][3] for layout in layouts if layout is not None and len(layout[0]) == 4]
    vectors = all(
        (own[3] == 1 or head_dim == 1) and not any(step % unit for step in own[:3])
        for own, head_dim in zip(wide, head_dims, strict=True)
    )
    if not vectors:
        return 1, [step for own in strides for step in own]
    for own in wide:
        own[:3] = [step // unit for step in own[:3]]
    return unit, [step for own in strides for step in own]


def needs_wide_offsets(layouts: Sequence[Layout | None], launch: Launch) -> bool:
    """Whether an offset between two elements of one tile can exceed 32 bits."""
    tile_rows = max(launch.block_p, launch.block_n, launch.block_s)
    return any(
        tile_rows * layout[1][2] + launch.block_d * layout[1][3] > _INT32_MAX
        for layout in layouts
        if layout is not None and len(layout[0]) == 4
    )


def _arithmetic(dtype: torch.dtype, head_dim: int, precision: str) -> str:
    """How the products of a call run; raises TypeError or ValueError where no kernel exists."""
    if dtype not in DTYPES:
        raise TypeError(f"query: dtype {dtype} has no Triton kernel; supported: {DTYPES}")
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(
            f"query: head dimension {head_dim}; the Triton kernel takes up to {LARGEST_HEAD_DIM}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not one of {tuple(PRECISIONS)}")
    too_wide = precision == "tf32x3" and head_dim > LARGEST_TF32X3_HEAD_DIM
    return "ieee" if too_wide or dtype != torch.float32 else precision


def options_of(launch: Launch) -> dict[str, Any]:
    """Triton's own launch options."""
    return {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": True,  # Triton 3.10 changes the default
    }


def by_token(tensor: Tensor, outer: int) -> Tensor:
    """An uninitialised (outer, H, L, D) tensor stored (outer, L, H, D), for rows like tensor's."""
    _, heads, length, head_dim = tensor.shape
    return tensor.new_empty(outer, length, heads, head_dim).transpose(1, 2)
