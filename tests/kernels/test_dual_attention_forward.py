"""The Triton forward against float64, on a GPU or (``TRITON_INTERPRET=1``) in Triton's interpreter.

The interpreter must be chosen before Triton is imported, hence in a process of its own:
``test_dual_attention_interpreter.py`` runs this file so. Without either, everything here skips.
The bound is the one users can check: at most twice the error of plain PyTorch in the same dtype.
bfloat16 runs on a GPU only, since the interpreter's bfloat16 products are silently wrong.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dual_attention_cases import (
    DEVICE,
    DTYPES,
    NEEDS_GPU_OR_INTERPRETER,
    Case,
    assert_near,
    far_apart,
    gpu_only,
    make,
    mask_some,
    poison_masked,
    slack_of,
)

forward = importlib.import_module("dvla_fast.kernels.dual_attention.forward")
launch = importlib.import_module("dvla_fast.kernels.dual_attention.launch")

pytestmark = NEEDS_GPU_OR_INTERPRETER

# T, G, H, P, N, S, D: groups, images a group, heads, queries, image keys, text keys, head dimension
SHAPES = [
    (1, 1, 1, 1, 1, 1, 24),
    (1, 1, 1, 4, 6, 3, 1),
    (2, 1, 3, 5, 7, 4, 40),
    (1, 3, 3, 9, 70, 9, 24),
    (2, 2, 2, 20, 33, 45, 48),
    (1, 2, 1, 17, 130, 20, 80),
    (1, 1, 1, 130, 65, 3, 16),
    (1, 2, 2, 70, 49, 45, 64),
    (1, 1, 1, 33, 40, 18, 128),
    (1, 1, 1, 19, 21, 2, 256),
]
RESULTS = ("out", "image_out", "text_out", "image_lse", "text_lse")


@pytest.fixture(autouse=True)
def poison_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel leaves unwritten shows as NaN; launches chosen by a test are forgotten."""
    launch.forget()
    allocate = forward._allocate

    def filled(*args: Any) -> tuple[Tensor, ...]:
        return tuple(tensor.fill_(float("nan")) for tensor in allocate(*args))

    monkeypatch.setattr(forward, "_allocate", filled)


