"""A GPU that launches nothing but notes what it was told, for tests of launches on any machine.

Triton compiles for it as for an sm_90; tensors stay on the CPU.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from dvla_fast import _extension
from dvla_fast.ops import dual_attention_cuda, policy_cuda

_FORMATS = {"i1": "<?", "i32": "<i", "i64": "<q", "u32": "<I", "u64": "<Q", "fp32": "<f"}
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p,
)  # fmt: skip
_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))


class Launch(NamedTuple):
    function: int
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared: int
    stream: int | None
    types: tuple[str, ...]
    values: tuple[bytes, ...]  # of all parameters, the two that Triton appends included


class FakeGPU:
    """Notes launches in ``by_triton`` and ``by_replay``; ``status`` is what those return."""

    def __init__(self) -> None:
        self.reset()
        self.types: dict[int, tuple[str, ...]] = {}  # by function
        self.functions = itertools.count(0x1000)
        self.utils = self  # of the driver that Triton sees
        self.callbacks = _LAUNCH(self._launch), _CONTEXT(self._current_context)

    def reset(self) -> None:
        self.by_triton: list[Launch] = []
        self.by_replay: list[Launch] = []
        self.has_context, self.status = True, 0

    # ---- what Triton asks of a driver

    def get_current_device(self) -> int:
        return 99  # of which no machine has compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, next(self.functions), 0, 0, 1024

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            arguments = rest[4:]  # before them: packed metadata, launch metadata, two hooks
            pairs = list(zip(src.signature.values(), arguments, strict=True))
            kept = [(kind, value) for kind, value in pairs if kind != "constexpr"]
            types = (*(kind for kind, _ in kept), "u64", "u64")
            values = (*(_packed(kind, value) for kind, value in kept), bytes(8), bytes(8))
            self.types[function] = types
            threads = (32 * metadata.num_warps, 1, 1)
            self.by_triton.append(
                Launch(function, (x, y, z), threads, metadata.shared, None, types, values)
            )

        return launch

    # ---- what the extension asks of the CUDA driver

    def _launch(self, function: int, *rest: Any) -> int:
        *sizes, shared, stream, parameters, extra = rest
        assert extra is None
        types = self.types[function]
        values = tuple(
            ctypes.string_at(
                parameters[i], 8 if kind[0] == "*" else struct.calcsize(_FORMATS[kind])
            )
            for i, kind in enumerate(types)
        )
        grid, threads = tuple(sizes[:3]), tuple(sizes[3:])
        self.by_replay.append(Launch(function, grid, threads, shared, stream, types, values))  # type: ignore[arg-type]
        return self.status

    def _current_context(self, context: Any) -> int:
        context[0] = 1 if self.has_context else None
        return 0


def _packed(kind: str, value: Any) -> bytes:
    """As Triton's launcher puts it into a parameter."""
    if kind[0] == "*":
        return struct.pack("<Q", value.data_ptr())
    return struct.pack(_FORMATS[kind], value)


_GPU = FakeGPU()  # one for all tests: Triton keeps what it compiled for it


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Triton and the extension see a fake GPU; the ops' Triton kernels take tensors on the CPU."""
    gpu, before = _GPU, triton.runtime.driver._active
    gpu.reset()
    library = torch.library.Library("dvla_fast", "IMPL")
    for name, kernel in (
        ("dual_attention_forward", dual_attention_cuda._forward),
        ("dual_attention_backward", dual_attention_cuda._backward),
        ("gate_policy_forward", policy_cuda._gate_forward),
        ("gate_policy_backward", policy_cuda._gate_backward),
    ):
        library.impl(f"{name}_triton", kernel, "CPU")
    addresses = [ctypes.cast(x, ctypes.c_void_p).value for x in gpu.callbacks]
    _extension.calls.forget()
    _extension.calls.use_driver(*addresses)
    triton.runtime.driver.set_active(gpu)
    try:
        yield gpu
    finally:
        triton.runtime.driver._active = before
        _extension.calls.use_driver(0, 0)
        _extension.calls.forget()
        library._destroy()


def on_gpu(op: str, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """The op as it would run with CUDA tensors."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    results: tuple[torch.Tensor, ...] = getattr(torch.ops.dvla_fast, op).default.redispatch(
        cuda, *arguments
    )
    return results
