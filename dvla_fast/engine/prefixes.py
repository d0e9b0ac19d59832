"""Feature maps before the first gate, computed once: what a frozen backbone never changes.

At ``backbone_lr: 0`` and without augmentation, meta-tuning meets the same maps again and again;
here they are computed once per image and shared by all runs that start from the same backbone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvla_fast.data import FewShotData
from dvla_fast.engine.config import AugmentConfig, MetatuneConfig
from dvla_fast.engine.modes import evaluating
from dvla_fast.engine.settings import UsageError
from dvla_fast.nn import DVLA
from dvla_fast.nn.backbones.base import Location

_BATCH = 64  # images of one pass


def has_constant_prefix(config: MetatuneConfig) -> bool:
    """Whether meta-tuning meets every image always with the same map before the first gate."""
    return config.backbone_lr == 0 and config.augment == AugmentConfig()


def check_constant_prefix(config: MetatuneConfig) -> None:
    """Raise UsageError unless the prefix is constant."""
    if not has_constant_prefix(config):
        raise UsageError(
            "maps before the first gate can be kept only with --metatune.backbone_lr 0 and without "
            "augmentation"
        )


class PrefixMaps:
    """Maps before the first gate of all images of a data set, of one frozen backbone.

    Args:
        data: normalised as the backbone expects.
        cache_mib: memory for the maps, in MiB; what does not fit pushes out what came first.
    """

    def __init__(self, data: FewShotData, cache_mib: float = 4096) -> None:
        self.data, self.cache_mib = data, cache_mib
        self._maps: dict[tuple[str, Location], Tensor] = {}

    @torch.no_grad()
    def of(self, model: DVLA, split: str) -> Tensor:
        """Return the maps (N, C, H, W) of a split; ``model`` must hold the frozen backbone."""
        key = (split, model.gated_layers[0])
        if key not in self._maps:
            chunks = self.data.split(split).chunks(_BATCH)
            with evaluating(model.backbone):
                maps = [model.prefix(self.data.normalise(chunk)) for chunk in chunks]
            self._maps[key] = torch.cat(maps)
            while sum(maps.nbytes for maps in self._maps.values()) > self.cache_mib * 2**20:
                if len(self._maps) == 1:
                    break
                del self._maps[next(iter(self._maps))]
        return self._maps[key]
