"""Visformer-Tiny, the paper's backbone, over timm's implementation, with gates before any block.

timm's modules and parameter names are kept (under ``net.``), so its checkpoints load; those of the
method's authors are converted by ``published``. Stage 1 is convolutional; gates with extra tokens
go to stages 2 and 3 (method §5). The ImageNet weights that timm offers have seen the novel classes
of every benchmark here, and are never fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvla_fast.errors import MissingDependencyError
from dvla_fast.nn.backbones.base import (
    GatedBackbone,
    Location,
    key_mask,
    to_map,
    to_tokens,
)
from dvla_fast.nn.backbones.published import load_visformer
from dvla_fast.nn.layers import is_plain, reset_parts


class Visformer(GatedBackbone):
    """A timm Visformer with gates.

    Args:
        net: a ``timm.models.visformer.Visformer`` with a convolutional stem.
        locations: where gates are called; default: last block of stage 2, first of stage 3, which
            are the paper's (2, 3) and (3, 0) in Visformer-Tiny.

    Raises:
        ValueError: a location that does not exist.
    """

    regularisers = ("drop_path_rate", "drop_rate", "proj_drop_rate", "attn_drop_rate")

    def __init__(self, net: Any, locations: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__()
        self.net = net
        stages = (net.stage1, net.stage2, net.stage3)
        self.depths = tuple(len(stage) for stage in stages)
        self.feature_dim = net.num_features
        self.widths = {(s, b): len(stages[s - 1][b].norm2.weight) for s, b in self.blocks}
        default = ((2, self.depths[1] - 1), (3, 0))
        self.locations = self.check_locations(default if locations is None else locations)

    def reset_parameters(self) -> None:
        """Initialise all weights and buffers anew, as timm does."""
        net: Any = self.net
        reset_parts(net)
        net.apply(net._init_weights)
        for position in (net.pos_embed1, net.pos_embed2, net.pos_embed3):
            if position is not None:
                nn.init.trunc_normal_(position, std=0.02)

    def enter(self, stage: int, x: Tensor) -> Tensor:
        """See :class:`GatedBackbone`."""
        net: Any = self.net
        if stage == 1:
            size = net.patch_embed1.img_size
            stride = net.stem[0].stride
            expected = (net.stem[0].in_channels, size[0] * stride[0], size[1] * stride[1])
            if tuple(x.shape[1:]) != expected:
                raise ValueError(f"images: shape {tuple(x.shape)}, expected (B, *{expected})")
            x = net.stem(x)
        x = getattr(net, f"patch_embed{stage}")(x)
        position = getattr(net, f"pos_embed{stage}")
        result: Tensor = x if position is None else net.pos_drop(x + position)
        return result

    def run_block(
        self, location: Location, x: Tensor, extra: Tensor | None, extra_mask: Tensor | None
    ) -> Tensor:
        """See :class:`GatedBackbone`.

        Extra tokens ride along as further positions of the attention. They are dropped after this
        block, so they are asked as keys and values only, and nothing more is computed for them.
        """
        block = self._block(location)
        result: Tensor
        if extra is None:
            result = block(x)
            return result
        attended = block.attn.proj_drop(block.attn.proj(_attend(block, x, extra, extra_mask)))
        x = x + block.drop_path(attended)
        result = x + block.drop_path(block.mlp(block.norm2(x)))
        return result

    def pool(self, x: Tensor) -> Tensor:
        """See :class:`GatedBackbone`."""
        net: Any = self.net
        pooled: Tensor = net.forward_head(net.norm(x), pre_logits=True)
        return pooled

    def carries_extra(self, location: Location) -> bool:
        """See :class:`GatedBackbone`."""
        block = self._block(location)
        return block.attn is not None and not block.spatial_conv

    def load_pretrained(self, source: str) -> dict[str, Any]:
        """Load the backbone of an authors' ``visformer-*.pth`` or ``dvla_rl-*.pth`` file.

        See :func:`dvla_fast.nn.backbones.published.load_visformer`.
        """
        return load_visformer(self.net, source)

    def _block(self, location: Location) -> Any:
        return getattr(self.net, f"stage{location[0]}")[location[1]]


def _attend(block: Any, x: Tensor, extra: Tensor, extra_mask: Tensor | None) -> Tensor:
    """Attention of a timm block before its projection: map (B, C, H, W) asks itself and extras."""
    attn = block.attn
    count = x.shape[2] * x.shape[3]
    tokens = torch.cat((to_tokens(x), extra.to(x.dtype)), dim=1)  # [B, N + P, C]
    mask = key_mask(count, extra_mask)  # [B, 1, 1, N + P]
    column = _normed(block.norm1, tokens.transpose(1, 2).unsqueeze(-1), mask)  # [B, C, N + P, 1]
    width = attn.num_heads * attn.head_dim
    parts = (width, 2 * width)
    if is_plain(attn.qkv, nn.Conv2d):  # 1 × 1
        normed = column.squeeze(-1).transpose(1, 2)
        to_query, to_others = attn.qkv.weight.flatten(1).split(parts)
        query, others = F.linear(normed[:, :count], to_query), F.linear(normed, to_others)
    else:  # queries of the extra tokens come with the call; nothing reads them
        stacked = attn.qkv(column).squeeze(-1).transpose(1, 2)
        query, others = stacked.split(parts, dim=-1)
        query = query[:, :count]
    query = query.unflatten(-1, (attn.num_heads, -1))
    others = others.unflatten(-1, (2, attn.num_heads, -1))
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),  # [B, heads, N, head_dim]
        others[:, :, 0].transpose(1, 2),  # [B, heads, N + P, head_dim]
        others[:, :, 1].transpose(1, 2),
        attn_mask=mask,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
    )
    return to_map(out.transpose(1, 2).flatten(2), x.shape[2], x.shape[3])


def _normed(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Norm of tokens x (B, C, L, 1); batch statistics leave out those that mask (B, 1, 1, L) does.

    The result at masked places is finite and means nothing.
    """
    own = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if mask is None or not own or not (norm.training or norm.running_mean is None):
        result: Tensor = norm(x)
        return result
    if type(norm) is nn.BatchNorm2d:
        return _masked_batch_norm(norm, x, mask.transpose(2, 3))
    keep = mask[:, 0, 0]  # statistics shared by processes: the layer is given what counts
    rows = x.squeeze(-1).transpose(1, 2)  # [B, L, C]
    kept = norm(rows[keep][:, :, None, None]).flatten(1)
    filled = kept.new_zeros(rows.shape)
    filled[keep] = kept
    return filled.transpose(1, 2).unsqueeze(-1)


