"""Compiles the Triton forward ahead of time for GPUs that need not be there, against a budget.

Each tile of the launch table becomes PTX and machine code for sm_90 and sm_80; the numbers that
decide whether a kernel is a disaster (registers spilled to the stack, shared memory) must stay
within ``dual_attention_budget.json``. Rewrite that file, after looking at what changed, with
``python tests/kernels/test_dual_attention_compile.py``.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
target = pytest.importorskip("triton.backends.compiler")

forward = importlib.import_module("dvla_fast.kernels.dual_attention.forward")
launch = importlib.import_module("dvla_fast.kernels.dual_attention.launch")

BUDGET = Path(__file__).with_name("dual_attention_budget.json")
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.bool: "i1",
}
# The head dimension compiled for a padded one: the model's own where it has one (24, 48).
HEAD_DIMS = {16: 16, 32: 24, 64: 48, 128: 128, 256: 256}
# Shared memory a block may have: the H100 and A100 limits, and the smaller of sm_86 and sm_89.
SHARED_LIMIT = {90: 232_448, 80: 166_912}
SMALLEST_SHARED_LIMIT = 101_376
REGISTERS_PER_PROCESSOR = 65_536
# ptxas and Triton differ between releases; a disaster is larger than this.
STACK_SLACK = 128
SHARED_SLACK = 1.25


@dataclass(frozen=True)
class Variant:
    """One kernel to compile."""

    arch: int
    dtype: torch.dtype
    block_d: int
    rows: int
    masks: bool

    @property
    def name(self) -> str:
        masks = "masks" if self.masks else "plain"
        return f"sm{self.arch}-{TYPE_NAMES[self.dtype]}-d{self.block_d}-rows{self.rows}-{masks}"


def variants() -> Iterator[Any]:
    """Every tile: sm_90 with masks in bfloat16, sm_80 without in float16, and float32 in both.

    sm_80 beyond the model's head dimensions is marked slow, to keep the common run short.
    """
    for (element_size, block_d), tiles in launch.FORWARD_TILES.items():
        for tile in tiles:
            half = element_size == 2
            for arch, dtype in ((90, torch.bfloat16), (80, torch.float16)):
                chosen = dtype if half else torch.float32
                variant = Variant(arch, chosen, block_d, tile.rows, masks=arch == 90)
                quick = arch == 90 or (block_d in (32, 64) and tile.rows == 64)
                marks = () if quick else (pytest.mark.slow,)
                yield pytest.param(variant, id=variant.name, marks=marks)


def arguments(
    dtype: torch.dtype,
    *,
    rows: int,
    head_dim: int,
    masks: bool = False,
    save: bool = True,
    precision: str = "ieee",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the launcher would pass for long keys and 4 images a group, on tensors without data."""

    def by_token(outer: int, length: int) -> torch.Tensor:
        return torch.empty(outer, length, 8, head_dim, dtype=dtype, device="meta").transpose(1, 2)

    query, text_key, text_value = by_token(2, rows), by_token(2, 600), by_token(2, 600)
    image_key, image_value = by_token(8, 600), by_token(8, 600)
    alpha = torch.empty(8, 1, device="meta").expand(8, 8)
    image_mask = torch.empty(8, 600, dtype=torch.bool, device="meta") if masks else None
    text_mask = torch.empty(2, 600, dtype=torch.bool, device="meta") if masks else None
    inputs = (query, image_key, image_value, text_key, text_value, alpha, image_mask, text_mask)
    results = forward._allocate(query, 8, save)
    _, values, options = forward.plan(inputs, results, 0.2, save, precision)
    return values, options


def compile_for(arch: int, values: dict[str, Any], options: dict[str, Any]) -> Any:
    """The kernel specialised as Triton's launcher does: 1 and multiples of 16 are told apart."""
    kernel = forward.dual_attention_forward_kernel
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
    source = compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target.GPUTarget("cuda", arch, 32), options=options)


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


