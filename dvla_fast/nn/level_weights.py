"""How much attributes and descriptions count at each gated layer (method §4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dvla_fast.arguments import expect_number
from dvla_fast.nn.backbones.base import Location


def default_level_weights(
    layers: Sequence[Location], deep_from: Location
) -> list[tuple[float, float]]:
    """(attribute, description) weights of each gated layer: attributes lead in shallow ones."""
    return [(0.7, 0.3) if tuple(layer) < deep_from else (0.3, 0.7) for layer in layers]


def level_scales(
    weights: Any, layers: tuple[Location, ...], deep_from: Location
) -> tuple[tuple[float, float], ...]:
    """Factors for attributes and descriptions, of mean 1 at each layer.

    Raises:
        TypeError: weights that are no sequence or array, or in whose pairs something is no number.
        ValueError: another number of pairs, or a pair that is none or holds a wrong number.
    """
    if weights is None:
        weights = default_level_weights(layers, deep_from)
    weights = _listed(weights)
    if not isinstance(weights, Sequence):
        raise TypeError(
            f"level_weights: expected two numbers for each gated layer, got {weights!r}"
        )
    weights = [_listed(pair) for pair in weights]
    if len(weights) != len(layers):
        raise ValueError(f"level_weights: {len(weights)} pairs for {len(layers)} gated layers")
    for pair in weights:
        two = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        for x in pair if two else ():
            expect_number("level_weights", x)
        if not two or not all(0 <= x < float("inf") for x in pair) or sum(pair) == 0:
            raise ValueError(
                f"level_weights: expected two finite weights >= 0, not both 0, got {pair}"
            )
    return tuple((2 * x / (x + y), 2 * y / (x + y)) for x, y in weights)


def _listed(x: Any) -> Any:
    """A tensor or NumPy array as lists of numbers; anything else as it is."""
    return x.tolist() if hasattr(x, "tolist") else x
