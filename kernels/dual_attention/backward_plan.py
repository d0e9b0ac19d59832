"""How a backward of dual attention is launched: which kernels, on what grids, with which constants.

``backward.py`` holds the kernels and says what they do; nothing here touches a tensor.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl

from .arguments import (
    Layout,
    needs_wide_offsets,
    options_of,
    problem_of,
    strides_of,
)
from .launch import Device, Launch, choose, remembered


class Plan(NamedTuple):
    """All of a backward but its tensors.

    Attributes:
        workspaces: shapes of dα by row block, query_sum, text_grad, image_delta and text_delta;
            None for what is not needed.
        rows: (grid, constants) of each launch of the rows kernel.
        rows_numbers: what follows the tensors in those.
        keys: (grid, numbers, constants) of the keys kernel for image and text; empty if not needed.
    """

    workspaces: tuple[tuple[int, ...] | None, ...]
    rows: list[tuple[tuple[int], dict[str, Any]]]
    rows_numbers: tuple[float, ...]
    keys: list[tuple[tuple[int], tuple[float, ...], dict[str, Any]]]


@remembered
def plan(
    layouts: tuple[Layout | None, ...],
    dtype: torch.dtype,
    device: Device,
    scale: float,
    precision: str,
) -> Plan:
    element_size = dtype.itemsize
    problem = problem_of(layouts[1:], dtype, precision)
    precision = problem.precision
    launch = choose("backward", problem, device)
    all_rows = launch is not None
    launch = launch or choose("backward_rows", problem, device)
    assert launch is not None
    groups, heads, rows, batch = (
        problem.groups, problem.heads, problem.rows, problem.groups * problem.group_size,
    )  # fmt: skip
    row_blocks = -(-rows // launch.block_p)
    runs = -(-problem.group_size // launch.images)
    shared = problem.group_size > 1
    one_launch = runs == 1 and (all_rows or not shared)
    sums = None if one_launch else (groups, runs, heads, rows, problem.head_dim)
    workspaces = (
        (batch, heads, row_blocks) if row_blocks > 1 else None,
        sums,
        sums,
        None if all_rows else (batch, heads, rows),
        None if all_rows else (groups, heads, rows),
    )
    unit, strides = strides_of(layouts, element_size)
    scales = (float(scale) * math.log2(math.e), float(scale))
    numbers = (
        *strides, *scales, problem.group_size, heads, rows, problem.image_keys, problem.text_keys,
        launch.images,
    )  # fmt: skip
    constants = {
        "HEAD_DIM": problem.head_dim,
        "BLOCK_P": launch.block_p,
        "BLOCK_N": launch.block_n,
        "BLOCK_S": launch.block_s,
        "BLOCK_D": launch.block_d,
        "HAS_IMAGE_MASK": layouts[7] is not None,
        "HAS_TEXT_MASK": layouts[8] is not None,
        "SHARED": shared,
        "ALL_ROWS": all_rows,
        "PRECISION": precision,
        "INDEX": tl.int64 if needs_wide_offsets(layouts, launch) else tl.int32,
        "UNIT": unit,
        **options_of(launch),
    }
    programs = row_blocks * heads * groups
    passes = [(True, True)] if one_launch else [(True, False), (False, True)]
    rows_steps = [
        (
            (programs * runs if image_path else programs,),
            {**constants, "IMAGE_PATH": image_path, "TEXT_PATH": text_path},
        )
        for image_path, text_path in passes
    ]
    keys_steps = []
    if not all_rows:
        launch = choose("backward_keys", problem, device)
        assert launch is not None
        grad, query, image_key, image_value, text_key, text_value, alpha, *masks = layouts
        gate = "rest"  # one image a group: its own gradient, times 1 - alpha
        text_grad = grad
        if sums is not None:
            gate = "none"
            size = rows * problem.head_dim
            strides_of_sums = (runs * heads * size, size, problem.head_dim, 1)
            text_grad = ((groups, heads, rows, problem.head_dim), strides_of_sums)
        image = (grad, query, image_key, image_value, alpha, masks[0])
        text = (text_grad, query, text_key, text_value, alpha, masks[1])
        for path, own_gate in ((image, "alpha"), (text, gate)):
            keys_steps.append(_keys_plan(path, own_gate, launch, element_size, scales, precision))
    return Plan(workspaces, rows_steps, numbers, keys_steps)


def _keys_plan(
    layouts: tuple[Layout | None, ...],
    gate: str,
    launch: Launch,
    element_size: int,
    scales: tuple[float, float],
    precision: str,
) -> tuple[tuple[int], tuple[float, ...], dict[str, Any]]:
    """The keys kernel for one path, from the layouts of its first six tensors."""
    _, query, key, _, _, mask = layouts
    assert query is not None
    assert key is not None
    batch, heads, keys, head_dim = key[0]
    groups, _, rows, _ = query[0]
    unit, strides = strides_of(layouts, element_size)
    numbers = (*strides, *scales, batch // groups, heads, rows, keys)
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_P": launch.block_p,
        # The longer of the two paths sets the block: the shorter one's programs are few.
        "BLOCK_L": max(launch.block_n, launch.block_s),
        "BLOCK_D": launch.block_d,
        "HAS_MASK": mask is not None,
        "GATE": gate,
        "PRECISION": precision,
        "INDEX": tl.int64 if needs_wide_offsets(layouts, launch) else tl.int32,
        "UNIT": unit,
        **options_of(launch),
    }
    return (-(-keys // constants["BLOCK_L"]) * heads * batch,), numbers, constants
