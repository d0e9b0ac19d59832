"""Random dual-attention problems on the C++ path: shapes, strides, masks, dtypes, hostile values.

``DVLA_FAST_FUZZ_SEED`` and ``DVLA_FAST_FUZZ_CASES`` choose other problems and how many; a failure
names the seed, and ``-k case-N`` runs one problem alone.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import pytest
import torch
from attention_cases import LAYOUTS, Shape, definition, laid_out, with_grads
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.functional import dual_attention

SEED = int(os.environ.get("DVLA_FAST_FUZZ_SEED", "0"))
CASES = int(os.environ.get("DVLA_FAST_FUZZ_CASES", "60"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Where tiles, vectors (16 float32 lanes, panels of 48) and blocks (256 keys) end, and one beside.
GROUPS, IMAGES, HEADS = (1, 1, 2, 3), (0, 1, 1, 2, 2, 3, 3, 5, 9), (1, 2, 3, 8)
ROWS = (0, 1, 2, 9, 15, 16, 17, 32, 33, 45, 47, 48, 49, 95, 96, 97, 145)
KEYS = (0, 1, 2, 7, 16, 31, 33, 49, 77, 127, 196, 255, 256, 257, 300, 511, 513)
WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 80, 100, 128)
LARGEST = 1_000_000  # products of numbers in the scores, which bounds the time of a case

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem)),
]


@dataclass(frozen=True)
class Case:
    """One random problem; everything follows from the seed and the number."""

    number: int
    shape: Shape
    dtype: torch.dtype
    layouts: tuple[str, ...]
    alpha: str
    values: str
    image_mask: str
    text_mask: str
    scale: float | None


def draw(number: int) -> Case:
    pick = random.Random(f"{SEED}/{number}")
    while True:
        shape = Shape(*map(pick.choice, (GROUPS, IMAGES, HEADS, ROWS, KEYS, KEYS, WIDTHS)))
        t, g, h, p, n, s, d = shape
        if t * h * p * d * (g * n + s) <= LARGEST:
            break
    masks = ("none", "none", "random", "some rows empty", "all empty")
    return Case(
        number,
        shape,
        DTYPES[number % len(DTYPES)],
        tuple(pick.choice([*LAYOUTS, "unaligned"]) for _ in range(6)),
        pick.choice(("scalar", "image", "head", "head", "shut", "open")),
        pick.choice(("normal", "normal", "normal", "huge", "zero", "tiny", "one key")),
        pick.choice(masks),
        pick.choice(masks),
        pick.choice((None, None, 0.0, -0.3, 1.0)),
    )


def tensors_of(case: Case) -> tuple[list[Tensor], Tensor, dict[str, Tensor | float | None]]:
    """(query … alpha), the output's gradient, and the options of the call."""
    gen = torch.Generator().manual_seed(case.number)
    t, g, h, p, n, s, d = case.shape
    image, text = (t * g, h, n, d), (t, h, s, d)

    def place(shape: tuple[int, ...], layout: str) -> Tensor:
        if layout != "unaligned":
            return laid_out(shape, layout if shape[0] else "contiguous", case.dtype, gen)
        flat = torch.randn(torch.Size(shape).numel() + 1, generator=gen, dtype=torch.float64)
        return flat.to(case.dtype)[1:].view(shape)

    shapes = ((t, h, p, d), image, image, text, text, (t * g, h, p, d))
    *tensors, grad_out = map(place, shapes, case.layouts)
    # Scores near ±10^4, exactly 0, below the smallest normal number, or one far above the others.
    if case.values == "one key":
        for i, tokens in ((1, n), (3, s)):
            boost = torch.ones(tokens, 1, dtype=case.dtype)
            boost[-1:] = 30
            tensors[i] = tensors[i] * boost
    else:
        tiny = 1e-4 if case.dtype == torch.float16 else 1e-20
        factor = {"normal": 1.0, "huge": 60.0, "zero": 0.0, "tiny": tiny}[case.values]
        tensors[0], tensors[1], tensors[3] = (tensors[i] * factor for i in (0, 1, 3))
    size = {"scalar": (), "image": (t * g,)}.get(case.alpha, (t * g, h))
    alpha = torch.rand(size, generator=gen).to(case.dtype)
    if case.alpha in ("shut", "open"):
        alpha = torch.full_like(alpha, float(case.alpha == "open"))
    wide = torch.promote_types(case.dtype, torch.float32)
    options: dict[str, Tensor | float | None] = {"scale": case.scale}
    for name, kind, size in (
        ("image_mask", case.image_mask, (t * g, n)),
        ("text_mask", case.text_mask, (t, s)),
    ):
        if kind == "none":
            continue
        keep = torch.rand(size[1], size[0], generator=gen).T < 0.6  # not contiguous
        if kind != "random":
            keep[:: 2 if kind == "some rows empty" else 1] = False
        options[name] = keep
    return [*tensors, alpha.to(wide)], grad_out, options


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def floor_of(
    case: Case, name: str, results: dict[str, Tensor], wide: list[Tensor], grad_out: Tensor
) -> float:
    """What rounding may do beside the peer's error, which over few numbers is small by luck."""
    query, image_key, image_value, text_key, text_value, _ = wide
    exact = results[name]
    scale = case.shape.width**-0.5 if case.scale is None else abs(case.scale)
    eps = torch.finfo(case.dtype).eps
    inner = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
    inner *= 2 if case.dtype == torch.float64 else 1  # what is taken for exact rounds as well
    image_query = query.repeat_interleave(case.shape.images, dim=0)
    pairs = ((image_query, image_key), (query, text_key))
    scores = scale * max(largest(q @ k.transpose(2, 3)) for q, k in pairs)
    # Some roundings of the result, and those of a score, which move its weight.
    roundings = {torch.float64: 4096, torch.float32: 16}.get(case.dtype, 2)
    floor = (roundings * eps + scores * inner) * largest(exact)
    keys = max(largest(image_key), largest(text_key))
    values = max(largest(image_value), largest(text_value))
    gradient = case.shape.width**0.5 * largest(grad_out)
    products = gradient * values
    if name == "grad_alpha":  # a difference of sums, some from rounded outputs, which may be small
        floor += inner * products + eps * gradient * largest(results["out"])
    other = {"grad_query": keys, "grad_image_key": largest(query), "grad_text_key": largest(query)}
    if name in other:
        # Differences of go·v cancel, wholly where one key has all the weight; their roundings stay.
        steep = case.values in ("huge", "one key")
        # The text's are those of the sum of its images' gradients.
        added = 1 if name == "grad_image_key" else case.shape.images**0.5
        floor += (4 * eps if steep else inner) * scale * products * added * other[name]
    return floor


