"""Shapes: the same images every time, disjoint splits, and attributes that can be seen."""

from __future__ import annotations

import colorsys
import hashlib
import runpy
import sys
from dataclasses import astuple, replace

import numpy as np
import pytest

from dvla_fast.data import shapes
from dvla_fast.data.shapes import (
    COLOURS,
    KINDS,
    NUMBERS,
    SHAPES,
    ShapeClass,
    ShapesData,
    _look,
    contact_sheet,
    draw_images,
    load_shapes,
    make_classes,
)
from dvla_fast.engine.config import SemanticsConfig
from dvla_fast.engine.texts import build_texts
from dvla_fast.errors import DataError, OutputError

PLAIN = ShapeClass("disc", "red", "plain", "large", "three", "row")


def coloured(image: np.ndarray) -> np.ndarray:
    """Pixels (n, 3) in [0, 1] of the objects: the background is muted."""
    pixels = image.reshape(-1, 3) / 255
    return pixels[_saturated(image).flatten()]


def _saturated(image: np.ndarray) -> np.ndarray:
    pixels = image / 255
    high, low = pixels.max(-1), pixels.min(-1)
    return (high > 0.2) & ((high - low) / np.maximum(high, 1e-6) > 0.6)


def parts(mask: np.ndarray) -> list[np.ndarray]:
    """Connected groups of at least six pixels, as (n, 2) rows of (y, x)."""
    left = {tuple(place) for place in np.argwhere(mask)}
    found = []
    while left:
        queue, group = [left.pop()], []
        while queue:
            y, x = queue.pop()
            group.append((y, x))
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    queue.append(near)
        if len(group) >= 6:
            found.append(np.array(group))
    return found


def test_an_image_depends_on_seed_class_and_index_alone() -> None:
    whole = draw_images(PLAIN, range(40), 32, 0, 5)
    assert whole.dtype == np.uint8
    assert whole.shape == (40, 32, 32, 3)
    assert np.array_equal(draw_images(PLAIN, [17, 3], 32, 0, 5), whole[[17, 3]])
    assert not np.array_equal(draw_images(PLAIN, [3], 32, 1, 5)[0], whole[3])
    assert not np.array_equal(draw_images(PLAIN, [3], 32, 0, 6)[0], whole[3])
    assert len({image.tobytes() for image in whole}) == 40


def test_known_image() -> None:
    """The generator is part of every number measured on it: a change must be noticed."""
    image = draw_images(PLAIN, [0], 32)[0].astype(int)
    assert image.mean((0, 1)) == pytest.approx(KNOWN_MEANS, abs=0.5)


KNOWN_MEANS = (149.4, 138.31, 130.98)


def test_classes_are_fine_grained_and_split() -> None:
    made = make_classes()
    assert len(made.classes) == len(set(made.names)) == 120
    rows = np.array([astuple(item)[:6] for item in made.classes])
    alike = (rows[:, None] == rows[None]).sum(-1)
    np.fill_diagonal(alike, 0)
    assert alike.max() == 4
    assert (alike.max(1) >= 3).mean() > 0.95
    members = [index for split in made.splits.values() for index in split]
    assert sorted(members) == list(range(120))
    assert {name: len(index) for name, index in made.splits.items()} == {
        "base": 72,
        "val": 24,
        "novel": 24,
    }
    base = rows[list(made.splits["base"])]
    for column in range(6):  # novel classes combine attributes that base classes show
        assert set(rows[:, column]) == set(base[:, column])
    assert make_classes() == made
    assert make_classes(seed=1).classes != made.classes


def test_texts_flag_what_no_image_shows() -> None:
    made = make_classes(hallucinations=3)
    for item, text in zip(made.classes, made.texts):
        true = [a for a, false in zip(text.attributes, text.hallucinated) if not false]
        assert sorted(true) == sorted(item.attributes)
        assert sum(text.hallucinated) == 3
        assert item.colour in text.description
        assert item.shape in text.description
    name = made.names[0]
    assert len(made.bank()[name]["attributes"]) == 9  # type: ignore[arg-type]
    assert len(made.bank(hallucinated=False)[name]["attributes"]) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("texture", ["plain", "checkered"])
