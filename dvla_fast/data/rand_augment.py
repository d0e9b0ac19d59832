"""RandAugment on batches: every image gets its own operations at its own strengths.

Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced search space".
The operations and their strengths are those that the name ``rand-m9-mstd0.5-inc1`` means in timm,
where the published recipes take it from, with Pillow's rounding. Images that share an operation go
through it together, and all that move through one resampling. Nothing waits for a GPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dvla_fast.data.augment import Draws, grey
from dvla_fast.data.images import to_device_of
from dvla_fast.errors import MissingDependencyError

_APPLIED = 0.5  # an operation that is drawn is applied to half of the images
_LIMIT = 10.0  # the strongest magnitude


@dataclass(frozen=True)
class RandAugment:
    """A parsed description such as ``rand-m9-mstd0.5-inc1``.

    Attributes:
        magnitude: strength in 0..10; deviation: its standard deviation over images; layers:
            operations of an image.
    """

    magnitude: float = 9.0
    deviation: float = 0.5
    layers: int = 2

    @classmethod
    def parse(cls, text: str) -> RandAugment:
        """Read ``rand-m<magnitude>-n<layers>-mstd<deviation>-inc1``, parts in any order.

        Raises:
            ValueError: another word, a magnitude above 10, or without ``inc1``: operations whose
                strength does not rise with the magnitude are not provided.
        """
        head, *parts = text.split("-")
        values: dict[str, float] = {"m": 10.0, "n": 2, "mstd": 0.0, "inc": 0}
        for part in parts:
            found = re.fullmatch(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)", part)
            if head != "rand" or found is None:
                break
            values[found[1]] = float(found[2])
        else:
            if values["inc"] == 1 and values["m"] <= _LIMIT and values["n"] in range(1, 9):
                return cls(values["m"], values["mstd"], int(values["n"]))
        raise ValueError(f"rand_augment: {text!r} is not of the form 'rand-m9-mstd0.5-inc1'")

    def __call__(self, images: Tensor, fill: Tensor, draws: Draws | None = None) -> Tensor:
        """Augment.

        Args:
            images: (B, C, H, W) uint8, C of 1 or 3.
            fill: (C,) values in 0..255 for what lies outside a moved image, on the same device.
            draws: random numbers of the images.

        Returns:
            (B, C, H, W) uint8.

        Raises:
            MissingDependencyError: torchvision is not installed.
        """
        require_torchvision()  # some operations need it, whether drawn or not
        draws = draws or Draws(len(images))
        images = images.clone()
        count = len(_COLOURS) + len(_MOVES)
        for _ in range(self.layers):
            choice = draws.integers(count)
            apply, sign = draws.uniform(2) < _APPLIED
            levels = self.magnitude + self.deviation * draws.normal()
            strength = levels.clamp(0, _LIMIT) / _LIMIT * torch.where(sign, 1.0, -1.0)
            for number, operation in enumerate(_COLOURS):
                rows = (apply & (choice == number)).nonzero()[:, 0]
                if len(rows):
                    where = to_device_of(images, rows)
                    images[where] = operation(images[where], strength[rows])
            rows = (apply & (choice >= len(_COLOURS))).nonzero()[:, 0]
            if len(rows):
                where = to_device_of(images, rows)
                move = choice[rows] - len(_COLOURS)
                images[where] = _moved(images[where], move, strength[rows], fill)
        return images


# The operations take images (n, C, H, W) uint8 and strengths (n,) in [-1, 1] on the CPU; where an
# operation has no direction the strength counts alone.


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    return require_torchvision().autocontrast(images)


def _equalize(images: Tensor, strength: Tensor) -> Tensor:
    return require_torchvision().equalize(images)


def require_torchvision() -> Any:
    """torchvision's functions on images (MissingDependencyError without it)."""
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise MissingDependencyError(
            "rand_augment needs torchvision, which is not installed; run "
            "pip install 'dvla-fast[vision]'"
        ) from error
    return functional


