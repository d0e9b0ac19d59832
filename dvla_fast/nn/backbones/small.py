"""SmallConvAttention: a backbone for small images and small machines, in Visformer's manner.

Stage 1 is convolutional, stages 2 and 3 are attention; about 0.3 M parameters, over a thousand
16 × 16 images a second on two CPU cores. Made for the demo and the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvla_fast import _extension, functional
from dvla_fast.nn.backbones.base import (
    GatedBackbone,
    Location,
    drop_path,
    key_mask,
    to_map,
    to_tokens,
)
from dvla_fast.nn.layers import is_plain, reset_parts


class SmallConvAttention(GatedBackbone):
    """Convolution, then attention: images (B, in_channels, S, S) -> features (B, 3·width).

    S = 16: stage 1 is width × 16², stage 2 is 2·width × 8² = 64 tokens, stage 3 is 3·width × 4² =
    16 tokens. Images of 32 and more are halved by the stem until they are 16 to 31 wide.

    Args:
        in_channels: colours.
        image_size: side S, at least 8.
        width: channels of stage 1; twice and three times as many in stages 2 and 3.
        depths: blocks of the three stages.
        num_heads: heads of the attention blocks.
        mlp_ratio: hidden width of an attention block's MLP over its width.
        drop_path_rate: stochastic depth of the last block; earlier ones less, in proportion.
        locations: where gates are called; default: last block of stage 2, first of stage 3.

    Raises:
        ValueError: sizes that do not fit together, or a rate out of range.
    """

    regularisers = ("drop_path_rate",)

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 16,
        width: int = 32,
        depths: Sequence[int] = (1, 2, 2),
        num_heads: int = 2,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        locations: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        dims = (width, 2 * width, 3 * width)
        if len(depths) != 3 or min(depths) < 1:
            raise ValueError(f"depths: expected three positive numbers, got {tuple(depths)}")
        if image_size < 8:
            raise ValueError(f"image_size: expected at least 8, got {image_size}")
        if in_channels < 1 or width < 1 or num_heads < 1:
            raise ValueError("in_channels, width, num_heads: expected positive numbers")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate: expected a number in [0, 1), got {drop_path_rate}")
        if any(dim % num_heads for dim in dims[1:]):
            raise ValueError(f"width: {dims[1:]} are not multiples of num_heads = {num_heads}")
        self.in_channels, self.image_size = in_channels, image_size
        self.feature_dim = dims[2]
        self.depths = (depths[0], depths[1], depths[2])
        self.widths = {(s, b): dims[s - 1] for s, b in self.blocks}
        default = ((2, depths[1] - 1), (3, 0))
        self.locations = self.check_locations(default if locations is None else locations)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.stem, side = _stem(in_channels, dims[0], image_size)
        self.stage1 = nn.ModuleList(_ConvBlock(dims[0], rates.pop(0)) for _ in range(depths[0]))
        self.down2 = nn.Conv2d(dims[0], dims[1], 2, stride=2)
        self.down3 = nn.Conv2d(dims[1], dims[2], 2, stride=2)
        self.position2 = nn.Parameter(torch.zeros(1, dims[1], side // 2, side // 2))
        self.position3 = nn.Parameter(torch.zeros(1, dims[2], side // 4, side // 4))
        self.stage2 = nn.ModuleList(
            _AttentionBlock(dims[1], num_heads, mlp_ratio, rates.pop(0)) for _ in range(depths[1])
        )
        self.stage3 = nn.ModuleList(
            _AttentionBlock(dims[2], num_heads, mlp_ratio, rates.pop(0)) for _ in range(depths[2])
        )
        self.norm = nn.LayerNorm(dims[2])
        self._reset_positions()

    def reset_parameters(self) -> None:
        """Initialise all weights and buffers anew."""
        reset_parts(self)
        self._reset_positions()

    def _reset_positions(self) -> None:
        nn.init.trunc_normal_(self.position2, std=0.02)
        nn.init.trunc_normal_(self.position3, std=0.02)

    def enter(self, stage: int, x: Tensor) -> Tensor:
        """See :class:`GatedBackbone`.

        Raises:
            ValueError: images of another shape than the backbone was built for.
        """
        if stage == 2:
            return self.down2(x) + self.position2
        if stage == 3:
            return self.down3(x) + self.position3
        expected = (self.in_channels, self.image_size, self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"images: shape {tuple(x.shape)}, expected (B, *{expected})")
        # Channels last from here on: convolutions are faster, and tokens need no copy.
        result: Tensor = self.stem(x).contiguous(memory_format=torch.channels_last)
        return result

    def run_block(
        self, location: Location, x: Tensor, extra: Tensor | None, extra_mask: Tensor | None
    ) -> Tensor:
        """See :class:`GatedBackbone`."""
        stage, index = location
        if stage == 1:
            conv: Tensor = self.stage1[index](x)
            return conv
        block = (self.stage2 if stage == 2 else self.stage3)[index]
        return to_map(block(to_tokens(x), extra, extra_mask), x.shape[2], x.shape[3])

    def pool(self, x: Tensor) -> Tensor:
        """See :class:`GatedBackbone`."""
        normed: Tensor = self.norm(to_tokens(x))
        return normed.mean(1)

    def carries_extra(self, location: Location) -> bool:
        """See :class:`GatedBackbone`."""
        return location[0] > 1


def _stem(in_channels: int, width: int, side: int) -> tuple[nn.Sequential, int]:
    """Convolutions to ``width`` channels on a map less than 32 wide, and that map's side."""
    layers: list[nn.Module] = []
    channels, stride = in_channels, 1
    while True:
        if side >= 32:
            stride, side = 2, (side + 1) // 2
        else:
            stride = 1
        layers += [
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
        ]
        channels = width
        if side < 32:
            return nn.Sequential(*layers), side


