"""Attention drawn over images: the weights of ``RLAGate.explain`` as a heat map.

    found = gate.explain(image_tokens, text_tokens)
    picture = overlay_attention(image, found.image[0].mean(0)[2])  # first image, third text token

``picture`` is (H, W, 3) uint8, ready for ``PIL.Image.fromarray(picture.numpy())``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dvla_fast.data.images import unit_range

# From the least attention to the most; lighter is more, so that it reads without colour vision.
_HEAT = torch.tensor([[128, 24, 88], [214, 60, 52], [246, 140, 24], [255, 226, 92]]).float()


def attention_map(
    weights: Tensor, size: tuple[int, int], grid: tuple[int, int] | None = None
) -> Tensor:
    """Spread weights over the pixels of an image, bilinearly.

    Args:
        weights: (..., N), one for each image token, row by row; averaged over heads beforehand.
        size: height and width in pixels.
        grid: rows and columns of tokens; None: a square of N.

    Returns:
        (..., height, width) float32.

    Raises:
        ValueError: N tokens do not fill the grid.
    """
    tokens = weights.shape[-1]
    if grid is None:
        side = math.isqrt(tokens)
        grid = (side, side)
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"weights: {tokens} tokens do not fill a grid of {grid[0]} x {grid[1]}")
    rows = weights.float().reshape(-1, 1, *grid)
    spread = F.interpolate(rows, size=size, mode="bilinear", align_corners=False)
    return spread.reshape(*weights.shape[:-1], *size)


def overlay_attention(
    image: Tensor,
    weights: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    size: int | None = None,
    limits: tuple[float, float] | None = None,
    strength: float = 0.78,
) -> Tensor:
    """Draw attention over an image: grey where there is little, coloured where there is much.

    Args:
        image: (C, H, W), C 1 or 3; uint8, or float in [0, 1].
        weights: (N,), as for :func:`attention_map`.
        size: height of the picture in pixels; None: the image's.
        limits: weights drawn without colour and with all of it; None: the smallest and largest
            here. Give the same limits to pictures that are to be compared.
        strength: share of the colour where attention is largest, 0 to 1.

    Returns:
        (height, width, 3) uint8 on the CPU.

    Raises:
        ValueError: shapes that do not fit.
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image: shape {tuple(image.shape)}, expected (1 or 3, H, W)")
    if weights.dim() != 1:
        raise ValueError(f"weights: shape {tuple(weights.shape)}, expected (tokens,)")
    picture = resize(image.detach().cpu(), size or image.shape[1]).mean(0)  # grey, [H, W]
    heat = attention_map(weights.detach().cpu(), (picture.shape[0], picture.shape[1]), grid)
    low, high = limits or (weights.min().item(), weights.max().item())
    # Even attention is no attention anywhere: rounding must not be stretched into a pattern.
    span = max(high - low, 1e-5 * abs(high), 1e-30)
    level = ((heat - low) / span).clamp(0, 1)
    share = (strength * level).unsqueeze(-1)
    mixed = (1 - share) * 255 * picture.unsqueeze(-1) + share * _colours(level)
    return mixed.round().clamp(0, 255).to(torch.uint8)


def _colours(level: Tensor) -> Tensor:
    place = level * (len(_HEAT) - 1)
    lower = place.floor().long().clamp(max=len(_HEAT) - 2)
    rest = (place - lower).unsqueeze(-1)
    return _HEAT[lower] * (1 - rest) + _HEAT[lower + 1] * rest


def resize(image: Tensor, height: int) -> Tensor:
    """An image (C, H, W), stored or in [0, 1], as (C, height, width) in [0, 1].

    Small images are enlarged without smoothing: every pixel that the model saw stays one square.
    """
    width = max(1, round(image.shape[2] * height / image.shape[1]))
    pixels = unit_range(image)
    if height >= 2 * image.shape[1]:
        return F.interpolate(pixels[None], size=(height, width), mode="nearest")[0]
    found = F.interpolate(
        pixels[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )
    return found[0].clamp(0, 1)


def peak_ratio(weights: Tensor) -> float:
    """Largest weight over that of even attention: 1 = looks everywhere alike, N = at one place."""
    return float(weights.max()) * weights.shape[-1]
