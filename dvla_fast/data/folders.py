"""Data sets that are folders: one a split, or one a class, which a split list divides."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dvla_fast.data.decode import is_image
from dvla_fast.data.listing import Found, References
from dvla_fast.data.splits import SPLITS
from dvla_fast.errors import DataError
from dvla_fast.names import composed

# Names of training and test classes, as people call them; the first pair that is there counts.
_MIXED = (("train", "novel"), ("base", "test"))
_SPLIT_NAMES = (("train", "test"), ("base", "novel"), *_MIXED)
_VAL_NAMES = ("val", "valid", "validation")
_KNOWN = frozenset((*_VAL_NAMES, *(name for pair in _SPLIT_NAMES for name in pair)))


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Name the file or folder that may not be read, and what to do about it (DataError)."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or place}: cannot be read ({error.strerror or error}); get the right "
            "to read it and to enter its folder (chmod u+rx, where they are yours), or move it "
            "elsewhere"
        ) from error


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted; those named like ``.cache`` or ``__MACOSX`` are none."""
    with reading(folder):
        inside = [path for path in folder.iterdir() if not path.name.startswith((".", "__"))]
        return sorted(path for path in inside if path.is_dir())


def class_folders(folder: Path) -> dict[str, References]:
    """Map class folders to their images; folders named like ``.cache`` are none.

    Names are in Unicode's composed form (NFC), whatever the file system made of them.

    Raises:
        DataError: two folders have one name in that form, or one cannot be read.
    """
    found: dict[str, References] = {}
    for path in visible_folders(folder):
        name = composed(path.name)
        if name in found:
            raise DataError(
                f"{folder}: two folders are called {name!r}, in different Unicode forms; "
                "rename or merge them"
            )
        with reading(path):
            # by their names, before paths are made of them: there may be a million
            found[name] = [path / item for item in sorted(filter(is_image, os.listdir(path)))]
    return found


def split_paths(folder: Path, suffix: str = "") -> dict[str, Path] | None:
    """The folder (or file with that suffix) of each split; None without those of train and test.

    Raises:
        DataError: two of one split.
    """
    there: Callable[[Path], bool] = Path.is_file if suffix else Path.is_dir
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name.casefold()
        if name.endswith(suffix) and name.removesuffix(suffix) in _KNOWN and there(path):
            found.setdefault(name.removesuffix(suffix), []).append(path)
    for train, test in _SPLIT_NAMES:
        if not (train in found and test in found):
            continue
        val = [path for name in _VAL_NAMES for path in found.get(name, ())]
        paths = {"train": found[train], "val": val, "test": found[test]}
        for split, word in zip(SPLITS, ("training", "validation", "test")):
            if len(paths[split]) > 1:
                raise DataError(
                    f"{' and '.join(map(str, paths[split]))}: all are called like {word} classes; "
                    "merge them, or rename what is something else"
                )
        return {split: paths[split][0] for split in SPLITS if paths[split]}
    return None


def split_folders(root: Path, listed: bool = False) -> Found | None:
    """``train/`` and ``test/``, with one folder a class in each.

    Args:
        listed: a split list is named: where the images of ``test/`` are in no class folders
            (ImageNet, Places), it divides the classes of ``train/``.

    Raises:
        DataError: a folder without class folders, that is not such a one.
    """
    folders = split_paths(root)
    if folders is None:
        return None
    classes = {split: class_folders(folder) for split, folder in folders.items()}
    flat = [folder for split, folder in folders.items() if not classes[split]]
    if listed and classes["train"] and not classes["test"]:
        filled = {key: items for key, items in classes["train"].items() if items}
        return Found("class folders", {"": filled}, where={"": str(folders["train"])})
    if flat:
        if (folders["train"].name.casefold(), folders["test"].name.casefold()) in _MIXED:
            return None  # two classes that are called so
        raise DataError(
            f"{flat[0]}: no class folders; it must hold one folder of images per class, or "
            "--data.splits names a list that divides the classes of the training folder"
        )
    where = {split: str(folder) for split, folder in folders.items()}
    names = "/, ".join(folder.name for folder in folders.values())
    return Found(f"folders {names}/", dict(classes), where=where)


def class_folder_root(root: Path) -> Found | None:
    """Class folders in ``images/``, in ``train/`` or in the root; a split list divides them."""
    inside = [path for path in sorted(root.iterdir()) if path.is_dir()]
    named = [
        path for name in ("images", "train") for path in inside if path.name.casefold() == name
    ]
    for folder in (*named, root):
        classes = {key: items for key, items in class_folders(folder).items() if items}
        if len(classes) >= 2:
            return Found("class folders", {"": classes}, where={"": str(folder)})
    return None


def _raise(error: OSError) -> None:
    raise error


def letter_folders(root: Path) -> Found | None:
    """Places as published: class folders below their first letter, ``data_256/f/field/wild/``.

    The class is ``field-wild``, as in the other packing and in the split list.
    """
    for top in (root / "data_256", root / "data_large", root):
        letters = visible_folders(top) if top.is_dir() else []
        if len(letters) < 2 or any(len(letter.name) > 1 for letter in letters):
            continue
        classes: dict[str, References] = {}
        for letter in letters:
            for place, _, names in os.walk(letter, onerror=_raise):
                images = sorted(path for name in names if is_image(path := Path(place, name)))
                if images and place != str(letter):
                    key = "-".join(Path(place).relative_to(letter).parts)
                    classes[composed(key)] = images
        if len(classes) >= 2:
            classes = dict(sorted(classes.items()))
            return Found("class folders by their letters", {"": classes}, where={"": str(top)})
    return None