def test_colour_is_visible(colour: str, texture: str) -> None:
    """Most object pixels of every image lie nearest to the class's hue."""
    item = replace(PLAIN, colour=colour, texture=texture)
    for image in draw_images(item, range(6), 64):
        hues = [360 * colorsys.rgb_to_hsv(*pixel)[0] for pixel in coloured(image)]
        assert len(hues) > 100
        distance = [
            np.minimum(np.abs(np.array(hues) - hue), 360 - np.abs(np.array(hues) - hue))
            for hue in COLOURS.values()
        ]
        nearest = np.stack(distance).argmin(0)
        assert (nearest == list(COLOURS).index(colour)).mean() > 0.9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("number", NUMBERS)
def test_number_is_visible(shape: str, number: str) -> None:
    item = replace(PLAIN, shape=shape, number=number, arrangement="diagonal")
    for image in draw_images(item, range(3), 84):
        assert len(parts(_saturated(image))) == NUMBERS[number]


def test_size_and_arrangement_are_visible() -> None:
    def areas(size: str) -> list[int]:
        images = draw_images(replace(PLAIN, size=size), range(12), 84)
        return [int(_saturated(image).sum()) for image in images]

    assert max(areas("small")) < min(areas("large"))

    def spread(arrangement: str) -> np.ndarray:
        image = draw_images(replace(PLAIN, arrangement=arrangement), [0], 84)[0]
        return np.std([group.mean(0) for group in parts(_saturated(image))], axis=0)

    assert spread("row")[1] > 5 * spread("row")[0]
    assert spread("column")[0] > 5 * spread("column")[1]
    assert min(spread("diagonal")) > 15
    assert 5 < min(spread("circle")) < 20


def test_shapes_and_textures_differ() -> None:
    """Averaged over the nuisance, no two shapes and no two textures look alike."""

    def average(**change: str) -> np.ndarray:
        item = replace(PLAIN, number="two", arrangement="row", **change)
        return draw_images(item, range(24), 48).mean(0)

    for key, values in (("shape", SHAPES), ("texture", ("plain", "striped", "dotted"))):
        pictures = [average(**{key: value}) for value in values]
        for i, first in enumerate(pictures):
            for second in pictures[:i]:
                assert np.abs(first - second).max() > 15


VARIED = replace(PLAIN, varied=("colour", "number"))


def test_attributes_that_vary_do_so_and_are_not_in_the_text() -> None:
    assert VARIED.attributes == (
        *("disc shape", "plain surface", "large size"),
        "arranged in a row",
    )
    assert (
        VARIED.description == "Large objects of disc shape with a plain surface, arranged in a row."
    )
    images = draw_images(VARIED, range(12), 84, 0, 5)
    assert np.array_equal(draw_images(VARIED, [7, 2], 84, 0, 5), images[[7, 2]])
    hues = [colorsys.rgb_to_hsv(*np.median(coloured(image), 0))[0] for image in images]
    assert len({round(8 * hue) for hue in hues}) >= 4
    assert {len(parts(_saturated(image))) for image in images} == {2, 3, 4}
    for image in images:  # and what defines the class is as ever
        low, high = sorted(np.std([group.mean(0) for group in parts(_saturated(image))], axis=0))
        assert high > 5 * low


def test_two_objects_never_stand_in_a_circle() -> None:
    """They would be a row, and the image would show no value of the arrangement."""
    for varied in (("number",), ("arrangement", "number"), ("arrangement",)):
        number = "two" if varied == ("arrangement",) else "four"
        item = replace(PLAIN, number=number, arrangement="circle", varied=varied)
        for look in (_look(item, np.random.default_rng(seed)) for seed in range(60)):
            assert (look.number, look.arrangement) != ("two", "circle")
            assert not look.varied


