"""Shapes: a made data set of fine-grained classes whose visible attributes are known exactly.

Every class is a combination of six attributes (shape, colour, texture, size, number, arrangement);
the background, places, angles, lighting and noise are nuisance. Classes share most of their
attributes with others, names say nothing, and their texts hold a few hallucinated attributes that
no image shows, flagged as such. So what text should do for few-shot learning can be checked
without a download: help at one shot, more so once the hallucinations are removed.

    python -m dvla_fast.data.shapes sheet.png

draws a contact sheet. Everything is drawn from signed distances, so images of any size are
antialiased, and image i of a class is the same whatever else is drawn.
"""

from __future__ import annotations

import colorsys
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter, eq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dvla_fast.data.images import FewShotData, ImageSet, channel_statistics
from dvla_fast.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
SPLIT_SHARES = {"base": 0.6, "val": 0.2, "novel": 0.2}

# No image shows any of these; what a language model might add to a class it does not know.
_INVENTED = (
    *("a furry tail", "a wooden handle", "a metallic sheen", "a striking golden crest"),
    *("long thin legs", "a transparent glass cover", "a curved beak", "leafy green stems"),
)


@dataclass(frozen=True)
class ShapeClass:
    """The attributes that define a class; each is visible in every image of it."""

    shape: str
    colour: str
    texture: str
    size: str
    number: str
    arrangement: str

    @property
    def attributes(self) -> tuple[str, ...]:
        """The six attributes as phrases."""
        return (
            f"{self.shape} shape",
            f"{self.colour} colour",
            f"{self.texture} surface",
            f"{self.size} size",
            f"{self.number} objects",
            f"arranged in a {self.arrangement}",
        )


@dataclass(frozen=True)
class ClassText:
    """What a language model could have written about a class.

    ``hallucinated[i]`` says whether no image shows ``attributes[i]``; ``description`` is true.
    """

    attributes: tuple[str, ...]
    hallucinated: tuple[bool, ...]
    description: str


@dataclass(frozen=True)
class ShapesData:
    """The classes of one seed: names, definitions, texts, and the split they belong to."""

    names: tuple[str, ...]
    classes: tuple[ShapeClass, ...]
    texts: tuple[ClassText, ...]
    splits: dict[str, tuple[int, ...]]

    def bank(self, hallucinated: bool = True) -> dict[str, dict[str, object]]:
        """The ``classes`` of a semantic bank; optionally without the hallucinated attributes."""
        result: dict[str, dict[str, object]] = {}
        for name, text in zip(self.names, self.texts):
            pairs = zip(text.attributes, text.hallucinated)
            kept = [attribute for attribute, false in pairs if hallucinated or not false]
            result[name] = {"attributes": kept, "description": text.description}
        return result


def make_classes(count: int = 120, seed: int = 0, hallucinations: int = 3) -> ShapesData:
    """Choose classes, names, texts and splits.

    Any two classes differ in at least two attributes, and every class shares at least four with
    some other where the draw allows it: fine-grained, yet never alike.

    Args:
        count: classes, 20 to 300; 60 % base, 20 % validation, 20 % novel.
        hallucinations: false attributes in each class's text, 0 to 6: wrong values of the class's
            own attributes, the last of them (of two or more) a thing that no image shows.

    Raises:
        DataError: a count out of range.
    """
    if not 20 <= count <= 300:
        raise DataError(f"shapes: classes must be 20 to 300, got {count}")
    if not 0 <= hallucinations <= 6:
        raise DataError(f"shapes: hallucinations must be 0 to 6, got {hallucinations}")
    made = _made_classes(count, seed, hallucinations)
    return replace(made, splits=dict(made.splits))  # the caller's own; all else cannot change


@functools.lru_cache(maxsize=8)
def _made_classes(count: int, seed: int, hallucinations: int) -> ShapesData:
    rng = _stream(seed, 0, 0)
    classes: list[ShapeClass] = []
    while len(classes) < count:
        new = _neighbour(classes, rng)
        if new is not None:
            classes.append(new)
    names = _names(count, rng)
    order = rng.permutation(count)
    first = round(SPLIT_SHARES["base"] * count)
    second = first + round(SPLIT_SHARES["val"] * count)
    cuts = {"base": order[:first], "val": order[first:second], "novel": order[second:]}
    splits = {name: tuple(sorted(map(int, index))) for name, index in cuts.items()}
    texts = tuple(_text(item, hallucinations, rng) for item in classes)
    return ShapesData(names, tuple(classes), texts, splits)


def load_shapes(
    image_size: int = 84, images_per_class: int = 60, seed: int = 0, classes: int = 120
) -> FewShotData:
    """Draw the data set: 120 classes, split by class into 72 base, 24 validation and 24 novel.

    Returns:
        FewShotData with uint8 images (N, 3, image_size, image_size).

    Raises:
        DataError: sizes out of range.
    """
    if image_size < 16:
        raise DataError(f"image_size must be at least 16 for the shapes, got {image_size}")
    if images_per_class < 2:
        raise DataError(f"shapes: images_per_class must be at least 2, got {images_per_class}")
    made = make_classes(classes, seed)
    sets = {}
    for split, members in made.splits.items():
        images = [
            draw_images(made.classes[index], range(images_per_class), image_size, seed, index)
            for index in members
        ]
        pixels = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous()
        labels = torch.arange(len(members)).repeat_interleave(images_per_class)
        names = tuple(made.names[index] for index in members)
        ids = tuple(f"{name}/{index}" for name in names for index in range(images_per_class))
        sets[split] = ImageSet(f"shapes/{split}", pixels, labels, names, ids=ids)
    mean, std = channel_statistics(sets["base"].images)
    return FewShotData(
        "shapes", sets["base"], sets["val"], sets["novel"], "validation classes", mean, std
    )


