"""ResNet-12, the convolutional backbone of the few-shot literature, with gates before its stages.

Four residual blocks of three 3 × 3 convolutions, each followed by a 2 × 2 max-pool, widths 64, 160,
320, 640, LeakyReLU 0.1 and global average pooling: the network of Lee et al. 2019 ("Meta-Learning
with Differentiable Convex Optimization", after TADAM and SNAIL), with their DropBlock (Ghiasi et
al. 2018) in the last two blocks and dropout in the first two.

There is no attention in it. By the rule of ``base``, no text tokens ride through its blocks: a gate
acts through z + mean(H) alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvla_fast.nn.backbones.base import GatedBackbone, Location
from dvla_fast.nn.layers import reset_parts

_SLOPE = 0.1  # of LeakyReLU


class ResNet12(GatedBackbone):
    """ResNet-12: images (B, in_channels, S, S) -> features (B, widths[3]); 12.4 M parameters.

    Each stage is one block, so the locations are (1, 0) to (4, 0), each before that stage's
    convolutions. 84 px: 160 × 21² = 441 tokens before stage 3, 320 × 10² = 100 before stage 4.
    224 px: 56² and 28².

    Args:
        image_size: side S of the images, at least 16.
        in_channels: colours.
        widths: channels of the four stages.
        drop_rate: of dropout (stages 1 and 2) and DropBlock (stages 3 and 4).
        drop_block: False: dropout in stages 3 and 4 too.
        block_size: side of the squares that DropBlock removes.
        ramp_steps: training passes over which DropBlock's rate grows from 0 to ``drop_rate``.
        locations: where gates are called; default: before stages 3 and 4.

    Raises:
        ValueError: sizes or rates out of range.
    """

    passes: Tensor
    deep_from = (4, 0)
    regularisers = ("drop_rate", "drop_block", "block_size", "ramp_steps")

    def __init__(
        self,
        image_size: int = 84,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 160, 320, 640),
        drop_rate: float = 0.1,
        drop_block: bool = True,
        block_size: int = 5,
        ramp_steps: int = 40_000,
        locations: Sequence[Sequence[int]] = ((3, 0), (4, 0)),
    ) -> None:
        super().__init__()
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths: expected four positive numbers, got {tuple(widths)}")
        if image_size < 16:
            raise ValueError(f"image_size: expected at least 16, got {image_size}")
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate: expected a number in [0, 1), got {drop_rate}")
        if min(in_channels, block_size, ramp_steps) < 1:
            raise ValueError("in_channels, block_size, ramp_steps: expected positive numbers")
        self.image_size, self.in_channels = image_size, in_channels
        self.drop_rate, self.ramp_steps = float(drop_rate), ramp_steps
        self.block_size = block_size if drop_block else 0
        # Training passes so far, saved with the weights: a resumed run continues the ramp.
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.feature_dim = widths[3]
        self.depths = (1, 1, 1, 1)
        entering = (in_channels, *widths[:3])
        self.widths = {(stage + 1, 0): width for stage, width in enumerate(entering)}
        self.locations = self.check_locations(locations)
        self.stages = nn.ModuleList(
            _Block(before, after) for before, after in zip(entering, widths)
        )
        self._reset_convolutions()

    def reset_parameters(self) -> None:
        """Initialise all weights and buffers anew."""
        reset_parts(self)
        self._reset_convolutions()
        self.passes.zero_()

    def _reset_convolutions(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, a=_SLOPE, mode="fan_out", nonlinearity="leaky_relu"
                )

    def enter(self, stage: int, x: Tensor) -> Tensor:
        """See :class:`GatedBackbone`.

        Raises:
            ValueError: images of another shape than the backbone was built for.
        """
        if stage > 1:
            return x
        expected = (self.in_channels, self.image_size, self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"images: shape {tuple(x.shape)}, expected (B, *{expected})")
        # Channels last from here on: convolutions are faster, and tokens need no copy.
        return x.contiguous(memory_format=torch.channels_last)

    def run_block(
        self, location: Location, x: Tensor, extra: Tensor | None, extra_mask: Tensor | None
    ) -> Tensor:
        """See :class:`GatedBackbone`."""
        return self._drop(self.stages[location[0] - 1](x), location[0])

    def pool(self, x: Tensor) -> Tensor:
        """See :class:`GatedBackbone`."""
        return x.mean((2, 3))

    def _drop(self, x: Tensor, stage: int) -> Tensor:
        if not self.training or self.drop_rate == 0.0:
            return x
        if stage == 4:  # it runs in every pass, whatever was computed before
            self.passes += 1
        if stage <= 2 or not self.block_size:
            return F.dropout(x, self.drop_rate)
        # On the device: the ramp costs no synchronisation.
        rate = self.drop_rate * (self.passes / self.ramp_steps).clamp(max=1.0)
        return drop_block(x, rate, self.block_size)

    def carries_extra(self, location: Location) -> bool:
        """See :class:`GatedBackbone`."""
        return False


class _Block(nn.Module):
    """Three 3 × 3 convolutions beside a 1 × 1 one, then a 2 × 2 max-pool."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.conv3 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential(
            nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)
        )

    def forward(self, x: Tensor) -> Tensor:
        branch = F.leaky_relu(self.norm1(self.conv1(x)), _SLOPE)
        branch = F.leaky_relu(self.norm2(self.conv2(branch)), _SLOPE)
        branch = self.norm3(self.conv3(branch))
        out = F.leaky_relu(branch + self.shortcut(x), _SLOPE)
        return F.max_pool2d(out, 2)


def drop_block(x: Tensor, rate: Tensor, size: int) -> Tensor:
    """DropBlock (Ghiasi et al. 2018): zero squares of a map, and rescale what is kept.

    Args:
        x: (B, C, H, W).
        rate: (), the share of a map that would be removed if squares did not overlap.
        size: side of a square; on smaller maps, the map's side.
    """
    height, width = x.shape[2:]
    size = min(size, height, width)
    corners = (height - size + 1, width - size + 1)  # where a whole square fits
    density = rate / size**2 * (height * width) / (corners[0] * corners[1])
    seeds = torch.rand(*x.shape[:2], *corners, device=x.device) < density
    kept = 1 - F.max_pool2d(F.pad(seeds.to(x.dtype), [size - 1] * 4), size, stride=1)
    share = kept.mean(dtype=torch.float32).clamp_min(1.0 / kept.numel())
    return x * (kept / share).to(x.dtype)
