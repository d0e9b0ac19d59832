"""Recognises how a data set lies on disk, and lists its classes and images.

In order: the archives as their publishers pack them (``archives.py``), CSV or JSON lists over a
folder of images, folders of splits, and one folder of classes that a split list divides.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeGuard

import numpy as np

from dvla_fast.data import archives
from dvla_fast.data.cache_index import is_cache
from dvla_fast.data.decode import IMAGE_SUFFIXES
from dvla_fast.data.folders import (
    class_folder_root,
    letter_folders,
    reading,
    split_folders,
    visible_folders,
)
from dvla_fast.data.listing import Found, Listing, References, Split
from dvla_fast.data.lists import class_lists, csv_lists, json_lists
from dvla_fast.data.shapes import KINDS
from dvla_fast.data.split_pickles import pickles_here
from dvla_fast.data.splits import (
    SPLITS,
    SplitList,
    candidates,
    class_names,
    load_split_list,
)
from dvla_fast.errors import DataError, DVLAError
from dvla_fast.names import normalised_name

_MADE = ("digits", *KINDS)  # data sets without a folder
# Folders in which a data set is looked for, for a message, and of those that are named there.
_LOOKED_INTO, _SHOWN = 20, 3


def list_data(
    root: str | Path, splits: str = "", *, strict: bool = True, absent_ok: bool = False
) -> Listing:
    """Recognise the layout of a data set and list its images.

    Args:
        root: the data set's folder, or one that holds it and no other folder.
        splits: bundled split list or path of a JSON file; empty: as the folders say, or the one
            bundled list that fits.
        strict: raise on missing classes, classes of fewer than two images and missing images; else
            list them.
        absent_ok: list images that a list names and that are missing, strict or not.

    Raises:
        DataError: nothing recognised, several split lists fit, classes missing or in two splits,
            files missing that a list names, or folders that cannot be read.
        MissingDependencyError: Pillow, scipy (for .mat files) or timm is needed and not installed.
    """
    root = Path(root)
    if not os.path.isdir(root):  # unlike Path.is_dir, says no where it may not look
        raise DataError(_no_folder(root))
    wanted = load_split_list(splits) if splits else None
    listed = wanted is not None
    found = _recognised(root, listed)
    inner = _inner(root) if found is None else []
    if len(inner) == 1:
        found = _recognised(inner[0], listed)
    if found is None:
        raise DataError(_nothing(root, inner))
    divide = _divide if "" in found.classes else _as_found
    listing = divide(root, found, wanted, strict)
    if strict and listing.absent and not absent_ok:
        raise DataError(_absent_images(listing))
    return listing


def _inner(root: Path) -> list[Path]:
    """The folders in which a data set may lie: caches of it, finished or not, are none."""
    folders = visible_folders(root)
    return [path for path in folders if path.suffix != ".partial" and not is_cache(path)]


def _recognised(root: Path, listed: bool = False) -> Found | None:
    """What the first layout that fits holds; ``listed``: a split list is named."""
    recognisers: tuple[Callable[[Path], Found | None], ...] = (
        *archives.RECOGNISERS,
        csv_lists,
        json_lists,
        class_lists,
        partial(split_folders, listed=listed),
        class_folder_root,
        letter_folders,
    )
    found = (recognise(root) for recognise in recognisers)
    with reading(root):
        return next((item for item in found if item is not None), None)


def _nothing(root: Path, inner: Sequence[Path]) -> str:
    """Say what a data set looks like, and which of the folders inside does."""
    fitting = (f"{folder.name}/" for folder in inner[:_LOOKED_INTO] if _looks_like_one(folder))
    shown = ", ".join(itertools.islice(fitting, _SHOWN))
    hint = f"; give one of the folders in it that are, such as {shown}" if shown else ""
    return (
        f"{root}: no data set here{hint}: it must hold the folders train/ and test/ (or base/ and "
        "novel/), and may hold val/ (or valid/, validation/), with one folder of images per "
        "class in each; or one folder of images per class, and --data.splits names the split; "
        "docs/data.md has all layouts"
    )


def _looks_like_one(folder: Path) -> bool:
    if pickles_here(folder):  # gigabytes to read
        return True
    try:
        return _recognised(folder) is not None
    except DVLAError:
        return False


def _absent_images(listing: Listing) -> str:
    first, table = next(iter(listing.absent.items()))
    images = sum(len(split) for split in listing.splits.values())
    return (
        f"{first}: listed in {table.name}, but not there ({len(listing.absent)} of {images} listed "
        f"images are missing); {listing.remedy}; 'dvla-fast data check' names more, 'dvla-fast "
        "data prepare --skip_unreadable' makes a cache without them"
    )


def _no_folder(root: Path) -> str:
    if str(root) in _MADE:
        return f"{root}: comes with dvla-fast, and has no folder to read; --data.dataset takes it"
    if os.path.isfile(root):
        return f"{root}: is a file; extract the archive first and give its folder"
    return (
        f"{root}: no such folder; give 'digits', a cache that 'dvla-fast data prepare' has made "
        "(--output names it), or the root of a data set with the folders "
        "train/, val/, test/ (or base/, val/, novel/), one folder per class in each; docs/data.md "
        "has all layouts"
    )


def _divide(root: Path, found: Found, wanted: SplitList | None, strict: bool) -> Listing:
    """Divide unsplit classes by a split list."""
    classes = found.classes[""]
    known = wanted or _only_candidate(root, found, classes)
    if found.incomplete and not known.part:
        raise DataError(
            f"{root}: {known.name} uses the whole archive, but the {found.incomplete}; add the "
            "file, or choose another split"
        )
    members = found.parts.get(known.part) if known.part else None
    by_split: dict[str, Mapping[str, References]] = {}
    missing: dict[str, tuple[str, ...]] = {}
    for split, keys in known.splits.items():
        absent = tuple(key for key in keys if key not in classes)
        if absent:
            missing[split] = absent
        chosen: dict[str, References] = {}
        for key in keys:
            if key in absent:
                continue
            items = classes[key]
            if members is not None:
                items = [item for item in items if item in members]
            if known.first_images:
                items = items[: known.first_images]
            chosen[key] = items
        if chosen:
            by_split[split] = chosen
    if strict and missing:
        _missing_classes(root, known, missing)
    arrays = dict.fromkeys(by_split, found.arrays[""]) if "" in found.arrays else {}
    where = {split: f"{found.where.get('', root)} ({split} of {known.name})" for split in by_split}
    divided = replace(found, classes=by_split, arrays=arrays, where=where)
    ignored = tuple(sorted(set(classes) - known.keys))
    return _listing(root, divided, known, missing, ignored, strict)


def _only_candidate(root: Path, found: Found, keys: Iterable[str]) -> SplitList:
    fitting = candidates(keys)
    if len(fitting) == 1:
        if fitting[0].missing_classes:
            raise DataError(
                f"{root}: looks like {fitting[0].dataset}, whose bundled list {fitting[0].name} "
                f"lacks {fitting[0].missing_classes} classes of the published split; give your "
                "own list, --data.splits FILE.json, or this one by name"
            )
        return fitting[0]
    if not fitting:
        raise DataError(
            f"{root}: {found.layout} without a split, of no data set known here; give "
            "--data.splits FILE.json with the classes of train, val and test, or sort the class "
            "folders into train/, val/ and test/"
        )
    raise DataError(
        f"{root}: {len(fitting)} published splits fit; choose one with --data.splits (--splits of "
        f"'dvla-fast data'): {' | '.join(item.name for item in fitting)}"
    )


def _missing_classes(root: Path, known: SplitList, missing: Mapping[str, tuple[str, ...]]) -> None:
    absent = [key for keys in missing.values() for key in keys]
    published = f" (published by {known.published})" if known.published else ""
    raise DataError(
        f"{root}: {len(absent)} of the {len(known.keys)} classes of {known.name} are missing "
        f"({', '.join(map(repr, absent[:3]))}{', ...' if len(absent) > 3 else ''}); restore "
        f"them{published}; 'dvla-fast data check' names all"
    )


def _as_found(root: Path, found: Found, wanted: SplitList | None, strict: bool) -> Listing:
    """Keep the split that folders or lists make; name the published one it equals, if any."""
    known = wanted
    present = {split: set(found.classes.get(split, ())) for split in SPLITS}
    everything = set().union(*present.values())
    missing: dict[str, tuple[str, ...]] = {}
    if known is None:
        exact = [
            item
            for item in candidates(everything)
            if all(present[split] == set(item.splits[split]) for split in SPLITS)
        ]
        known = exact[0] if exact else None
    else:
        misplaced = [
            f"{key!r} in {split}"
            for split in SPLITS
            for key in sorted(present[split] - set(known.splits[split]))
        ]
        if misplaced and strict:
            raise DataError(
                f"{root}: does not follow {known.name}: {len(misplaced)} class(es) are in another "
                f"split than it says or unknown to it ({', '.join(misplaced[:3])}); move them, or "
                "leave out --data.splits"
            )
        for split in SPLITS:
            absent = tuple(key for key in known.splits[split] if key not in present[split])
            if absent:
                missing[split] = absent
        if strict and missing:
            _missing_classes(root, known, missing)
    return _listing(root, found, known, missing, (), strict)


def _listing(
    root: Path,
    found: Found,
    known: SplitList | None,
    missing: dict[str, tuple[str, ...]],
    ignored: tuple[str, ...],
    strict: bool,
) -> Listing:
    keys = list(dict.fromkeys(key for split in SPLITS for key in found.classes.get(split, {})))
    names = dict(zip(keys, class_names(keys, known), strict=True))
    if strict:
        _check_classes(found, names)
    splits = {}
    for split in SPLITS:
        if not found.classes.get(split):
            continue
        classes = _as_image_folder(found.classes[split])
        references = [item for items in classes.values() for item in items]
        counts = [len(items) for items in classes.values()]
        splits[split] = Split(
            found.where.get(split, str(root)),
            tuple(classes),
            tuple(names[key] for key in classes),
            references,  # type: ignore[arg-type]
            np.repeat(np.arange(len(counts)), counts).astype(np.int64),
            found.arrays.get(split),
            found.reduced,
            found.file_order,
        )
    used = {item for split in splits.values() for item in split.references} if found.absent else {}
    absent = {path: table for path, table in found.absent.items() if path in used}
    return Listing(root, found.layout, splits, known, missing, ignored, absent, found.remedy)


def _as_image_folder(classes: Mapping[str, References]) -> dict[str, References]:
    """Sort classes by key and their files by name, so that every layout of a set has one order."""
    return {
        key: sorted(items, key=lambda item: (item.name, item)) if _files(items) else items
        for key, items in sorted(classes.items())
    }


def _files(items: References) -> TypeGuard[Sequence[Path]]:
    return bool(items) and isinstance(items[0], Path)


def _check_classes(found: Found, names: Mapping[str, str]) -> None:
    """Stop on a class in two splits, on two spellings of one name, and on empty classes.

    Args:
        names: class key -> readable name. They are compared as evaluation compares them with the
            classes that were trained on.
    """
    _check_crossing(found, names)
    for split in SPLITS:
        where = found.where.get(split, split)
        seen: dict[str, str] = {}
        for key, items in found.classes.get(split, {}).items():
            twin = seen.setdefault(normalised_name(names[key]), key)
            if twin != key:
                raise DataError(
                    f"{where}: the classes {twin!r} and {key!r} have the same name, but for case, "
                    "spaces, '_' and '-'; rename or merge them"
                )
            if len(items) < 2:
                folder = Path(where) / key
                raise DataError(
                    f"{folder if folder.is_dir() else f'{where}: class {key!r}'}: {len(items)} "
                    f"image(s) ({', '.join(IMAGE_SUFFIXES)}); a class needs at least 2, one to "
                    "learn from and one to ask about: add images or remove the folder"
                )


def _check_crossing(found: Found, names: Mapping[str, str]) -> None:
    """Stop on a class in two splits, however it is spelled there."""
    known = {
        split: {normalised_name(names[key]): key for key in found.classes.get(split, {})}
        for split in SPLITS
    }
    for first, second in itertools.combinations(SPLITS, 2):
        shared = [mark for mark in known[first] if mark in known[second]]
        if shared:
            spelled = {known[split][shared[0]]: None for split in (first, second)}
            raise DataError(
                f"{found.where.get(first, first)} and {found.where.get(second, second)} share "
                f"{len(shared)} class(es) ({' and '.join(map(repr, spelled))}, ...): they would be "
                "trained on, or selected by, and evaluated as novel; keep each class in one split"
            )
