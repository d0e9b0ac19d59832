"""What the launchers share: checks of dtypes, strides as the kernels take them, offset widths."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .launch import LARGEST_HEAD_DIM, Launch, Problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISIONS = ("ieee", "tf32x3", "tf32")
_INT32_MAX = 2**31 - 1
_VECTOR_BYTES = 16


def problem_of(query: Tensor, image_key: Tensor, text_key: Tensor) -> Problem:
    """The sizes that a launch is chosen by."""
    groups, heads, rows, head_dim = query.shape
    batch, _, image_keys, _ = image_key.shape
    text_keys = text_key.shape[2]
    return Problem(
        query.element_size(), groups, batch // groups, heads, rows, image_keys, text_keys, head_dim
    )


def strides_of(tensors: Sequence[Tensor | None], ranks: Sequence[int]) -> tuple[int, list[int]]:
    """(unit, strides of all tensors), the outer strides of the 4-d tensors in that unit.

    A head stride of 24 elements, say, divides by 8 but not by 16, all that Triton tells apart in an
    integer argument: it would load element by element. Counted in units of 16 bytes and multiplied
    by a constant in the kernel, the stride shows that whole vectors may be loaded. The unit is 1
    where some stride is no multiple of it. The first tensor is one of 4 dimensions, so is none
    behind one of fewer; an absent tensor counts with its rank.
    """
    strides: list[int] = []
    for tensor, rank in zip(tensors, ranks, strict=True):
        if tensor is None:
            strides += [0] * rank
        else:  # the stride of a dimension of size 1 means nothing and may be anything
            sizes = zip(tensor.shape, tensor.stride(), strict=True)
            strides += [stride if size > 1 else 0 for size, stride in sizes]
    first = tensors[0]
    assert first is not None
    unit = _VECTOR_BYTES // first.element_size()
    count = 4 * sum(rank == 4 for rank in ranks)
    contiguous = first.shape[3] == 1 or all(stride == 1 for stride in strides[3:count:4])
    if not contiguous or any(strides[i] % unit for i in range(count) if i % 4 != 3):
        return 1, strides
    return unit, [s // unit if i < count and i % 4 != 3 else s for i, s in enumerate(strides)]


def needs_wide_offsets(tensors: Sequence[Tensor | None], launch: Launch) -> bool:
    """Whether an offset between two elements of one tile can exceed 32 bits."""
    tile_rows = max(launch.block_p, launch.block_n, launch.block_s)
    return any(
        tile_rows * tensor.stride(2) + launch.block_d * tensor.stride(3) > _INT32_MAX
        for tensor in tensors
        if tensor is not None
    )


def check_supported(dtype: torch.dtype, head_dim: int, precision: str) -> None:
    """Raises TypeError or ValueError where no kernel exists."""
    if dtype not in DTYPES:
        raise TypeError(f"query: dtype {dtype} has no Triton kernel; supported: {DTYPES}")
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(
            f"query: head dimension {head_dim}; the Triton kernel takes up to {LARGEST_HEAD_DIM}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not one of {PRECISIONS}")


def options_of(launch: Launch) -> dict[str, int | bool]:
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


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
