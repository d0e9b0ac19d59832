"""Augmentation as batched tensor operations on the images' own device.

Every image has its own random numbers. They are drawn on the CPU whatever the device, so that the
stream, hence a resumed run, is the same anywhere, and for the whole batch even where this process
holds a part of it, so that several processes see what one would.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dvla_fast.data.images import to_device_of

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as Pillow's


class Draws:
    """The random numbers of a batch of images.

    Args:
        count: images at hand.
        first, total: they are the images first .. first + count - 1 of a batch of ``total``, whose
            numbers are all drawn; None: the whole batch.
        generator: CPU generator; PyTorch's global one if None.
    """

    def __init__(
        self,
        count: int,
        first: int = 0,
        total: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.total = count if total is None else total
        self.rows = slice(first, first + count)
        self.generator = generator

    def uniform(self, *sizes: int) -> Tensor:
        """Uniform on [0, 1): (*sizes, count) float32 on the CPU."""
        return self.whole(*sizes)[..., self.rows]

    def whole(self, *sizes: int) -> Tensor:
        """The same for the whole batch: (*sizes, total)."""
        return torch.rand(*sizes, self.total, generator=self.generator)

    def normal(self) -> Tensor:
        """Standard normal: (count,) float32 on the CPU."""
        return torch.randn(self.total, generator=self.generator)[self.rows]

    def integers(self, high: int) -> Tensor:
        """Uniform on 0 .. high - 1: (count,) int64 on the CPU."""
        return torch.randint(0, high, (self.total,), generator=self.generator)[self.rows]


def random_affine(
    images: Tensor,
    *,
    shift: float = 0.0,
    rotate: float = 0.0,
    scale: float = 0.0,
    flip: bool = False,
    crop: float = 1.0,
    padding: str = "zeros",
    draws: Draws | None = None,
) -> Tensor:
    """Shift, rotate, scale, mirror and crop every image at random, in one resampling.

    Args:
        images: (B, C, H, W) float in [0, 1], before normalisation, so that zero is background.
        shift: largest shift along each axis, as a share of the side.
        rotate: largest rotation, in degrees.
        scale: largest relative change of size.
        flip: mirror half of the images left to right (never for digits).
        crop: smallest share of the area that a random crop keeps, of aspect ratio 3/4 to 4/3; it is
            resized back (Szegedy et al. 2015, "Going Deeper with Convolutions"). 1: none.
        padding: ``"zeros"`` or ``"reflection"`` for what lies outside the image.
        draws: random numbers of the images.

    Returns:
        (B, C, H, W), dtype and device of ``images``.
    """
    if not (shift or rotate or scale or flip or crop < 1):
        return images
    draws = draws or Draws(len(images))
    draw = draws.uniform(5)
    angle = (2 * draw[0] - 1) * math.radians(rotate)
    zoom = 1 / (1 + (2 * draw[1] - 1) * scale)
    mirror = torch.where(draw[4] < 0.5, -1.0, 1.0) if flip else torch.ones_like(zoom)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    offset = (2 * draw[2:4] - 1) * 2 * shift  # the sampling grid spans [-1, 1], hence the 2
    linear = torch.stack([cosine * mirror, -sine, sine * mirror, cosine], -1).view(-1, 2, 2)
    if crop < 1:
        size, centre = _crops(draws.uniform(4), crop)
        offset = offset + (linear @ centre.unsqueeze(-1)).squeeze(-1).T
        linear = linear * size.unsqueeze(1)
    theta = torch.cat([linear, offset.T.unsqueeze(-1)], -1)  # [B, 2, 3]
    grid = F.affine_grid(
        to_device_of(images, theta.to(images.dtype)), list(images.shape), align_corners=False
    )
    return F.grid_sample(images, grid, "bilinear", padding, align_corners=False)


def _crops(draw: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Widths and heights (B, 2) as shares of the side, and centres (B, 2) in [-1, 1]."""
    area = smallest + (1 - smallest) * draw[0]
    widest = (-area.log()).clamp_max(math.log(4 / 3))  # so that both sides fit
    ratio = ((2 * draw[1] - 1) * widest).exp()
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], -1)
    return size, (2 * draw[2:4].T - 1) * (1 - size)


def color_jitter(images: Tensor, amount: float, draws: Draws | None = None) -> Tensor:
    """Change brightness, contrast and saturation, each by a factor in [1 - amount, 1 + amount].

    Args:
        images: (B, C, H, W) float in [0, 1]; one channel has no saturation to change.
        amount: in [0, 1]; 0 is the identity.
        draws: random numbers of the images.
    """
    if not amount:
        return images
    draw = (draws or Draws(len(images))).uniform(3)
    factors = 1 + (2 * draw.to(images.dtype) - 1) * amount
    factors = to_device_of(images, factors)[..., None, None, None]
    images = (images * factors[0]).clamp(0, 1)
    images = torch.lerp(grey(images).mean((1, 2, 3), keepdim=True), images, factors[1])
    images = images.clamp(0, 1)
    return torch.lerp(grey(images), images, factors[2]).clamp(0, 1)


def grey(images: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of images (B, 3, H, W); the mean of channels where there are not three."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    # Numbers, not a tensor of them: copying that to a GPU would wait for it.
    red, green, blue = images.split(1, dim=1)
    return _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue


def random_erasing(images: Tensor, probability: float, draws: Draws | None = None) -> Tensor:
    """Replace a rectangle of some images by noise (Zhong et al. 2020, "Random Erasing").

    The rectangle takes 2 to 33 % of the area, with aspect ratio 0.3 to 1/0.3.

    Args:
        images: (B, C, H, W), normalised: the noise is standard normal, a value a pixel.
        probability: share of the images; 0 is the identity.
        draws: random numbers of the images. The noise itself comes from the device's generator.
    """
    if not probability:
        return images
    draws = draws or Draws(len(images))
    everyone = draws.whole(5)
    erased = everyone[4] < probability
    place = erased[draws.rows].nonzero()[:, 0]
    # Noise for the whole batch: the device's stream, too, stays that of one process.
    noise = torch.randn(int(erased.sum()), *images.shape[1:], device=images.device)
    first = int(erased[: draws.rows.start].sum())
    noise = noise[first : first + len(place)].to(images.dtype)
    mask = to_device_of(images, _rectangles(everyone[:, draws.rows][:, place], images.shape[2:]))
    place = to_device_of(images, place)
    images = images.clone()
    images[place] = torch.where(mask, noise, images[place])
    return images


def _rectangles(draw: Tensor, sides: torch.Size) -> Tensor:
    """Random rectangles (n, 1, H, W) bool from uniform numbers (4 or more, n)."""
    area = 0.02 + (1 / 3 - 0.02) * draw[0]
    ratio = ((2 * draw[1] - 1) * math.log(1 / 0.3)).exp()
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()]).clamp_max(1.0)
    first = draw[2:4] * (1 - size)
    inside = []
    for axis, count in enumerate(sides):
        centre = torch.arange(count) + 0.5
        start = (first[axis] * count)[:, None]
        inside.append((centre >= start) & (centre < start + size[axis, :, None] * count))
    return inside[0][:, None, :, None] & inside[1][:, None, None, :]
