"""The launch table and the launcher's own checks: plain Python, nothing compiled or run."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dvla_fast.kernels import dual_attention

forward = importlib.import_module("dvla_fast.kernels.dual_attention.forward")
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
    "processors": 132,
}


def choose(**changes: int) -> Any:
    return launch.choose_forward(**{**EPISODE, **changes})


def call(dtype: torch.dtype = torch.float32, head_dim: int = 24, **options: Any) -> None:
    q, k = torch.zeros(1, 1, 2, head_dim, dtype=dtype), torch.zeros(1, 1, 3, head_dim, dtype=dtype)
    dual_attention.forward(q, k, k, k, k, torch.ones(1, 1), None, None, 1.0, False, **options)


def test_submodule_does_not_hide_the_function() -> None:
    assert callable(dual_attention.forward)
    assert dual_attention.forward is forward.forward


@pytest.mark.parametrize(
    ("length", "padded"), [(0, 16), (1, 16), (16, 16), (17, 32), (24, 32), (48, 64), (256, 256)]
)
def test_padded(length: int, padded: int) -> None:
    assert launch.padded(length) == padded


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("head_dim", [1, 16, 24, 48, 80, 200, 256])
@pytest.mark.parametrize("rows", [1, 16, 45, 77, 1000])
def test_every_shape_has_a_launch(element_size: int, head_dim: int, rows: int) -> None:
    chosen = choose(element_size=element_size, head_dim=head_dim, rows=rows)
    assert chosen.block_d >= head_dim
    assert chosen.block_p >= 16
    for block in (chosen.block_p, chosen.block_n, chosen.block_s, chosen.block_d):
        assert block & (block - 1) == 0, "Triton wants powers of two"
    tiles = launch.FORWARD_TILES[element_size, chosen.block_d]
    assert chosen.block_p == tiles[-1].rows or chosen.block_p >= rows


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


def test_dtype_without_a_kernel() -> None:
    with pytest.raises(TypeError, match=r"query: dtype torch\.float64"):
        call(torch.float64)


def test_head_dimension_too_large() -> None:
    with pytest.raises(ValueError, match="head dimension 257"):
        call(head_dim=257)


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="precision: 'half'"):
        call(precision="half")
