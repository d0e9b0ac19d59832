"""Records what the Triton kernels of an op launched, so that C++ launches it again without Python.

An eager call of a few-shot problem spends more time on planning and on Triton's binder than on the
GPU. A call of the same sizes, strides, types and numbers makes the same launches with other
addresses: ``csrc/calls/replay.h`` keeps them by that key. Compiled kernels differ by whether an
address is a multiple of 16, so that is part of the key too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dvla_fast import _extension

if TYPE_CHECKING:  # importing the kernels imports Triton
    from dvla_fast.kernels.launching import Launched, Recorder

_NUMBER, _ARGUMENT, _RESULT, _SCRATCH = range(4)  # Source in csrc/calls/replay.h
_LARGEST_SHARED = 228 * 1024  # beyond it Triton launches with an attribute

_Parameter = tuple[int, int, int]  # source, index, value


def recorder(op: str, arguments: tuple[Any, ...]) -> Recorder | None:
    """What records a call of ``op``, or None without the extension.

    Args:
        op: name of an op in ``replay::kOps``.
        arguments: the call's, in the order of the schema; the last may be left to their defaults.
    """
    if _extension.calls is None:
        return None
    schema = getattr(torch.ops.dvla_fast, op).default._schema.arguments
    defaults = (argument.default_value for argument in schema[len(arguments) :])
    complete = (*arguments, *defaults)

    def record(
        results: Sequence[Tensor], scratch: Sequence[Tensor], launched: Sequence[Launched]
    ) -> None:
        inputs = [x for x in complete if isinstance(x, Tensor)]
        launches = [_launch(launch, (inputs, results, scratch)) for launch in launched]
        if launches and None not in launches:
            kernels = [launch.compiled for launch in launched]
            _extension.calls.record(op, complete, results, scratch, launches, kernels)

    return record


def _launch(
    launched: Launched, tensors: tuple[Sequence[Tensor], ...]
) -> tuple[int, int, int, int, list[_Parameter]] | None:
    """Function, grid, threads, shared bytes and parameters; None where more would be needed."""
    compiled = launched.compiled
    if compiled is None or not _is_plain(compiled.metadata):
        return None
    parameters: list[_Parameter] = []
    types = compiled.src.signature.values()
    for argument, kind in zip(launched.arguments, types, strict=False):  # then come constants
        if kind == "constexpr":
            continue
        parameter = _parameter(argument, kind, tensors)
        if parameter is None:
            return None
        parameters.append(parameter)
    # Two addresses that Triton appends: memory for the kernel's and a profiler's own use, unused.
    parameters += [(_NUMBER, 0, 0)] * 2
    metadata = compiled.metadata
    threads = 32 * metadata.num_warps
    return compiled.function, launched.grid, threads, metadata.shared, parameters


def _is_plain(metadata: Any) -> bool:
    """Whether nothing but a function, a grid and shared memory makes the launch."""
    unusual = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size",
               "profile_scratch_size", "instrumentation_mode")  # fmt: skip
    return (
        torch.version.cuda is not None
        and metadata.num_ctas == 1
        and metadata.shared <= _LARGEST_SHARED
        and not any(getattr(metadata, name, None) for name in unusual)
    )


def _parameter(
    argument: Any, kind: str, tensors: tuple[Sequence[Tensor], ...]
) -> _Parameter | None:
    """Where a kernel's parameter of the type ``kind`` comes from; None if it cannot be said."""
    if kind.startswith("*"):
        return _address(argument, tensors)
    if kind in ("fp32", "fp64"):
        packed = struct.pack("<f4x" if kind == "fp32" else "<d", argument)
        return _NUMBER, 0, struct.unpack("<q", packed)[0]
    if kind[0] in "iu" and kind[1:].isdigit():
        return _NUMBER, 0, (int(argument) + 2**63) % 2**64 - 2**63
    return None


def _address(argument: Tensor, tensors: tuple[Sequence[Tensor], ...]) -> _Parameter | None:
    """A tensor of the call, or a view into a result or into scratch memory."""
    if argument.data_ptr() == 0:
        return _NUMBER, 0, 0
    for source, known in enumerate(tensors, start=_ARGUMENT):
        for index, tensor in enumerate(known):
            if tensor is argument:
                return source, index, 0
    for source, known in enumerate(tensors, start=_ARGUMENT):
        for index, tensor in enumerate(known):
            offset = argument.data_ptr() - tensor.data_ptr()
            if offset == 0 or (source != _ARGUMENT and _share_memory(argument, tensor)):
                return source, index, offset
    return None  # a copy, which a replay would not make


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
