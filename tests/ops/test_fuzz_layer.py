"""Random problems of the gated layer on the C++ path: shapes, masks, dtypes, one gradient missing.

``DVLA_FAST_FUZZ_SEED`` and ``DVLA_FAST_FUZZ_CASES`` choose other problems and how many; a failure
names the seed, and ``-k case-N`` runs one problem alone.
"""

from __future__ import annotations

import os
import random
from typing import NamedTuple

import pytest
import torch
from test_gated_attention import (
    NAMES,
    Shape,
    layer,
    make,
    make_grads,
    make_masks,
    poisoned_memory,  # noqa: F401 - used by every test here
)

from dvla_fast import _extension
from dvla_fast.functional import gated_attention

SEED = int(os.environ.get("DVLA_FAST_FUZZ_SEED", "0"))
CASES = int(os.environ.get("DVLA_FAST_FUZZ_CASES", "60"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Error allowed, as a share of the largest exact value or of one.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}

GROUPS, IMAGES, HEADS = (1, 1, 2, 3, 5), (0, 1, 1, 2, 3, 5, 16, 25, 40), (1, 2, 3, 8)
ROWS, KEYS = (0, 1, 2, 5, 9, 17, 45), (0, 1, 3, 49, 100, 196, 700)
WIDTHS, MODELS = (1, 4, 8, 24, 33, 48), (1, 5, 16, 64, 192, 200)
LARGEST = 30_000_000  # products of numbers, which bounds the time of a case

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))


class Case(NamedTuple):
    """One random problem; everything follows from the seed and the number."""

    number: int
    shape: Shape
    dtype: torch.dtype
    wide_tokens: bool  # float32 beside weights of half types
    masks: tuple[str, ...]
    wanted: tuple[str, ...]  # gradients
    results: tuple[int, ...]  # that a gradient flows into: updated tokens, H


def draw(number: int) -> Case:
    pick = random.Random(f"{SEED}/{number}")
    while True:
        shape = Shape(*map(pick.choice, (GROUPS, IMAGES, HEADS, ROWS, KEYS, WIDTHS, MODELS)))
        t, g, h, p, n, d, c = shape
        if t * g * n * h * d * (2 * c + 2 * p) <= LARGEST:
            break
    dtype = DTYPES[number % len(DTYPES)]
    return Case(
        number,
        shape,
        dtype,
        dtype.itemsize == 2 and pick.random() < 0.5,
        tuple(name for name in ("image_mask", "text_mask") if pick.random() < 0.4),
        tuple(name for name in NAMES if name != "image_tokens" or pick.random() < 0.8),
        pick.choice(((0, 1), (0, 1), (0,), (1,))),
    )


@pytest.mark.parametrize("case", map(draw, range(CASES)), ids=lambda case: f"case-{case.number}")
def test_against_the_definition(case: Case) -> None:
    tensors, grads = make(case.shape, case.dtype), make_grads(case.shape, case.dtype)
    if case.wide_tokens:
        tensors[1] = tensors[1].float()
    masks = make_masks(case.shape) if case.shape.images else {}
    masks = {name: mask for name, mask in masks.items() if name in case.masks}

    def run(function: object, dtype: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [x.to(dtype or x.dtype, copy=True) for x in tensors]
        wanted = [x.requires_grad_() for x, name in zip(leaves, NAMES) if name in case.wanted]
        results = function(*leaves, **masks)  # type: ignore[operator]
        flowing = [i for i in case.results if results[i].requires_grad]
        found = torch.autograd.grad(
            [results[i] for i in flowing],
            wanted,
            [grads[i].to(results[i].dtype) for i in flowing],
            allow_unused=True,
            materialize_grads=True,
        )
        return [x.detach() for x in (*results, *found)]

    names = ["updated", "fused", *case.wanted]
    for name, got, want in zip(names, run(gated_attention, None), run(layer, torch.float64)):
        if not want.numel():
            continue
        allowed = TOLERANCE[case.dtype] * max(1.0, float(want.abs().max()))
        error = float((got.double() - want).abs().max())
        assert error <= allowed, f"{name} is wrong by {error:.2g} (seed {SEED}): {case}"