def draw_images(
    item: ShapeClass, indices: Sequence[int], size: int, seed: int = 0, number: int = 0
) -> NDArray[np.uint8]:
    """Draw images of a class.

    Args:
        item: the class.
        indices: which of its endless images, B of them.
        size: side in pixels.
        seed: of the data set.
        number: the class's number in the data set; with ``seed`` and an index it fixes an image.

    Returns:
        (B, size, size, 3).
    """
    parts = [
        _draw(item, list(indices[first : first + 16]), size, seed, number)
        for first in range(0, len(indices), 16)  # 16 images of 84 px stay in the cache
    ]
    return np.concatenate(parts)


def _stream(seed: int, number: int, index: int) -> np.random.Generator:
    # The first key tells this data set's streams from any other use of the seed.
    sequence = np.random.SeedSequence(seed, spawn_key=(7, number, index))
    return np.random.Generator(np.random.Philox(sequence))


def _draw(
    item: ShapeClass, indices: list[int], size: int, seed: int, number: int
) -> NDArray[np.uint8]:
    count = NUMBERS[item.number]
    draws = []
    for index in indices:  # one stream an image: it does not depend on its neighbours
        rng = _stream(seed, number + 1, index)
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
_VALUES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": tuple(SIZES),
    "number": tuple(NUMBERS),
    "arrangement": ARRANGEMENTS,
}


def _neighbour(known: Sequence[ShapeClass], rng: np.random.Generator) -> ShapeClass | None:
    """A class two attributes away from a known one (or a new one), None where it will not do."""
    values = {key: str(rng.choice(options)) for key, options in _VALUES.items()}
    if known and rng.random() < 0.75:
        parent = known[int(rng.integers(len(known)))]
        kept = rng.choice(list(_VALUES), 4, replace=False)
        values.update({str(key): getattr(parent, str(key)) for key in kept})
    new = ShapeClass(**values)
    if new.number == "two" and new.arrangement == "circle":
        return None  # two objects are a row, however they stand
    mine = _attributes(new)
    alike = max((sum(map(eq, mine, _attributes(old))) for old in known), default=0)
    return new if alike <= len(_VALUES) - 2 else None


# dataclasses.astuple copies deeply, which took most of the time of make_classes
_attributes = attrgetter(*(field.name for field in fields(ShapeClass)))


def _names(count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Made-up names, so that nothing can be read off them."""
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(syllables, 3))] = None
    return tuple(names)


def _text(item: ShapeClass, hallucinations: int, rng: np.random.Generator) -> ClassText:
    keys = [field.name for field in fields(ShapeClass)]
    false: list[str] = []
    for position, key in enumerate(rng.permutation(keys)[:hallucinations]):
        if position == hallucinations - 1 and hallucinations > 1:
            false.append(str(rng.choice(_INVENTED)))
            continue
        others = [value for value in _VALUES[key] if value != getattr(item, key)]
        values = {name: getattr(item, name) for name in keys}
        wrong = ShapeClass(**{**values, str(key): str(rng.choice(others))})
        false.append(wrong.attributes[keys.index(str(key))])
    pairs = [(text, False) for text in item.attributes] + [(text, True) for text in false]
    pairs = [pairs[place] for place in rng.permutation(len(pairs))]
    description = (
        f"{item.number.capitalize()} {item.size} {item.colour} objects of {item.shape} shape with "
        f"a {item.texture} surface, arranged in a {item.arrangement}."
    )
    return ClassText(
        tuple(text for text, _ in pairs), tuple(flag for _, flag in pairs), description
    )


def contact_sheet(path: str | Path, classes: int = 15, images: int = 5, size: int = 112) -> None:
    """Draw a few images of the first classes beside their texts, hallucinations struck through.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    from dvla_fast.pictures import require_matplotlib

    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = make_classes()
    columns, rows = 3, -(-classes // 3)
    figure = Figure(figsize=(5.4 * columns, 1.72 * rows), dpi=80, facecolor="white")
    FigureCanvasAgg(figure)
    for place in range(classes):
        item, text = made.classes[place], made.texts[place]
        left, bottom = (place % columns) / columns, 1 - (place // columns + 1) / rows
        axis = figure.add_axes((left + 0.006, bottom + 0.3 / rows, 0.32, 0.58 / rows))
        strip = draw_images(item, range(images), size, 0, place)
        axis.imshow(np.concatenate(list(strip), 1), interpolation="nearest")
        axis.set_axis_off()
        false = [a for a, f in zip(text.attributes, text.hallucinated) if f]
        figure.text(
            left + 0.008, bottom + 0.9 / rows, made.names[place], fontsize=10, fontweight="bold"
        )
        figure.text(left + 0.05, bottom + 0.9 / rows, text.description, fontsize=6.4)
        figure.text(
            left + 0.008,
            bottom + 0.17 / rows,
            f"hallucinated: {', '.join(false)}",
            fontsize=7.5,
            color="#B03A2E",
        )
    figure.savefig(path, format="png")


if __name__ == "__main__":
    contact_sheet(sys.argv[1] if len(sys.argv) > 1 else "shapes.png")
