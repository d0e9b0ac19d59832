"""RandAugment: its name is understood, each image has its own operations, strengths are timm's."""

from __future__ import annotations

import pytest
import torch

from dvla_fast.data.augment import Draws
from dvla_fast.data.rand_augment import _OPERATIONS, RandAugment, _torchvision

pytest.importorskip("torchvision")


def photographs(count: int, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, side, mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def test_description() -> None:
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 0.5, 2)
    assert RandAugment.parse("rand-m7-n3-inc1") == RandAugment(7.0, 0.0, 3)


@pytest.mark.parametrize(
    "text", ["rand-m9", "rand-m11-inc1", "augmix-m3-inc1", "rand-m9-w0-inc1", "rand-m9-n0-inc1"]
)
def test_unknown_description(text: str) -> None:
    with pytest.raises(ValueError, match=r"rand_augment: '.*' is not of the form"):
        RandAugment.parse(text)


def test_about_a_quarter_of_the_images_stays_as_it_is() -> None:
    images = photographs(400)
    before = images.clone()
    out = RandAugment()(images, [128.0] * 3)
    assert torch.equal(images, before)  # not in place
    assert out.dtype == torch.uint8
    assert out.shape == images.shape
    same = (out == images).flatten(1).all(1).float().mean()
    assert 0.17 < same < 0.40  # both operations left out: 1/4, and some change nothing


def test_images_of_a_part_change_as_in_the_whole() -> None:
    images = photographs(40)
    torch.manual_seed(3)
    whole = RandAugment()(images, [128.0] * 3)
    torch.manual_seed(3)
    part = RandAugment()(images[10:20], [128.0] * 3, Draws(10, 10, 40))
    assert torch.equal(part, whole[10:20])


@pytest.mark.parametrize("number", range(len(_OPERATIONS)))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_runs_at_both_ends(number: int, channels: int) -> None:
    images = photographs(3)[:, :channels]
    for strength in (-1.0, -0.3, 0.3, 1.0):
        out = _OPERATIONS[number](_torchvision(), images, strength, [128.0] * channels)
        assert out.shape == images.shape
        assert out.dtype == torch.uint8


def test_strengths_at_magnitude_nine() -> None:
    functional, grey = _torchvision(), torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    fill = [0.0] * 3
    posterised = _OPERATIONS[4](functional, grey, 0.9, fill)
    assert posterised.unique().tolist() == [0]  # one bit is left: 100 -> 0
    assert _OPERATIONS[5](functional, grey, 0.9, fill).unique().tolist() == [
        155
    ]  # above 26: 255 - x
    assert _OPERATIONS[6](functional, grey, 0.9, fill).unique().tolist() == [199]  # plus 99
    assert _OPERATIONS[9](functional, grey, 0.9, fill).unique().tolist() == [181]  # times 1.81
    assert _OPERATIONS[9](functional, grey, -0.9, fill).unique().tolist() == [19]  # times 0.19
    moved = _OPERATIONS[13](
        functional, torch.full((1, 3, 20, 20), 100, dtype=torch.uint8), 0.9, fill
    )
    assert (moved[0, 0, 0] == 0).sum() == 8  # 0.405 of 20 columns came in empty
