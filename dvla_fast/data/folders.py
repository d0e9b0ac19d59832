"""Data sets that are folders: one a split, or one a class, which a split list divides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dvla_fast.data.decode import is_image
from dvla_fast.data.listing import Found, References
from dvla_fast.data.splits import SPLITS, composed
from dvla_fast.errors import DataError

# Names of training and test classes, as people call them; those of validation in any case.
_SPLIT_NAMES = (("train", "test"), ("base", "novel"))
_VAL_NAMES = ("val", "valid", "validation")


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


def split_paths(folder: Path, suffix: str = "") -> dict[str, Path] | None:
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


def split_folders(root: Path) -> Found | None:
    folders = split_paths(root)
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


def class_folder_root(root: Path) -> Found | None:
    for name in ("Images", "images", "train", "."):
        folder = root / name
        if folder.is_dir():
            classes = {key: items for key, items in class_folders(folder).items() if items}
            if len(classes) >= 2:
                return Found("class folders", {"": classes}, where={"": str(folder)})
    return None
