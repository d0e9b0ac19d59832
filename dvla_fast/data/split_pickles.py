"""Data sets published as pickles, one a split: miniImageNet, CIFAR-FS, FC100, tieredImageNet.

The layouts follow the public programs that read them: kjunelee/MetaOptNet (``data/``) for CIFAR-FS,
FC100 and miniImageNet, renmengye/few-shot-ssl-public (``fewshot/data/tiered_imagenet.py`` and
``compress_tiered_imagenet.py``) for tieredImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvla_fast.data.listing import Found, References
from dvla_fast.data.pickles import load_pickle
from dvla_fast.data.png_images import PngImages
from dvla_fast.data.splits import SPLITS, load_split_list
from dvla_fast.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_THREE = dict(zip(SPLITS, SPLITS))
# File name of each data set, and what a split is called in it.
_FORMS = {
    "mini-imagenet-cache-{}.pkl": ("miniImageNet", _THREE),
    "miniImageNet_category_split_{}.pickle": (
        "miniImageNet",
        {"train": "train_phase_train", "val": "val", "test": "test"},
    ),
    "CIFAR_FS_{}.pickle": ("CIFAR-FS", _THREE),
    "FC100_{}.pickle": ("FC100", _THREE),
}
_TIERED = ("{}_images_png.pkl", "{}_images.npz")


def pickles_here(root: Path) -> bool:
    """Tell by their names alone whether a folder holds pickles of a data set known here."""
    names = [form.format(part) for form, (_, parts) in _FORMS.items() for part in parts.values()]
    names += [form.format(split) for form in _TIERED for split in SPLITS]
    return any((root / name).is_file() for name in names)


def pickled_splits(root: Path) -> Found | None:
    """One pickle a split: miniImageNet, CIFAR-FS, FC100.

    ``mini-imagenet-cache-{train,val,test}.pkl`` hold image_data and class_dict;
    MetaOptNet's ``miniImageNet_category_split_*.pickle``, ``CIFAR_FS_*.pickle`` and
    ``FC100_*.pickle`` data (N, H, W, 3), labels (N), and catname2label, label2catname or neither.
    """
    for form, (name, parts) in _FORMS.items():
        files = {split: root / form.format(part) for split, part in parts.items()}
        if files["train"].is_file() or files["test"].is_file():
            return _one_a_split(name, files)
    return None


def _one_a_split(name: str, files: Mapping[str, Path]) -> Found:
    found = Found(f"{name} pickles", {}, reduced=name == "miniImageNet", file_order=False)
    for split, path in files.items():
        if not path.is_file():
            raise DataError(f"{path}: missing beside the other splits' pickles; restore it")
        found.arrays[split], found.classes[split] = _pickled(path, name)
        found.where[split] = str(path)
    return found


def _pickled(path: Path, name: str) -> tuple[Any, dict[str, References]]:
    content = load_pickle(path)
    try:
        if "image_data" in content:
            array = np.asarray(content["image_data"])
            classes: dict[str, References] = {
                str(key): [int(i) for i in rows] for key, rows in content["class_dict"].items()
            }
        else:
            array = np.asarray(content["data"])
            classes = _by_label(np.asarray(content["labels"]), _label_names(content), len(array))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: not a {name} pickle ({error!r}); get it again") from error
    _check_images(path, array)
    if any(
        isinstance(row, Path) or not 0 <= row < len(array)
        for rows in classes.values()
        for row in rows
    ):
        raise DataError(f"{path}: class_dict points outside the {len(array)} images; get it again")
    return array, dict(sorted(classes.items()))


def _check_images(path: Path, array: NDArray[Any]) -> None:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise DataError(
            f"{path}: images must be uint8 (N, H, W, 3), got {array.dtype} "
            f"{array.shape}; get it again"
        )


def _label_names(content: Mapping[str, Any]) -> dict[int, str]:
    """Names by label, from either of the two tables that the pickles carry; or nothing."""
    if content.get("catname2label"):
        return {int(label): str(key) for key, label in content["catname2label"].items()}
    table = content.get("label2catname")
    if isinstance(table, Mapping):
        return {int(label): str(key) for label, key in table.items()}
    return dict(enumerate(map(str, table))) if table is not None else {}


def _by_label(labels: NDArray[Any], names: Mapping[int, str], images: int) -> dict[str, References]:
    """Rows by class; a class without a name is called after its label."""
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise ValueError(f"{images} images, but labels {labels.dtype} {labels.shape}")
    found: dict[str, References] = {}
    for label in np.unique(labels).tolist():
        key = names.get(label, f"class {label}")
        if key in found:
            raise ValueError(f"two labels are called {key!r}")
        found[key] = np.flatnonzero(labels == label).tolist()
    return found


def tiered_imagenet_pickles(root: Path) -> Found | None:
    """tieredImageNet of 84 pixels: ``{train,val,test}_images_png.pkl`` (or ``_images.npz``).

    Beside ``*_labels.pkl``. The first holds PNG files, N arrays of uint8. The second is what Ren et
    al.'s own program unpacks of them: images (N, 84, 84, 3) in OpenCV's order of channels, blue
    first, which is turned here. Labels are label_specific with label_specific_str, or MetaOptNet's
    labels, without names.
    """
    where: dict[str, Path] = {}
    for split in SPLITS:
        for form in _TIERED:
            if (root / form.format(split)).is_file():
                where.setdefault(split, root / form.format(split))
    if not where or not all((root / f"{split}_labels.pkl").is_file() for split in where):
        return None
    if set(where) != set(SPLITS):
        absent = next(split for split in SPLITS if split not in where)
        raise DataError(f"{root / f'{absent}_images_png.pkl'}: missing beside the other splits'")
    found = Found("tieredImageNet pickles", {}, reduced=True, file_order=False)
    for split, path in where.items():
        array = _unpacked(path) if path.suffix == ".npz" else _png_images(path)
        labels = root / f"{split}_labels.pkl"
        content = load_pickle(labels)
        try:
            table = content["label_specific" if "label_specific" in content else "labels"]
            names = content.get("label_specific_str")
            named = {} if names is None else dict(enumerate(map(str, names)))
            classes = _by_label(np.asarray(table), named, len(array))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(
                f"{labels}: no labels of tieredImageNet ({error!r}); get it again"
            ) from error
        found.arrays[split], found.classes[split] = array, classes
        found.where[split] = str(path)
    keys = _wordnet_ids(found)
    found.classes = {
        split: {keys.get((split, key), key): rows for key, rows in classes.items()}
        for split, classes in found.classes.items()
    }
    return found


def _wordnet_ids(found: Found) -> dict[tuple[str, str], str]:
    """WordNet ids of names, if every name is one of the published split's; else nothing."""
    known = load_split_list("tieredimagenet")
    result = {}
    for split, classes in found.classes.items():
        ids: dict[str, list[str]] = {}
        for wnid in known.splits[split]:
            ids.setdefault(known.names[wnid].casefold(), []).append(wnid)
        for key in classes:
            fitting = ids.get(key.split(",")[0].strip().casefold(), [])
            if len(fitting) != 1:
                return {}
            result[split, key] = fitting[0]
    return result if len(set(result.values())) == len(result) else {}


def _unpacked(path: Path) -> Any:
    try:
        with np.load(path, allow_pickle=False) as content:
            array = content["images"]
    except Exception as error:  # numpy raises nearly anything on damaged files
        raise DataError(f"{path}: no array 'images' to read ({error}); get it again") from error
    _check_images(path, array)
    return array[..., ::-1]


def _png_images(path: Path) -> PngImages:
    content = load_pickle(path)
    if not isinstance(content, list | tuple) or not content:
        raise DataError(f"{path}: not a list of PNG images; get it again")
    return PngImages(path, content)
