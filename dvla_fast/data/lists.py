"""Data sets that are CSV or JSON lists, one for each split, over a folder of images."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvla_fast.data.decode import is_image
from dvla_fast.data.folders import class_folders, split_paths, visible_folders
from dvla_fast.data.listing import Found, not_there, within
from dvla_fast.errors import DataError
from dvla_fast.names import composed

# Names of columns, in any case, with or without "_"; the first of them that a list has is read.
_FILE_COLUMNS = ("filename", "file", "image", "imagename", "path", "img")
_LABEL_COLUMNS = ("label", "class", "classname", "wnid", "category", "target")
_EXPECTED = (
    "expected a first line with the names of the columns (one of filename, file, image, "
    "image_name, path, img and one of label, class, class_name, wnid, category, target), or lines "
    "of filename,label alone"
)
_SEPARATORS = ",;\t"
_SPACES: Any = {"skipinitialspace": True}  # a quote may follow one

_Rows = Mapping[str, Sequence[tuple[str, str]]]  # split -> file and class of each line


def _list_files(root: Path, suffix: str) -> dict[str, Path] | None:
    """The list file of each split that has one; None without those of train and test."""
    for folder in (root, root / "split", root / "splits"):
        paths = split_paths(folder, suffix)
        if paths is not None:
            return paths
    return None


def csv_lists(root: Path) -> Found | None:
    """``train.csv`` with columns of files and classes (Ravi and Larochelle; DN4; FEAT).

    Raises:
        DataError: no text in UTF-8, a line without a file and a class, or columns nobody named.
    """
    files = _list_files(root, ".csv")
    if files is None:
        return None
    tables = {split: _csv_table(path) for split, path in files.items()}
    rows = {split: rows for split, (_, rows) in tables.items()}
    images = _Images(root, rows, files)
    for split, (named, pairs) in tables.items():
        name, label = pairs[0]
        if not (named or is_image(Path(name)) or images.find(split, name, label).is_file()):
            if split_paths(root) is not None:
                return None  # the splits are folders, and the tables say something else of them
            raise DataError(
                f"{files[split]}: its first line ({name!r:.100}, {label!r:.100}) names no columns "
                f"known here and no file; {_EXPECTED}"
            )
    return _resolve("CSV lists over a folder of images", rows, images)


def _csv_table(path: Path) -> tuple[bool, list[tuple[str, str]]]:
    """Whether the first line names the columns; and file and class of each other line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            text = stream.read()
        first = next((line for line in text.splitlines() if line.strip()), "")
        separator, columns = _form_of(first)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, **_SPACES)
        lines = [(reader.line_num, [field.strip() for field in row]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no list in UTF-8 ({error}); save it as UTF-8") from error
    lines = [line for line in lines if any(line[1])][1 if columns else 0 :]
    if not lines:
        raise DataError(f"{path}: lists no image; {_EXPECTED}")
    file, label = columns or (0, 1)
    for number, row in lines:
        if len(row) <= max(file, label) or not (_is_name(row[file]) and _is_name(row[label])):
            raise DataError(
                f"{path}, line {number}: expected a file in column {file + 1} and its class in "
                f"column {label + 1}, got {row!r:.200}; {_EXPECTED}"
            )
    return columns is not None, [(row[file], row[label]) for _, row in lines]


def _form_of(first: str) -> tuple[str, tuple[int, int] | None]:
    """Separator of a list, by its first line, and the columns that this line names, if it does."""
    fields = {
        mark: next(csv.reader([first], delimiter=mark, **_SPACES), []) for mark in _SEPARATORS
    }
    for mark, names in fields.items():
        columns = _columns(names)
        if columns is not None:
            return mark, columns
    return next((mark for mark, parts in fields.items() if len(parts) > 1), ","), None


def _columns(names: Sequence[str]) -> tuple[int, int] | None:
    """Where a line names a column of files and one of classes, as known here; else None."""
    plain = [re.sub(r"[\W_]", "", name).casefold() for name in names]
    file = next((plain.index(name) for name in _FILE_COLUMNS if name in plain), None)
    label = next((plain.index(name) for name in _LABEL_COLUMNS if name in plain), None)
    return None if file is None or label is None else (file, label)


def class_lists(root: Path) -> Found | None:
    """``data/`` of class folders, divided by ``splits/NAME/train.txt``, a class a line (CIFAR-FS).

    Raises:
        DataError: several such splits, or a list that is no text in UTF-8 or empty.
    """
    data, splits = root / "data", root / "splits"
    if not (data.is_dir() and splits.is_dir()):
        return None
    places = {folder: split_paths(folder, ".txt") for folder in (splits, *visible_folders(splits))}
    lists = {folder: files for folder, files in places.items() if files}
    if len(lists) > 1:
        raise DataError(
            f"{splits}: holds {len(lists)} splits ({', '.join(folder.name for folder in lists)}); "
            f"keep one, or give the folder {data} and name a split list with --data.splits"
        )
    for files in lists.values():
        there = class_folders(data)
        classes = {
            split: {key: there.get(key, []) for key in _class_names(path)}
            for split, path in files.items()
        }
        where = {split: str(path) for split, path in files.items()}
        return Found("class folders and lists of classes", dict(classes), where=where)
    return None


def _class_names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no list in UTF-8 ({error}); save it as UTF-8") from error
    names = [composed(line.strip()) for line in lines if line.strip()]
    if not names:
        raise DataError(f"{path}: lists no class; expected the name of a class folder on each line")
    return names


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
    return _resolve("JSON lists of images", rows, _Images(root, rows, files))


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


class _Images:
    """Finds listed files: below the data set's folder, images/, data/ or the list's own folder.

    In these, or in their class's folder there: whichever place holds any of them is that of all.
    """

    def __init__(self, root: Path, rows: _Rows, files: Mapping[str, Path]) -> None:
        self.root, self.files = root, files
        self.stems: dict[Path, dict[str, list[Path]]] = {}
        shared = (root, root / "images", root / "data")
        self.bases = {split: (*shared, path.parent) for split, path in files.items()}
        self.form = self._first_form(rows)

    def _first_form(self, rows: _Rows) -> tuple[int, bool]:
        """Which of the bases, and whether a folder of the class follows; images/ if none fits."""
        forms = [(base, in_class) for in_class in (False, True) for base in range(4)]
        for split, pairs in rows.items():
            for name, label in pairs:
                for form in forms:
                    if self._path(split, name, label, form).is_file():
                        return form
        return 1, False

    def find(self, split: str, name: str, label: str) -> Path:
        """Return the file's path, be it there or not.

        Raises:
            DataError: it leads out of the data set's folder, or several files fit.
        """
        return within(self.root, self._path(split, name, label, self.form), self.files[split])

    def _path(self, split: str, name: str, label: str, form: tuple[int, bool]) -> Path:
        base = self.bases[split][form[0]]  # an absolute name stays as it is
        name = name.replace("\\", "/")  # as Windows writes them
        path = base / label / name if form[1] else base / name
        if is_image(path) or path.is_file():
            return path
        alike = self._alike(path)
        if len(alike) > 1:
            raise DataError(
                f"{self.files[split]}: names {name!r} without an ending, and {alike[0]} and "
                f"{alike[1]} are both there; write the ending"
            )
        return alike[0] if alike else path

    def _alike(self, path: Path) -> list[Path]:
        """The image files called so but for their ending."""
        folder = path.parent
        if folder not in self.stems:
            stems = self.stems[folder] = {}
            for item in sorted(folder.iterdir()) if folder.is_dir() else ():
                if is_image(item):
                    stems.setdefault(item.stem, []).append(item)
        return self.stems[folder].get(path.name, [])


def _resolve(layout: str, rows: _Rows, images: _Images) -> Found:
    """Find the listed files. Those that are not there are listed all the same, as absent.

    Raises:
        DataError: a file listed twice, or as ``_Images.find``.
    """
    classes: dict[str, dict[str, list[Path]]] = {}
    absent: dict[Path, Path] = {}
    seen: dict[str, str] = {}  # by the path without its detours
    for split, pairs in rows.items():
        classes[split] = {}
        for name, label in pairs:
            path = images.find(split, name, label)
            place = f"{split}, class {label!r}"
            known = os.path.normpath(path)
            if known in seen:
                raise DataError(
                    f"{path}: listed in {seen[known]} and again in {place}; keep one of the lines"
                )
            seen[known] = place
            classes[split].setdefault(composed(label), []).append(path)
        listed = (path for paths in classes[split].values() for path in paths)
        absent |= not_there(listed, images.files[split])
    where = {split: str(path) for split, path in images.files.items()}
    remedy = "restore the images, or correct the lists"
    return Found(layout, dict(classes), where=where, absent=absent, remedy=remedy)
