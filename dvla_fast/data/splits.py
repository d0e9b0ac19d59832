"""Split lists: which classes are base, validation and novel, and where that is published.

The lists are JSON files in ``split_lists/``, each with the file it was taken from. Where the field
uses several splits of one data set, each has its own name and they are never mixed.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvla_fast.errors import DataError, MissingDependencyError
from dvla_fast.names import composed, normalised_name

FORMAT = "dvla-fast-splits/1"
SPLITS = ("train", "val", "test")
_FOLDER = Path(__file__).parent / "split_lists"
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class SplitList:
    """The classes of each split of a data set, with what is known about them.

    Names of classes are in Unicode's composed form (NFC), as those of folders are.

    Attributes:
        name: e.g. ``"cub_100_50_50"``; the value of ``--data.splits``.
        dataset: name of the data set; several lists may split the same one. Empty, as in most
            lists of users': the data set is called like its folder.
        splits: class keys (folder names, WordNet ids, labels) by split: train, val, test.
        names: readable names of the keys that do not tell them themselves.
        images_per_split, images_per_class: known counts; empty where unknown.
        expected_classes: classes per split of the published split, where the list lacks some.
        first_images: only the first so many file names of a class, sorted, belong to it; 0: all.
        part: part of the archive that the list draws from; empty: all of it.
        source: the files it was taken from; published: who publishes the images.
    """

    name: str
    dataset: str
    splits: Mapping[str, tuple[str, ...]]
    title: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    images_per_split: Mapping[str, int] = field(default_factory=dict)
    images_per_class: Mapping[str, int] = field(default_factory=dict)
    expected_classes: Mapping[str, int] = field(default_factory=dict)
    first_images: int = 0
    part: str = ""
    source: tuple[str, ...] = ()
    published: str = ""
    notes: str = ""

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(key for keys in self.splits.values() for key in keys)

    @property
    def missing_classes(self) -> int:
        """Number of classes of the published split that the list does not know."""
        expected = sum(self.expected_classes.values())
        return max(0, expected - len(self.keys)) if expected else 0


def split_list_names() -> tuple[str, ...]:
    """Return the names of the bundled split lists."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


@functools.cache
def bundled_split_lists() -> tuple[SplitList, ...]:
    """Return all bundled split lists, by name."""
    return tuple(_read(_FOLDER / f"{name}.json") for name in split_list_names())


def load_split_list(name: str) -> SplitList:
    """Return a bundled split list by name, or read the user's own JSON file.

    A file needs only ``{"splits": {"train": [...], "val": [...], "test": [...]}}``; ``names`` may
    map classes to readable names.

    Raises:
        DataError: unknown name, unreadable file, or a class that is listed twice.
    """
    if name in split_list_names():
        return next(item for item in bundled_split_lists() if item.name == name)
    path = Path(name)
    if path.suffix != ".json":
        raise DataError(
            f"split list {name!r} is unknown; choose one of {', '.join(split_list_names())}, or "
            "give the path of a .json file"
        )
    return _read(path)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _maps_to(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 10_000


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200


# The fields of a list besides its splits, each with what it must be.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("name", "dataset", "title", "part"), (_is_name, "a text of at most 200 characters")
    ),
    **dict.fromkeys(("published", "notes"), (_is_text, "a text")),
    "source": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "texts"),
    "names": (
        _maps_to(lambda value: _is_name(value) and bool(value.strip())),
        "an object of a readable name for each class",
    ),
    **dict.fromkeys(
        ("images_per_split", "images_per_class", "expected_classes"),
        (_maps_to(_is_count), "an object of numbers"),
    ),
    **dict.fromkeys(("first_images", "images_each_class"), (_is_count, "a number")),
}


def _read(path: Path) -> SplitList:
    form = 'expected {"splits": {"train": [class, ...], "val": [...], "test": [...]}}'
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot read this split list ({error}); {form}") from error
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, dict) or not set(splits) <= set(SPLITS):
        raise DataError(f"{path}: not a split list; {form}")
    if content.get("format", FORMAT) != FORMAT:
        raise DataError(f"{path}: split format {content['format']!r:.80} is unknown; {form}")
    for name, (fits, expected) in _FIELDS.items():
        if name in content and not fits(content[name]):
            raise DataError(f"{path}: {name!r} must be {expected}, got {content[name]!r:.80}")
    where: dict[str, str] = {}
    for split, keys in splits.items():
        if not isinstance(keys, list) or not all(map(_is_name, keys)):
            raise DataError(f"{path}: {split!r} is not a list of class names; {form}")
        splits[split] = keys = [composed(key) for key in keys]
        for key in keys:
            if not key.strip() or ".." in Path(key).parts or Path(key).is_absolute():
                raise DataError(
                    f"{path}: {key!r} in {split!r} is no class name; give the names of the class "
                    "folders, without a path"
                )
            if key in where:
                raise DataError(
                    f"{path}: class {key!r} is listed in {where[key]} and again in {split}; keep "
                    "each class once, in one split"
                )
            where[key] = split
    if not where:
        raise DataError(f"{path}: lists no class; {form}")
    per_class = content.get("images_per_class", {})
    if "images_each_class" in content:
        per_class = dict.fromkeys(where, content["images_each_class"])
    return SplitList(
        name=content.get("name", path.stem),
        dataset=content.get("dataset", ""),
        splits={split: tuple(splits.get(split, ())) for split in SPLITS},
        title=content.get("title", content.get("dataset", "")),
        names={composed(key): name for key, name in content.get("names", {}).items()},
        images_per_split=content.get("images_per_split", {}),
        images_per_class={composed(key): count for key, count in per_class.items()},
        expected_classes=content.get("expected_classes", {}),
        first_images=content.get("first_images", 0),
        part=content.get("part", ""),
        source=tuple(content.get("source", ())),
        published=content.get("published", ""),
        notes=content.get("notes", ""),
    )


