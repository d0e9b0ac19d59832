"""Compiling the kernels for GPUs that need not be there, and what they then use."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

forward = importlib.import_module("dvla_fast.kernels.dual_attention.forward")
backward = importlib.import_module("dvla_fast.kernels.dual_attention.backward")
launch = importlib.import_module("dvla_fast.kernels.dual_attention.launch")

TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.bool: "i1",
}


def inputs(
    dtype: torch.dtype, *, rows: int, head_dim: int, masks: bool, images: int, keys: int = 600
) -> tuple[torch.Tensor | None, ...]:
    """Inputs of the forward for two groups of `images`, stored by token, without data."""
    groups, heads = 2, 8
    batch = groups * images

    def by_token(outer: int, length: int) -> torch.Tensor:
        shape = (outer, length, heads, head_dim)
        return torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2)

    def mask(outer: int) -> torch.Tensor | None:
        return torch.empty(outer, keys, dtype=torch.bool, device="meta") if masks else None

    return (
        by_token(groups, rows),
        *(by_token(batch, keys) for _ in range(2)),
        *(by_token(groups, keys) for _ in range(2)),
        torch.empty(batch, 1, device="meta").expand(batch, heads),
        mask(batch),
        mask(groups),
    )


def forward_step(
    dtype: torch.dtype, *, save: bool = True, precision: str = "ieee", **shape: Any
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(kernel, arguments, options) of the forward."""
    tensors = inputs(dtype, **shape)
    batch = tensors[1].shape[0]  # type: ignore[union-attr]
    results = forward._allocate(tensors[0], batch, save)
    return named(forward.step(tensors, results, 0.2, save, precision))


def backward_steps(
    dtype: torch.dtype, *, precision: str = "ieee", **shape: Any
) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """(kernel, arguments, options) of each launch of the backward."""
    tensors = inputs(dtype, **shape)
    out, *saved = forward._allocate(tensors[0], tensors[1].shape[0], True)  # type: ignore[union-attr]
    arguments = (out, *tensors)
    gradients = backward._allocate(arguments)
    steps, _ = backward.steps(arguments, tuple(saved), gradients, 0.2, precision)
    return [named(step) for step in steps]


def named(step: tuple[Any, ...]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(kernel, arguments by name, options) of a launch."""
    kernel, _, arguments, constants = step
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: value for name, value in constants.items() if name in kernel.arg_names}
    return kernel, values, {k: v for k, v in constants.items() if k not in kernel.arg_names}


def compile_for(arch: int, kernel: Any, values: dict[str, Any], options: dict[str, Any]) -> Any:
    """The kernel specialised as Triton's launcher does: 1 and multiples of 16 are told apart."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        integer = isinstance(value, int) and not parameter.is_constexpr
        specialised = integer and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif integer:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread, stack bytes a thread (spills), shared bytes a block."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert found, dump
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": int(compiled.metadata.shared),
    }


def steps_of(
    row: dict[str, Any],
    dtype: torch.dtype,
    *,
    head_dim: int,
    masks: bool,
    images: int,
    precision: str = "ieee",
) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """The launches that a row of the launch table decides: (kernel, arguments, options) of each."""
    name = row["kernel"]
    tile = launch.Tile(row["rows"], row["keys"], row["warps"], row["stages"])
    find = launch.find_tile

    def only_this(kernel: str, *shape: Any) -> Any:
        if kernel == name:
            return tile
        return None if kernel == "backward" else find(kernel, *shape)

    rows = row["rows"] if name == "backward" else 600
    shape = {"rows": rows, "head_dim": head_dim, "masks": masks, "images": images}
    launch.find_tile = only_this
    launch.forget()
    try:
        if name == "forward":
            return [forward_step(dtype, precision=precision, **shape)]
        steps = backward_steps(dtype, precision=precision, **shape)
    finally:
        launch.find_tile = find
        launch.forget()
    kernel = (
        backward.dual_attention_backward_keys_kernel
        if name == "backward_keys"
        else backward.dual_attention_backward_rows_kernel
    )
    return [step for step in steps if step[0] is kernel]
