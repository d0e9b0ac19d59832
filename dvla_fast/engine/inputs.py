"""What a run works on, as hashes: a run that goes on must find the same images and texts."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvla_fast.data import FewShotData, ImageSet
from dvla_fast.engine.trained_classes import class_digests
from dvla_fast.errors import CheckpointError

_NAMES = {
    "base": "the images of the base classes",
    "monitor": "the monitor images",
    "split": "the images of the evaluated split",
    "bank": "the bank's texts",
}


def run_inputs(
    data: FewShotData, semantics: Mapping[str, Any] | None = None, split: str = ""
) -> dict[str, str]:
    """Return hashes of what a run learns from.

    Args:
        semantics: description of its texts (``texts.build_texts``).
        split: one more split whose images count.

    Returns:
        ``base`` and ``monitor`` (class names, labels and names of all images), ``pixels`` (of a
        few images of each base class), ``split`` and ``bank`` where given.
    """
    found = {
        "base": images_fingerprint(data.base),
        "monitor": images_fingerprint(data.monitor),
        "pixels": pixels_fingerprint(data.base),
    }
    if split:
        found["split"] = images_fingerprint(data.split(split))
    if semantics is not None:
        found["bank"] = str(semantics["bank_sha256"])
    return found


def check_inputs(
    path: Path, began: Mapping[str, str] | None, now: Mapping[str, str], remedy: str
) -> None:
    """Compare what a run began with, None where that was not noted, with what it finds now.

    Raises:
        CheckpointError: other images or texts.

    Warns:
        UserWarning: the same images with other pixels: edited, or decoded by another library.
    """
    changed = [
        text for key, text in _NAMES.items() if began and began.get(key, "") != now.get(key, "")
    ]
    if changed:
        raise CheckpointError(
            f"{path}: begun with others than are found now: {' and '.join(changed)}; give them "
            f"back, or {remedy}"
        )
    if began and began.get("pixels") != now["pixels"]:
        warnings.warn(
            f"{path}: base images have other pixels than when it was begun: edited, or decoded by "
            "another library; what follows is not what an uninterrupted run gives",
            UserWarning,
            stacklevel=2,
        )


def images_fingerprint(images: ImageSet) -> str:
    """Return a hash of the class names, labels and names (``ids``) of all images, in order.

    Names are relative to the data set's root, so a folder and a cache of it have the same hash.
    """
    digest = hashlib.sha256(json.dumps([images.class_names, images.ids]).encode())
    digest.update(images.labels.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def pixel_facts(images: ImageSet) -> dict[str, Any]:
    """What an evaluation's result says of its pixels: ``image_size`` and ``pixels_sha256``."""
    return {"image_size": images.images.shape[-1], "pixels_sha256": pixels_fingerprint(images)}


def pixels_fingerprint(images: ImageSet) -> str:
    """Return a hash of the pixels of a few images of each class."""
    pixels = json.dumps(class_digests(images), sort_keys=True)
    return hashlib.sha256(pixels.encode()).hexdigest()
