"""Backbones that gates can be put into, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dvla_fast.nn.backbones.base import GatedBackbone, GatedTokens, GateFn, Location
from dvla_fast.nn.backbones.clip import ClipViT, clip_statistics, clip_vit
from dvla_fast.nn.backbones.published import has_small_stem
from dvla_fast.nn.backbones.resnet12 import ResNet12
from dvla_fast.nn.backbones.small import SmallConvAttention
from dvla_fast.nn.backbones.visformer import Visformer, visformer_tiny

__all__ = [
    "BACKBONES",
    "ClipViT",
    "GateFn",
    "GatedBackbone",
    "GatedTokens",
    "Location",
    "ResNet12",
    "SmallConvAttention",
    "Visformer",
    "build_backbone",
    "clip_statistics",
    "clip_vit",
    "has_small_stem",
    "visformer_tiny",
]

_BUILDERS: dict[str, Callable[..., GatedBackbone]] = {
    "small": SmallConvAttention,
    "resnet12": ResNet12,
    "visformer_tiny": visformer_tiny,
    "clip": clip_vit,
}

BACKBONES = tuple(_BUILDERS)


def build_backbone(name: str, **kwargs: Any) -> GatedBackbone:
    """The backbone of that name (of ``BACKBONES``); kwargs as its constructor takes them.

    Raises:
        ValueError: unknown name, or arguments that do not fit together.
        TypeError: an argument that this backbone does not take.
    """
    if name not in _BUILDERS:
        raise ValueError(f"backbone: unknown {name!r}; expected one of {BACKBONES}")
    return _BUILDERS[name](**kwargs)
