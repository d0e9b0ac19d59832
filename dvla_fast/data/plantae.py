"""The split of Plantae (FWT: Tseng et al., 2020), derived from the images of iNaturalist 2018.

    python -m dvla_fast.data.plantae train_val2018/Plantae plantae.json

writes a split list for ``--data.splits plantae.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from dvla_fast.data.decode import is_image
from dvla_fast.data.splits import FORMAT, SPLITS, load_split_list
from dvla_fast.errors import DataError, DVLAError
from dvla_fast.files import write_text_atomic

CLASSES, IMAGES = 200, 600


def split_of_position(position: int) -> str:
    """Split of the class at a position (0 to 199) of the order by ascending number of images."""
    if position % 2 == 0:
        return "train"
    return "val" if position % 4 == 1 else "test"


def derive(counts: Mapping[str, int], known: Mapping[str, str]) -> tuple[dict[str, str], int]:
    """Divide classes by the rule of hytseng0509/CrossDomainFewShot (write_plantae_filelist.py).

    The 200 classes with most images, in ascending order of their number: base at even positions,
    validation where the position is 1 modulo 4, novel where it is 3. The order among classes with
    equally many images is that of one machine's directory, which was not published: there the
    classes of ``known`` take the positions of their split, and the rest follow by name.

    Args:
        counts: images of each class.
        known: split of the classes for which it is published.

    Returns:
        (split of each of the 200 classes, how many of them a tie left to chance).

    Raises:
        DataError: fewer than 200 classes, or the rule contradicts ``known``.
    """
    if len(counts) < CLASSES:
        raise DataError(
            f"Plantae: {len(counts)} class folders, but its rule takes the {CLASSES} largest of "
            "iNaturalist 2018; extract all of train_val2018/Plantae"
        )
    ordered = sorted(counts, key=lambda key: (-counts[key], key))
    result: dict[str, str] = {}
    undecided, last = 0, CLASSES  # positions below `last` are free
    for _, tied in groupby(ordered, key=counts.__getitem__):
        group = list(tied)
        free = [split_of_position(p) for p in range(last - 1, max(0, last - len(group)) - 1, -1)]
        rest = [key for key in group if key not in known]
        for key in group:
            if key in known:
                if known[key] not in free:
                    raise DataError(
                        f"Plantae: class {key!r} with {counts[key]} images is published as "
                        f"{known[key]}, but the rule puts it elsewhere; these are not all "
                        "images of iNaturalist 2018 (train_val2018/Plantae)"
                    )
                free.remove(known[key])
                result[key] = known[key]
        if len(rest) > len(free) or len(set(free)) > 1:
            undecided += len(free)
        result.update(zip(rest, free))
        last -= len(group)
        if last <= 0:
            break
    lost = sorted(set(known) - set(result))
    if lost:
        raise DataError(
            f"Plantae: {len(lost)} published class(es) are not among the {CLASSES} largest "
            f"({', '.join(map(repr, lost[:3]))}); these are not all images of iNaturalist 2018"
        )
    return result, undecided


def plantae_split(folder: str | Path) -> dict[str, Any]:
    """Derive a split list from ``train_val2018/Plantae``, a folder of class folders.

    What is published of the original split (``plantae_fwt``: all 100 base classes, 17 validation
    and 18 novel ones) must agree. The 600 images that the original drew at random from a class are
    not known; here they are the first 600 by name.

    Returns:
        The content of a split list for ``--data.splits``.

    Raises:
        DataError: as :func:`derive`; or no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give train_val2018/Plantae of iNaturalist 2018")
    published = load_split_list("plantae_fwt")
    counts = {
        path.name: sum(is_image(item) for item in path.iterdir())
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
    known = {key: split for split, keys in published.splits.items() for key in keys}
    found, undecided = derive(counts, known)
    return {
        "format": FORMAT,
        "name": "plantae_derived",
        "dataset": "Plantae",
        "title": "Plantae (iNaturalist 2018), 100/50/50 by FWT's rule",
        "published": published.published,
        "source": [*published.source, f"derived from {len(counts)} class folders"],
        "notes": f"{undecided} classes were placed among equally large ones by name; the first "
        f"{IMAGES} images of a class by name, where the original drew at random",
        "first_images": IMAGES,
        "names": {key: name for key, name in published.names.items() if key in found},
        "splits": {
            split: sorted(key for key, other in found.items() if other == split) for split in SPLITS
        },
    }


def main(arguments: list[str]) -> int:
    """Write the split list of a folder; returns the exit status."""
    if len(arguments) != 2:
        print("usage: python -m dvla_fast.data.plantae FOLDER SPLIT.json", file=sys.stderr)
        return 2
    try:
        content = plantae_split(arguments[0])
        write_text_atomic(Path(arguments[1]), json.dumps(content, indent=1) + "\n")
    except (DVLAError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments[1]}: {', '.join(f'{len(v)} {k}' for k, v in content['splits'].items())}")
    print(content["notes"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
