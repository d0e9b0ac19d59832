"""Looks through a data set before work starts: counts, classes, unreadable and duplicate images."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvla_fast.checks import Report
from dvla_fast.data.cache import verify_cache
from dvla_fast.data.cache_index import check_split, is_cache, read_index
from dvla_fast.data.decode import IMAGE_SUFFIXES, in_blocks, is_image, open_rgb
from dvla_fast.data.equal import Place, crosses, equal_rows, places_text, row_hash
from dvla_fast.data.folders import reading, visible_folders
from dvla_fast.data.layouts import list_data
from dvla_fast.data.listing import Listing, Split
from dvla_fast.data.load import enlarged_note
from dvla_fast.data.splits import candidates
from dvla_fast.errors import DataError
from dvla_fast.names import normalised_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What one line names; the rest is counted.
_SHOWN = 10


def check_data(
    root: str | Path,
    splits: str = "",
    *,
    shot: int = 5,
    query: int = 15,
    image_size: int = 224,
    decode_images: bool = True,
    workers: int = 0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Check a data set, or a prepared cache.

    Args:
        root, splits: as ``list_data``, or the folder of a cache and its own split list.
        shot, query: images that an episode takes of a class; smaller classes are a problem.
        image_size: side that training will use; images of half of it or less are noted.
        decode_images: read every image (finds unreadable ones and duplicates); else only count.
            The images of a cache are always read, for their checksums.
        workers: threads; 0: a few more than cores.
        advance: called with the images done so far and all of them, those of a cache, too.

    Raises:
        DataError: nothing recognised at all, as ``list_data``; or a cache of another split list.
        MissingDependencyError: as ``list_data``.
    """
    report = Report()
    if is_cache(root):
        _check_cache(root, splits, shot + query, decode_images, advance, report)
        return report
    listing = list_data(root, splits, strict=False)
    _describe(listing, report)
    _check_absent(listing, report)
    _check_counts(listing, report)
    _check_classes(listing, shot + query, report)
    report.notes += _passed_over(listing)
    if decode_images:
        _check_images(listing, image_size, workers, advance, report)
    return report


