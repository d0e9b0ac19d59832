"""Images that are there more than once, found by hashes of their pixels."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Place = tuple[str, str]  # split and name of an image


def row_hash(pixels: Any) -> bytes:
    """Hash a contiguous array or buffer of pixels to the eight bytes that ``equal_rows`` takes."""
    return hashlib.sha256(pixels).digest()[:8]


def equal_rows(hashes: bytes | bytearray) -> Iterator[list[int]]:
    """Yield the rows of each image that is there more than once, in order.

    Args:
        hashes: ``row_hash`` of every row, one after the other.
    """
    values = np.frombuffer(hashes, np.uint64)
    order = np.argsort(values, kind="stable")
    bounds = np.flatnonzero(np.diff(values[order]))  # the last row of each hash but one
    starts = np.concatenate([[0], bounds + 1])
    ends = np.concatenate([bounds + 1, [len(order)]])
    double = ends - starts > 1
    pairs = zip(starts[double].tolist(), ends[double].tolist())
    yield from sorted(order[start:end].tolist() for start, end in pairs)


def in_two_splits(hashes: bytes | bytearray, places: Sequence[Place]) -> tuple[str, ...]:
    """Describe each image that lies in more than one split, in order.

    Args:
        hashes: ``row_hash`` of every image.
        places: split and name of every image.
    """
    groups = ([places[row] for row in group] for group in equal_rows(hashes))
    return tuple(places_text(group) for group in groups if crosses(group))


def crosses(group: Iterable[Place]) -> bool:
    """Tell whether places lie in more than one split."""
    return len({split for split, _ in group}) > 1


def places_text(group: Sequence[Place]) -> str:
    """Name the first place in each split, or two places in one, and count the others."""
    first: dict[str, str] = {}
    for split, where in group:
        first.setdefault(split, where)
    shown = [(where, split) for split, where in first.items()]
    if len(shown) == 1:
        shown = [(where, split) for split, where in group[:2]]
    more = f" and {len(group) - len(shown)} more" if len(group) > len(shown) else ""
    return " and ".join(f"{where} ({split})" for where, split in shown) + more


def warn_of_shared(name: str, shared: Sequence[str]) -> None:
    """Warn of the images that ``in_two_splits`` found in a data set."""
    if shared:
        warnings.warn(
            f"{name}: {len(shared)} image(s) are in two splits, e.g. {shared[0]}: what is trained "
            "on, or selected by, would be evaluated as novel; keep one of each ('dvla-fast data "
            "check' names more)",
            stacklevel=2,
        )
