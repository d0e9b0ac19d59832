"""The images of the shapes: drawn from signed distances, so images of any size are antialiased."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dvla_fast.data.shapes import ShapeClass

    Array = NDArray[np.floating[Any]]

# Hue in degrees; far enough apart that the jitter of ±4 degrees never makes one another.
COLOURS = {
    **{"red": 0, "orange": 28, "yellow": 56, "green": 122},
    **{"cyan": 182, "blue": 224, "purple": 272, "pink": 322},
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": 0.06, "large": 0.095}  # radius as a share of the image's side
NUMBERS = {"two": 2, "three": 3, "four": 4}
ARRANGEMENTS = ("row", "column", "diagonal", "circle")


def stream(seed: int, *place: int) -> np.random.Generator:
    """The random numbers of a place in the data set of a seed."""
    # The first key tells this data set's streams from any other use of the seed.
    sequence = np.random.SeedSequence(seed, spawn_key=(7, *place))
    return np.random.Generator(np.random.Philox(sequence))


def draw(
    item: ShapeClass, indices: list[int], size: int, seed: int, number: int
) -> NDArray[np.uint8]:
    """Draw a few images of fixed attributes, (B, size, size, 3); arguments as ``draw_images``."""
    count = NUMBERS[item.number]
    draws = []
    for index in indices:  # one stream an image: it does not depend on its neighbours
        rng = stream(seed, number + 1, index)
        noise = rng.standard_normal((size, size), dtype=np.float32)
        draws.append((rng.random(8 + 8 + 6 * count, dtype=np.float32), noise))
    chance = np.stack([draw[0] for draw in draws])  # (B, ·) in [0, 1)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = axis[None, None, :], axis[None, :, None]
    canvas = _background(chance[:, :8], x, y)  # (B, size, size, 3)
    whole, each = chance[:, 8:16], chance[:, 16:].reshape(len(draws), count, 6)
    centres = _centres(item.arrangement, count) + 0.06 * (whole[:, None, :2] - 0.5)
    centres = centres + 0.036 * (each[:, :, :2] - 0.5)
    radius = SIZES[item.size] * (1 + 0.12 * (whole[:, 2] - 0.5))
    tones = _tones(item.colour, whole)  # (B, 2, 3): of the surface, and of its pattern
    for k in range(count):
        angle = np.deg2rad(44 * (each[:, k, 2] - 0.5))[:, None, None]
        scale = (radius * (1 + 0.08 * (each[:, k, 3] - 0.5)))[:, None, None]
        dx = x - centres[:, k, 0, None, None]
        dy = y - centres[:, k, 1, None, None]
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / scale
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / scale
        pixels = scale * size  # a unit of u in pixels
        cover = _coverage(_SHAPES[item.shape](u, v), pixels)
        rim = _coverage(np.abs(_SHAPES[item.shape](u, v)) - 0.05, pixels)
        mix = np.maximum(_pattern(item.texture, u, v, pixels), 0.9 * rim)[..., None]
        paint = tones[:, None, None, 0] * (1 - mix) + tones[:, None, None, 1] * mix
        canvas += cover[..., None] * (paint - canvas)
    noise = np.stack([draw[1] for draw in draws])[..., None]
    return (255 * np.clip(canvas + 0.015 * noise, 0, 1) + 0.5).astype(np.uint8)


def _background(chance: Array, x: Array, y: Array) -> Array:
    """A muted gradient with a soft wave: (B, ·) numbers -> (B, size, size, 3)."""
    value = 0.45 + 0.5 * chance[:, :2]  # brightness of the two ends
    tint = 0.1 * (chance[:, 2:5] - 0.5)
    angle = 2 * np.pi * chance[:, 5, None, None]
    along = 0.5 + (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)) / np.sqrt(2)
    phase = 2 * np.pi * chance[:, 6, None, None]
    wave = np.sin((3 + 5 * chance[:, 7, None, None]) * np.pi * (x + along * y) + phase)
    grey = value[:, 0, None, None] * (1 - along) + value[:, 1, None, None] * along + 0.04 * wave
    result: Array = (grey[..., None] + tint[:, None, None, :]).astype(np.float32)
    return result


def _tones(colour: str, chance: Array) -> Array:
    """The bright tone of a colour and the dark one of patterns and rims: (B, 2, 3)."""
    tones = np.empty((len(chance), 2, 3), dtype=np.float32)
    for row, number in enumerate(chance):
        hue = ((COLOURS[colour] + 8 * (number[3] - 0.5)) % 360) / 360
        light = 0.88 + 0.12 * number[4]
        tones[row, 0] = colorsys.hsv_to_rgb(hue, 0.86 + 0.12 * number[5], light)
        tones[row, 1] = colorsys.hsv_to_rgb(hue, 1.0, 0.3 * light)
    return tones


def _centres(arrangement: str, count: int) -> Array:
    """Places of the objects before jitter: (count, 2)."""
    steps = (np.arange(count) - (count - 1) / 2) * (0.235 if count == 4 else 0.28)
    zero = np.zeros(count)
    if arrangement == "circle":
        angle = 2 * np.pi * np.arange(count) / count - np.pi / 2 + (np.pi / 4 if count == 4 else 0)
        places = np.stack((0.24 * np.cos(angle), 0.24 * np.sin(angle)), 1)
    else:
        lines = {"row": (steps, zero), "column": (zero, steps), "diagonal": (steps, steps)}
        places = np.stack(lines[arrangement], 1)
    return (0.5 + places).astype(np.float32)


def _coverage(distance: Array, pixels: Array) -> Array:
    """Share of a pixel inside, from the signed distance in units of the radius."""
    result: Array = np.clip(0.5 - distance * pixels, 0, 1)
    return result


def _pattern(texture: str, u: Array, v: Array, pixels: Array) -> Array:
    """Share of the dark tone, in [0, 1]."""
    if texture == "plain":
        return np.zeros((1, 1, 1), dtype=np.float32)
    if texture == "dotted":
        cell = 0.72
        a, b = (np.mod(w + cell / 2, cell) - cell / 2 for w in (u, v))
        return _coverage(np.hypot(a, b) - 0.22, pixels)
    period = 0.7 if texture == "striped" else 0.9
    stripes = [np.abs(np.mod(w, period) - period / 2) - period / 4 for w in (u, v)]
    first = _coverage(stripes[0], pixels)
    if texture == "striped":
        return first
    second = _coverage(stripes[1], pixels)
    result: Array = first * (1 - second) + second * (1 - first)
    return result


def _polygon(sides: int) -> Callable[[Array, Array], Array]:
    angles = 2 * np.pi * (np.arange(sides) + 0.5) / sides + np.pi / 2

    def distance(u: Array, v: Array) -> Array:
        result = u * np.float32(np.cos(angles[0])) + v * np.float32(np.sin(angles[0]))
        for angle in angles[1:]:
            side = u * np.float32(np.cos(angle)) + v * np.float32(np.sin(angle))
            result = np.maximum(result, side)
        inner: Array = result - np.float32(np.cos(np.pi / sides))
        return inner

    return distance


def _star(u: Array, v: Array) -> Array:
    # Fold the plane into one tenth, from a tip (1, 0) to the notch beside it; there it is a line.
    radius, turn = np.hypot(u, v), np.arctan2(-v, u) - np.pi / 2
    folded = np.abs(np.mod(turn + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
    notch = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([notch[1], 1 - notch[0]]) / np.hypot(notch[1], 1 - notch[0])
    result: Array = (
        (radius * np.cos(folded) - 1) * normal[0] + radius * np.sin(folded) * normal[1]
    ).astype(np.float32)
    return result


def _box(u: Array, v: Array, width: float, height: float) -> Array:
    result: Array = np.maximum(np.abs(u) - np.float32(width), np.abs(v) - np.float32(height))
    return result


# Signed distances in units of the radius, negative inside, exact enough for one pixel of rim.
_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda u, v: np.hypot(u, v) - np.float32(0.95),
    "square": lambda u, v: _box(u, v, 0.84, 0.84),
    "triangle": _polygon(3),
    "hexagon": _polygon(6),
    "star": _star,
    "cross": lambda u, v: np.minimum(_box(u, v, 0.95, 0.34), _box(u, v, 0.34, 0.95)),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - np.float32(0.7)) - np.float32(0.28),
    "crescent": lambda u, v: np.maximum(
        np.hypot(u, v) - np.float32(0.98), np.float32(0.78) - np.hypot(u - np.float32(0.5), v)
    ),
    "bar": lambda u, v: _box(u, v, 0.98, 0.4),
    "dome": lambda u, v: np.maximum(
        np.hypot(u, v - np.float32(0.4)) - np.float32(0.98), v - np.float32(0.4)
    ),
}
SHAPES = tuple(_SHAPES)
