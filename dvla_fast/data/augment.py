"""Light augmentation as batched tensor operations on the images' own device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def random_affine(
    images: Tensor,
    *,
    shift: float = 0.0,
    rotate: float = 0.0,
    scale: float = 0.0,
    flip: bool = False,
    padding: str = "zeros",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Shift, rotate, scale and mirror every image at random, in one resampling.

    Args:
        images: (B, C, H, W) float in [0, 1], before normalisation, so that zero is background.
        shift: largest shift along each axis, as a share of the side.
        rotate: largest rotation, in degrees.
        scale: largest relative change of size.
        flip: mirror half of the images left to right (never for digits).
        padding: ``"zeros"`` or ``"reflection"`` for what lies outside the image.
        generator: CPU generator; the default one if None.

    Returns:
        (B, C, H, W), dtype and device of ``images``.
    """
    if not (shift or rotate or scale or flip):
        return images
    # Drawn on the CPU whatever the device: the stream, hence a resumed run, is the same anywhere.
    draw = torch.rand(5, images.shape[0], generator=generator)
    angle = (2 * draw[0] - 1) * math.radians(rotate)
    zoom = 1 / (1 + (2 * draw[1] - 1) * scale)
    mirror = torch.where(draw[4] < 0.5, -1.0, 1.0) if flip else torch.ones_like(zoom)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    offset = (2 * draw[2:4] - 1) * 2 * shift  # the sampling grid spans [-1, 1], hence the 2
    theta = torch.stack(
        [
            torch.stack([cosine * mirror, -sine, offset[0]], -1),
            torch.stack([sine * mirror, cosine, offset[1]], -1),
        ],
        1,
    ).to(images)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, "bilinear", padding, align_corners=False)