def published_name(name: str, classes: Mapping[str, Iterable[str]]) -> str:
    """Return the name of a bundled list if classes are divided exactly by it; else empty.

    A list of a user's may have any name, and a folder too.

    Args:
        name: of the list that divided them.
        classes: class keys by split; a split without any may be left out.
    """
    if name not in split_list_names():
        return ""
    known = load_split_list(name).splits
    same = all(set(known[split]) == set(classes.get(split, ())) for split in SPLITS)
    return name if same else ""


def candidates(keys: Iterable[str]) -> list[SplitList]:
    """Return the bundled lists that these class keys can belong to.

    More than half of a list's classes must be there: a data set with a few classes lost is still
    recognised, and those that are missing can be named.
    """
    present = set(keys)
    return [item for item in bundled_split_lists() if 2 * len(item.keys & present) > len(item.keys)]


def class_names(keys: Iterable[str], known: SplitList | None = None) -> tuple[str, ...]:
    """Return readable class names, in order.

    From the split list where it knows them, else from the key itself: ``003.Sooty_Albatross``
    (CUB), ``n02085620-Chihuahua`` (Stanford Dogs), ``n01532829`` (WordNet id, through timm's
    ImageNet tables). A name that several classes share gets its key appended, also where names
    differ in case alone (the wnids of ``Cardigan`` and ``cardigan``). Keys of an unknown data set
    that are none of these are kept as they are: two spellings of a name stay one name.

    Raises:
        MissingDependencyError: WordNet ids, and timm is not installed.
        DataError: a WordNet id that timm's ImageNet tables do not know.
    """
    keys = tuple(keys)
    names = [_class_name(key, known) for key in keys]
    forms = Counter(map(normalised_name, names))
    return tuple(
        f"{name} ({key})" if forms[normalised_name(name)] > 1 and not _spells(key, name) else name
        for name, key in zip(names, keys)
    )


def _spells(key: str, name: str) -> bool:
    """Whether a key says no more than the name does: appended, it would tell nothing apart."""
    return name in (key, key.replace("_", " "))


def _class_name(key: str, known: SplitList | None) -> str:
    if known is not None and key in known.names:
        return known.names[key]
    if _WNID.fullmatch(key):
        return _wordnet_name(key)
    embedded = re.fullmatch(r"(?:n\d{8}-|\d{3}\.)(.+)", key)
    if embedded:
        return embedded[1].replace("_", " ")
    if known is not None and key in known.keys:
        return key.replace("_", " ")
    return key


def _wordnet_name(wnid: str) -> str:
    try:
        return _imagenet().label_name_to_description(wnid).split(",")[0]
    except KeyError as error:
        raise DataError(
            f"class folder {wnid!r} looks like a WordNet id, but timm's ImageNet tables do not "
            "know it; rename the folder to the class's name"
        ) from error


@functools.cache
def _imagenet() -> Any:
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError as error:
        raise MissingDependencyError(
            "class folders named by WordNet ids (n01532829) get their readable names from timm, "
            "which is not installed; run pip install 'dvla-fast[vision]', or rename the folders"
        ) from error
    return ImageNetInfo("imagenet-21k")


def is_split_of(option: str, name: str, keys: Mapping[str, Sequence[str]]) -> bool:
    """Whether ``--data.splits`` means the list of that name by which classes were divided.

    A user's own file may have been edited since, so its classes are compared with ``keys``.

    Raises:
        DataError: as ``load_split_list``.
    """
    wanted = load_split_list(option)
    if wanted.name != name:
        return False
    own = Path(option).suffix == ".json"
    return not own or all(
        {composed(key) for key in x} <= set(wanted.splits.get(split, ()))
        for split, x in keys.items()
    )