class _ConvBlock(nn.Module):
    """Residual block of two 3 × 3 convolutions."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))
        return F.gelu(x + drop_path(branch, self.rate, self.training))


class _AttentionBlock(nn.Module):
    """Pre-norm transformer block on tokens (B, N, dim), with extra ones (B, P, dim) to look at.

    Extra tokens are dropped after the block, so they are asked as keys and values only.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, rate: float) -> None:
        super().__init__()
        self.num_heads, self.rate = num_heads, rate
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(
        self, x: Tensor, extra: Tensor | None = None, extra_mask: Tensor | None = None
    ) -> Tensor:
        x = x + drop_path(self._attend(x, extra, extra_mask), self.rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.rate, self.training)

    def _attend(self, x: Tensor, extra: Tensor | None, extra_mask: Tensor | None) -> Tensor:
        count, dim = x.shape[1:]
        seen = x if extra is None else torch.cat((x, extra.to(x.dtype)), dim=1)
        normed = self.norm1(seen)
        parts = (dim, 2 * dim)
        if is_plain(self.qkv):
            to_query, to_others = self.qkv.weight.split(parts)
            query_bias, others_bias = self.qkv.bias.split(parts)
            query = F.linear(normed[:, :count], to_query, query_bias)
            others = F.linear(normed, to_others, others_bias)
        else:  # queries of the extra tokens come with the call; nothing reads them
            query, others = self.qkv(normed).split(parts, dim=-1)
            query = query[:, :count]
        others = others.unflatten(-1, (2, self.num_heads, -1))
        out = _attention(
            query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2),  # [B, heads, N, head_dim]
            others[:, :, 0].transpose(1, 2),  # [B, heads, N + P, head_dim]
            others[:, :, 1].transpose(1, 2),
            key_mask(count, extra_mask),
        )
        result: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return result


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of heads (B, heads, L, head_dim); mask (B, 1, 1, S), True = attend.

    Heads here are 8 or 16 wide. On the CPU dual attention without a text, its gate open, takes them
    in half to a third of the time of PyTorch's own operator, forward and backward.
    """
    if query.device.type != "cpu" or _extension.problem is not None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    no_text = key[:, :, :0]
    image_mask = None if mask is None else mask[:, 0, 0]
    gate = torch.ones((), dtype=torch.float32)
    return functional.dual_attention(
        query, key, value, no_text, no_text, gate, image_mask=image_mask
    )
