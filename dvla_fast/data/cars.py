"""Stanford Cars as published, and as it is copied since: both packings, in whichever folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dvla_fast.data.listing import EXTRACT, Found, within
from dvla_fast.errors import DataError, MissingDependencyError

# Where the tables lie: as published, as copied, and taken out of their folder.
_TABLES = ("devkit", "car_devkit/devkit", "car_devkit", ".")


@dataclass(frozen=True)
class _Image:
    """One line of a table: an image, its class counted from 1, whether it is of the test part."""

    path: Path
    label: int
    test: bool


@dataclass(frozen=True)
class _Packing:
    """What one set of tables says; ``absent`` are its images that are not there."""

    names: list[str]
    images: list[_Image]
    absent: dict[Path, Path]

    @property
    def share(self) -> float:
        return 1 - len(self.absent) / len(self.images)


def stanford_cars(root: Path) -> Found | None:
    """Stanford Cars (Krause et al., 2013): cars_train/, cars_test/ and devkit/, or car_ims/.

    The older packing has ``car_ims/`` and ``cars_annos.mat``. Of the newer one, cars_test/ counts
    only with ``cars_test_annos_withlabels.mat``: the devkit's own file has no labels. Where the
    tables of both are there, the packing counts of which more of the images are.

    Raises:
        DataError: damaged tables, or images outside of ``root``.
        MissingDependencyError: scipy is not installed.
    """
    read: list[Callable[[Path], _Packing | None]] = [_merged, _devkit]
    packings = [packing for form in read if (packing := form(root)) is not None]
    if not packings:
        return None
    packing = max(packings, key=lambda packing: packing.share)
    classes: dict[str, list[Path]] = {name: [] for name in packing.names}
    for image in packing.images:
        classes[packing.names[image.label - 1]].append(image.path)
    incomplete = "labels of cars_test/, cars_test_annos_withlabels.mat, are not here"
    return Found(
        "Stanford Cars as published",
        {"": classes},
        parts={"cars_train": frozenset(image.path for image in packing.images if not image.test)},
        where={"": str(root)},
        incomplete="" if any(image.test for image in packing.images) else incomplete,
        absent=packing.absent,
        remedy=EXTRACT,
    )


def _merged(root: Path) -> _Packing | None:
    """``cars_annos.mat`` over ``car_ims/``, which is part of the names in it."""
    table = _table(root, "cars_annos.mat")
    if table is None:
        return None
    content = _mat(table)
    names = _class_list(table, content, "class_names")
    rows = _annotations(table, content, ("relative_im_path", "class", "test"))
    bases = (root, root / "car_ims")
    return _packing(root, names, [(table, bases, rows)])


def _devkit(root: Path) -> _Packing | None:
    """``cars_meta.mat`` and a table for each of ``cars_train/`` and ``cars_test/``."""
    meta = _table(root, "cars_meta.mat")
    if meta is None:
        return None
    names = _class_list(meta, _mat(meta), "class_names")
    train = _table(root, "cars_train_annos.mat") or meta.with_name("cars_train_annos.mat")
    parts = [("cars_train", train, 0)]
    test = _table(root, "cars_test_annos_withlabels.mat")
    if test is not None:
        parts.append(("cars_test", test, 1))
    listed = []
    for part, table, number in parts:
        rows = _annotations(table, _mat(table), ("fname", "class"))
        bases = (root / part, root / part / part)
        listed.append((table, bases, [(*row, number) for row in rows]))
    return _packing(root, names, listed)


def _table(root: Path, name: str) -> Path | None:
    places = (root / folder / name for folder in _TABLES)
    return next((path for path in places if path.is_file()), None)


def _packing(
    root: Path,
    names: list[str],
    listed: Sequence[tuple[Path, Sequence[Path], Sequence[tuple[Any, ...]]]],
) -> _Packing:
    """Find the images of tables: (table, folders they may lie in, rows of name, class, test)."""
    images, absent = [], {}
    for table, bases, rows in listed:
        # where any of them lies
        base = next((base for row in rows for base in bases if (base / row[0]).is_file()), bases[0])
        for name, label, test in rows:
            path = within(root, base / name, table)
            if not 1 <= label <= len(names):
                raise DataError(f"{table}: class {label} of {name} is unknown; get the file again")
            if not path.is_file():
                absent[path] = table
            images.append(_Image(path, label, bool(test)))
    return _Packing(names, images, absent)


def _mat(path: Path) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: reading .mat files needs scipy, which is not installed; run "
            "pip install 'dvla-fast[train]'"
        ) from error
    try:
        return loadmat(path, squeeze_me=True, struct_as_record=True)
    except Exception as error:
        raise DataError(f"{path}: cannot read this .mat file ({error}); get it again") from error


def _class_list(path: Path, content: dict[str, Any], key: str) -> list[str]:
    if key not in content:
        raise DataError(f"{path}: holds no {key!r}; get the devkit again")
    return [str(name) for name in np.atleast_1d(content[key])]


def _annotations(
    path: Path, content: dict[str, Any], fields: Sequence[str]
) -> list[tuple[Any, ...]]:
    table = np.atleast_1d(content.get("annotations", np.empty(0)))
    if not len(table) or not set(fields) <= set(table.dtype.names or ()):
        raise DataError(
            f"{path}: its annotations lack {', '.join(fields)}; the file with labels is needed"
        )
    try:
        return [(str(row[fields[0]]), *(int(row[field]) for field in fields[1:])) for row in table]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: damaged annotations ({error}); get the file again") from error