def _check_cache(
    root: str | Path,
    splits: str,
    needed: int,
    compare: bool,
    advance: Callable[[int, int], None],
    report: Report,
) -> None:
    index = read_index(root)
    check_split(root, index, splits)
    report.facts.append(
        f"cache of {index['name']}, {index['images']} images of {index['image_size']} pixels, "
        f"split {index['split_list'] or 'of its folders'}, made from {index['root']}"
    )
    report.facts += [
        f"  {name:<5} {len(entry['keys']):>4} classes {sum(entry['counts']):>7} images"
        for name, entry in index["splits"].items()
    ]
    report.add(report.notes, [f"left out: {line}" for line in index["skipped"]])
    if 0 < index["reduced"] < index["image_size"]:
        report.notes.append(enlarged_note(index["root"], index["reduced"], index["image_size"]))
    if not Path(index["root"]).is_dir():
        report.notes.append(f"{index['root']} is not here: not compared with the original files")
    for name, entry in index["splits"].items():
        where = f"{root} ({name})"
        report.problems += _small(where, entry["keys"], entry["counts"], needed)
    stride, read = 3 * index["image_size"] ** 2, 0
    with ThreadPoolExecutor(1) as pool:  # hashing releases the GIL
        rows = _Rows(stride, pool)

        def look(chunk: bytes) -> None:
            nonlocal read
            if compare:
                rows(chunk)
            read += len(chunk)
            advance(read // stride, index["images"])

        report.add(report.problems, verify_cache(root, look))
    if not compare:
        return
    places = [(name, file) for name, entry in index["splits"].items() for file in entry["files"]]
    groups = [[places[row] for row in group] for group in rows.equal()]
    _report_equal(groups, "remove one and run 'dvla-fast data prepare' again", report)


class _Rows:
    """Hashes of a cache's images, eight bytes each, taken chunk by chunk."""

    def __init__(self, stride: int, pool: ThreadPoolExecutor) -> None:
        self.stride, self.pool, self.hashes = stride, pool, bytearray()
        self.waiting: Future[bytes] | None = None

    def __call__(self, chunk: bytes) -> None:
        """Begin to hash the rows of a chunk beside the caller; at most one chunk is under way."""
        self.finish()
        self.waiting = self.pool.submit(self._hashes, memoryview(chunk))

    def finish(self) -> None:
        """Wait for the last chunk."""
        if self.waiting is not None:
            self.hashes += self.waiting.result()
            self.waiting = None

    def _hashes(self, chunk: memoryview) -> bytes:
        rows = (chunk[at : at + self.stride] for at in range(0, len(chunk), self.stride))
        return b"".join(map(row_hash, rows))

    def equal(self) -> Iterator[list[int]]:
        """Yield the rows of each image that is there more than once, in order."""
        self.finish()
        yield from equal_rows(self.hashes)


def _describe(listing: Listing, report: Report) -> None:
    report.facts.append(f"{listing.root}: {listing.layout}")
    known = listing.split_list
    if known is not None:
        report.facts.append(f"{known.title or listing.name}, split list {known.name}")
        report.facts += [f"  from {line}" for line in known.source]
        if known.published:
            report.facts.append(f"  images published by {known.published}")
        if known.missing_classes:
            report.notes.append(
                f"{known.name} lacks {known.missing_classes} classes of the published split: "
                "results do not compare with others'"
            )
    else:
        keys = [key for split in listing.splits.values() for key in split.keys]
        for item in candidates(keys):
            report.notes.append(
                f"its classes are {item.dataset}'s, but not in the split {item.name}: results do "
                "not compare with those on that split"
            )
    if listing.ignored:
        report.notes.append(f"{len(listing.ignored)} classes on disk are not in the split list")
    for name, split in listing.splits.items():
        line = f"  {name:<5} {len(split.keys):>4} classes {_counts(listing, split).sum():>7} images"
        expected = known.images_per_split.get(name) if known else None
        report.facts.append(f"{line}, known: {expected}" if expected else line)


def _counts(listing: Listing, split: Split) -> NDArray[np.int64]:
    """Number of images of each class, without those that are listed and not there."""
    if not listing.absent:
        return split.counts()
    there = [reference not in listing.absent for reference in split.references]
    return np.bincount(split.labels[there], minlength=len(split.keys))


def _check_absent(listing: Listing, report: Report) -> None:
    """Count the images that a list names and that are not there, and name them."""
    absent = listing.absent
    if not absent:
        return
    images = sum(len(split) for split in listing.splits.values())
    tables = ", ".join(f"{n} of {table.name}" for table, n in Counter(absent.values()).items())
    report.problems.append(
        f"{listing.root}: {len(absent)} of {images} listed images are missing ({tables}); "
        f"{listing.remedy}"
    )
    lines = [f"{path}: listed in {table.name}, but not there" for path, table in absent.items()]
    report.add(report.problems, lines)


def _check_counts(listing: Listing, report: Report) -> None:
    known = listing.split_list
    if known is None:
        return
    published = f"; published by {known.published}" if known.published else ""
    for name, keys in listing.missing.items():
        report.problems.append(
            f"{name}: {len(keys)} of {len(known.splits[name])} classes missing ({_few(keys)})"
            f"{published}"
        )
    for split in listing.splits.values():
        counts = zip(split.keys, _counts(listing, split))
        compared = ((key, count, known.images_per_class.get(key, count)) for key, count in counts)
        wrong = [f"{key!r} ({n}, known: {right})" for key, n, right in compared if n != right]
        if wrong:
            report.problems.append(
                f"{split.where}: {len(wrong)} of {len(split.keys)} classes have other numbers of "
                f"images than are known: {_few(wrong)}"
            )
    for name, expected in known.images_per_split.items():
        found = _counts(listing, listing.splits[name]).sum() if name in listing.splits else 0
        if found != expected and not known.images_per_class:
            report.problems.append(f"{name}: {found} images, known: {expected}{published}")


def _small(where: str, keys: Sequence[str], counts: Iterable[int], needed: int) -> list[str]:
    """Say in a line which classes of a split have too few images; none: no line."""
    small = [f"{key!r} ({count})" for key, count in zip(keys, counts) if count < needed]
    if not small:
        return []
    return [
        f"{where}: {len(small)} of {len(keys)} classes have fewer images than the {needed} that an "
        f"episode takes: {_few(small)}; add images, or train and evaluate with fewer shots and "
        "queries (--metatune.shots, --metatune.query, --evaluate.shots, --evaluate.query)"
    ]


def _few(items: Sequence[str]) -> str:
    """Lay out the first few of a list."""
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


def _check_classes(listing: Listing, needed: int, report: Report) -> None:
    known: dict[str, tuple[str, str]] = {}  # by what evaluation compares of a name
    for name, split in listing.splits.items():
        counts = _counts(listing, split)
        report.problems += _small(split.where, split.keys, counts, needed)
        for key, readable in zip(split.keys, split.names):
            other, twin = known.setdefault(normalised_name(readable), (name, key))
            if (other, twin) != (name, key):
                report.problems.append(
                    f"class {key!r} of {name} is also {twin!r} of {other}; keep each class once"
                )


def _passed_over(listing: Listing) -> list[str]:
    """Count what lies in the folders of a data set and is not read; hidden files are expected."""
    beside: list[Path] = []
    notes = []
    if listing.layout.startswith("folders "):
        tops = [Path(split.where) for split in listing.splits.values()]
        beside = [path for top in tops for path in _visible(top) if not path.is_dir()]
        folders = [path for top in tops for path in _visible(top) if path.is_dir()]
        roots = [path for path in visible_folders(tops[0].parent) if path not in tops]
        if roots:
            names = ", ".join(f"{path.name}/" for path in roots[:_SHOWN])
            more = ", ..." if len(roots) > _SHOWN else ""
            notes.append(
                f"passed over {len(roots)} folder(s) beside the splits, with {_images_in(roots)} "
                f"image(s): {names}{more}; splits are called train/, val/ and test/ (or base/, "
                "novel/; valid/, validation/)"
            )
    elif listing.layout == "class folders":
        found = (path for split in listing.splits.values() for path in split.references)
        folders = sorted({path.parent for path in found if isinstance(path, Path)})
    else:
        return []  # lists and archives name their images
    inside = [path for folder in folders for path in _visible(folder, images=False)]
    nested = [path for path in inside if path.is_dir()]
    others = [path for path in inside if not path.is_dir()]
    if others:
        kinds = Counter(path.suffix.lower() or "without an ending" for path in others)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_SHOWN))
        notes.append(
            f"passed over {len(others)} file(s) of other kinds in class folders ({counted}), e.g. "
            f"{others[0]}; images end in {', '.join(IMAGE_SUFFIXES)}"
        )
    if nested:
        notes.append(
            f"passed over {len(nested)} folder(s) inside class folders, with {_images_in(nested)} "
            f"image(s), e.g. {nested[0]}; a class's images lie in its own folder"
        )
    if beside:
        notes.append(f"passed over {len(beside)} file(s) beside class folders, e.g. {beside[0]}")
    return notes


