"""Recognises how a data set lies on disk, and lists its classes and images.

In order: the archives as their publishers pack them (``archives.py``), CSV or JSON lists over a
folder of images, folders of splits, and one folder of classes that a split list divides.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from dvla_fast.data import archives
from dvla_fast.data.decode import IMAGE_SUFFIXES, is_image
from dvla_fast.data.listing import Found, Listing, References, Split, within
from dvla_fast.data.shapes import KINDS
from dvla_fast.data.splits import (
    SPLITS,
    SplitList,
    candidates,
    class_names,
    composed,
    load_split_list,
)
from dvla_fast.errors import DataError
from dvla_fast.semantics.bank import normalised_name

# Names of training and test classes, as people call them; those of validation in any case.
_SPLIT_NAMES = (("train", "test"), ("base", "novel"))
_VAL_NAMES = ("val", "valid", "validation")
_MADE = ("digits", *KINDS)  # data sets without a folder


def list_data(root: str | Path, splits: str = "", *, strict: bool = True) -> Listing:
    """Recognise the layout of a data set and list its images.

    Args:
        root: the data set's folder.
        splits: bundled split list or path of a JSON file; empty: as the folders say, or the one
            bundled list that fits.
        strict: raise on missing classes and classes of fewer than two images; else list them.

    Raises:
        DataError: nothing recognised, several split lists fit, classes missing or in two splits,
            or files missing that a list names.
        MissingDependencyError: Pillow, scipy (for .mat files) or timm is needed and not installed.
    """
    root = Path(root)
    if root.is_file() or not root.is_dir():
        raise DataError(_no_folder(root))
    wanted = load_split_list(splits) if splits else None
    for recognise in _RECOGNISERS:
        found = recognise(root)
        if found is not None:
            break
    else:
        raise DataError(
            f"{root}: no data set here: it must hold the folders train/ and test/ (or base/ and "
            "novel/), and may hold val/ (or valid/, validation/), with one folder of images per "
            "class in each; or one folder of images per class, and --data.splits names the split; "
            "docs/data.md has all layouts"
        )
    if "" in found.classes:
        return _divide(root, found, wanted, strict)
    return _as_found(root, found, wanted, strict)


def _no_folder(root: Path) -> str:
    if str(root) in _MADE:
        return f"{root}: comes with dvla-fast, and has no folder to read; --data.dataset takes it"
    if root.is_file():
        return f"{root}: is a file; extract the archive first and give its folder"
    return (
        f"{root}: no such folder; give 'digits' or the root of a data set with the folders "
        "train/, val/, test/ (or base/, val/, novel/), one folder per class in each; docs/data.md "
        "has all layouts"
    )


def class_folders(folder: Path) -> dict[str, References]:
    """Map class folders to their images; folders named like ``.cache`` are none.

    Names are in Unicode's composed form (NFC), whatever the file system made of them.

    Raises:
        DataError: two folders have one name in that form.
    """
    found: dict[str, References] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith((".", "__")):
            name = composed(path.name)
            if name in found:
                raise DataError(
                    f"{folder}: two folders are called {name!r}, in different Unicode forms; "
                    "rename or merge them"
                )
            found[name] = sorted(item for item in path.iterdir() if is_image(item))
    return found


def _split_paths(folder: Path, suffix: str = "") -> dict[str, Path] | None:
    """The folder (or file with that suffix) of each split; None without those of train and test.

    Raises:
        DataError: two of validation classes.
    """
    there: Callable[[Path], bool] = Path.is_file if suffix else Path.is_dir
    for train, test in _SPLIT_NAMES:
        paths = {"train": folder / f"{train}{suffix}", "test": folder / f"{test}{suffix}"}
        if not all(map(there, paths.values())):
            continue
        wanted = {f"{name}{suffix}" for name in _VAL_NAMES}
        val = sorted(p for p in folder.iterdir() if p.name.casefold() in wanted and there(p))
        if len(val) > 1:
            raise DataError(
                f"{val[0]} and {val[1]}: both are called like validation classes; merge them, or "
                "rename the one that is something else"
            )
        if val:
            paths["val"] = val[0]
        return {split: paths[split] for split in SPLITS if split in paths}
    return None


def _split_folders(root: Path) -> Found | None:
    folders = _split_paths(root)
    if folders is None:
        return None
    classes = {split: class_folders(folder) for split, folder in folders.items()}
    for split, folder in folders.items():
        if not classes[split]:
            raise DataError(
                f"{folder}: no class folders; it must hold one folder of images per class"
            )
    where = {split: str(folder) for split, folder in folders.items()}
    names = "/, ".join(folder.name for folder in folders.values())
    return Found(f"folders {names}/", dict(classes), where=where)


def _class_folder_root(root: Path) -> Found | None:
    for name in ("Images", "images", "train", "."):
        folder = root / name
        if folder.is_dir():
            classes = {key: items for key, items in class_folders(folder).items() if items}
            if len(classes) >= 2:
                return Found("class folders", {"": classes}, where={"": str(folder)})
    return None


def _list_files(root: Path, suffix: str) -> dict[str, Path] | None:
    """The list file of each split that has one; None without those of train and test."""
    for folder in (root, root / "split", root / "splits"):
        paths = _split_paths(folder, suffix)
        if paths is not None:
            return paths
    return None


def _csv_lists(root: Path) -> Found | None:
    """``train.csv`` with the columns filename,label (Ravi and Larochelle; DN4; FEAT)."""
    files = _list_files(root, ".csv")
    if files is None:
        return None
    rows = {split: _csv_rows(path) for split, path in files.items()}
    where = {split: str(path) for split, path in files.items()}
    classes = _resolve(root, rows, files)
    return Found("CSV lists over a folder of images", classes, where=where)


def _csv_rows(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            lines = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no list in UTF-8 ({error}); save it as UTF-8") from error
    if lines and lines[0][:2] == ["filename", "label"]:
        lines = lines[1:]
    bad = next((row for row in lines if not all(map(_is_name, (*row, "")[:2]))), None)
    if bad is not None or not lines:
        got = f"{bad!r:.200}" if bad else "none"
        raise DataError(f"{path}: expected lines of filename,label, got {got}")
    return [(row[0], row[1]) for row in lines]


def _is_name(text: str) -> bool:
    return (
        bool(text.strip())
        and all(len(part.encode("utf-8", "replace")) <= 255 for part in text.split("/"))
        and len(text) <= 2000
    )


def _json_lists(root: Path) -> Found | None:
    """``base.json`` with label_names, image_names, image_labels (A Closer Look; FWT)."""
    files = _list_files(root, ".json")
    if files is None:
        return None
    rows = {split: _json_rows(path) for split, path in files.items()}
    where = {split: str(path) for split, path in files.items()}
    return Found("JSON lists of images", _resolve(root, rows, files), where=where)


def _json_rows(path: Path) -> list[tuple[str, str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        labels, numbers = content["label_names"], content["image_labels"]
        images = content["image_names"]
        if not all(isinstance(items, list) for items in (labels, numbers, images)):
            raise TypeError("one of them is no list")
        if not all(isinstance(name, str) and _is_name(name) for name in (*labels, *images)):
            raise TypeError("a name is no text, empty or longer than a path can be")
        if not numbers or min(numbers) < 0:
            raise ValueError("no images, or a negative label")
        return [(image, labels[label]) for image, label in zip(images, numbers, strict=True)]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(
            f"{path}: expected the lists label_names, image_names and image_labels "
            f"({error!r}); make it again with the script that made it"
        ) from error


def _resolve(
    root: Path, rows: Mapping[str, list[tuple[str, str]]], files: Mapping[str, Path]
) -> dict[str, Mapping[str, References]]:
    """Find the listed files: as named, under root, under images/, or in their class's folder."""
    first, label = next(iter(rows.values()))[0]
    forms: list[Callable[[str, str], Path]] = [
        lambda name, _: root / name,  # an absolute name stays as it is
        lambda name, _: root / "images" / name,
        lambda name, label: root / label / name,
        lambda name, label: root / "images" / label / name,
    ]
    form = next((form for form in forms if form(first, label).is_file()), forms[1])
    classes: dict[str, dict[str, list[Path]]] = {}
    missing: list[Path] = []
    seen: dict[str, str] = {}  # by the path without its detours
    for split, pairs in rows.items():
        classes[split] = {}
        for name, label in pairs:
            path = within(root, form(name, label), files[split])
            place = f"{split}, class {label!r}"
            known = os.path.normpath(path)
            if known in seen:
                raise DataError(
                    f"{path}: listed in {seen[known]} and again in {place}; keep one of the lines"
                )
            seen[known] = place
            if not path.is_file():
                missing.append(path)
            classes[split].setdefault(composed(label), []).append(path)
    if missing:
        raise DataError(
            f"{missing[0]}: listed, but not there ({len(missing)} of {len(seen)} listed images are "
            "missing); restore the images, or correct the lists"
        )
    return dict(classes)


_RECOGNISERS: tuple[Callable[[Path], Found | None], ...] = (
    *archives.RECOGNISERS,
    _csv_lists,
    _json_lists,
    _split_folders,
    _class_folder_root,
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
    divided = Found(found.layout, by_split, arrays, where=where)
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
        classes = found.classes.get(split)
        if not classes:
            continue
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
        )
    return Listing(root, found.layout, splits, known, missing, ignored)


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