def test_varied_classes_stay_apart() -> None:
    """No image can belong to two classes: some attribute is fixed in both, and differs."""
    made = make_classes(varied=2)
    assert len(made.classes) == 120
    for place, first in enumerate(made.classes):
        assert len(set(first.varied)) == 2
        for second in made.classes[:place]:
            fixed = {"shape", "colour", "texture", "size", "number", "arrangement"}
            fixed -= {*first.varied, *second.varied}
            assert any(getattr(first, key) != getattr(second, key) for key in fixed)
    for item, text in zip(made.classes, made.texts):
        true = [a for a, false in zip(text.attributes, text.hallucinated) if not false]
        assert sorted(true) == sorted(item.attributes)
        assert len(true) == 4
    assert {key for item in made.classes for key in item.varied} == {
        *("shape", "colour", "texture"),
        *("size", "number", "arrangement"),
    }


@pytest.mark.parametrize(
    ("kind", "banks"),
    [
        ("shapes", {"shapes": 10, "shapes-true": 7}),
        ("shapes-varied", {"shapes-varied": 8, "shapes-varied-true": 5}),
    ],
)
def test_data_set_and_its_texts(kind: str, banks: dict[str, int]) -> None:
    told: list[tuple[int, int]] = []
    data = load_shapes(
        image_size=16, images_per_class=2, kind=kind, advance=lambda *counts: told.append(counts)
    )
    assert told == [(done, 240) for done in range(2, 242, 2)]
    assert data.name == kind
    assert [len(data.split(s).class_names) for s in ("base", "monitor", "novel")] == [72, 24, 24]
    assert len(set(data.class_names)) == 120
    assert data.base.images.shape == (144, 3, 16, 16)
    made = make_classes(varied=KINDS[kind])
    index = made.names.index(data.novel.class_names[3])
    drawn = draw_images(made.classes[index], range(2), 16, 0, index)
    assert np.array_equal(data.novel.images[6:8].permute(0, 2, 3, 1).numpy(), drawn)
    for bank, phrases in banks.items():
        texts, described = build_texts(SemanticsConfig(bank=bank), data, data.mean.device)
        assert texts.tokens.shape == (120, phrases, 512)
        assert described["bank"] == bank


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("image_size must be at least 16", {"image_size": 8}),
        ("images_per_class", {"images_per_class": 1}),
        ("classes must be 20 to 300", {"classes": 5}),
        ("'round'", {"kind": "round"}),
    ],
)
def test_wrong_sizes(match: str, arguments: dict[str, int]) -> None:
    with pytest.raises(DataError, match=match):
        load_shapes(**arguments)


def test_contact_sheet(tmp_path) -> None:  # type: ignore[no-untyped-def]
    contact_sheet(tmp_path / "sheet.png", classes=3, images=2, size=32)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="cannot write"):
        contact_sheet(tmp_path / "none" / "sheet.png", classes=1, images=1, size=16)


def test_contact_sheet_of_an_unknown_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["shapes", "sheet.png", "squares"])
    with pytest.raises(SystemExit, match="error: shapes: the kinds are shapes, shapes-varied, got"):
        runpy.run_path(shapes.__file__, run_name="__main__")


@pytest.mark.parametrize(
    ("arguments", "digest"),
    [
        ((120, 0, 3), "66fb2a55aa7fbc8a251ec2947f23304cc7d5aedcf15e736890700e0cd760c888"),
        ((60, 1, 0), "d608ead4c0dd183c1608762f4c941fc304fc678636d5c5571e49e69f775a60a2"),
        ((20, 2, 1), "93b987cdab6b56a497fda82a2d2936a87d2f6857b49d5b3cd1d0f8bf0639839e"),
        ((120, 0, 3, 2), "4de7d4d1646295d406d17ed66282ec73d59ae98359ba3a5250e3c9c44c59da9f"),
    ],
)
def test_the_classes_of_a_seed_never_change(arguments: tuple[int, ...], digest: str) -> None:
    made = make_classes(*arguments)
    assert _digest(made) == digest
    made.splits.clear()  # one caller's change reaches no other
    assert _digest(make_classes(*arguments)) == digest


def _digest(made: ShapesData) -> str:
    text = repr(made).replace(", varied=()", "")  # the field came later than the first results
    return hashlib.sha256(text.encode()).hexdigest()
