"""Data sets that are CSV or JSON lists, one for each split, over a folder of images."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from dvla_fast.data.folders import split_paths
from dvla_fast.data.listing import Found, not_there, within
from dvla_fast.data.splits import composed
from dvla_fast.errors import DataError


def _list_files(root: Path, suffix: str) -> dict[str, Path] | None:
    """The list file of each split that has one; None without those of train and test."""
    for folder in (root, root / "split", root / "splits"):
        paths = split_paths(folder, suffix)
        if paths is not None:
            return paths
    return None


def csv_lists(root: Path) -> Found | None:
    """``train.csv`` with the columns filename,label (Ravi and Larochelle; DN4; FEAT)."""
    files = _list_files(root, ".csv")
    if files is None:
        return None
    rows = {split: _csv_rows(path) for split, path in files.items()}
    return _resolve(root, "CSV lists over a folder of images", rows, files)


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


def json_lists(root: Path) -> Found | None:
    """``base.json`` with label_names, image_names, image_labels (A Closer Look; FWT)."""
    files = _list_files(root, ".json")
    if files is None:
        return None
    rows = {split: _json_rows(path) for split, path in files.items()}
    return _resolve(root, "JSON lists of images", rows, files)


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


# Where a list's images may lie: file and class as it names them -> path.
_Form = Callable[[str, str], Path]


def _resolve(
    root: Path, layout: str, rows: Mapping[str, list[tuple[str, str]]], files: Mapping[str, Path]
) -> Found:
    """Find the listed files. Those that are not there are listed all the same, as absent.

    Raises:
        DataError: a file listed twice, or outside of the data set's folder.
    """
    form = _form(root, rows)
    classes: dict[str, dict[str, list[Path]]] = {}
    absent: dict[Path, Path] = {}
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
            classes[split].setdefault(composed(label), []).append(path)
        listed = (path for paths in classes[split].values() for path in paths)
        absent |= not_there(listed, files[split])
    where = {split: str(path) for split, path in files.items()}
    remedy = "restore the images, or correct the lists"
    return Found(layout, dict(classes), where=where, absent=absent, remedy=remedy)


def _form(root: Path, rows: Mapping[str, list[tuple[str, str]]]) -> _Form:
    """As named, under root, under images/, or in their class's folder: where any of them is."""
    images = root / "images"
    forms: list[_Form] = [
        lambda name, _: root / name,  # an absolute name stays as it is
        lambda name, _: images / name,
        lambda name, label: root / label / name,
        lambda name, label: images / label / name,
    ]
    pairs = (pair for pairs in rows.values() for pair in pairs)
    return next((form for pair in pairs for form in forms if form(*pair).is_file()), forms[1])
