"""What DVLA is given, looked at before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.arguments import expect_tensor, expect_whole
from dvla_fast.ops.value_checks import require, value_checks

if TYPE_CHECKING:
    from dvla_fast.nn.episode import LayerTrace, TextTokens


def check_episodes(
    support: Tensor, labels: Tensor, query: Tensor, way: int, whole: bool = True
) -> None:
    """Raises TypeError or ValueError unless images and labels are those of episodes.

    ``whole``: a class without supports is wrong, too.
    """
    check_images("support", support)
    check_images("query", query)
    if query.dtype != support.dtype:
        raise TypeError(f"query: dtype {query.dtype}, support has {support.dtype}")
    episodes, count = support.shape[:2]
    if query.shape[0] != episodes or query.shape[2:] != support.shape[2:]:
        raise ValueError(
            f"query: shape {tuple(query.shape)} does not fit support {tuple(support.shape)}"
        )
    if min(episodes, count, query.shape[1]) < 1:
        raise ValueError("support, query: an episode needs at least one image of each")
    check_support_labels(labels, (episodes, count), way, whole)
    _check_devices("support", support, query=query, support_labels=labels)


def check_support_labels(
    labels: Tensor, shape: tuple[int, ...], way: int, whole: bool = True
) -> None:
    """Likewise for the supports' labels: below ``way``, and where ``whole`` of every class."""
    expect_whole("way", way)
    if way < 1:
        raise ValueError(f"way: expected a positive number, got {way}")
    check_labels("support_labels", labels, shape, way)
    if whole and value_checks(labels.device) and not _extension.transforming():
        of_class = labels.unsqueeze(-1) == torch.arange(way, device=labels.device)
        require(of_class.any(1), "support_labels: a class of an episode has no support")


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...], way: int) -> None:
    """Likewise for labels by any name: int64 of that shape and, if values are checked, < way."""
    expect_tensor(name, labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"{name}: shape {tuple(labels.shape)}, expected {tuple(shape)}")
    if value_checks(labels.device) and not _extension.transforming():
        require((labels >= 0) & (labels < way), f"{name}: expected values in [0, {way})")


def check_images(name: str, images: Tensor) -> None:
    """Likewise for the supports or the queries alone."""
    expect_tensor(name, images)
    if images.dim() != 5:
        raise ValueError(
            f"{name}: shape {tuple(images.shape)}, expected (episodes, images, C, H, W)"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"{name}: dtype {images.dtype}, expected floating values, as"
            " dvla_fast.data.unit_range makes of uint8"
        )


def check_learned(
    features: Tensor,
    labels: Tensor,
    query: Tensor,
    layers: Sequence[LayerTrace],
    way: int,
    width: int,
) -> None:
    """Likewise for queries whose supports went through before, to features of that width."""
    check_images("query", query)
    if min(query.shape[:2]) < 1:
        raise ValueError("query: an episode needs at least one image")
    expect_tensor("features", features)
    if features.dim() != 3 or features.shape[0::2] != (query.shape[0], width):
        raise ValueError(
            f"features: shape {tuple(features.shape)}, expected"
            f" ({query.shape[0]}, supports, {width})"
        )
    check_support_labels(labels, features.shape[:2], way)
    _check_devices("query", query, features=features, support_labels=labels)
    for trace in layers:
        if trace.support_before.shape[:2] != labels.shape:
            raise ValueError(
                f"layers: of {tuple(trace.support_before.shape[:2])} supports, features are of"
                f" {tuple(labels.shape)}"
            )


def check_text(text: TextTokens, images: Tensor, way: int, text_dim: int, by_class: bool) -> None:
    """Likewise for their texts; ``by_class``: whether those of a class are taken apart."""
    if not hasattr(text, "levels"):
        raise TypeError(f"text: expected TextTokens, got {type(text).__name__}")
    names = ("tokens", "levels", "class_embedding", "mask")
    parts = {f"text.{name}": getattr(text, name, None) for name in names}
    for name, part in parts.items():
        if not isinstance(part, Tensor) and not (part is None and name == "text.mask"):
            raise TypeError(f"{name}: expected a tensor, got {type(part).__name__}")
    tokens, episodes = text.tokens, images.shape[0]
    if tokens.dim() != 3 or tokens.shape[0] != episodes or tokens.shape[2] != text_dim:
        raise ValueError(
            f"text.tokens: shape {tuple(tokens.shape)}, expected ({episodes}, P, {text_dim})"
        )
    if text.levels.dtype != torch.int64:
        raise TypeError(f"text.levels: expected int64, got {text.levels.dtype}")
    if tuple(text.levels.shape) != (tokens.shape[1],):
        raise ValueError(
            f"text.levels: shape {tuple(text.levels.shape)}, expected ({tokens.shape[1]},)"
        )
    if value_checks(text.levels.device) and not _extension.transforming():
        known = (text.levels == 0) | (text.levels == 1)
        require(known, "text.levels: expected 0 (attribute) or 1 (description)")
    if text.mask is not None and text.mask.dtype != torch.bool:
        raise TypeError(f"text.mask: expected bool (True = a token), got {text.mask.dtype}")
    if text.mask is not None and text.mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"text.mask: shape {tuple(text.mask.shape)}, expected {tuple(tokens.shape[:2])}"
        )
    expected = (episodes, way, text_dim)
    if tuple(text.class_embedding.shape) != expected:
        raise ValueError(
            f"text.class_embedding: shape {tuple(text.class_embedding.shape)}, expected {expected}"
        )
    if by_class and tokens.shape[1] % way:
        raise ValueError(
            f"text.tokens: {tokens.shape[1]} tokens do not fall into {way} classes evenly,"
            " as this text_scope needs; pad the classes and set text.mask"
        )
    _check_devices("the images", images, **parts)


def check_no_replay(**given: Any) -> None:
    """Raises ValueError where gates are to be replayed in a pass without texts, which has none."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: without text no gate runs that could replay it; give text")


def _check_devices(first: str, given: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError where one of the others is on another device than the first."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != given.device:
            raise ValueError(f"{name}: on {tensor.device}, {first} on {given.device}")
