"""The launch table and the launchers' own checks: plain Python, nothing compiled or run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dvla_fast.kernels import dual_attention

arguments = importlib.import_module("dvla_fast.kernels.dual_attention.arguments")
forward = importlib.import_module("dvla_fast.kernels.dual_attention.forward")
backward = importlib.import_module("dvla_fast.kernels.dual_attention.backward")
launch = importlib.import_module("dvla_fast.kernels.dual_attention.launch")

EPISODE = {
    "element_size": 2,
    "groups": 1,
    "group_size": 80,
    "heads": 8,
    "rows": 45,
    "image_keys": 196,
    "text_keys": 45,
    "head_dim": 24,
}
ROW = {"kernel": "forward", "element_size": 2, "precision": None, "head_dim": 32,
       "max_rows": None, "max_keys": None, "rows": 16, "keys": 64, "warps": 4, "stages": 2,
       "shared": 1}  # fmt: skip


def choose(kernel: str = "forward", **changes: Any) -> Any:
    return launch.choose(kernel, launch.Problem(**{**EPISODE, **changes}), launch.Device())


def find(**changes: Any) -> Any:
    device = launch.Device(changes.pop("generation", "default"), shared=changes.pop("shared", 200))
    shape = {"kernel": "forward", "element_size": 2, "precision": "ieee", "block_d": 32,
             "rows": 9, "keys": 196}  # fmt: skip
    return launch.find_tile(**{**shape, **changes}, device=device)


def call(dtype: torch.dtype = torch.float32, head_dim: int = 24, **options: Any) -> None:
    q, k = torch.zeros(1, 1, 2, head_dim, dtype=dtype), torch.zeros(1, 1, 3, head_dim, dtype=dtype)
    dual_attention.forward(q, k, k, k, k, torch.ones(1, 1), None, None, 1.0, False, **options)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """A table of the test's own, section by section."""
    sections: dict[str, list[dict[str, Any]]] = {}
    monkeypatch.setattr(launch, "table_rows", lambda section: sections.get(section, ()))
    yield sections
    launch.forget()


def test_submodules_do_not_hide_the_functions() -> None:
    assert callable(dual_attention.forward)
    assert callable(dual_attention.backward)


@pytest.mark.parametrize(
    ("length", "padded"), [(0, 16), (1, 16), (16, 16), (17, 32), (24, 32), (48, 64), (256, 256)]
)
def test_padded(length: int, padded: int) -> None:
    assert launch.padded(length) == padded


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "ieee"), *((torch.float32, name) for name in launch.PRECISIONS)],
)
@pytest.mark.parametrize("head_dim", [1, 16, 24, 48, 80, 200, 256])
@pytest.mark.parametrize("rows", [1, 16, 45, 77, 1000])
def test_every_shape_has_a_launch(
    dtype: torch.dtype, precision: str, head_dim: int, rows: int
) -> None:
    """On the smallest device too; without one for all rows in a tile there is one for blocks."""
    sizes: dict[str, Any] = {
        "element_size": dtype.itemsize,
        "head_dim": head_dim,
        "rows": rows,
        "precision": arguments._arithmetic(dtype, head_dim, precision),
    }
    streamed = choose("backward", **sizes) is None
    for kernel in (
        "forward",
        *(("backward_rows", "backward_keys") if streamed else ("backward",)),
    ):
        chosen = choose(kernel, **sizes)
        assert chosen.block_d >= head_dim
        assert chosen.block_p >= 16
        for block in (chosen.block_p, chosen.block_n, chosen.block_s, chosen.block_d):
            assert block & (block - 1) == 0, "Triton wants powers of two"
        assert kernel != "backward" or chosen.block_p >= rows


@pytest.mark.parametrize("rows", [9, 45, 77])
@pytest.mark.parametrize("head_dim", [24, 48])
def test_few_shot_backward_keeps_all_rows_in_a_tile(head_dim: int, rows: int) -> None:
    assert choose("backward", head_dim=head_dim, rows=rows) is not None


