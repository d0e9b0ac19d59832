"""Shapes: a made data set of fine-grained classes whose visible attributes are known exactly.

Every class is a combination of six attributes (shape, colour, texture, size, number, arrangement);
the background, places, angles, lighting and noise are nuisance. Classes share most of their
attributes with others, names say nothing, and their texts hold a few hallucinated attributes that
no image shows, flagged as such. In the second kind, "shapes-varied", two attributes of each class
vary from image to image, and its text leaves them out: one image cannot tell which of its
attributes make the class, more images or the text can. So what text should do for few-shot
learning can be checked without a download: help at one shot, more so once the hallucinations are
removed.

    python -m dvla_fast.data.shapes sheet.png
    python -m dvla_fast.data.shapes sheet.png shapes-varied

draws a contact sheet. Image i of a class is the same whatever else is drawn.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import attrgetter, ne
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dvla_fast.data.images import FewShotData, ImageSet, channel_statistics
from dvla_fast.data.shape_drawing import (
    ARRANGEMENTS,
    COLOURS,
    NUMBERS,
    SHAPES,
    SIZES,
    TEXTURES,
    draw,
    stream,
)
from dvla_fast.errors import DataError, DVLAError
from dvla_fast.files import write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = {"shapes": 0, "shapes-varied": 2}  # how many attributes of a class vary
# Names of the made banks: the data set, and whether hallucinated attributes are in.
BANKS = {f"{kind}{end}": (kind, not end) for kind in KINDS for end in ("", "-true")}
SPLIT_SHARES = {"base": 0.6, "val": 0.2, "novel": 0.2}

# No image shows any of these; what a language model might add to a class it does not know.
_INVENTED = (
    *("a furry tail", "a wooden handle", "a metallic sheen", "a striking golden crest"),
    *("long thin legs", "a transparent glass cover", "a curved beak", "leafy green stems"),
)


@dataclass(frozen=True)
class ShapeClass:
    """The attributes that define a class; each is visible in every image of it.

    ``varied`` names those that do not define it: every image has a value of its own.
    """

    shape: str
    colour: str
    texture: str
    size: str
    number: str
    arrangement: str
    varied: tuple[str, ...] = ()

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes that define the class as phrases, six less those that vary."""
        kept = (key for key in _VALUES if key not in self.varied)
        return tuple(_PHRASES[key].format(getattr(self, key)) for key in kept)

    @property
    def description(self) -> str:
        """The same in a sentence."""
        known = {key: getattr(self, key) for key in _VALUES if key not in self.varied}
        words = [known[key] for key in ("number", "size", "colour") if key in known]
        text = " ".join([*words, "objects"])
        text += f" of {self.shape} shape" if "shape" in known else ""
        text += f" with a {self.texture} surface" if "texture" in known else ""
        text += f", arranged in a {self.arrangement}" if "arrangement" in known else ""
        return f"{text[0].upper()}{text[1:]}."


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


def make_classes(
    count: int = 120, seed: int = 0, hallucinations: int = 3, varied: int = 0
) -> ShapesData:
    """Choose classes, names, texts and splits.

    Any two classes differ in at least two attributes, or, where some vary, in at least one that
    varies in neither. Nearly all share four with some other: fine-grained, yet never alike.

    Args:
        count: classes, 20 to 300; 60 % base, 20 % validation, 20 % novel.
        hallucinations: false attributes in each class's text, 0 to 6: wrong values of attributes
            (or one value of an attribute that varies), the last of them (of two or more) a thing
            that no image shows.
        varied: attributes of each class that vary from image to image, 0 to 2.

    Raises:
        DataError: a count out of range.
    """
    if not 20 <= count <= 300:
        raise DataError(f"shapes: classes must be 20 to 300, got {count}")
    if not 0 <= hallucinations <= 6:
        raise DataError(f"shapes: hallucinations must be 0 to 6, got {hallucinations}")
    if not 0 <= varied <= 2:
        raise DataError(f"shapes: varied must be 0 to 2, got {varied}")
    made = _made_classes(count, seed, hallucinations, varied)
    return replace(made, splits=dict(made.splits))  # the caller's own; all else cannot change


@functools.lru_cache(maxsize=8)
def _made_classes(count: int, seed: int, hallucinations: int, varied: int) -> ShapesData:
    rng = stream(seed, 0, 0)
    classes: list[ShapeClass] = []
    while len(classes) < count:
        new = _neighbour(classes, rng, varied)
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
    image_size: int = 84,
    images_per_class: int = 60,
    seed: int = 0,
    classes: int = 120,
    kind: str = "shapes",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> FewShotData:
    """Draw the data set: 120 classes, split by class into 72 base, 24 validation and 24 novel.

    Args:
        kind: "shapes" or "shapes-varied".
        advance: called with the images drawn so far and all of them.

    Returns:
        FewShotData with uint8 images (N, 3, image_size, image_size).

    Raises:
        DataError: sizes out of range.
    """
    if image_size < 16:
        raise DataError(f"image_size must be at least 16 for the shapes, got {image_size}")
    if images_per_class < 2:
        raise DataError(f"shapes: images_per_class must be at least 2, got {images_per_class}")
    made = make_classes(classes, seed, varied=_varied(kind))

    def draw(index: int) -> NDArray[np.uint8]:
        return draw_images(made.classes[index], range(images_per_class), image_size, seed, index)

    images = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy releases the GIL
        order = [index for members in made.splits.values() for index in members]
        for index, drawn in zip(order, pool.map(draw, order)):
            images[index] = drawn
            advance(len(images) * images_per_class, classes * images_per_class)
    sets = {}
    for split, members in made.splits.items():
        pixels = torch.from_numpy(np.concatenate([images.pop(index) for index in members]))
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
        labels = torch.arange(len(members)).repeat_interleave(images_per_class)
        names = tuple(made.names[index] for index in members)
        ids = tuple(f"{name}/{index}" for name in names for index in range(images_per_class))
        sets[split] = ImageSet(f"{kind}/{split}", pixels, labels, names, ids=ids)
    mean, std = channel_statistics(sets["base"].images)
    return FewShotData(
        kind, sets["base"], sets["val"], sets["novel"], "validation classes", mean, std
    )