def _masked_batch_norm(norm: nn.BatchNorm2d, x: Tensor, keep: Tensor) -> Tensor:
    """``norm`` with the batch statistics of x (B, C, L, 1) where keep (B, 1, L, 1) is True.

    Sums with weights 0 and 1, where picking the places would make the host wait for a GPU.
    """
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = keep.to(values.dtype)
    count, places = weight.sum(), (0, 2, 3)
    mean = (values * weight).sum(places) / count
    centred = values - mean[:, None, None]
    variance = (centred.square() * weight).sum(places) / count
    if norm.training and norm.running_mean is not None:
        _track(norm, mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
    result = centred * (variance + norm.eps).rsqrt()[:, None, None]
    if norm.affine:
        result = result * norm.weight[:, None, None] + norm.bias[:, None, None]
    return result.to(x.dtype)


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, unbiased: Tensor) -> None:
    """Move the running statistics as a training step of ``norm`` does."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.add_(share * (new - running))


def visformer_tiny(
    image_size: int = 224,
    in_channels: int = 3,
    *,
    small_stem: bool | None = None,
    locations: Sequence[Sequence[int]] | None = None,
    **kwargs: Any,
) -> Visformer:
    """Visformer-Tiny (about 10 M parameters), randomly initialised.

    224 px: stages of 96 × 28², 192 × 14² and 384 × 7². 84 px with the small stem: 21², 10² and 5².

    Args:
        image_size: side of the images.
        in_channels: colours.
        small_stem: two 3 × 3 convolutions of stride 1, as the authors have for 84 px, in place of
            one 7 × 7 of stride 2; default: under 128 px.
        locations: where gates are called.
        kwargs: for ``timm.create_model``, e.g. ``drop_path_rate=0.5``.

    Raises:
        MissingDependencyError: timm is not installed.
        ValueError: image_size too small, or a location that does not exist.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError(
            "visformer_tiny needs timm: pip install 'dvla-fast[vision]'"
        ) from error
    small = image_size < 128 if small_stem is None else small_stem
    halvings = 16 if small else 32
    if image_size < halvings or (image_size % 2 and not small):
        even = "" if small else ", and an even number without the small stem"
        raise ValueError(f"image_size: expected at least {halvings}{even}; got {image_size}")
    # timm sizes the position tables for a stem of stride 2: twice the side gives those of stride 1.
    size = 2 * image_size if small else image_size
    net: Any = timm.create_model(
        "visformer_tiny", pretrained=False, num_classes=0, img_size=size, in_chans=in_channels,
        **kwargs,
    )  # fmt: skip
    if small:
        net.stem = _small_stem(in_channels, net.stem[0].out_channels)
    return Visformer(net, locations)


def _small_stem(in_channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for entering in (in_channels, width):
        convolution = nn.Conv2d(entering, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