def test_short_sequences_get_short_blocks() -> None:
    chosen = choose(rows=9, image_keys=49, text_keys=9)
    assert (chosen.block_p, chosen.block_n, chosen.block_s) == (16, 64, 16)


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 2),  # 640 programs of one image, 264 wanted
        ({"groups": 5, "group_size": 1}, 1),
        ({"groups": 16}, 16),  # text once per 16 images
        ({"groups": 64, "group_size": 5}, 5),  # never more than the group has
        ({"groups": 1, "group_size": 5}, 1),  # too few programs to give any away
    ],
)
def test_images_of_a_program(changes: dict[str, int], images: int) -> None:
    assert choose(**changes).images == images


def test_rows_are_well_formed() -> None:
    for row in launch.table_rows("default"):
        assert row.keys() == ROW.keys()
        known = [None] if row["element_size"] == 2 else launch.PRECISIONS
        assert row["precision"] in known
        assert row["kernel"] in launch.KERNELS
        assert row["max_rows"] is None or row["max_rows"] <= row["rows"]
        assert row["shared"] > 0


def test_first_row_that_serves(table: dict[str, list[dict[str, Any]]]) -> None:
    table["default"] = [
        {**ROW, "max_rows": 16, "max_keys": 128, "warps": 1},
        {**ROW, "max_rows": 16, "shared": 150, "warps": 2},
        {**ROW, "max_rows": 16, "warps": 4},
        {**ROW, "rows": 32, "warps": 8},
    ]
    assert find(keys=100).warps == 1
    assert find().warps == 2
    assert find(shared=120).warps == 4, "too little shared memory for the second row"
    assert find(rows=17).warps == 8
    assert find(rows=17).rows == 32
    assert find(block_d=64) is None
    assert find(kernel="backward") is None
    assert find(element_size=4) is None


def test_section_of_the_device_comes_first(table: dict[str, list[dict[str, Any]]]) -> None:
    table["default"] = [{**ROW, "warps": 4}]
    table["sm_90"] = [{**ROW, "max_rows": 16, "warps": 8}]
    assert find(generation="sm_90").warps == 8
    assert find(generation="sm_90", rows=50).warps == 4
    assert find(generation="sm_80").warps == 4


def test_rows_of_a_precision(table: dict[str, list[dict[str, Any]]]) -> None:
    """Those of float32 arithmetic serve one tf32 product too, after its own."""
    row = {**ROW, "element_size": 4}
    table["default"] = [
        {**row, "precision": "ieee", "warps": 1},
        {**row, "precision": "tf32x3", "warps": 2},
    ]
    table["sm_90"] = [{**row, "precision": "tf32", "warps": 4}]

    def warps(precision: str, generation: str) -> int:
        return find(element_size=4, precision=precision, generation=generation).warps

    assert [warps(name, "sm_80") for name in ("ieee", "tf32x3", "tf32")] == [1, 2, 1]
    assert [warps(name, "sm_90") for name in ("ieee", "tf32x3", "tf32")] == [1, 2, 4]
    table["default"].pop()
    assert find(element_size=4, precision="tf32x3") is None


@pytest.mark.parametrize(
    ("dtype", "head_dim", "precision", "runs"),
    [
        (torch.float32, 128, "tf32x3", "tf32x3"),
        (torch.float32, 129, "tf32x3", "ieee"),
        (torch.float32, 256, "tf32", "tf32"),
        (torch.bfloat16, 24, "tf32x3", "ieee"),  # one kernel whatever is set
    ],
)
def test_arithmetic_that_runs(dtype: torch.dtype, head_dim: int, precision: str, runs: str) -> None:
    q, k = (torch.empty(1, 1, n, head_dim, dtype=dtype, device="meta") for n in (2, 3))
    inputs = (q, k, k, k, k, torch.ones(1, 1, device="meta"), None, None)
    results = forward._allocate(q, 1, True)
    *_, constants = forward.step(inputs, results, 1.0, True, precision)
    assert constants["PRECISION"] == runs
    steps, _ = backward.steps((q, *inputs), results[1:], (*inputs[:6],), 1.0, precision)
    assert {step[-1]["PRECISION"] for step in steps} == {runs}


def test_dtype_without_a_kernel() -> None:
    with pytest.raises(TypeError, match=r"query: dtype torch\.float64"):
        call(torch.float64)


def test_head_dimension_too_large() -> None:
    with pytest.raises(ValueError, match="head dimension 257"):
        call(head_dim=257)


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="precision: 'half'"):
        call(precision="half")
