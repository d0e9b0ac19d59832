"""The Triton backward against float64, on a GPU or interpreted; see the forward's tests.

Every shape runs through the launch table as it is and with a table that keeps few rows a tile, so
that the path for long queries is covered at sizes the interpreter can afford.
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

backward = importlib.import_module("dvla_fast.kernels.dual_attention.backward")
backward_plan = importlib.import_module("dvla_fast.kernels.dual_attention.backward_plan")
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
    (1, 2, 2, 70, 49, 45, 64),
    (1, 1, 1, 33, 40, 18, 128),
    (1, 1, 1, 19, 21, 2, 256),
]
NAMES = ("query", "image_key", "image_value", "text_key", "text_value", "alpha")


@pytest.fixture(autouse=True)
def poison_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels leave unwritten shows as NaN, workspaces included."""
    launch.forget()
    allocate, empty = backward._allocate, Tensor.new_empty

    def poisoned_empty(tensor: Tensor, *size: Any, **options: Any) -> Tensor:
        return empty(tensor, *size, **options).fill_(float("nan"))

    def filled(*args: Any) -> tuple[Tensor, ...]:
        return tuple(tensor.fill_(float("nan")) for tensor in allocate(*args))

    monkeypatch.setattr(backward, "_allocate", filled)
    monkeypatch.setattr(Tensor, "new_empty", poisoned_empty)