def compile_variant(variant: Variant) -> tuple[Any, dict[str, Any]]:
    values, options = arguments(
        variant.dtype,
        rows=variant.rows,
        head_dim=HEAD_DIMS[variant.block_d],
        masks=variant.masks,
    )
    assert values["BLOCK_P"] == variant.rows
    assert values["BLOCK_D"] == variant.block_d
    return compile_for(variant.arch, values, options), options


@pytest.fixture(autouse=True)
def compiled_not_interpreted() -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")


@pytest.mark.parametrize("variant", variants())
def test_within_budget(variant: Variant) -> None:
    compiled, options = compile_variant(variant)
    used = resources(compiled)
    budget = json.loads(BUDGET.read_text())["variants"][variant.name]
    assert used["stack"] <= budget["stack"] + STACK_SLACK, (used, budget)
    assert used["shared"] <= budget["shared"] * SHARED_SLACK, (used, budget)
    assert used["shared"] <= min(SHARED_LIMIT[variant.arch], SMALLEST_SHARED_LIMIT), used
    assert used["registers"] * options["num_warps"] * 32 <= REGISTERS_PER_PROCESSOR, used
    wide_enough = variant.rows >= 64 and variant.dtype in (torch.float16, torch.bfloat16)
    if variant.arch == 90 and wide_enough:
        assert "wgmma.mma_async" in compiled.asm["ptx"], "sm_90 runs without its tensor-core unit"


def test_budget_lists_exactly_the_launch_table() -> None:
    listed = set(json.loads(BUDGET.read_text())["variants"])
    assert listed == {parameter.values[0].name for parameter in variants()}


@pytest.mark.parametrize(("head_dim", "vectors"), [(24, True), (40, True), (25, False)])
def test_rows_are_loaded_as_vectors(head_dim: int, vectors: bool) -> None:
    """16-byte copies to shared memory although a head stride of 24 elements is no multiple of 16.

    The odd head dimension shows that the check can fail.
    """
    values, options = arguments(torch.float16, rows=64, head_dim=head_dim)
    ptx = compile_for(80, values, options).asm["ptx"]
    copies = re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", ptx)
    element_loads = re.findall(r"ld\.global(?:\.\w+)*\.[bu]16", ptx)
    assert bool(copies) == vectors
    assert bool(element_loads) != vectors


@pytest.mark.parametrize(
    ("precision", "instruction"), [("ieee", "fma.rn.f32"), ("tf32x3", ".tf32")]
)
def test_float32_products(precision: str, instruction: str) -> None:
    """Real float32 arithmetic by default; tensor cores only where asked for."""
    values, options = arguments(torch.float32, rows=16, head_dim=24, precision=precision)
    ptx = compile_for(80, values, options).asm["ptx"]
    assert instruction in ptx
    assert (".tf32" in ptx) == (precision == "tf32x3")


def test_wide_offsets_and_no_save_compile() -> None:
    values, options = arguments(torch.float16, rows=16, head_dim=24, save=False)
    values["INDEX"] = forward.tl.int64
    values["image_key_b"] = 2**33  # an outer stride that takes 64 bits by itself
    assert compile_for(80, values, options).asm["cubin"]


def _write_budget() -> None:
    measured = {}
    for parameter in variants():
        variant = parameter.values[0]
        measured[variant.name] = resources(compile_variant(variant)[0])
        print(variant.name, measured[variant.name], flush=True)
    header = {"triton": triton.__version__, "unit": "a thread; shared: bytes a block"}
    lines = [f"    {json.dumps(name)}: {json.dumps(used)}" for name, used in measured.items()]
    text = ",\n".join(lines)
    head = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in header.items())
    BUDGET.write_text(f'{{\n{head},\n  "variants": {{\n{text}\n  }}\n}}\n')


if __name__ == "__main__":
    _write_budget()