def _varied(kind: str) -> int:
    if kind not in KINDS:
        raise DataError(f"shapes: the kinds are {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind]


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
    if item.varied:
        looks = [_look(item, stream(seed, number + 1, index, 1)) for index in indices]
        parts = [draw(look, [i], size, seed, number) for look, i in zip(looks, indices)]
        return np.concatenate(parts)
    parts = [
        draw(item, list(indices[first : first + 16]), size, seed, number)
        for first in range(0, len(indices), 16)  # 16 images of 84 px stay in the cache
    ]
    return np.concatenate(parts)


def _look(item: ShapeClass, rng: np.random.Generator) -> ShapeClass:
    """The attributes of one image: a value for each that varies."""
    while True:
        values = {key: str(rng.choice(_VALUES[key])) for key in item.varied}
        look = replace(item, **values, varied=())
        if _possible(look):
            return look


def _possible(item: ShapeClass) -> bool:
    """Whether all six can be seen: two objects are a row, however they stand."""
    return not (item.number == "two" and item.arrangement == "circle")


_VALUES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": tuple(SIZES),
    "number": tuple(NUMBERS),
    "arrangement": ARRANGEMENTS,
}
_PHRASES = {
    **{"shape": "{} shape", "colour": "{} colour", "texture": "{} surface", "size": "{} size"},
    **{"number": "{} objects", "arrangement": "arranged in a {}"},
}


def _neighbour(
    known: Sequence[ShapeClass], rng: np.random.Generator, varied: int
) -> ShapeClass | None:
    """A class two attributes away from a known one (or a new one), None where it will not do."""
    values = {key: str(rng.choice(options)) for key, options in _VALUES.items()}
    if known and rng.random() < 0.75:
        parent = known[int(rng.integers(len(known)))]
        kept = rng.choice(list(_VALUES), 4, replace=False)
        values.update({str(key): getattr(parent, str(key)) for key in kept})
    free = rng.choice(list(_VALUES), varied, replace=False) if varied else ()
    new = ShapeClass(**values, varied=tuple(sorted(map(str, free))))
    if not _possible(new):
        return None
    mine = _attributes(new)
    if varied:
        return new if all(_fixed_apart(new, old) for old in known) else None
    apart = min((sum(map(ne, mine, _attributes(old))) for old in known), default=2)
    return new if apart >= 2 else None


# dataclasses.astuple copies deeply, which took most of the time of make_classes
_attributes = attrgetter(*_VALUES)


def _fixed_apart(first: ShapeClass, second: ShapeClass) -> int:
    """In how many attributes that vary in neither two classes differ."""
    keys = [key for key in _VALUES if key not in first.varied + second.varied]
    return sum(getattr(first, key) != getattr(second, key) for key in keys)


def _names(count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Made-up names, so that nothing can be read off them."""
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(syllables, 3))] = None
    return tuple(names)


def _text(item: ShapeClass, hallucinations: int, rng: np.random.Generator) -> ClassText:
    keys = list(_VALUES)
    false: list[str] = []
    for position, key in enumerate(rng.permutation(keys)[:hallucinations]):
        if position == hallucinations - 1 and hallucinations > 1:
            false.append(str(rng.choice(_INVENTED)))
            continue
        others = [value for value in _VALUES[key] if value != getattr(item, key)]
        false.append(_PHRASES[str(key)].format(rng.choice(others)))
    pairs = [(text, False) for text in item.attributes] + [(text, True) for text in false]
    pairs = [pairs[place] for place in rng.permutation(len(pairs))]
    return ClassText(
        tuple(text for text, _ in pairs), tuple(flag for _, flag in pairs), item.description
    )


def contact_sheet(
    path: str | Path, kind: str = "shapes", *, classes: int = 15, images: int = 5, size: int = 112
) -> None:
    """Draw a few images of the first classes beside their texts and what is hallucinated in them.

    Raises:
        DataError: an unknown kind.
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    from dvla_fast.pictures import require_matplotlib

    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = make_classes(varied=_varied(kind))
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
    write_atomic(Path(path), lambda temporary: figure.savefig(temporary, format="png"))


if __name__ == "__main__":
    try:
        contact_sheet(*(sys.argv[1:3] or ["shapes.png"]))
    except DVLAError as error:
        sys.exit(f"error: {error}")