def assert_accurate(got: tuple[Tensor, ...], case: Case) -> None:
    """Each result: error against float64 at most twice that of PyTorch in the same dtype."""
    dtype = case.query.dtype
    expected, peer = case.plain(torch.float64), case.plain(dtype)
    for name, mine, theirs, exact in zip(RESULTS, got, peer, expected, strict=True):
        if name.endswith("lse"):  # float32 arithmetic whatever the inputs
            assert mine.dtype == torch.float32
            finite = exact[exact.isfinite()]
            unit = 1.0 / finite.abs().max().item() if finite.numel() else 1.0
            assert_near(name, mine, exact, exact, 17 * max(1.0, unit))
        else:
            assert mine.dtype == dtype
            assert_near(name, mine, theirs, exact, slack_of(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make(shape, dtype)
    assert_accurate(case.run(), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "orders",
    ["heads", "dims", "slices", ("tokens", "heads", "dims", "slices", "tokens", "heads")],
    ids=["heads", "dims", "slices", "mixed"],
)
def test_any_strides(orders: str | tuple[str, ...], dtype: torch.dtype) -> None:
    case = make((2, 2, 3, 5, 19, 7, 24), dtype, orders)
    case.alpha = torch.rand(3, 4, device=DEVICE).t()
    assert_accurate(case.run(), case)


def test_results_are_stored_by_token() -> None:
    out, image_out, text_out, *_ = make((1, 2, 3, 5, 6, 4, 24), torch.float32).run()
    for result in (out, image_out, text_out):
        assert result.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype: torch.dtype) -> None:
    """Random masks, one image and one group without any key, and NaN behind the mask."""
    case = make((2, 2, 2, 6, 37, 21, 24), dtype)
    mask_some(case)
    got = case.run()
    assert_accurate(got, case)
    _, image_out, text_out, image_lse, text_lse = got
    assert torch.count_nonzero(image_out[1]) == 0
    assert torch.count_nonzero(text_out[1]) == 0
    assert image_lse[1].eq(float("-inf")).all()
    assert text_lse[1].eq(float("-inf")).all()
    poison_masked(case)
    for before, after in zip(got, case.run(), strict=True):
        assert torch.equal(before, after)


def test_both_paths_masked_give_exactly_zero() -> None:
    case = make((1, 2, 2, 3, 5, 4, 24), torch.float32)
    case.image_mask = torch.zeros(2, 5, dtype=torch.bool, device=DEVICE)
    case.text_mask = torch.zeros(1, 4, dtype=torch.bool, device=DEVICE)
    assert torch.count_nonzero(case.run(save=False)[0]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_closed_gate_returns_the_other_path_exactly(alpha: float, dtype: torch.dtype) -> None:
    case = make((1, 3, 2, 9, 20, 9, 24), dtype)
    case.alpha = torch.tensor(alpha, device=DEVICE).expand(3, 2)
    out, image_out, text_out, *_ = case.run()
    assert torch.equal(out, image_out if alpha else text_out.expand(3, -1, -1, -1))


def test_without_save_only_the_result_exists() -> None:
    case = make((2, 2, 3, 9, 20, 9, 48), torch.float32)
    out, *rest = case.run(save=False)
    assert torch.equal(out, case.run()[0])
    assert [tuple(tensor.shape) for tensor in rest] == [(0,)] * 4


@pytest.mark.parametrize("images", [1, 2, 16])
def test_several_images_in_a_program(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of images that divide the group evenly, unevenly and wholly give the same bits."""
    case = make((2, 5, 2, 17, 40, 9, 24), torch.float32)
    expected = case.run()
    monkeypatch.setattr(launch, "PROGRAMS_PER_PROCESSOR", 0)
    monkeypatch.setattr(launch, "MOST_IMAGES_PER_PROGRAM", images)
    launch.forget()
    got = case.run()
    assert_accurate(got, case)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_large_scores_neither_overflow_nor_lose_the_maximum() -> None:
    case = make((1, 1, 1, 5, 40, 20, 24), torch.float32)
    case.scale = -80.0
    assert_accurate(case.run(), case)


def test_wide_offsets_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make((2, 2, 3, 5, 19, 7, 24), torch.float32)
    expected = case.run()
    monkeypatch.setattr(forward, "needs_wide_offsets", lambda *_: True)
    launch.forget()
    assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))


@pytest.mark.usefixtures("memory_given_back")
@pytest.mark.parametrize(
    ("axis", "keys", "stride"),
    [
        pytest.param(0, 3, 2**30, id="between-images"),
        pytest.param(1, 3, 2**30, id="between-heads"),
        pytest.param(2, 258, 2**23 + 8, id="between-tiles"),
        pytest.param(2, 3, 2**30, id="inside-a-tile"),
        pytest.param(2, 3, 2**31 + 8, id="stride-itself"),
    ],
)
@pytest.mark.parametrize("name", ["image_key", "text_value"])
def test_offsets_beyond_32_bits(name: str, axis: int, keys: int, stride: int) -> None:
    """Elements so far apart that 32-bit offsets would wrap; only touched pages exist."""
    case = make((3, 1, 3, 4, keys, keys, 24), torch.float16)
    expected = case.run()
    setattr(case, name, far_apart(getattr(case, name), axis, stride))
    assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))


@pytest.mark.parametrize(("image_keys", "text_keys"), [(0, 4), (4, 0), (0, 0)])
def test_a_path_without_keys_contributes_zero(image_keys: int, text_keys: int) -> None:
    case = make((1, 2, 2, 3, image_keys, text_keys, 24), torch.float32)
    out, image_out, text_out, image_lse, text_lse = case.run()
    assert torch.count_nonzero(image_out) == 0 or image_keys
    assert torch.count_nonzero(text_out) == 0 or text_keys
    assert image_keys or image_lse.eq(float("-inf")).all()
    assert text_keys or text_lse.eq(float("-inf")).all()
    gate = case.alpha[:, :, None, None]
    torch.testing.assert_close(out, gate * image_out + (1 - gate) * text_out)


def test_no_rows_or_no_images_launch_nothing() -> None:
    assert make((1, 2, 2, 0, 5, 4, 24), torch.float32).run()[0].shape == (2, 2, 0, 24)
    results = make((1, 0, 2, 3, 5, 4, 24), torch.float32).run()
    assert results[0].shape == (0, 2, 3, 24)
    assert all(result.isfinite().all() for result in results)


@gpu_only
def test_tensor_core_float32_stays_near_float32() -> None:
    case = make((2, 2, 2, 45, 196, 45, 48), torch.float32)
    exact = case.plain(torch.float64)[0]
    peer = (case.plain(torch.float32)[0].double() - exact).abs().max()
    error = (case.run(precision="tf32x3")[0].double() - exact).abs().max()
    assert error <= 4 * peer + 1e-6


@gpu_only
def test_inside_a_cuda_graph() -> None:
    case = make((1, 4, 8, 9, 196, 9, 24), torch.float16)
    expected = case.run()[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()[0]
    graph.replay()
    assert torch.equal(out, expected)
