"""How much attributes and descriptions count at each gated layer (method §4)."""

from __future__ import annotations

from collections.abc import Sequence

from dvla_fast.nn.backbones.base import Location


def default_level_weights(
    layers: Sequence[Location], deep_from: Location
) -> list[tuple[float, float]]:
    """(attribute, description) weights of each gated layer: attributes lead in shallow ones."""
    return [(0.7, 0.3) if tuple(layer) < deep_from else (0.3, 0.7) for layer in layers]


def level_scales(
    weights: Sequence[Sequence[float]] | None, layers: tuple[Location, ...], deep_from: Location
) -> tuple[tuple[float, float], ...]:
    """Factors for attributes and descriptions, of mean 1 at each layer."""
    if weights is None:
        weights = default_level_weights(layers, deep_from)
    if len(weights) != len(layers):
        raise ValueError(f"level_weights: {len(weights)} pairs for {len(layers)} gated layers")
    for pair in weights:
        two = isinstance(pair, Sequence) and len(pair) == 2
        if not two or not all(0 <= x < float("inf") for x in pair) or sum(pair) == 0:
            raise ValueError(
                f"level_weights: expected two finite weights >= 0, not both 0, got {pair}"
            )
    return tuple((2 * x / (x + y), 2 * y / (x + y)) for x, y in weights)
