"""What a data set holds, before any image is decoded: classes, splits, and where each image is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvla_fast.data.png_images import PngImages
from dvla_fast.data.splits import published_name
from dvla_fast.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dvla_fast.data.splits import SplitList

EXTRACT = "extract the archive again"  # the remedy where published files are missing

# The images of one class: files, or row numbers of an array of decoded images.
References = Sequence[Path] | Sequence[int]


def within(root: Path, path: Path, table: Path) -> Path:
    """Return a path that a list names, if it stays below the data set's folder.

    Judged by the names alone: a link that lies below the folder may point elsewhere.

    Raises:
        DataError: ``..`` or an absolute path lead out of ``root``.
    """
    if str(path).startswith(f"{root}{os.sep}") and ".." not in str(path):
        return path  # nearly all are, of up to a million
    place = Path(os.path.abspath(path))
    if place.is_relative_to(os.path.abspath(root)) or place.is_relative_to(root.resolve()):
        return path
    raise DataError(
        f"{table}: names {str(path)!r}, outside of {root}; correct the list, or put the images (or "
        "a link to their folder) below it"
    )


def not_there(files: Iterable[Path], table: Path) -> dict[Path, Path]:
    """Return those of the files a list names that do not exist, each with the list."""
    return {path: table for path in files if not path.is_file()}


@dataclass(frozen=True)
class Split:
    """The classes and images of one split, images class by class.

    Attributes:
        where: folder or file it comes from, for messages.
        keys: class keys as on disk; names: readable class names in the same order.
        references: (N,) one file, or one row of ``array``, for each image.
        labels: (N,) int64 indices into ``keys``.
        array: (M, H, W, 3) uint8 images, where they come decoded or in a pickle; else None.
        reduced: the array holds smaller copies of the original images.
        file_order: the images of a class are in the order of their file names.
    """

    where: str
    keys: tuple[str, ...]
    names: tuple[str, ...]
    references: References
    labels: NDArray[np.int64]
    array: NDArray[np.uint8] | PngImages | None = None
    reduced: bool = False
    file_order: bool = True

    def __len__(self) -> int:
        return len(self.references)

    def source(self, index: int) -> Path | NDArray[np.uint8]:
        """Return what ``decode`` reads: a path, or an array (H, W, 3).

        Raises:
            DataError: as ``PngImages``.
        """
        reference = self.references[index]
        if isinstance(reference, Path):
            return reference
        assert self.array is not None
        pixels: NDArray[np.uint8] = self.array[reference]
        return pixels

    def stored(self, index: int) -> bytes:
        """Return an image of ``array`` as it is stored, by which a change is known."""
        row = self.references[index]
        assert isinstance(row, int)
        if isinstance(self.array, PngImages):
            return self.array.file(row)
        assert self.array is not None
        return np.ascontiguousarray(self.array[row]).tobytes()

    def counts(self) -> NDArray[np.int64]:
        """Return the number of images of each class (C,)."""
        return np.bincount(self.labels, minlength=len(self.keys))


@dataclass(frozen=True)
class Listing:
    """A data set on disk under one split.

    Attributes:
        layout: the layout recognised, in words.
        split_list: the bundled or user's list in use; None where folders alone make the split.
        splits: by name: train, val, test; those without any class are left out.
        missing: classes of the split list that are not on disk, by split.
        ignored: classes on disk that the split list does not use.
        absent: images of the splits that a list names and that are not there, each with that list.
        remedy: what to do about them.
    """

    root: Path
    layout: str
    splits: dict[str, Split]
    split_list: SplitList | None = None
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    absent: Mapping[Path, Path] = field(default_factory=dict)
    remedy: str = ""

    @property
    def name(self) -> str:
        """The data set's name, whatever list divides it: as published, else its folder's."""
        published = self.split_list.dataset if self.split_list else ""
        return published or os.path.basename(os.path.abspath(self.root))

    @property
    def reduced(self) -> int:
        """Side of the smaller copies that the images come as; 0: of their full size."""
        sides = (
            split.array.shape[1]
            for split in self.splits.values()
            if split.reduced and split.array is not None
        )
        return min(sides, default=0)

    @property
    def published(self) -> str:
        """Name of the bundled split list that the classes follow; empty where they follow none."""
        name = self.split_list.name if self.split_list else ""
        return published_name(name, {split: item.keys for split, item in self.splits.items()})

    def image_id(self, split: Split, index: int) -> str:
        """Name an image: its path below the root, or ``file[row]`` of an array.

        Where a split list divides an array (CIFAR-100), the file's name is followed by the split
        and the list: under another list the same image is called otherwise.
        """
        reference = split.references[index]
        if not isinstance(reference, Path):
            return f"{Path(split.where).name}[{reference}]"
        text, top = str(reference), f"{self.root}{os.sep}"
        if text.startswith(top):  # nearly all do, of up to a million
            return text[len(top) :].replace(os.sep, "/")
        for root in (self.root, *self._real_roots):
            if reference.is_relative_to(root):
                return reference.relative_to(root).as_posix()
        return str(reference)

    @cached_property
    def _real_roots(self) -> tuple[Path, Path]:
        """The root as lists with absolute paths may have it."""
        return Path(os.path.abspath(self.root)), self.root.resolve()

    def image_ids(self, split: Split) -> tuple[str, ...]:
        """Name all images of a split, in order."""
        return tuple(self.image_id(split, index) for index in range(len(split)))


@dataclass
class Found:
    """What a layout holds: split by split, or under ``""`` when a split list must divide it.

    Attributes:
        classes: split -> class key -> images.
        arrays: split -> (M, H, W, 3) uint8, where images come decoded.
        parts: named parts of an archive that a split list may restrict itself to.
        where: split -> folder or file, for messages.
        reduced: the arrays hold smaller copies of the original images.
        file_order: where images come decoded, those of a class are in the order of the names of
            the files that they were.
        incomplete: what a split list of the whole archive would need besides; empty: nothing.
        absent: those of the images that are not there, each with the list that names it.
        remedy: what to do about them.
    """

    layout: str
    classes: dict[str, Mapping[str, References]]
    arrays: dict[str, NDArray[np.uint8] | PngImages] = field(default_factory=dict)
    parts: dict[str, frozenset[Path]] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    incomplete: str = ""
    reduced: bool = False
    file_order: bool = True
    absent: Mapping[Path, Path] = field(default_factory=dict)
    remedy: str = ""
