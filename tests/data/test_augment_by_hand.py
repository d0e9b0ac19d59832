"""Each augmentation does what its numbers say: shown with chosen numbers instead of random ones."""

from __future__ import annotations

import pytest
import torch

from dvla_fast.data.augment import Draws, color_jitter, random_affine, random_erasing


class Chosen(Draws):
    """Gives tables of numbers in [0, 1], a column an image, in the order of the calls."""

    def __init__(self, *tables: list[list[float]]) -> None:
        super().__init__(len(tables[0][0]))
        self.tables = [torch.tensor(table) for table in tables]

    def whole(self, *sizes: int) -> torch.Tensor:
        table = self.tables.pop(0)
        assert table.shape == (*sizes, self.total)
        return table


def affine(
    turn: float = 0.5, size: float = 0.5, right: float = 0.5, down: float = 0.5, mirror: float = 1.0
) -> list[list[float]]:
    """The numbers of one image; 0.5 is the middle of a range, which changes nothing."""
    return [[turn], [size], [right], [down], [mirror]]


def noise(count: int, channels: int, side: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
    stream = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, side, side, generator=stream, dtype=torch.float64).to(kind)


@pytest.mark.parametrize(("turn", "quarters"), [(0.0, -1), (0.5, 0), (1.0, 1)])
@pytest.mark.parametrize("mirror", [0.0, 1.0])
def test_a_quarter_turn(turn: float, quarters: int, mirror: float) -> None:
    images = noise(1, 3, 12)
    numbers = Chosen(affine(turn=turn, mirror=mirror))
    out = random_affine(images, rotate=90, flip=True, draws=numbers)
    expected = images.rot90(quarters, (2, 3))
    expected = expected if mirror else expected.flip(3)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "scale", "side"),
    [(1.0, 1.0, 8), (0.0, 0.5, 2), (0.5, 0.5, 4), (0.75, 1.0, 6)],  # times 2, 1/2, 1, 3/2
)
def test_a_square_grows_and_shrinks(size: float, scale: float, side: int) -> None:
    image = torch.zeros(1, 1, 16, 16)
    image[..., 6:10, 6:10] = 1
    out = random_affine(image, scale=scale, draws=Chosen(affine(size=size)))
    expected = torch.zeros(16, 16)
    first = 8 - side // 2
    expected[first : first + side, first : first + side] = 1
    assert torch.equal((out[0, 0] > 0.5).float(), expected)


@pytest.mark.parametrize(("right", "down"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_smallest_crop_in_a_corner_is_that_quarter(right: int, down: int) -> None:
    levels = torch.tensor([[0.2, 0.4], [0.6, 0.8]])
    image = levels.repeat_interleave(8, 0).repeat_interleave(8, 1)[None, None]
    crop = [[0.0], [0.5], [float(right)], [float(down)]]  # a quarter of the area, a square
    out = random_affine(image, crop=0.25, padding="reflection", draws=Chosen(affine(), crop))
    inside = out[0, 0, 1:-1, 1:-1]  # the outermost pixels are between two quarters
    torch.testing.assert_close(inside, torch.full_like(inside, float(levels[down, right])))


def jittered(image: list[list[float]], factors: list[float]) -> list[list[float]]:
    """Brightness, contrast, saturation of pixels [red, green, blue], in plain arithmetic."""
    brightness, contrast, saturation = factors

    def between(value: float) -> float:
        return min(max(value, 0.0), 1.0)

    def grey(pixel: list[float]) -> float:
        return 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]

    image = [[between(brightness * value) for value in pixel] for pixel in image]
    middle = sum(grey(pixel) for pixel in image) / len(image)
    image = [[between(middle + contrast * (v - middle)) for v in pixel] for pixel in image]
    return [
        [between(grey(pixel) + saturation * (value - grey(pixel))) for value in pixel]
        for pixel in image
    ]


def test_colours_change_by_the_factors() -> None:
    """One of the three at a time, then all of them, down and up; far enough to reach 0 and 1."""
    amount = 0.8
    brightness = [0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25, 0.75, 1.0]
    contrast = [0.5, 0.5, 0.0, 1.0, 0.5, 0.5, 0.75, 0.25, 1.0]
    saturation = [0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.75, 0.0, 0.75]
    images = noise(9, 3, 4, torch.float64)
    out = color_jitter(images, amount, Chosen([brightness, contrast, saturation]))
    for image, found, *numbers in zip(images, out, brightness, contrast, saturation, strict=True):
        factors = [1 + amount * (2 * number - 1) for number in numbers]
        expected = torch.tensor(jittered(image.flatten(1).T.tolist(), factors), dtype=torch.float64)
        torch.testing.assert_close(found.flatten(1).T, expected)


def test_one_channel_has_brightness_and_contrast() -> None:
    image = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]], dtype=torch.float64)
    out = color_jitter(image, 0.5, Chosen([[1.0], [0.0], [1.0]]))
    # times 1.5: 0.15, 0.3, 0.45, 0.6; half the distance to their mean, 0.375
    expected = torch.tensor([[[[0.2625, 0.3375], [0.4125, 0.4875]]]], dtype=torch.float64)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("ratio", "rows", "columns"), [(0.0, 23, 77), (0.5, 42, 42), (1.0, 77, 23)]
)
@pytest.mark.parametrize("corner", [0.0, 1.0])
def test_the_middle_rectangle_in_a_corner(
    ratio: float, rows: int, columns: int, corner: float
) -> None:
    """Of (1/50 + 1/3)/2 of the area, its sides as 0.3 to 1, 1 to 1, or 1 to 0.3."""
    numbers = Chosen([[0.5], [ratio], [corner], [corner], [0.0]])
    out = random_erasing(torch.full((1, 3, 100, 100), 7.0), 0.5, numbers)
    expected = torch.zeros(100, 100, dtype=torch.bool)
    expected[:rows, :columns] = True
    erased = (out != 7.0).all(1)[0]
    assert torch.equal(erased.flip(0, 1) if corner else erased, expected)