@pytest.fixture(params=["whole", "streamed"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All rows in a program, as the table has it for short queries, or blocks of few rows."""
    if request.param == "streamed":
        stream_in_small_blocks(monkeypatch)
    return request.param


def stream_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    find = launch.find_tile

    def small(kernel: str, *shape: Any) -> Any:
        if kernel == "forward":
            return find(kernel, *shape)
        return None if kernel == "backward" else launch.Tile(16, 32, 4, 1)

    monkeypatch.setattr(launch, "find_tile", small)
    launch.forget()


def images_a_program(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PROGRAMS_PER_PROCESSOR", 0)
    monkeypatch.setattr(launch, "MOST_IMAGES_PER_PROGRAM", count)
    launch.forget()


def assert_accurate(got: tuple[Tensor, ...], case: Case) -> None:
    """Each gradient: error against float64 at most twice that of PyTorch in the same dtype."""
    dtype = case.query.dtype
    exact, peer = case.plain_gradients(torch.float64), case.plain_gradients(dtype)
    # float32: the saved log-sum-exp is rounded once more than a softmax that forms it on the way.
    slack = slack_of(case) + (3.0 if dtype == torch.float32 else 0.0)
    # Where all terms cancel, as with a single key, what is left is a rounding or two of the terms.
    terms = 2 * torch.finfo(dtype).eps * max(x.abs().max().item() for x in exact if x.numel())
    for name, mine, theirs, right in zip(NAMES, got, peer, exact, strict=True):
        assert mine.dtype == (torch.float32 if name == "alpha" else dtype), name
        if name == "alpha":
            # A sum over a head's output, which may cancel: its terms' roundings add up, and what a
            # half type rounds is O, not the gradient.
            largest = max(1.0, right.abs().max().item())
            entries = case.query.shape[-2] * case.query.shape[-1] if dtype == torch.float32 else 1
            bound = 2 * (theirs.double() - right).abs().max().item()
            bound += torch.finfo(dtype).eps * largest * entries**0.5
            assert (mine.double() - right).abs().max().item() <= bound, name
        else:
            assert_near(name, mine, theirs, right, slack, floor=terms)


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, mine, theirs in zip(NAMES, got, expected, strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, path: str) -> None:
    case = make(shape, dtype)
    assert_accurate(case.gradients(), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_longer_than_a_tile(dtype: torch.dtype) -> None:
    case = make((1, 2, 1, 150, 40, 35, 16), dtype)
    assert_accurate(case.gradients(), case)


@pytest.mark.parametrize(
    "orders",
    ["heads", "dims", "slices", ("tokens", "heads", "dims", "slices", "tokens", "dims")],
    ids=["heads", "dims", "slices", "mixed"],
)
def test_any_strides(orders: str | tuple[str, ...], path: str) -> None:
    case = make((1, 2, 3, 18, 19, 7, 24), torch.float32, orders)
    case.alpha = torch.rand(3, 2, device=DEVICE).t()
    assert_accurate(case.gradients(), case)


def test_expanded_gradient_and_gate(path: str) -> None:
    """What `out.sum().backward()` and one gate for all images bring: strides of 0."""
    case = make((2, 2, 2, 18, 19, 7, 24), torch.float32)
    case.alpha = torch.tensor(0.3, device=DEVICE).expand(4, 2)
    case.grad_out = torch.ones((), device=DEVICE).expand(case.grad_out.shape)
    assert_accurate(case.gradients(), case)


def test_saved_results_of_any_strides(path: str) -> None:
    case = make((1, 2, 2, 18, 19, 7, 24), torch.float32)
    expected = case.gradients()
    run = case.run
    case.run = lambda: tuple(x.contiguous() for x in run())  # type: ignore[method-assign]
    assert_same_bits(case.gradients(), expected)


def test_gradients_are_stored_by_token(path: str) -> None:
    for gradient in make((1, 2, 3, 5, 6, 4, 24), torch.float32).gradients()[:5]:
        assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype: torch.dtype, images: int, path: str) -> None:
    """Random masks, an image and a group without any key, and NaN behind the mask."""
    case = make((2, images, 1, 18, 37, 21, 24), dtype)
    mask_some(case)
    got = case.gradients()
    assert_accurate(got, case)
    masks = (case.image_mask, case.image_mask, case.text_mask, case.text_mask)
    for gradient, mask in zip(got[1:5], masks, strict=True):
        assert mask is not None
        assert torch.count_nonzero(gradient.masked_fill(mask[:, None, :, None], 0)) == 0
    poison_masked(case)
    assert_same_bits(case.gradients(), got)


@pytest.mark.parametrize("images", [1, 2])
def test_both_paths_masked_give_exactly_zero(images: int, path: str) -> None:
    case = make((1, images, 2, 3, 5, 4, 24), torch.float32)
    case.image_mask = torch.zeros(images, 5, dtype=torch.bool, device=DEVICE)
    case.text_mask = torch.zeros(1, 4, dtype=torch.bool, device=DEVICE)
    assert all(torch.count_nonzero(gradient) == 0 for gradient in case.gradients())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_closed_gate(alpha: float, path: str) -> None:
    """No gradient through the closed path, and the gate's own is still the paths' difference."""
    case = make((1, 3, 1, 18, 20, 9, 24), torch.float32)
    case.alpha = torch.tensor(alpha, device=DEVICE).expand(3, 1)
    got = case.gradients()
    assert_accurate(got, case)
    _, image_key, image_value, text_key, text_value, gate = got
    dead = (text_key, text_value) if alpha else (image_key, image_value)
    assert all(torch.count_nonzero(gradient) == 0 for gradient in dead)
    assert torch.count_nonzero(gate) == gate.numel()


@pytest.mark.parametrize("images", [1, 2, 16])
def test_several_images_in_a_program(
    images: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of images that divide the group evenly, unevenly and wholly."""
    case = make((1, 5, 1, 17, 20, 9, 24), torch.float32)
    mask_some(case)
    expected = case.gradients()
    images_a_program(images, monkeypatch)
    got = case.gradients()
    assert_accurate(got, case)
    for index in (1, 2, 5):  # a sum over other runs differs by rounding, the rest in no bit
        assert torch.equal(got[index], expected[index]), NAMES[index]


@pytest.mark.parametrize("images", [1, 3])
def test_twice_the_same_bits(images: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make((1, images, 1, 33, 40, 9, 24), torch.float16)
    images_a_program(2, monkeypatch)
    assert_same_bits(case.gradients(), case.gradients())


def test_number_of_launches(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One where a program sees a whole group, one more for a text shared by several programs."""
    counts = {}
    for images in (1, 4):
        case = make((1, images, 1, 18, 5, 4, 24), torch.float32)
        arguments = (
            case.grad_out, case.query, case.image_key, case.image_value, case.text_key,
            case.text_value, case.alpha, None, None,
        )  # fmt: skip
        gradients = backward._allocate(arguments)
        steps, _ = backward.steps(arguments, case.run()[1:], gradients, 1.0)
        counts[images] = len(steps)
    assert counts == ({1: 1, 4: 2} if path == "whole" else {1: 3, 4: 4})


def test_large_scores(path: str) -> None:
    """Scores in the hundreds, in one tile and over several: the softmax all but picks one key."""
    case = make((1, 1, 1, 18, 40, 20, 24), torch.float32)
    case.scale = -20.0
    got, exact = case.gradients(), case.plain_gradients(torch.float64)
    for name, mine, right in zip(NAMES, got, exact, strict=True):
        # A score of 500 is known to 500 · 2⁻²⁴, and so, relatively, are weights.
        error = (mine.double() - right).abs().max() / right.abs().max()
        assert error < 500 * 2**-21, name


def test_wide_offsets_give_the_same_bits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make((2, 2, 2, 18, 19, 7, 24), torch.float32)
    expected = case.gradients()
    monkeypatch.setattr(backward_plan, "needs_wide_offsets", lambda *_: True)
    launch.forget()
    assert_same_bits(case.gradients(), expected)


@pytest.mark.usefixtures("memory_given_back")
@pytest.mark.parametrize(
    ("axis", "keys", "stride"),
    [
        pytest.param(0, 3, 2**30, id="between-images"),
        pytest.param(2, 66, 2**25 + 8, id="between-tiles"),
        pytest.param(2, 3, 2**31 + 8, id="stride-itself"),
    ],
)
def test_offsets_beyond_32_bits(axis: int, keys: int, stride: int, path: str) -> None:
    """Elements so far apart that 32-bit offsets would wrap."""
    case = make((3, 1, 3, 1, keys, keys, 24), torch.float16)
    expected = case.gradients()
    case.image_key = far_apart(case.image_key, axis, stride)
    case.text_value = far_apart(case.text_value, axis, stride)
    assert_same_bits(case.gradients(), expected)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("image_keys", "text_keys"), [(0, 4), (4, 0), (0, 0)])
def test_a_path_without_keys(image_keys: int, text_keys: int, images: int, path: str) -> None:
    case = make((1, images, 1, 18, image_keys, text_keys, 24), torch.float32)
    assert_accurate(case.gradients(), case)


def test_no_rows_or_no_images_give_zero() -> None:
    for shape in ((1, 2, 2, 0, 5, 4, 24), (1, 0, 2, 3, 5, 4, 24)):
        gradients = make(shape, torch.float32).gradients()
        assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


@gpu_only
def test_tensor_core_float32_stays_near_float32() -> None:
    case = make((2, 2, 2, 45, 196, 45, 48), torch.float32)
    exact, peer = case.plain_gradients(torch.float64), case.plain_gradients(torch.float32)
    got = case.gradients(precision="tf32x3")
    for name, mine, theirs, right in zip(NAMES, got, peer, exact, strict=True):
        error = (mine.double() - right).abs().max()
        assert error <= 4 * (theirs.double() - right).abs().max() + 1e-6, name


@gpu_only
@pytest.mark.parametrize("dim", [16, 24, 48, 128, 200])
@pytest.mark.parametrize("rows", [9, 45, 130])
def test_every_tile_of_three_products(rows: int, dim: int) -> None:
    """The launch table has rows of its own for them, which a GPU has to have the memory for."""
    case = make((2, 2, 1, rows, 49, 17, dim), torch.float32)
    mask_some(case)
    got = (case.run(precision="tf32x3")[0], *case.gradients(precision="tf32x3"))
    exact = (case.plain(torch.float64)[0], *case.plain_gradients(torch.float64))
    for name, mine, right in zip(("out", *NAMES), got, exact, strict=True):
        error = (mine.double() - right).abs().max()
        assert error <= 1e-5 * right.abs().max().clamp_min(1.0), name


@gpu_only
@pytest.mark.parametrize("images", [1, 4])
def test_inside_a_cuda_graph(images: int, path: str) -> None:
    case = make((1, images, 8, 45, 196, 9, 24), torch.float16)
    expected = case.gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.gradients()
    graph.replay()
    assert_same_bits(got, expected)