@pytest.mark.parametrize("number", range(CASES), ids=lambda number: f"case-{number}")
def test_random_problem(number: int) -> None:
    case = draw(number)
    tensors, grad_out, options = tensors_of(case)
    wide = [x.double() for x in tensors]
    exact = with_grads(dual_attention, wide, grad_out.double(), backend="reference", **options)
    plain = exact
    if grad_out.shape[0]:
        plain = with_grads(definition, [x.to(case.dtype) for x in tensors], grad_out, **options)
    got = with_grads(dual_attention, tensors, grad_out, backend="cpp", **options)
    about = f"DVLA_FAST_FUZZ_SEED={SEED}, {case}"
    with torch.no_grad():
        alone = dual_attention(*tensors, backend="cpp", **options)
    assert torch.equal(alone, got["out"]), f"{about}: without gradients another result"
    for name, want in exact.items():
        assert got[name].shape == want.shape, f"{about}: shape of {name}"
        if want.numel() == 0:
            continue
        error = (got[name].double() - want).abs().nan_to_num(torch.inf)
        peer = (plain[name].double() - want).abs().nan_to_num(torch.inf).max()
        worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        limit = 2 * peer + floor_of(case, name, exact, wide, grad_out.double())
        assert error.max() <= limit, (
            f"{about}: {name}{worst} is off by {error.max():.3g}, plain PyTorch by {peer:.3g}"
        )
