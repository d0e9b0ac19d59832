"""Data sets as their publishers pack them, extracted: recognised by the files that name them.

Each recogniser takes a folder and returns what it found, or None when the folder is another layout.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dvla_fast.data.cars import stanford_cars
from dvla_fast.data.decode import is_image
from dvla_fast.data.listing import EXTRACT, Found, not_there, within
from dvla_fast.data.pickles import load_pickle
from dvla_fast.data.split_pickles import pickled_splits, tiered_imagenet_pickles
from dvla_fast.data.splits import load_split_list
from dvla_fast.errors import DataError


def _inside(root: Path, name: str, marks: Sequence[str]) -> Path | None:
    """Return root, or its folder ``name``, if it holds all the marks."""
    for folder in (root, root / name):
        if all((folder / mark).exists() for mark in marks):
            return folder
    return None


def _lines(path: Path) -> list[list[str]]:
    """Read lines of a number and a text, as CUB-200-2011 writes all of its tables."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no text in UTF-8 ({error}); extract it again") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split(maxsplit=1)
        if len(fields) != 2:
            raise DataError(
                f"{path}, line {number}: expected two fields, got {line!r}; extract it again"
            )
        rows.append(fields)
    return rows


def cub(root: Path) -> Found | None:
    """CUB_200_2011 (Wah et al., 2011): images.txt, image_class_labels.txt, classes.txt, images/."""
    marks = ("images.txt", "image_class_labels.txt", "classes.txt")
    folder = _inside(root, "CUB_200_2011", marks)
    if folder is None:
        return None
    names = dict(_lines(folder / "classes.txt"))
    labels = dict(_lines(folder / "image_class_labels.txt"))
    classes: dict[str, list[Path]] = {name: [] for name in names.values()}
    for number, file in _lines(folder / "images.txt"):
        key = names.get(labels.get(number, ""))
        if key is None:
            raise DataError(
                f"{folder / 'image_class_labels.txt'}: no class for image {number} ({file}); "
                "extract the archive again"
            )
        path = folder / "images" / file
        classes[key].append(within(folder, path, folder / "images.txt"))
    listed = (path for paths in classes.values() for path in paths)
    return Found(
        "CUB_200_2011 as published",
        {"": classes},
        where={"": str(folder)},
        absent=not_there(listed, folder / "images.txt"),
        remedy=EXTRACT,
    )


def cifar100(root: Path) -> Found | None:
    """CIFAR-100, python version (Krizhevsky, 2009): the pickles train, test and meta."""
    folder = _inside(root, "cifar-100-python", ("train", "test", "meta"))
    if folder is None or not (folder / "meta").is_file():
        return None
    meta = load_pickle(folder / "meta")
    arrays, labels, files = [], [], []
    for part in ("train", "test"):
        content = load_pickle(folder / part)
        try:
            arrays.append(np.asarray(content["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(content["fine_labels"], dtype=np.int64))
            names = [str(name) for name in meta["fine_label_names"]]
            files += [str(name) for name in content.get("filenames", ())]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{folder / part}: not a CIFAR-100 pickle ({error}); download the python version"
            ) from error
        known = (labels[-1] >= 0) & (labels[-1] < len(names))
        if len(known) != len(arrays[-1]) or not known.all():
            raise DataError(f"{folder / part}: images and labels disagree; download it again")
    array = np.concatenate(arrays).transpose(0, 2, 3, 1)  # (60000, 32, 32, 3)
    target = np.concatenate(labels)
    named = len(files) == len(target)  # as the pickles are published; folders are made from them
    rows = sorted(range(len(target)), key=files.__getitem__ if named else None)
    classes: dict[str, list[int]] = {name: [] for name in names}
    for row in rows:
        classes[names[target[row]]].append(row)
    return Found(
        "CIFAR-100 python pickles", {"": classes}, {"": array}, where={"": str(folder)},
        file_order=named,
    )  # fmt: skip


def chestx(root: Path) -> Found | None:
    """ChestX-ray8/14 (Wang et al., 2017): Data_Entry_2017*.csv over images*/, as BSCD-FSL uses it.

    Images with exactly one finding, of the seven classes of the benchmark (Guo et al., 2020).
    """
    tables = sorted(root.glob("Data_Entry_2017*.csv"))
    if not tables:
        return None
    wanted = load_split_list("chestx").keys
    paths = {
        path.name: path
        for folder in sorted({*root.glob("images*"), *root.glob("images*/images")})
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if is_image(path)
    }
    classes: dict[str, list[Path]] = {}
    absent: dict[Path, Path] = {}
    for name, label in _findings(tables[0]).items():
        if label not in wanted:
            continue
        path = paths.get(name)
        if path is None:  # in whichever of the folders
            path = within(root, root / "images" / name, tables[0])
            absent[path] = tables[0]
        classes.setdefault(label, []).append(path)
    return Found(
        "ChestX-ray14 table and images",
        {"": classes},
        where={"": str(root)},
        absent=absent,
        remedy=f"extract all image archives into folders images*/ of {root}",
    )


def _findings(table: Path) -> dict[str, str]:
    """Finding labels of each image of ChestX's table, in order."""
    columns = ("Image Index", "Finding Labels")
    found: dict[str, str] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if not set(columns) <= set(reader.fieldnames or ()):
                raise DataError(
                    f"{table}: expected the columns {' and '.join(columns)}; get it again"
                )
            for row in reader:
                name, label = row[columns[0]], row[columns[1]]
                if not (name and label) or name in found:
                    raise DataError(
                        f"{table}, line {reader.line_num}: expected another image and its "
                        f"findings, got {name!r} and {label!r}; get it again"
                    )
                found[name] = label
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: no table in UTF-8 ({error}); get it again") from error
    return found


RECOGNISERS: tuple[Callable[[Path], Found | None], ...] = (
    cub,
    stanford_cars,
    cifar100,
    pickled_splits,
    tiered_imagenet_pickles,
    chestx,
)
