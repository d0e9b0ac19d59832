"""RandAugment on batches: every image gets its own operations, images that share one go together.

Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced search space".
The operations and their strengths are those that the name ``rand-m9-mstd0.5-inc1`` means in timm,
where the published recipes take it from; torchvision computes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dvla_fast.data.augment import Draws
from dvla_fast.data.images import to_device_of
from dvla_fast.errors import MissingDependencyError

_APPLIED = 0.5  # an operation that is drawn is applied to half of the images
_LIMIT = 10.0  # the strongest magnitude


@dataclass(frozen=True)
class RandAugment:
    """A parsed description such as ``rand-m9-mstd0.5-inc1``.

    Attributes:
        magnitude: strength in 0..10; deviation: its standard deviation, drawn for each group of
            images that share an operation; layers: operations of an image.
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
            if values["inc"] == 1 and values["m"] <= _LIMIT and 1 <= values["n"] <= 8:
                return cls(values["m"], values["mstd"], int(values["n"]))
        raise ValueError(f"rand_augment: {text!r} is not of the form 'rand-m9-mstd0.5-inc1'")

    def __call__(self, images: Tensor, fill: list[float], draws: Draws | None = None) -> Tensor:
        """Augment.

        Args:
            images: (B, C, H, W) uint8.
            fill: C values in 0..255 for what lies outside a moved image.
            draws: random numbers of the images.

        Returns:
            (B, C, H, W) uint8.

        Raises:
            MissingDependencyError: torchvision is not installed.
        """
        functional = _torchvision()
        draws = draws or Draws(len(images))
        images = images.clone()
        for _ in range(self.layers):
            choice = draws.integers(len(_OPERATIONS))
            apply, sign = draws.uniform(2) < _APPLIED
            magnitudes = torch.randn(len(_OPERATIONS), 2, generator=draws.generator)
            levels = (self.magnitude + self.deviation * magnitudes).clamp(0, _LIMIT) / _LIMIT
            for number, operation in enumerate(_OPERATIONS):
                for side in (0, 1):
                    rows = (apply & (choice == number) & (sign == bool(side))).nonzero()[:, 0]
                    if len(rows) == 0:
                        continue
                    strength = float(levels[number, side]) * (1 if side else -1)
                    where = to_device_of(images, rows)
                    images[where] = operation(functional, images[where], strength, fill)
        return images


def _torchvision() -> Any:
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise MissingDependencyError(
            "rand_augment needs torchvision, which is not installed; run "
            "pip install 'dvla-fast[vision]'"
        ) from error
    return functional


def _moved(F: Any, x: Tensor, fill: list[float], **change: Any) -> Tensor:
    from torchvision.transforms import InterpolationMode

    neutral: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    how = {"interpolation": InterpolationMode.BILINEAR, "fill": fill}
    moved: Tensor = F.affine(x, **{**neutral, **change}, **how)
    return moved


def _degrees(strength: float) -> float:
    return float(torch.rad2deg(torch.atan(torch.tensor(0.3 * strength))))


def _factor(strength: float) -> float:
    return max(0.1, 1 + 0.9 * strength)


# (functional, images uint8, strength in [-1, 1], fill) -> images. Where an operation has no
# direction its strength counts alone.
_Operation = Callable[[Any, Tensor, float, list[float]], Tensor]
_OPERATIONS: tuple[_Operation, ...] = (
    lambda F, x, s, fill: F.autocontrast(x),
    lambda F, x, s, fill: F.equalize(x),
    lambda F, x, s, fill: F.invert(x),
    lambda F, x, s, fill: _moved(F, x, fill, angle=30 * s),
    lambda F, x, s, fill: F.posterize(x, 4 - int(4 * abs(s))),
    lambda F, x, s, fill: F.solarize(x, 256 - int(256 * abs(s))),
    lambda F, x, s, fill: _solarize_add(x, int(110 * abs(s))),
    lambda F, x, s, fill: F.adjust_saturation(x, _factor(s)) if x.shape[1] == 3 else x,
    lambda F, x, s, fill: F.adjust_contrast(x, _factor(s)),
    lambda F, x, s, fill: F.adjust_brightness(x, _factor(s)),
    lambda F, x, s, fill: F.adjust_sharpness(x, _factor(s)),
    lambda F, x, s, fill: _moved(F, x, fill, shear=[_degrees(s), 0.0]),
    lambda F, x, s, fill: _moved(F, x, fill, shear=[0.0, _degrees(s)]),
    lambda F, x, s, fill: _moved(F, x, fill, translate=[round(0.45 * s * x.shape[3]), 0]),
    lambda F, x, s, fill: _moved(F, x, fill, translate=[0, round(0.45 * s * x.shape[2])]),
)


def _solarize_add(images: Tensor, addition: int) -> Tensor:
    """Brighten the dark half of the range."""
    brighter = images.int().add(addition).clamp(max=255).to(images.dtype)
    return torch.where(images < 128, brighter, images)
