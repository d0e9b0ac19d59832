"""The Triton forward against float64, on a GPU or (``TRITON_INTERPRET=1``) in Triton's interpreter.

The interpreter must be chosen before Triton is imported, hence in a process of its own:
``test_dual_attention_interpreter.py`` runs this file so. Without either, everything here skips.
The bound is the one users can check: at most twice the error of plain PyTorch in the same dtype.
bfloat16 runs on a GPU only, since the interpreter's bfloat16 products are silently wrong.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dvla_fast.kernels import dual_attention

forward = importlib.import_module("dvla_fast.kernels.dual_attention.forward")
launch = importlib.import_module("dvla_fast.kernels.dual_attention.launch")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# Without a GPU these cases run all the same: test_dual_attention_interpreter.py interprets them.
pytestmark = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]
)
gpu_only = pytest.mark.skipif(INTERPRETED, reason="means something on a GPU only")

DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float16, id="float16"),
    pytest.param(torch.bfloat16, id="bfloat16", marks=gpu_only),
]
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


@dataclass
class Case:
    """Arguments of one call, and the float64 and same-dtype results to compare with."""

    query: Tensor
    image_key: Tensor
    image_value: Tensor
    text_key: Tensor
    text_value: Tensor
    alpha: Tensor
    image_mask: Tensor | None = None
    text_mask: Tensor | None = None
    scale: float = 0.3

    def run(self, save: bool = True, **options: Any) -> tuple[Tensor, ...]:
        return dual_attention.forward(
            self.query, self.image_key, self.image_value, self.text_key, self.text_value,
            self.alpha, self.image_mask, self.text_mask, self.scale, save, **options,
        )  # fmt: skip

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The five results by matmul and softmax in ``dtype``, the text expanded."""
        images = self.image_key.shape[0] // self.query.shape[0]
        q = self.query.to(dtype)
        image, image_lse = attend(
            q.repeat_interleave(images, 0), self.image_key, self.image_value, self.image_mask,
            self.scale, dtype,
        )  # fmt: skip
        text, text_lse = attend(
            q, self.text_key, self.text_value, self.text_mask, self.scale, dtype
        )
        gate = self.alpha.to(dtype)[:, :, None, None]
        out = gate * image + (1 - gate) * text.repeat_interleave(images, 0)
        return out, image, text, image_lse, text_lse


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Softmax attention in ``dtype`` and the log-sum-exp of its scores; 0 without a key."""
    score = q @ k.to(dtype).transpose(-2, -1) * scale
    v = v.to(dtype)
    if mask is not None:
        score = score.masked_fill(~mask[:, None, None, :], float("-inf"))
        v = v.masked_fill(~mask[:, None, :, None], 0)
    weight = torch.softmax(score, -1)
    if mask is not None:
        weight = weight.nan_to_num(0)
    return weight @ v, torch.logsumexp(score.double(), -1)


def poisoned(*shape: int, dtype: torch.dtype, order: str = "tokens") -> Tensor:
    """Normal numbers of ``shape`` (outer, H, L, D) inside a larger buffer of NaN.

    ``order`` is how they are stored: by "tokens" (outer, L, H, D), by "heads" (outer, H, L, D), by
    "dims" (outer, H, D, L), or "slices": every second row and column of a larger (outer, H, L, D).
    """
    outer, heads, length, dim = shape
    stored = {
        "tokens": (outer, length + 1, heads, dim + 8),
        "heads": (outer, heads, length + 3, dim),
        "dims": (outer, heads, dim, length + 5),
        "slices": (outer, heads, 2 * length, 2 * dim + 1),
    }[order]
    buffer = torch.full(stored, float("nan"), dtype=dtype, device=DEVICE)
    if order == "tokens":
        view = buffer[:, :length, :, :dim].transpose(1, 2)
    elif order == "heads":
        view = buffer[:, :, :length]
    elif order == "dims":
        view = buffer[..., :length].transpose(2, 3)
    else:
        view = buffer[:, :, ::2, : 2 * dim : 2]
    view.copy_(torch.randn(shape))
    assert view.shape == shape
    return view


def make(
    shape: tuple[int, ...], dtype: torch.dtype, orders: str | tuple[str, ...] = "tokens"
) -> Case:
    groups, images, heads, rows, image_keys, text_keys, dim = shape
    torch.manual_seed(sum(shape))
    batch = groups * images
    q, ik, iv, tk, tv = (orders,) * 5 if isinstance(orders, str) else orders
    return Case(
        poisoned(groups, heads, rows, dim, dtype=dtype, order=q),
        poisoned(batch, heads, image_keys, dim, dtype=dtype, order=ik),
        poisoned(batch, heads, image_keys, dim, dtype=dtype, order=iv),
        poisoned(groups, heads, text_keys, dim, dtype=dtype, order=tk),
        poisoned(groups, heads, text_keys, dim, dtype=dtype, order=tv),
        torch.rand(batch, heads, device=DEVICE),
        scale=dim**-0.5,
    )


@pytest.fixture(autouse=True)
def poison_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel leaves unwritten shows as NaN."""
    allocate = forward._allocate

    def filled(*args: Any) -> tuple[Tensor, ...]:
        return tuple(tensor.fill_(float("nan")) for tensor in allocate(*args))

    monkeypatch.setattr(forward, "_allocate", filled)


