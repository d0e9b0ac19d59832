"""Image-folder data sets: ``root/{train,val,test}/<class>/*.jpg`` or ``root/{base,val,novel}/...``.

Every image is decoded once, resized, centre-cropped and kept as uint8 in memory: few-shot
training reads each image many times, and decoding would otherwise dominate.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dvla_fast.data.images import FewShotData, ImageSet, channel_statistics, hold_out
from dvla_fast.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_LAYOUTS = (("train", "val", "test"), ("base", "val", "novel"))
# The usual evaluation crop: resize the short side to 256, crop the central 224.
_RESIZE_RATIO = 256 / 224


def load_image_folder(
    root: str | Path, image_size: int = 84, holdout: float = 0.25, split_seed: int = 0
) -> FewShotData:
    """Load an image-folder data set into memory.

    Where there is no ``val`` folder, ``monitor`` is a held-out share of the base images.

    Returns:
        FewShotData with uint8 images (N, 3, image_size, image_size).

    Raises:
        DataError: missing or empty folders, a class with one image only, an unreadable image,
            one class in two splits.
        MissingDependencyError: Pillow is not installed.
    """
    root = Path(root)
    base_name, val_name, novel_name = _layout(root)
    base = _load_split(root, base_name, image_size)
    novel = _load_split(root, novel_name, image_size)
    kind = "validation classes"
    if (root / val_name).is_dir():
        monitor = _load_split(root, val_name, image_size)
    else:
        kind = "held-out images of the base classes"
        if not 0 < holdout < 1:
            raise DataError(f"holdout must be between 0 and 1 (both excluded), got {holdout}")
        whole = base
        kept, held = hold_out(whole.labels, holdout, split_seed)
        base = whole.subset(kept, f"{root}/{base_name}")
        monitor = whole.subset(held, f"{root}/{base_name} (held out)")
    _check_disjoint(base, novel, "trained on and evaluated as novel")
    if kind == "validation classes":
        _check_disjoint(base, monitor, "trained on and used for validation")
        _check_disjoint(monitor, novel, "used for validation and evaluated as novel")
    mean, std = channel_statistics(base.images)
    return FewShotData(root.name, base, monitor, novel, kind, mean, std)


def _layout(root: Path) -> tuple[str, str, str]:
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; give 'digits' or the root of a data set with the folders "
            "train/, val/, test/ (or base/, val/, novel/), one folder per class in each"
        )
    for layout in _LAYOUTS:
        if (root / layout[0]).is_dir() and (root / layout[2]).is_dir():
            return layout
    raise DataError(
        f"{root}: no data set here: it must hold the folders train/ and test/ (or base/ and "
        "novel/), and may hold val/, with one folder of images per class in each"
    )


def _check_disjoint(first: ImageSet, second: ImageSet, what: str) -> None:
    shared = sorted(set(first.class_names) & set(second.class_names))
    if shared:
        raise DataError(
            f"{first.name} and {second.name} share {len(shared)} class(es) ({shared[0]!r}, ...): "
            f"they would be {what}; keep each class in one split"
        )


def _load_split(root: Path, split: str, image_size: int) -> ImageSet:
    folder = root / split
    class_dirs = sorted(path for path in folder.iterdir() if path.is_dir())
    if not class_dirs:
        raise DataError(f"{folder}: no class folders; it must hold one folder of images per class")
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_dir in enumerate(class_dirs):
        found = sorted(
            path
            for path in class_dir.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        )
        if len(found) < 2:
            raise DataError(
                f"{class_dir}: {len(found)} image(s) ({', '.join(IMAGE_SUFFIXES)}); a class needs "
                "at least 2, one to learn from and one to ask about: add images or remove the "
                "folder"
            )
        paths.extend(found)
        labels.extend([label] * len(found))
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
        arrays = list(pool.map(lambda path: _decode(path, image_size), paths))
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return ImageSet(
        f"{folder}", images, torch.tensor(labels), tuple(path.name for path in class_dirs)
    )


def _decode(path: Path, size: int) -> NDArray[np.uint8]:
    """Decode, resize the short side and crop the centre: uint8 (size, size, 3)."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError(
            "reading image folders needs Pillow, which is not installed; run "
            "pip install 'dvla-fast[train]'"
        ) from error
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise DataError(
            f"{path}: cannot read this image ({error}); replace or remove the file"
        ) from error
    scale = size * _RESIZE_RATIO / min(rgb.size)
    width, height = (max(size, round(side * scale)) for side in rgb.size)
    rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size)))
