"""What a backbone must offer so that gates can sit before any of its blocks.

A backbone is stages of blocks over a state: a feature map (B, C, H, W), unless a backbone says
otherwise. Before a gated block a callback sees the image tokens, may replace them, and may append
extra tokens that ride along through that one block (method §3, "back into the image stream").
They ride as further keys and values of the block's attention. A block without attention has
nothing that could read them: there a gate acts through the image tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Location = tuple[int, int]
"""(stage, block): the stage counted from 1 as in the paper, the block from 0."""


class GatedTokens(NamedTuple):
    """What a gate callback hands back to the backbone."""

    tokens: Tensor
    """(B, N, d): the image tokens, changed or not."""
    extra: Tensor | None = None
    """(B, P, d): tokens that ride along through the block, then are dropped."""
    extra_mask: Tensor | None = None
    """(B, P) bool, True = a token: padding that attention must not see."""


GateFn = Callable[[Location, Tensor], "GatedTokens | tuple[Tensor, Tensor | None] | None"]
"""(location, tokens (B, N, d)) -> None to go on unchanged, or the new tokens and the extra ones."""


class GatedBackbone(nn.Module):
    """Base class: walks the blocks, calls the gates, carries the extra tokens.

    Attributes:
        feature_dim: width of the features.
        depths: number of blocks of each stage.
        widths: width d of the tokens before each block.
        locations: where gates are called unless a call says otherwise.
        deep_from: gates from this block on weigh descriptions higher than attributes (method §4).
        regularisers: constructor arguments that act in training alone: backbones that differ in
            them share their weights.
    """

    feature_dim: int
    depths: tuple[int, ...]
    widths: dict[Location, int]
    locations: tuple[Location, ...]
    deep_from: Location = (3, 0)
    regularisers: tuple[str, ...] = ()

    def enter(self, stage: int, x: Tensor) -> Tensor:
        """The state that the first block of a stage sees; x: images, or the last stage's state."""
        raise NotImplementedError

    def run_block(
        self, location: Location, x: Tensor, extra: Tensor | None, extra_mask: Tensor | None
    ) -> Tensor:
        """One block on a state, extra tokens (B, P, C) riding along if given."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """The last state to features (B, feature_dim)."""
        raise NotImplementedError

    def carries_extra(self, location: Location) -> bool:
        """Whether extra tokens can ride through this block (not through a spatial convolution)."""
        raise NotImplementedError

    def tokens(self, x: Tensor) -> Tensor:
        """The image tokens (B, N, C) of a state."""
        return to_tokens(x)

    def with_tokens(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The state with other image tokens (B, N, C)."""
        return to_map(tokens, x.shape[2], x.shape[3])

    def load_pretrained(self, source: str) -> dict[str, Any]:
        """Load published weights of this network.

        Returns:
            What was loaded and what of it was left out, ready for JSON.

        Raises:
            ValueError: no weights are published for this backbone.
            CheckpointError: a file or name that holds no such weights.
        """
        raise ValueError(
            f"{type(self).__name__} has no published weights to start from (got {source!r});"
            " pre-train it"
        )

    @property
    def blocks(self) -> tuple[Location, ...]:
        """Every block, in order."""
        return tuple((s + 1, b) for s, depth in enumerate(self.depths) for b in range(depth))

    def forward(
        self,
        images: Tensor,
        gate_fn: GateFn | None = None,
        *,
        locations: Sequence[Location] | None = None,
        start: Location | None = None,
    ) -> Tensor:
        """Features (B, feature_dim) of images (B, C, H, W).

        Args:
            images: the images; with ``start``, the state that :meth:`prefix` returned for it.
            gate_fn: called as ``gate_fn(location, tokens (B, N, d))`` before each block of
                ``locations``.
            locations: default ``self.locations``.
            start: begin at this block.

        Raises:
            TypeError: a mask of the extra tokens that is not bool.
            ValueError: a location that does not exist, tokens or a mask of another shape, or extra
                tokens where they cannot ride.
        """
        gated = self.check_locations(self.locations if locations is None else locations)
        x = images
        for location in self.blocks if start is None else self._from(start):
            if location[1] == 0 and location != start:
                x = self.enter(location[0], x)
            if gate_fn is not None and location in gated:
                x = self._gated_block(location, x, gate_fn)
            else:
                x = self.run_block(location, x, None, None)
        return self.pool(x)

    def prefix(self, images: Tensor, stop: Location) -> Tensor:
        """The state just before the block ``stop``: work that no later gate changes.

        ``forward(prefix(images, location), gate_fn, start=location)`` equals
        ``forward(images, gate_fn)`` when no gate sits before ``location``.
        """
        self.check_locations([stop])
        x = images
        for location in self.blocks:
            if location[1] == 0:
                x = self.enter(location[0], x)
            if location == stop:
                break
            x = self.run_block(location, x, None, None)
        return x

    def check_locations(self, locations: Iterable[Sequence[int]]) -> tuple[Location, ...]:
        """The locations as tuples.

        Raises:
            ValueError: a block that this backbone does not have, or one named twice.
        """
        checked: list[Location] = []
        for pair in locations:
            location = tuple(pair) if isinstance(pair, Sequence) else (pair,)
            # By comparison: what cannot be looked up in a dict is no location either.
            if location not in list(self.widths):
                raise ValueError(
                    f"location {location}: no such (stage, block); stages 1 to"
                    f" {len(self.depths)} have {self.depths} blocks, counted from 0"
                )
            if location in checked:
                raise ValueError(f"location {location}: named twice")
            checked.append((location[0], location[1]))
        return tuple(checked)

    def _from(self, start: Location) -> tuple[Location, ...]:
        self.check_locations([start])
        blocks = self.blocks
        return blocks[blocks.index(start) :]

    def _gated_block(self, location: Location, x: Tensor, gate_fn: GateFn) -> Tensor:
        tokens = self.tokens(x)
        result = gate_fn(location, tokens)
        if result is None:
            return self.run_block(location, x, None, None)
        new = GatedTokens(*result)
        if new.tokens.shape != tokens.shape:
            raise ValueError(
                f"gate at {location}: tokens {tuple(new.tokens.shape)}, expected"
                f" {tuple(tokens.shape)}"
            )
        if new.extra is not None:
            self._check_extra(location, tokens, new.extra, new.extra_mask)
        return self.run_block(location, self.with_tokens(x, new.tokens), new.extra, new.extra_mask)

    def _check_extra(
        self, location: Location, tokens: Tensor, extra: Tensor, mask: Tensor | None
    ) -> None:
        """Refuse what cannot ride along with image tokens (B, N, d) through this block."""
        gate = f"gate at {location}"
        if not self.carries_extra(location):
            raise ValueError(
                f"{gate}: this block has a spatial convolution, through which extra tokens cannot"
                " ride; gate an attention block instead"
            )
        if extra.dim() != 3 or extra.shape[0::2] != tokens.shape[0::2]:
            raise ValueError(
                f"{gate}: extra tokens {tuple(extra.shape)}, expected"
                f" ({tokens.shape[0]}, P, {tokens.shape[2]})"
            )
        if mask is None:
            return
        if mask.dtype != torch.bool:  # attention would add its numbers to the scores
            raise TypeError(f"{gate}: mask of {mask.dtype}, expected torch.bool")
        if mask.shape != extra.shape[:2]:
            raise ValueError(f"{gate}: mask {tuple(mask.shape)}, expected {tuple(extra.shape[:2])}")


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H·W, C), no copy."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H·W, C) -> (B, C, H, W), no copy; a channels-last map when the tokens are contiguous."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def key_mask(image_tokens: int, extra_mask: Tensor | None) -> Tensor | None:
    """Attention mask (B, 1, 1, N + P) of image tokens followed by extra ones; True = attend."""
    if extra_mask is None:
        return None
    seen = torch.ones(
        (extra_mask.shape[0], image_tokens), dtype=torch.bool, device=extra_mask.device
    )
    return torch.cat((seen, extra_mask), dim=1)[:, None, None, :]


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: zero a sample's branch with probability ``rate``, rescale the rest."""
    if not training or rate == 0.0:
        return x
    keep = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), device=x.device) >= rate
    return x * (keep.to(x.dtype) / (1.0 - rate))
