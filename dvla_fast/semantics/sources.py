"""Which classes a bank is built for, and which of their images a language model is shown.

Only images of the splits asked for are read, and what was shown is recorded by an id that names
the image in its data set, so that an evaluation can keep it out of its queries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dvla_fast.characters import is_unicode
from dvla_fast.data.cache_index import check_split, is_cache, map_images, read_index
from dvla_fast.data.images import ImageSet
from dvla_fast.data.layouts import list_data
from dvla_fast.data.splits import SPLITS
from dvla_fast.errors import DataError
from dvla_fast.semantics.language_models.base import ShownImage
from dvla_fast.semantics.stages import ClassSource


def named_classes(names: Iterable[str]) -> list[ClassSource]:
    """Return classes without images, for texts from names alone.

    Raises:
        DataError: no class, a class without a name, or a name twice.
    """
    classes = [ClassSource(name.strip()) for name in names]
    check_classes(classes)
    return classes


def folder_classes(
    root: str | Path, splits: str, parts: Sequence[str], count: int, seed: int, max_side: int
) -> list[ClassSource]:
    """Return the classes of a data set's folder, or of a cache, with ``count`` images of each.

    Args:
        root: folder of any known layout, or a cache of ``dvla-fast data prepare``.
        splits: split list, as ``dvla_fast.data.list_data``; of a cache its own, or none.
        parts: splits to build for: train, val, test.
        count: images shown of a class, chosen by ``seed``; all where there are fewer; 0: none.
        max_side: see ``ShownImage``.

    Raises:
        DataError: as ``list_data``; a cache of another split list; a split that the data set does
            not have; or a class without a name or without images.
    """
    if is_cache(root):
        classes = _cache_classes(Path(root), splits, parts, count, seed, max_side)
    else:
        listing = list_data(root, splits)
        classes = []
        for part in _present(parts, listing.splits, str(root)):
            split = listing.splits[part]
            for label, (key, name) in enumerate(zip(split.keys, split.names)):
                rows = np.flatnonzero(split.labels == label)
                shown = (
                    ShownImage(listing.image_id(split, row), split.source(row), max_side)
                    for row in pick(rows, count, seed, key)
                )
                classes.append(ClassSource(name, tuple(shown)))
    check_classes(classes, with_images=count > 0)
    return classes


def image_set_classes(
    sets: Iterable[tuple[str, ImageSet]], count: int, seed: int, max_side: int
) -> list[ClassSource]:
    """Return the classes of image sets in memory, named ``(name, set)``, as ``folder_classes``."""
    classes = []
    for where, images in sets:
        labels = images.labels.cpu().numpy()
        for label, name in enumerate(images.class_names):
            picked = pick(np.flatnonzero(labels == label), count, seed, name)
            shown = (
                shown_tensor(images.images[row], _id(images, row, where), max_side)
                for row in picked
            )
            classes.append(ClassSource(name, tuple(shown)))
    check_classes(classes, with_images=count > 0)
    return classes


def episode_images(
    images: ImageSet, support: Tensor, way: int, max_side: int = 512
) -> list[tuple[ShownImage, ...]]:
    """Return the support images of one episode, class by class.

    Args:
        support: (way * shot,) int64 positions in ``images``, as in ``EpisodeBatch.support``.
    """
    gathered = images.gather(support).cpu()
    shot = len(support) // way
    shown = [
        shown_tensor(image, _id(images, place, images.name), max_side)
        for image, place in zip(gathered, support.tolist())
    ]
    return [tuple(shown[start : start + shot]) for start in range(0, len(shown), shot)]


def shown_tensor(image: Tensor, id: str, max_side: int = 512) -> ShownImage:
    """Return an image (C, H, W), uint8 or float in [0, 1], as one to be shown; C is 1 or 3."""
    if image.dtype != torch.uint8:
        image = (image.float() * 255).round().clamp(0, 255).to(torch.uint8)
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
    return ShownImage(id, pixels, max_side)


def pick(rows: np.ndarray, count: int, seed: int, key: str) -> list[int]:
    """Choose ``count`` of a class's images by seed, independently of all other classes."""
    if count >= len(rows):
        return [int(row) for row in rows]
    entropy = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    stream = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, entropy])))
    return sorted(int(row) for row in stream.choice(rows, count, replace=False))


def check_classes(classes: Sequence[ClassSource], *, with_images: bool = False) -> None:
    """Find classes that nothing can be written about.

    Raises:
        DataError: naming them.
    """
    if not classes:
        raise DataError("there is no class to write texts for; name at least one")
    unnamed = [str(place + 1) for place, item in enumerate(classes) if not item.name.strip()]
    if unnamed:
        raise DataError(f"class number {', '.join(unnamed[:5])} has no name; name its folder")
    for item in classes:
        unwritten = [
            text for text in (item.name, *(i.id for i in item.images)) if not is_unicode(text)
        ]
        if unwritten:
            raise DataError(
                f"class {item.name!r}: the name {unwritten[0]!r} is not UTF-8 and cannot be "
                "recorded; rename the folder or file"
            )
    names = [item.name for item in classes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{', '.join(map(repr, twice[:5]))} is named twice; keep each class once")
    bare = [repr(item.name) for item in classes if with_images and not item.images]
    if bare:
        raise DataError(
            f"{len(bare)} class(es) have no image to show ({', '.join(bare[:5])}); add images, or "
            "build from class names alone with --construct.images 0"
        )


def _cache_classes(
    root: Path, splits: str, parts: Sequence[str], count: int, seed: int, max_side: int
) -> list[ClassSource]:
    index = read_index(root)
    check_split(root, index, splits)
    images = map_images(root, index)
    classes, first = [], 0
    starts = {}
    for part in SPLITS:  # the rows of a cache are in this order
        if part in index["splits"]:
            starts[part] = first
            first += sum(index["splits"][part]["counts"])
    for part in _present(parts, starts, str(root)):
        entry, row = index["splits"][part], 0
        for key, name, size in zip(entry["keys"], entry["names"], entry["counts"]):
            picked = pick(np.arange(row, row + size), count, seed, key)
            shown = (
                shown_tensor(images[starts[part] + place], entry["files"][place], max_side)
                for place in picked
            )
            classes.append(ClassSource(name, tuple(shown)))
            row += size
    return classes


def _id(images: ImageSet, row: int, where: str) -> str:
    """The image's own id where the set knows them, as evaluations compare them."""
    return images.ids[row] if images.ids else f"{where}[{row}]"


def _present(parts: Sequence[str], there: Iterable[str], where: str) -> list[str]:
    present = list(there)
    missing = [part for part in parts if part not in present]
    if missing:
        raise DataError(
            f"{where}: has no split {', '.join(map(repr, missing))}; it has {', '.join(present)}"
        )
    return list(parts) or present