def _images_in(folders: Iterable[Path]) -> int:
    return sum(is_image(path) for folder in folders for path in folder.rglob("*"))


def _visible(folder: Path, images: bool = True) -> list[Path]:
    """What lies in a folder, hidden files apart; ``images``: image files, too."""
    with reading(folder):
        names = [name for name in os.listdir(folder) if not name.startswith((".", "__"))]
        return [folder / name for name in sorted(names) if images or not is_image(name)]


def _check_images(
    listing: Listing,
    image_size: int,
    workers: int,
    advance: Callable[[int, int], None],
    report: Report,
) -> None:
    """Decode every image: unreadable ones, modes, small ones, and equal pixels."""
    places: dict[bytes, list[Place]] = defaultdict(list)
    modes: Counter[str] = Counter()
    total = sum(len(split) for split in listing.splits.values())
    bad, small, done = [], 0, 0
    with ThreadPoolExecutor(workers or None) as pool:
        for name, split in listing.splits.items():
            for index, result in enumerate(in_blocks(pool, partial(_look, split), len(split))):
                if isinstance(result, str):
                    if split.references[index] not in listing.absent:  # they are on record
                        bad.append(result)
                else:
                    digest, mode, side = result
                    reference = split.references[index]
                    where = (
                        reference if isinstance(reference, Path) else f"{split.where}[{reference}]"
                    )
                    places[digest].append((name, str(where)))
                    modes[mode] += 1
                    small += 2 * side <= image_size
                done += 1
                if done % 64 == 0 or done == total:
                    advance(done, total)
    report.facts.append("  modes: " + ", ".join(f"{n} {mode}" for mode, n in modes.most_common()))
    report.add(report.problems, bad)
    groups = [group for group in places.values() if len(group) > 1]
    _report_equal(groups, "remove one", report)
    if small:
        report.notes.append(
            f"{small} of {total} images have a side of at most half of {image_size} pixels: they "
            "would be enlarged"
        )


def _report_equal(groups: list[list[Place]], remedy: str, report: Report) -> None:
    """Report groups of places that hold one image."""
    crossing = [group for group in groups if crosses(group)]
    within = [group for group in groups if not crosses(group)]
    report.add(
        report.problems,
        [f"one image in two splits: {places_text(group)}; {remedy}" for group in crossing],
    )
    report.add(
        report.notes, [f"one image twice in a split: {places_text(group)}" for group in within]
    )


def _look(split: Split, index: int) -> tuple[bytes, str, int] | str:
    """Return the digest of an image's pixels, its mode and shorter side; or what is wrong."""
    try:
        source = split.source(index)
        if isinstance(source, Path):
            rgb, mode, side = open_rgb(source)
            pixels = np.asarray(rgb)
        else:
            pixels, mode, side = source, "RGB", min(source.shape[:2])
    except DataError as error:
        return str(error)
    digest = hashlib.sha256(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest(), mode, side
