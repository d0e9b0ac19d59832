"""RandAugment: its name is understood, each image has its own operations, they are timm's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dvla_fast.data import rand_augment
from dvla_fast.data.augment import Draws
from dvla_fast.data.rand_augment import RandAugment

pytest.importorskip("torchvision")
timm = pytest.importorskip("timm.data.auto_augment")

FILL = (124, 116, 104)
COLOURS = {operation.__name__: operation for operation in rand_augment._COLOURS}


def grey_fill(channels: int) -> Tensor:
    return torch.full((channels,), 128.0)


def photographs(count: int, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, side, mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def test_description() -> None:
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 0.5, 2)
    assert RandAugment.parse("rand-m7-n3-inc1") == RandAugment(7.0, 0.0, 3)


@pytest.mark.parametrize(
    "text",
    ["rand-m9", "rand-m11-inc1", "augmix-m3-inc1", "rand-m9-w0-inc1", "rand-m9-n0-inc1",
     "rand-m9-n9-inc1", "rand-m9-n2.5-inc1"],
)  # fmt: skip
def test_unknown_description(text: str) -> None:
    with pytest.raises(ValueError, match=r"rand_augment: '.*' is not of the form"):
        RandAugment.parse(text)


def test_about_a_quarter_of_the_images_stays_as_it_is() -> None:
    images = photographs(400)
    before = images.clone()
    out = RandAugment()(images, grey_fill(3))
    assert torch.equal(images, before)  # not in place
    assert out.dtype == torch.uint8
    assert out.shape == images.shape
    same = (out == images).flatten(1).all(1).float().mean()
    assert 0.17 < same < 0.40  # both operations left out: 1/4, and some change nothing


def test_images_of_a_part_change_as_in_the_whole() -> None:
    images = photographs(40)
    torch.manual_seed(3)
    whole = RandAugment()(images, grey_fill(3))
    torch.manual_seed(3)
    part = RandAugment()(images[10:20], grey_fill(3), Draws(10, 10, 40))
    assert torch.equal(part, whole[10:20])


# timm's function, the operation of ours, and timm's argument at a strength in [-1, 1].
SAME: dict[str, tuple[Callable, Callable[[float], tuple]]] = {
    "_autocontrast": (timm.auto_contrast, lambda s: ()),
    "_equalize": (timm.equalize, lambda s: ()),
    "_invert": (timm.invert, lambda s: ()),
    "_posterize": (timm.posterize, lambda s: (max(1, 4 - int(4 * abs(s))),)),
    "_solarize": (timm.solarize, lambda s: (256 - int(256 * abs(s)),)),
    "_solarize_add": (timm.solarize_add, lambda s: (int(110 * abs(s)),)),
    "_saturation": (timm.color, lambda s: (max(0.1, 1 + 0.9 * s),)),
    "_contrast": (timm.contrast, lambda s: (max(0.1, 1 + 0.9 * s),)),
    "_brightness": (timm.brightness, lambda s: (max(0.1, 1 + 0.9 * s),)),
    "_sharpness": (timm.sharpness, lambda s: (max(0.1, 1 + 0.9 * s),)),
}
MOVED: dict[str, tuple[Callable, Callable[[float], tuple]]] = {
    "rotate": (timm.rotate, lambda s: (30 * s,)),
    "shear x": (timm.shear_x, lambda s: (0.3 * s,)),
    "shear y": (timm.shear_y, lambda s: (0.3 * s,)),
    "translate x": (timm.translate_x_rel, lambda s: (0.45 * s,)),
    "translate y": (timm.translate_y_rel, lambda s: (0.45 * s,)),
}
STRENGTHS = torch.tensor([-1.0, -0.9, -0.31, 0.0, 0.31, 0.9, 1.0])


def pillow(image: Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array if len(image) == 3 else array[:, :, 0])


def tensor(image: Image.Image) -> Tensor:
    array = np.asarray(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1).copy()).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", [(24, 24), (3, 3), (2, 5), (5, 2)], ids=str)
@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_those_of_timm(name: str, sides: tuple[int, int], channels: int) -> None:
    """Each image at its own strength; products are rounded in other places, one level at most."""
    images = photographs(len(STRENGTHS), max(sides))[:, :channels, : sides[0], : sides[1]]
    ours = COLOURS[name](images, STRENGTHS)
    assert ours.dtype == torch.uint8
    peer, argument = SAME[name]
    for image, got, strength in zip(images, ours, STRENGTHS.tolist()):
        want = tensor(peer(pillow(image), *argument(strength)))
        assert (got.int() - want.int()).abs().max() <= 1, strength


@pytest.mark.parametrize("number", range(len(MOVED)))
@pytest.mark.parametrize("sides", [(24, 24), (20, 32)], ids=str)
def test_moves_are_those_of_timm(number: int, sides: tuple[int, int]) -> None:
    images = photographs(len(STRENGTHS), 40)[:, :, : sides[0], : sides[1]]
    peer, argument = list(MOVED.values())[number]
    assert list(MOVED) == list(rand_augment._MOVES)
    move = torch.full((len(images),), number)
    ours = rand_augment._moved(images, move, STRENGTHS, torch.tensor(FILL).float())
    for image, got, strength in zip(images, ours, STRENGTHS.tolist()):
        options = {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL}
        want = tensor(peer(pillow(image), *argument(strength), **options))
        difference = (got.int() - want.int()).abs().amax(0).float()
        # Along the image's edges Pillow does not blend with what lies outside.
        assert (difference > 3).float().mean() < 0.12, (strength, difference)
        assert difference.median() <= 2


def test_strengths_are_those_of_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions as often, magnitude 9 ± 0.5 of 10 and never beyond; every operation drawn."""
    seen: list[Tensor] = []

    def note(images: Tensor, strength: Tensor) -> Tensor:
        seen.append(strength)
        return images

    moved: list[Tensor] = []

    def note_moves(images: Tensor, move: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
        moved.append(move)
        return note(images, strength)

    monkeypatch.setattr(rand_augment, "_COLOURS", (note,) * len(COLOURS))
    monkeypatch.setattr(rand_augment, "_moved", note_moves)
    torch.manual_seed(0)
    RandAugment()(photographs(6000, 4), grey_fill(3))
    strengths = torch.cat(seen)
    assert len(strengths) == pytest.approx(6000, rel=0.05)  # half of two operations an image
    assert len(seen) == 2 * (len(COLOURS) + 1)
    assert (strengths > 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert strengths.abs().mean() == pytest.approx(0.896, abs=0.005)  # cut off at 1
    assert strengths.abs().max() == 1
    assert torch.cat(moved).bincount().tolist() == pytest.approx([400] * 5, rel=0.2)
