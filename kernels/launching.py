"""Runs launches, and tells who asked what was launched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

# Kernel, grid, its tensors and numbers in order, constants and launch options by name.
Step: TypeAlias = tuple[Any, tuple[int], tuple[Any, ...], dict[str, Any]]


class Launched(NamedTuple):
    """A launch that was made."""

    compiled: Any
    """Triton's compiled kernel; None in its interpreter."""
    grid: int
    arguments: tuple[Any, ...]
    """Tensors and numbers in the order of the kernel's parameters."""


# Is told an op's results, the uninitialised tensors it worked in, and its launches in order.
Recorder: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Launched]], None]


def run(steps: Iterable[Step], tensor: Tensor) -> list[Launched]:
    """Launches in order on the device of ``tensor``; a step with an empty grid is left out."""
    launched = []
    with on_device_of(tensor):
        for kernel, grid, arguments, constants in steps:
            if grid[0] > 0:
                compiled = kernel[grid](*arguments, **constants)
                launched.append(Launched(compiled, grid[0], arguments))
    return launched


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