def assert_accurate(got: tuple[Tensor, ...], case: Case) -> None:
    """Each result: error against float64 at most twice that of PyTorch in the same dtype."""
    dtype = case.query.dtype
    expected, peer = case.plain(torch.float64), case.plain(dtype)
    for name, mine, theirs, exact in zip(RESULTS, got, peer, expected, strict=True):
        assert mine.shape == exact.shape, name
        wide = torch.float32 if name.endswith("lse") else dtype
        assert mine.dtype == wide, name
        largest = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
        if name.endswith("lse"):  # float32 arithmetic whatever the inputs
            bound = 2e-6 * max(1.0, largest)
        else:
            bound = 2 * (theirs.double() - exact).abs().max().item()
            bound += torch.finfo(dtype).eps * largest * _slack(case)
        error = (mine.double() - exact).abs()
        error = torch.where(mine.double() == exact, 0.0, error)  # -inf == -inf
        worst = torch.unravel_index(error.nan_to_num(float("inf")).argmax(), error.shape)
        index = tuple(int(i) for i in worst)
        assert error.nan_to_num(float("inf")).max().item() <= bound, (
            f"{name}{list(index)}: {mine[index].item()} for {exact[index].item()}, bound {bound}"
        )


def _slack(case: Case) -> float:
    """Units of rounding allowed beyond the peer's error: half of one for rounding the result.

    The interpreter also adds float32 products one by one, where the CPU's matmul keeps many partial
    sums: at D = 256 that alone is twice the peer's error.
    """
    if INTERPRETED and case.query.dtype == torch.float32:
        return max(1.0, case.query.shape[-1] / 64)
    return 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make(shape, dtype)
    assert_accurate(case.run(), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "orders",
    ["heads", "dims", "slices", ("tokens", "heads", "dims", "slices", "tokens")],
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
    case.image_mask = torch.rand(4, 74, device=DEVICE)[:, ::2] < 0.6
    case.text_mask = torch.rand(2, 21, device=DEVICE) < 0.6
    case.image_mask[1] = False
    case.text_mask[1] = False
    got = case.run()
    assert_accurate(got, case)
    _, image_out, text_out, image_lse, text_lse = got
    assert torch.count_nonzero(image_out[1]) == 0
    assert torch.count_nonzero(text_out[1]) == 0
    assert image_lse[1].eq(float("-inf")).all()
    assert text_lse[1].eq(float("-inf")).all()
    for tensor, mask in (
        (case.image_key, case.image_mask),
        (case.image_value, case.image_mask),
        (case.text_key, case.text_mask),
        (case.text_value, case.text_mask),
    ):
        tensor.masked_fill_(~mask[:, None, :, None], float("nan"))
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
    monkeypatch.setattr(forward, "_needs_wide_offsets", lambda *_: True)
    assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))


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
    shape = (3, 3, keys, 24)
    strides = [72, 24, 0, 1] if axis == 2 else [72 * keys, 24 * keys, 24, 1]
    strides[axis] = stride
    extent = sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1
    try:
        far = torch.empty(extent, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve the address space: {error}")
    view = far.as_strided(shape, strides)
    view.copy_(getattr(case, name))
    setattr(case, name, view)
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
