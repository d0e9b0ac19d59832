"""Random problems on the Triton kernels, forward and backward, against float64.

Shapes, strides, masks, layouts of the gate, dtypes, and tiles: those of the launch table, or ones
so small that every loop runs several times and the backward streams. On a GPU or interpreted, like
the forward's tests. ``DVLA_FAST_FUZZ_SEED`` and ``DVLA_FAST_FUZZ_CASES`` choose other problems and
how many; a failure names the seed, and ``-k case-N`` runs one problem alone:

    TRITON_INTERPRET=1 DVLA_FAST_FUZZ_CASES=500 pytest tests/kernels/test_dual_attention_fuzz.py
"""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import test_dual_attention_backward as backward
import test_dual_attention_forward as forward
from dual_attention_cases import (
    DEVICE,
    INTERPRETED,
    NEEDS_GPU_OR_INTERPRETER,
    Case,
    make,
    mask_some,
    poison_masked,
)

launch = importlib.import_module("dvla_fast.kernels.dual_attention.launch")

pytestmark = NEEDS_GPU_OR_INTERPRETER

SEED = int(os.environ.get("DVLA_FAST_FUZZ_SEED", "0"))
CASES = int(os.environ.get("DVLA_FAST_FUZZ_CASES", "24"))
# The interpreter's bfloat16 products are silently wrong.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
# Where blocks end, and one beside.
GROUPS, IMAGES, HEADS = (1, 1, 2, 3), (1, 1, 2, 3, 5), (1, 2, 3)
ROWS, KEYS = (1, 2, 9, 15, 16, 17, 33, 48, 49), (0, 1, 3, 16, 17, 31, 33, 49, 65)
WIDTHS = (1, 2, 3, 15, 16, 17, 24, 31, 33, 47, 48, 63, 64, 65, 96, 127, 128)
ORDERS = ("tokens", "heads", "dims", "slices")
LARGEST = 300_000  # products of numbers in the scores, which bounds the time of a case


@dataclass(frozen=True)
class Problem:
    """One random problem; everything follows from the seed and the number."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    orders: tuple[str, ...]
    alpha: str
    masked: bool
    small_tiles: bool
    images_a_program: int | None


def draw(number: int) -> Problem:
    pick = random.Random(f"{SEED}/{number}")
    while True:
        # Wide heads and odd ones have paths of their own: a third of the problems each.
        width = (pick.choice(WIDTHS), pick.randint(129, 256), pick.randrange(1, 256, 2))[number % 3]
        t, g, h, p, n, s = map(pick.choice, (GROUPS, IMAGES, HEADS, ROWS, KEYS, KEYS))
        if t * h * p * width * (g * n + s) <= LARGEST:
            break
    return Problem(
        number,
        (t, g, h, p, n, s, width),
        pick.choice(DTYPES),
        (*(pick.choice(ORDERS) for _ in range(5)), pick.choice([*ORDERS, "expanded"])),
        pick.choice(("scalar", "image", "head", "transposed", "shut", "open")),
        pick.random() < 0.5,
        number % 2 == 1,
        pick.choice((None, None, 1, 2)),
    )


def case_of(problem: Problem) -> Case:
    *orders, last = problem.orders
    case = make(problem.shape, problem.dtype, (*orders, last.replace("expanded", "tokens")))
    if last == "expanded":  # what `out.sum().backward()` brings
        one = torch.ones((), dtype=problem.dtype, device=DEVICE)
        case.grad_out = one.expand(case.grad_out.shape)
    batch, heads = case.alpha.shape
    if problem.alpha in ("scalar", "shut", "open"):
        gate = {"scalar": 0.3, "shut": 0.0, "open": 1.0}[problem.alpha]
        case.alpha = torch.tensor(gate, device=DEVICE).expand(batch, heads)
    elif problem.alpha == "image":
        case.alpha = case.alpha[:, :1].expand(batch, heads)
    elif problem.alpha == "transposed":
        case.alpha = case.alpha.t().contiguous().t()
    if problem.masked:
        mask_some(case)
        poison_masked(case)
    return case


def few_rows_and_keys_a_tile(kernel: str, *_: Any) -> Any:
    return None if kernel == "backward" else launch.Tile(16, 16, 4, 1)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the kernels leave unwritten shows as NaN, workspaces included."""
    empty = Tensor.new_empty

    def poisoned(tensor: Tensor, *size: Any, **options: Any) -> Tensor:
        return empty(tensor, *size, **options).fill_(float("nan"))

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    yield
    launch.forget()


@pytest.mark.parametrize("number", [pytest.param(n, id=f"case-{n}") for n in range(CASES)])
def test_random_problem(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(number)
    print(f"DVLA_FAST_FUZZ_SEED={SEED}, {problem}")  # pytest shows it where the test fails
    if problem.small_tiles:
        monkeypatch.setattr(launch, "find_tile", few_rows_and_keys_a_tile)
    if problem.images_a_program is not None:
        backward.images_a_program(problem.images_a_program, monkeypatch)
    launch.forget()
    case = case_of(problem)
    forward.assert_accurate(case.run(), case)
    backward.assert_accurate(case.gradients(), case)


def test_problems_cover_what_they_should() -> None:
    """Otherwise a change of the lists above could leave a path out without a word."""
    problems = [draw(number) for number in range(24)]
    widths = {problem.shape[-1] for problem in problems}
    assert any(129 <= width < 256 for width in widths)
    assert any(width % 2 for width in widths)
    for name in ("masked", "small_tiles", "dtype", "alpha", "images_a_program"):
        assert len({getattr(problem, name) for problem in problems}) >= 2, name