def _invert(images: Tensor, strength: Tensor) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    """Keep one to four of the eight bits (timm none at full strength, which Pillow refuses)."""
    bits = (4 - (4 * strength.abs()).int()).clamp_min(1)
    return images & _each(images, 256 - 2 ** (8 - bits)).to(torch.uint8)


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    """Invert the bright part of the range."""
    threshold = _each(images, 256 - (256 * strength.abs()).int())
    return torch.where(images < threshold, images, 255 - images)


def _solarize_add(images: Tensor, strength: Tensor) -> Tensor:
    """Brighten the dark half of the range."""
    brighter = (images + _each(images, (110 * strength.abs()).int())).clamp(max=255)
    return torch.where(images < 128, brighter.to(torch.uint8), images)


def _saturation(images: Tensor, strength: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    return _enhanced(images, _levels(images), strength)


def _contrast(images: Tensor, strength: Tensor) -> Tensor:
    mean = _levels(images).mean((1, 2, 3), keepdim=True)
    return _enhanced(images, (mean + 0.5).floor(), strength)


def _brightness(images: Tensor, strength: Tensor) -> Tensor:
    return _enhanced(images, images.new_zeros(()).float(), strength)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Away from, or toward, means of 3 x 3 pixels whose middle counts five times."""
    if min(images.shape[2:]) < 3:
        return images
    smooth = images.float()
    inner = smooth[:, :, 1:-1, 1:-1]
    inner.copy_(((9 * F.avg_pool2d(smooth, 3, stride=1) + 4 * inner) / 13 + 0.5).floor())
    return _enhanced(images, smooth, strength)


def _levels(images: Tensor) -> Tensor:
    """Grey (n, 1, H, W) float32 of whole values."""
    return (grey(images.float()) + 0.5).floor()


def _enhanced(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """Away from (positive strength) or toward another image; cut off, not rounded, as Pillow's."""
    factor = _each(images, (1 + 0.9 * strength).clamp_min(0.1))
    return (other + factor * (images - other)).clamp(0, 255).to(torch.uint8)


def _each(images: Tensor, values: Tensor) -> Tensor:
    """One value an image (n,) on the CPU -> (n, 1, 1, 1) on the images' device."""
    return to_device_of(images, values)[:, None, None, None]


_COLOURS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _autocontrast, _equalize, _invert, _posterize, _solarize, _solarize_add, _saturation,
    _contrast, _brightness, _sharpness,
)  # fmt: skip
_MOVES = ("rotate", "shear x", "shear y", "translate x", "translate y")


def _moved(images: Tensor, move: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    """Rotate by up to 30°, shear by up to 0.3 from the upper left corner, or shift by up to 45 %.

    Args:
        move: (n,) places in ``_MOVES``, on the CPU.
    """
    rotate, *others = (torch.where(move == k, strength, 0.0) for k in range(len(_MOVES)))
    shear_x, shear_y, shift_x, shift_y = others
    angle = math.radians(30) * rotate
    tall = images.shape[2] / images.shape[3]
    # From output to input, in coordinates that reach from -1 to 1.
    rows = [
        [angle.cos(), (0.3 * shear_x - angle.sin()) * tall, 0.9 * shift_x + 0.3 * shear_x * tall],
        [(0.3 * shear_y + angle.sin()) / tall, angle.cos(), 0.9 * shift_y + 0.3 * shear_y / tall],
    ]
    theta = torch.stack([torch.stack(row, -1) for row in rows], 1)  # [n, 2, 3]
    grid = F.affine_grid(to_device_of(images, theta), list(images.shape), align_corners=False)
    background = fill[:, None, None]
    moved = F.grid_sample(images - background, grid, "bilinear", "zeros", align_corners=False)
    return (moved + background).round().clamp(0, 255).to(torch.uint8)
