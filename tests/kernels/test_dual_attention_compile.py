"""Compiles the Triton kernels ahead of time for GPUs that need not be there, against a budget.

Each row of the launch table's default section becomes PTX and machine code; the numbers that
decide whether a kernel is a disaster (registers spilled to the stack, shared memory) must stay
within ``dual_attention_budget.json``. Rewrite that file, after looking at what changed, with
``python tests/kernels/test_dual_attention_compile.py``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import ahead_of_time  # noqa: E402
from ahead_of_time import TYPE_NAMES, backward, compile_for, forward, launch, resources  # noqa: E402

BUDGET = Path(__file__).with_name("dual_attention_budget.json")
# The head dimension compiled for a padded one: the model's own where it has one (24, 48).
HEAD_DIMS = {16: 16, 32: 24, 64: 48, 128: 128, 256: 256}
REGISTERS_PER_PROCESSOR = 65_536
# ptxas and Triton differ between releases; a disaster is larger than this.
STACK_SLACK = 128
SHARED_SLACK = 1.25
OTHER_RELEASE_SLACK = 2.0  # another Triton lays shared memory out otherwise, with fewer registers


@dataclass(frozen=True)
class Variant:
    """One kernel to compile: a row of the table, and what else specialises it."""

    arch: int
    dtype: torch.dtype
    row: int
    masks: bool
    images: int

    @property
    def name(self) -> str:
        row = launch.table_rows("default")[self.row]
        tile = "x".join(str(row[key]) for key in ("rows", "keys", "warps", "stages"))
        masks = "masks" if self.masks else "plain"
        numbers = "tf32x3" if row["precision"] == "tf32x3" else TYPE_NAMES[self.dtype]
        kind = f"{numbers}-d{row['head_dim']}"
        return f"{row['kernel']}-sm{self.arch}-{kind}-{tile}-G{self.images}-{masks}"

    def compile(self) -> tuple[Any, dict[str, Any]]:
        """(compiled kernel, launch options)."""
        row = launch.table_rows("default")[self.row]
        (kernel, values, options), *_ = ahead_of_time.steps_of(
            row,
            self.dtype,
            head_dim=HEAD_DIMS[row["head_dim"]],
            masks=self.masks,
            images=self.images,
            precision=row["precision"] or "ieee",
        )
        return compile_for(self.arch, kernel, values, options), options


def variants() -> Iterator[Any]:
    """Every row for sm_90, masked and with a shared text, in bfloat16 or float32.

    The few-shot head dimensions also for sm_80 and sm_100, without masks and one image a text, in
    float16 or float32; three tf32 products for sm_80 with masks, where they spill most, and for
    sm_100 with 64 rows alone. Outside the half types at the model's own sizes most are slow.
    """
    for index, row in enumerate(launch.table_rows("default")):
        half, few_shot = row["element_size"] == 2, row["head_dim"] in (32, 64)
        bfloat16, float16 = (
            (torch.bfloat16, torch.float16) if half else (torch.float32, torch.float32)
        )
        typical = few_shot and row["rows"] == 64
        chosen = [(Variant(90, bfloat16, index, True, 4), few_shot if half else typical)]
        if few_shot and row["precision"] == "tf32x3":
            archs = (80, 100) if typical else (80,)
            chosen += [(Variant(arch, torch.float32, index, True, 4), False) for arch in archs]
        elif few_shot:
            quick = half and typical
            chosen += [(Variant(arch, float16, index, False, 1), quick) for arch in (80, 100)]
        for variant, quick in chosen:
            marks = () if quick else (pytest.mark.slow,)
            yield pytest.param(variant, id=variant.name, marks=marks)


@pytest.fixture(autouse=True)
def compiled_not_interpreted() -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")


@pytest.mark.parametrize("variant", variants())
def test_within_budget(variant: Variant) -> None:
    row = launch.table_rows("default")[variant.row]
    compiled, options = variant.compile()
    used = resources(compiled)
    recorded = json.loads(BUDGET.read_text())
    budget, same = recorded["variants"][variant.name], triton.__version__ == recorded["triton"]
    assert used["stack"] <= budget["stack"] + STACK_SLACK * (1 if same else 2), (used, budget)
    slack = SHARED_SLACK if same else OTHER_RELEASE_SLACK
    assert used["shared"] <= budget["shared"] * slack, (used, budget)
    assert used["registers"] * options["num_warps"] * 32 <= REGISTERS_PER_PROCESSOR, used
    assert used["shared"] <= row["shared"], "a launch would fail where the table says it fits"
    long_side = row["rows"] if row["kernel"] == "forward" else row["keys"]
    if variant.arch == 90 and row["element_size"] == 2 and long_side >= 64:
        assert "wgmma.mma_async" in compiled.asm["ptx"], "sm_90 runs without its tensor-core unit"


def test_budget_lists_exactly_the_launch_table() -> None:
    listed = set(json.loads(BUDGET.read_text())["variants"])
    assert listed == {parameter.values[0].name for parameter in variants()}


@pytest.mark.parametrize(("head_dim", "vectors"), [(24, True), (40, True), (25, False)])
def test_rows_are_loaded_as_vectors(head_dim: int, vectors: bool) -> None:
    """16-byte copies to shared memory although a head stride of 24 elements is no multiple of 16.

    The odd head dimension shows that the check can fail.
    """
    step = ahead_of_time.forward_step(
        torch.float16, rows=64, head_dim=head_dim, masks=False, images=4
    )
    ptx = compile_for(80, *step).asm["ptx"]
    copies = re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", ptx)
    element_loads = re.findall(r"ld\.global(?:\.\w+)*\.[bu]16", ptx)
    assert bool(copies) == vectors
    assert bool(element_loads) != vectors


@pytest.mark.parametrize("head_dim", [24, 48])
def test_backward_moves_vectors(head_dim: int) -> None:
    """Neither a load nor a store of one half-type element in any launch of the backward."""
    for images in (1, 4):
        for step in ahead_of_time.backward_steps(
            torch.float16, rows=45, head_dim=head_dim, masks=False, images=images
        ):
            ptx = compile_for(80, *step).asm["ptx"]
            assert not re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.[bu]16", ptx)


@pytest.mark.parametrize(
    ("precision", "instruction"), [("ieee", "fma.rn.f32"), ("tf32x3", ".tf32"), ("tf32", ".tf32")]
)
def test_float32_products(precision: str, instruction: str) -> None:
    """Real float32 arithmetic by default; tensor cores only where asked for."""
    shape = {"rows": 16, "head_dim": 24, "masks": False, "images": 1}
    steps = [
        ahead_of_time.forward_step(torch.float32, precision=precision, **shape),
        *ahead_of_time.backward_steps(torch.float32, precision=precision, **shape),
    ]
    for step in steps:
        ptx = compile_for(80, *step).asm["ptx"]
        assert instruction in ptx
        assert (".tf32" in ptx) == (precision != "ieee")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", launch.KERNELS)
def test_one_tf32_product_fits_where_float32_arithmetic_does(kernel: str) -> None:
    """Both have the same rows."""
    for row in launch.table_rows("default"):
        if (row["kernel"], row["precision"], row["head_dim"]) != (kernel, "ieee", 32):
            continue
        (step, *_) = ahead_of_time.steps_of(
            row, torch.float32, head_dim=24, masks=True, images=4, precision="tf32"
        )
        compiled = compile_for(90, *step)
        used = resources(compiled)
        assert ".tf32" in compiled.asm["ptx"]
        assert used["shared"] <= row["shared"], row
        assert used["stack"] <= STACK_SLACK, row


def test_wide_offsets_and_no_save_compile() -> None:
    shape = {"rows": 16, "head_dim": 24, "masks": False, "images": 4}
    steps = [
        ahead_of_time.forward_step(torch.float16, save=False, **shape),
        *ahead_of_time.backward_steps(torch.float16, **shape),
    ]
    for kernel, values, options in steps:
        values["INDEX"] = forward.tl.int64
        values["image_key_b"] = 2**33  # an outer stride that takes 64 bits by itself
        assert compile_for(80, kernel, values, options).asm["cubin"]


def test_few_kernels_serve_all_batch_sizes() -> None:
    """Nothing that a new batch size changes is a constant of a kernel."""
    for kernel in (
        forward.dual_attention_forward_kernel,
        backward.dual_attention_backward_rows_kernel,
        backward.dual_attention_backward_keys_kernel,
    ):
        fixed = {p.name for p in kernel.params if p.do_not_specialize or p.is_constexpr}
        sizes = {"group_size", "heads", "rows", "image_keys", "text_keys", "images", "keys"}
        assert sizes & {p.name for p in kernel.params} <= fixed


def _write_budget() -> None:
    measured = {}
    for parameter in variants():
        variant = parameter.values[0]
        measured[variant.name] = resources(variant.compile()[0])
        print(variant.name, measured[variant.name], file=sys.stderr, flush=True)
    header = {"triton": triton.__version__, "unit": "a thread; shared: bytes a block"}
    lines = [f"    {json.dumps(name)}: {json.dumps(used)}" for name, used in measured.items()]
    text = ",\n".join(lines)
    head = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in header.items())
    BUDGET.write_text(f'{{\n{head},\n  "variants": {{\n{text}\n  }}\n}}\n')


if __name__ == "__main__":
    _write_budget()
