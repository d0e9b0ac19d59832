"""Images on disk to a ``FewShotData``: decoded into memory here, or mapped from a cache."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dvla_fast.data.decode import check_size, decode, in_blocks, pillow
from dvla_fast.data.equal import in_two_splits, row_hash, warn_of_shared
from dvla_fast.data.images import FewShotData, ImageSet, channel_statistics, hold_out
from dvla_fast.data.layouts import list_data
from dvla_fast.data.listing import Listing, Split
from dvla_fast.errors import DataError

# Channel statistics of ImageNet, for collections that are only evaluated on and have no base
# classes: statistics of the images under evaluation would be knowledge of the test set.
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TOLD = 100  # images, after which progress is told


def load_images(
    root: str | Path,
    image_size: int = 84,
    holdout: float = 0.25,
    split_seed: int = 0,
    splits: str = "",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> FewShotData:
    """Decode a data set of any known layout into memory.

    Every image is decoded once, resized, centre-cropped and kept as uint8: few-shot training reads
    each image many times, and decoding would otherwise dominate. A set too large for memory, or one
    that is used often, is better prepared once (``prepare_cache``).

    Args:
        root: the data set's folder.
        image_size, holdout, split_seed, splits, advance: as ``dvla_fast.data.load_data``.

    Returns:
        FewShotData with uint8 images (N, 3, image_size, image_size).

    Raises:
        DataError: as ``list_data``; an unreadable image; more images than memory holds; or a size
            below 1.
        MissingDependencyError: as ``list_data``.
    """
    pillow()
    check_size(image_size)
    listing = list_data(root, splits)
    warn_if_enlarged(listing.root, listing.reduced, image_size)
    _check_memory(listing, image_size)
    sets, hashes = {}, bytearray()
    places: list[tuple[str, str]] = []
    total = sum(map(len, listing.splits.values()))
    for name, split in listing.splits.items():
        ids, before = listing.image_ids(split), len(places)
        images, digests = _decode_split(split, image_size, advance, (before, total))
        labels = torch.from_numpy(split.labels)
        sets[name] = ImageSet(
            split.where, images, labels, split.names, ids=ids, file_order=split.file_order
        )
        hashes += digests
        places += [(name, image) for image in ids]
    shared = in_two_splits(hashes, places)
    warn_of_shared(str(listing.root), shared)
    data = assemble(listing.name, sets, holdout, split_seed, split_list=listing.published)
    return replace(data, shared=shared, reduced=listing.reduced)


def enlarged_note(where: str | Path, side: int, image_size: int) -> str:
    """Say what enlarging stored copies of ``side`` pixels does to results."""
    return (
        f"{where}: holds {side}-pixel images, enlarged here to {image_size}: results do not "
        f"compare with those from full-size images; use --data.image_size {side}, or the original "
        "images"
    )


def warn_if_enlarged(where: str | Path, side: int, image_size: int) -> None:
    """Warn when images come decoded (``side`` > 0) and smaller than they are asked for."""
    if 0 < side < image_size:
        warnings.warn(enlarged_note(where, side, image_size), stacklevel=2)


def _check_memory(listing: Listing, image_size: int) -> None:
    needed = sum(len(split) for split in listing.splits.values()) * 3 * image_size**2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.6 * memory:
        raise DataError(
            f"{listing.root}: its images take {needed / 1e9:.1f} GB at {image_size} pixels, and "
            f"this machine has {memory / 1e9:.1f} GB of memory; run 'dvla-fast data prepare' once "
            "and give --data.dataset the cache, which stays on disk"
        )


def _decode_split(
    split: Split, image_size: int, advance: Callable[[int, int], None], counts: tuple[int, int]
) -> tuple[Tensor, bytes]:
    """Decode a split's images, uint8 (N, 3, S, S), and hash them as ``equal_rows`` takes it.

    Args:
        counts: images of the splits before it, and of all.
    """
    before, total = counts
    images = np.empty((len(split), 3, image_size, image_size), dtype=np.uint8)
    bad: dict[int, str] = {}

    def fill(index: int) -> bytes:
        try:
            images[index] = decode(split.source(index), image_size)
        except DataError as error:
            bad[index] = str(error)
        return row_hash(images[index].data)

    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
        hashes = bytearray()
        for done, digest in enumerate(in_blocks(pool, fill, len(split)), 1):
            hashes += digest
            if done % _TOLD == 0 or done == len(split):
                advance(before + done, total)
    if bad:
        raise DataError(
            f"{bad[min(bad)]} ({len(bad)} of {len(split)} images of {split.where} cannot be read; "
            "'dvla-fast data check' names all, 'dvla-fast data prepare --skip_unreadable' makes a "
            "cache without them)"
        )
    return torch.from_numpy(images), bytes(hashes)


def assemble(
    name: str,
    sets: dict[str, ImageSet],
    holdout: float,
    split_seed: int,
    statistics: tuple[Tensor, Tensor] | None = None,
    split_list: str = "",
) -> FewShotData:
    """Make the data set of its splits.

    Where there is no ``val``, ``monitor`` is a held-out share of the base images; where there is no
    ``train`` either (ChestX), both are empty and only the novel classes can be evaluated.

    Args:
        sets: image sets by split: train, val, test.
        statistics: mean and std (3,) of ``train``, if they are known already.
        split_list: the bundled split list that the classes follow, if any.

    Raises:
        DataError: no test classes, or a ``holdout`` that is out of range or leaves a class
            without images.
    """
    if "test" not in sets:
        raise DataError(f"{name}: has no test classes to evaluate on; add them to its split")
    novel = sets["test"]
    empty = ImageSet(f"{name} (no such split)", novel.images[:0], novel.labels[:0], ())
    base, monitor, kind = sets.get("train", empty), sets.get("val", empty), "validation classes"
    if "val" not in sets and len(base):
        kind, statistics = "held-out images of the base classes", None
        if not 0 < holdout < 1:
            raise DataError(f"holdout must be between 0 and 1 (both excluded), got {holdout}")
        whole = base
        kept, held = hold_out(whole.labels, holdout, split_seed, whole.class_names)
        base = whole.subset(kept, whole.name)
        monitor = whole.subset(held, f"{whole.name} (held out)")
    elif "val" not in sets:
        kind = "nothing"
    if statistics is None and len(base):
        statistics = channel_statistics(base.images)
    elif statistics is None:
        mean, std = IMAGENET_STATISTICS
        statistics = torch.tensor(mean), torch.tensor(std)
    return FewShotData(name, base, monitor, novel, kind, *statistics, split_list=split_list)
