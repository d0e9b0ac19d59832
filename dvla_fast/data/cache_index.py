"""The index of a prepared cache, and the file of images beside it."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvla_fast.data.splits import is_split_of
from dvla_fast.errors import DataError

FORMAT = "dvla-fast-cache/3"  # raised with the layout, and with the pixels that images decode to
IMAGES, INDEX = "images.bin", "index.json"


def is_cache(path: str | Path) -> bool:
    """Tell whether a folder is a finished cache, be it one that lost its images since."""
    index = Path(path) / INDEX
    if not os.path.isfile(index) or os.path.isfile(Path(path) / IMAGES):
        return os.path.isfile(index)
    return b'"dvla-fast-cache/' in index.read_bytes()[:100]  # an index.json may be another's


def index_checksum(index: dict[str, Any]) -> str:
    """Hash an index without its own checksum."""
    content = {key: value for key, value in index.items() if key != "index_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_index(path: str | Path) -> dict[str, Any]:
    """Read and check the index of a cache, and the size of its images.

    Raises:
        DataError: damaged, of another format, or its image file has the wrong length.
    """
    path = Path(path)
    remedy = "remove the folder and run 'dvla-fast data prepare' again"
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            made = f"cache format {index['format']!r:.80}, not {FORMAT}"
            raise DataError(f"{path}: made by another version of dvla-fast ({made}); {remedy}")
        sound = index["index_sha256"] == index_checksum(index)
        expected = index["images"] * 3 * index["image_size"] ** 2
        actual = (path / IMAGES).stat().st_size
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) if isinstance(error, OSError) else repr(error)
        raise DataError(f"{path}: cannot read this cache ({reason}); {remedy}") from error
    if not sound:
        raise DataError(f"{path / INDEX}: changed since it was written; {remedy}")
    if actual != expected:
        raise DataError(f"{path / IMAGES}: {actual} bytes, expected {expected}; {remedy}")
    return index


def check_split(path: str | Path, index: Mapping[str, Any], splits: str) -> None:
    """Refuse a split list that is not the one a cache was prepared with; none: any will do.

    Raises:
        DataError: another one, or as ``load_split_list``.
    """
    keys = {name: entry["keys"] for name, entry in index["splits"].items()}
    if splits and not is_split_of(splits, index["split_list"], keys):
        raise DataError(
            f"{path}: was prepared with the split {index['split_list'] or 'of its folders'}, not "
            f"{splits}; leave out --data.splits (--splits of 'dvla-fast data'), or prepare "
            "another cache"
        )


def map_images(path: str | Path, index: Mapping[str, Any]) -> torch.Tensor:
    """Map a cache's images, all splits in order: uint8 (N, 3, S, S), never to be written to.

    Args:
        index: of the cache, as of ``read_index``.
    """
    shape = (index["images"], 3, index["image_size"], index["image_size"])
    mapped = np.memmap(Path(path) / IMAGES, np.uint8, "r", shape=shape)
    with warnings.catch_warnings():
        # torch warns that the array is read-only. A writable private map would count as memory in
        # full, and a large cache would then not open; nothing writes to stored images.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(mapped)
