"""Training images: from stored ones to augmented, normalised network input, on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dvla_fast.data import FewShotData
from dvla_fast.data.augment import Draws, color_jitter, random_affine, random_erasing
from dvla_fast.data.images import unit_range
from dvla_fast.data.rand_augment import RandAugment, require_torchvision
from dvla_fast.engine.config import AugmentConfig, PretrainConfig
from dvla_fast.errors import MissingDependencyError


class Augmentation:
    """Applies a configured augmentation: geometry, RandAugment, colours, erasing, in this order.

    Args:
        config: the amounts.
        data: whose images they are.

    Raises:
        MissingDependencyError: RandAugment without torchvision.
        ValueError: a description of RandAugment that is none.
    """

    def __init__(self, config: AugmentConfig, data: FewShotData) -> None:
        self.config, self.data = config, data
        self.rand = None
        if config.rand_augment:
            require_torchvision()
            self.rand = RandAugment.parse(config.rand_augment)
        # Digits have a black background, which zeros continue; photographs are mirrored outwards.
        self.padding = "zeros" if data.channels == 1 else "reflection"
        self.fill = 255 * data.mean

    def __call__(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Stored images (B, C, H, W), uint8 or float32 in [0, 1] -> normalised float32 ones."""
        config = self.config
        draws = draws or Draws(len(images))
        pixels = random_affine(
            unit_range(images),
            shift=config.shift,
            rotate=config.rotate,
            scale=config.scale,
            flip=config.flip,
            crop=config.crop,
            padding=self.padding,
            draws=draws,
        )
        if self.rand is not None:
            stored = (pixels * 255).round().to(torch.uint8)
            pixels = unit_range(self.rand(stored, self.fill, draws))
        pixels = color_jitter(pixels, config.color_jitter, draws)
        return random_erasing(self.data.normalise(pixels), config.random_erasing, draws)


def build_mixer(
    config: PretrainConfig, classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup, cutmix, or one of both by a coin; None where both are off.

    The mixer takes images (B, C, H, W) and labels (B,) int64 and returns mixed images and soft
    labels (B, classes). Each process mixes its own images (Zhang et al. 2018; Yun et al. 2019).

    Raises:
        MissingDependencyError: torchvision is not installed.
    """
    if not (config.mixup or config.cutmix):
        return None
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise MissingDependencyError(
            "mixup and cutmix need torchvision, which is not installed; run "
            "pip install 'dvla-fast[vision]'"
        ) from error
    kinds: list[Any] = []
    if config.mixup:
        kinds.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix:
        kinds.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    mixer: Any = kinds[0] if len(kinds) == 1 else v2.RandomChoice(kinds)
    return mixer
