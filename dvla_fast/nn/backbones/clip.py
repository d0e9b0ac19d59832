"""CLIP's ViT image towers from open_clip, with gates before any block.

The tower is one stage: location (1, b) is before block b. Its state is (B, 1, 1 + N, C), the class
token first. Patch tokens are the image tokens: gates see, pool and change them alone. The class
token is never gated; it reads the gated patches in the block's self-attention, and the fused text
tokens that ride along as further keys and values of that one block. The feature is the tower's own:
the class token after the last norm (or whatever pooling the architecture has), by default projected
into CLIP space.

CLIP was trained on 400 million and more images of the web: the novel classes of every benchmark are
likely among them. Report results with it as what they are, apart from those of backbones trained on
base classes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvla_fast.errors import CheckpointError, MissingDependencyError
from dvla_fast.nn.backbones.base import GatedBackbone, Location


class ClipViT(GatedBackbone):
    """An open_clip image tower with gates: images (B, 3, S, S) -> features (B, feature_dim).

    Args:
        net: an ``open_clip.transformer.VisionTransformer`` of plain attention blocks.
        architecture: its name in open_clip; what :meth:`load_pretrained` looks weights up by.
        projection: features in CLIP space (512 for ViT-B/16); False: before the projection (768).
        locations: where gates are called; default: half and three quarters of the way.

    Raises:
        ValueError: another kind of tower, or a location that does not exist.
    """

    def __init__(
        self,
        net: Any,
        architecture: str,
        projection: bool = True,
        locations: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        _check_tower(net, architecture)
        self.net, self.architecture, self.projection = net, architecture, projection
        depth = len(net.transformer.resblocks)
        self.depths = (depth,)
        self.widths = dict.fromkeys(self.blocks, net.class_embedding.shape[0])
        self.feature_dim = net.proj.shape[1 if projection else 0]
        self.deep_from = (1, 3 * depth // 4)
        default = dict.fromkeys([(1, depth // 2), self.deep_from])
        self.locations = self.check_locations(default if locations is None else locations)

    def enter(self, stage: int, x: Tensor) -> Tensor:
        """See :class:`GatedBackbone`.

        Raises:
            ValueError: images of another shape than the backbone was built for.
        """
        net: Any = self.net
        expected = (3, *net.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"images: shape {tuple(x.shape)}, expected (B, *{expected})")
        embedded: Tensor = net._embeds(x)  # [B, 1 + N, C]
        return embedded.unsqueeze(1)

    def run_block(
        self, location: Location, x: Tensor, extra: Tensor | None, extra_mask: Tensor | None
    ) -> Tensor:
        """See :class:`GatedBackbone`.

        Extra tokens are dropped after this block, so they are asked as keys and values only.
        """
        net: Any = self.net
        block = net.transformer.resblocks[location[1]]
        tokens = x.squeeze(1)
        if extra is None:
            plain: Tensor = block(tokens)
            return plain.unsqueeze(1)
        seen = block.ln_1(torch.cat((tokens, extra.to(tokens.dtype)), dim=1))
        hidden = None
        if extra_mask is not None:
            own = extra_mask.new_zeros(tokens.shape[:2])
            hidden = torch.cat((own, ~extra_mask), dim=1)  # [B, 1 + N + P], True = not attended
        query = seen[:, : tokens.shape[1]]
        attended = block.attn(query, seen, seen, key_padding_mask=hidden, need_weights=False)[0]
        tokens = tokens + block.ls_1(attended)
        tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        return tokens.unsqueeze(1)

    def pool(self, x: Tensor) -> Tensor:
        """See :class:`GatedBackbone`."""
        net: Any = self.net
        pooled: Tensor = net._pool(x.squeeze(1))[0]
        return pooled @ net.proj if self.projection else pooled

    def carries_extra(self, location: Location) -> bool:
        """See :class:`GatedBackbone`."""
        return True

    def tokens(self, x: Tensor) -> Tensor:
        """See :class:`GatedBackbone`: the patches, without the class token."""
        return x[:, 0, 1:]

    def with_tokens(self, x: Tensor, tokens: Tensor) -> Tensor:
        """See :class:`GatedBackbone`."""
        return torch.cat((x[:, :, :1], tokens.unsqueeze(1)), dim=2)

    def load_pretrained(self, source: str) -> dict[str, Any]:
        """Load CLIP weights: a tag of open_clip, or a file of a whole CLIP model.

        Position embeddings are interpolated to this tower's image size by open_clip.

        Raises:
            CheckpointError: no such tag or file, a tag of another activation, or a file that does
                not fit the architecture.
        """
        open_clip = _open_clip()
        tag = _tag(open_clip, self.architecture, source)
        quick = bool(open_clip.get_model_config(self.architecture).get("quick_gelu", False))
        if tag and bool(tag.get("quick_gelu", False)) != quick:
            other = self.architecture.removesuffix("-quickgelu") + ("" if quick else "-quickgelu")
            raise CheckpointError(
                f"{source!r} was trained with another activation than {self.architecture} has;"
                f" set --model.clip_model {other}"
            )
        size = self.net.image_size[0]
        try:
            with _quiet():
                model = open_clip.create_model(
                    self.architecture, pretrained=source, force_image_size=size
                )
            self.net.load_state_dict(model.visual.state_dict())
        except Exception as error:  # open_clip passes on whatever its download and torch raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{source}: cannot be loaded as CLIP weights of {self.architecture} ({reason});"
                " give a tag of open_clip that can be downloaded or is in its cache, or the file"
                " of a whole CLIP model of that architecture"
            ) from error
        return {"pretrained": source, "architecture": self.architecture, "left_out": ["text tower"]}


def clip_vit(
    image_size: int = 224,
    architecture: str = "ViT-B-16",
    *,
    projection: bool = True,
    locations: Sequence[Sequence[int]] | None = None,
) -> ClipViT:
    """A CLIP image tower, randomly initialised; :meth:`ClipViT.load_pretrained` has the weights.

    Args:
        image_size: side of the images; at 84 px, 16 px patches leave a border of 4 px unread.
        architecture: a name of ``open_clip.list_models()`` with a ViT tower.
        projection: features in CLIP space.
        locations: where gates are called.

    Raises:
        MissingDependencyError: open_clip is not installed.
        ValueError: unknown architecture, another kind of tower, or images smaller than a patch.
    """
    open_clip = _open_clip()
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(
            f"architecture: open_clip knows no {architecture!r}; choose one of"
            " open_clip.list_models(), e.g. ViT-B-16 or ViT-B-16-quickgelu"
        )
    patch = config["vision_cfg"].get("patch_size", 16)
    if isinstance(patch, int) and image_size < patch:
        raise ValueError(f"image_size: expected at least one patch of {patch}, got {image_size}")
    with _quiet():
        model: Any = open_clip.create_model(
            architecture,
            force_image_size=image_size,
            force_patch_dropout=0.0,
            pretrained_text=False,
        )
    return ClipViT(model.visual, architecture, projection, locations)


def clip_statistics(architecture: str, source: str = "") -> tuple[list[float], list[float]]:
    """Channel means and deviations that CLIP weights expect: those of their tag, else OpenAI's.

    Raises:
        MissingDependencyError: open_clip is not installed.
    """
    open_clip = _open_clip()
    tag = open_clip.get_pretrained_cfg(architecture, source) if source else {}
    mean = tag.get("mean", open_clip.OPENAI_DATASET_MEAN)
    std = tag.get("std", open_clip.OPENAI_DATASET_STD)
    return list(mean), list(std)


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(
            "the clip backbone needs open_clip: pip install 'dvla-fast[semantics]'"
        ) from error
    return open_clip


def _tag(open_clip: Any, architecture: str, source: str) -> dict[str, Any]:
    tag: dict[str, Any] = open_clip.get_pretrained_cfg(architecture, source)
    if not tag and not Path(source).is_file():
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise CheckpointError(
            f"{source}: neither a file nor weights that open_clip knows for {architecture}"
            f" ({', '.join(tags) or 'none'})"
        )
    return tag


def _check_tower(net: Any, architecture: str) -> None:
    """Refuse towers whose blocks are not plain self-attention with a class token."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    plain = isinstance(net, VisionTransformer) and net.proj is not None
    if not plain or not all(
        isinstance(block, ResidualAttentionBlock) for block in net.transformer.resblocks
    ):
        raise ValueError(
            f"architecture: the image tower of {architecture!r} is no plain ViT of open_clip;"
            " choose a ViT-* one such as ViT-B-16"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's remark that a model has no weights yet: they come from a checkpoint."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
