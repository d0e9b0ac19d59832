"""Makes a few-shot data set of drawn pictures and real words from openly licensed emoji.

A class is an emoji, an image of it the drawing in one of up to twelve styles (Noto, Twemoji,
OpenMoji, ...). Its texts are Unicode's: keywords and groups as attributes, name and group as
description. Nothing is downloaded here; npm fetches the packages::

    npm pack emojibase-data @iconify-json/{noto,noto-v1,twemoji,openmoji,fxemoji,streamline-emojis}
    npm pack @iconify-json/{emojione,emojione-v1,emojione-monotone}
    npm pack @iconify-json/{fluent-emoji,fluent-emoji-flat,fluent-emoji-high-contrast}
    python -m benchmarks.emoji . emoji   # in the same folder; needs resvg-py

writes ``emoji/{train,val,test}/CLASS/STYLE.png``, the bank ``emoji/bank.json``, and
``emoji/SOURCES.txt`` with the licence of each style.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from dvla_fast.semantics import SemanticBank

try:
    import resvg_py
except ImportError:  # said before any work
    resvg_py = None

# People come once a gender and skin, clocks once an hour; flags and symbols are signs.
_LEFT_OUT = {"people-body", "component", "flags", "symbols", "time"}
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


@dataclass(frozen=True)
class Style:
    """One set of drawings: its name, its licence, and icons by name, as Iconify writes them."""

    name: str
    licence: str
    icons: dict[str, Any]

    def names(self) -> dict[str, str]:
        """Icons by their bare names."""
        return {
            _bare(name): name for name in (*self.icons.get("aliases", {}), *self.icons["icons"])
        }

    def svg(self, name: str) -> str | None:
        """The drawing as SVG; None for one that is another turned or mirrored."""
        aliases = self.icons.get("aliases", {})
        while name in aliases:
            if set(aliases[name]) - {"parent"}:
                return None
            name = aliases[name]["parent"]
        icon = self.icons["icons"][name]
        left, top = (icon.get(key, self.icons.get(key, 0)) for key in ("left", "top"))
        width, height = (icon.get(key, self.icons.get(key, 16)) for key in ("width", "height"))
        body = icon["body"].replace("currentColor", "black")
        return (
            f'<svg {_NAMESPACES} width="{width}" height="{height}" '
            f'viewBox="{left} {top} {width} {height}">{body}</svg>'
        )


@dataclass(frozen=True)
class Emoji:
    """A class: its name, its texts, and its drawings as SVG by style."""

    name: str
    attributes: tuple[str, ...]
    description: str
    drawings: dict[str, str]


def read_packages(folder: Path) -> tuple[list[Style], list[dict[str, Any]]]:
    """Read the styles and Unicode's annotations (with their groups' names) from npm's archives.

    Raises:
        ValueError: annotations or styles are missing.
    """
    styles, annotations = [], None
    for path in sorted(folder.glob("*.tgz")):
        with tarfile.open(path) as archive:
            if path.name.startswith("emojibase-data"):
                annotations = _annotations(archive)
            elif path.name.startswith("iconify-json-"):
                name = re.sub(r"-[0-9.]+$", "", path.stem.removeprefix("iconify-json-"))
                licence = _member(archive, "package/info.json")["license"]["title"]
                styles.append(Style(name, licence, _member(archive, "package/icons.json")))
    if annotations is None or not styles:
        raise ValueError(f"{folder}: needs emojibase-data-*.tgz and iconify-json-*.tgz from npm")
    return styles, annotations


def _member(archive: tarfile.TarFile, name: str) -> Any:
    file = archive.extractfile(name)
    assert file is not None
    return json.load(file)


def _annotations(archive: tarfile.TarFile) -> list[dict[str, Any]]:
    messages = _member(archive, "package/en/messages.json")
    groups, parts = (
        {row["order"]: (row["key"], row["message"]) for row in messages[key]}
        for key in ("groups", "subgroups")
    )
    found = []
    for entry in _member(archive, "package/en/data.json"):
        if "group" in entry and "subgroup" in entry:
            (key, group), (part, message) = groups[entry["group"]], parts[entry["subgroup"]]
            if not {key, part} & _LEFT_OUT:
                found.append({**entry, "group": group, "subgroup": message})
    return found


def choose_classes(
    styles: Sequence[Style], annotations: Sequence[dict[str, Any]], least: int
) -> list[Emoji]:
    """The emoji that at least ``least`` styles draw, each as no other, sorted by name."""
    names = [(style, style.names()) for style in styles]
    drawings = []
    for entry in annotations:
        bare = _bare(entry["label"])
        found = {style.name: style.svg(known[bare]) for style, known in names if bare in known}
        drawings.append({name: svg for name, svg in found.items() if svg})
    # black hearts of all colours are one drawing
    times = Counter(svg for drawn in drawings for svg in drawn.values())
    classes = {}
    for entry, drawn in zip(annotations, drawings):
        drawn = {name: svg for name, svg in drawn.items() if times[svg] == 1}
        if len(drawn) < least:
            continue
        label = entry["label"].replace("’", "")
        group, part = entry["group"], entry["subgroup"]
        said = label.lower().split()
        words = dict.fromkeys([*entry.get("tags", ()), part, *group.split(" & ")])
        attributes = tuple(
            word for word in words if word.lower() not in said and re.search("[A-Za-z]{2}", word)
        )
        description = f"{label}, of the group {group}, {part}.".replace("&", "and")
        name = re.sub(r"[^\w \-]", "", label)
        classes[name] = Emoji(name, attributes, description, drawn)
    return [classes[name] for name in sorted(classes)]


def _bare(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower().replace("ñ", "n"))


def split_classes(classes: Sequence[Emoji], seed: int) -> dict[str, list[Emoji]]:
    """Three parts by chance: 60, 20 and 20 % of the classes."""
    order = list(classes)
    Random(seed).shuffle(order)
    parts, start = {}, 0.0
    for name, share in _SHARES.items():
        stop = start + share * len(order)
        parts[name] = order[round(start) : round(stop)]
        start = stop
    return parts


def write(parts: dict[str, list[Emoji]], styles: Sequence[Style], folder: Path, size: int) -> None:
    """Write the images, the bank and the sources."""
    entries = {}
    for part, classes in parts.items():
        for emoji in classes:
            place = folder / part / emoji.name
            place.mkdir(parents=True)
            for style, svg in emoji.drawings.items():
                drawn = resvg_py.svg_to_bytes(
                    svg_string=svg, width=size, height=size, background="#fff",
                    skip_system_fonts=True,
                )  # fmt: skip
                Image.open(io.BytesIO(bytes(drawn))).convert("RGB").save(place / f"{style}.png")
            entries[emoji.name] = {
                "candidates": list(emoji.attributes),
                "description": emoji.description,
            }
    bank = {
        "format": "dvla-fast-bank/2",
        "name": "emoji",
        "provenance": {"kind": "imported", "author": "Unicode", "note": "CLDR annotations"},
        "classes": dict(sorted(entries.items())),
    }
    SemanticBank.from_dict(bank)  # raises where it is none
    (folder / "bank.json").write_text(json.dumps(bank, indent=1, ensure_ascii=False) + "\n")
    sources = [f"{style.name}: {style.licence}" for style in styles]
    (folder / "SOURCES.txt").write_text("\n".join([*sources, "texts: Unicode License v3"]) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the data set; exit status 0, or 1 with what is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emoji",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("packages", type=Path, help="folder of npm's archives (*.tgz)")
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--size", type=int, default=48, help="side of the images in pixels")
    parser.add_argument("--least", type=int, default=10, help="styles that must draw a class")
    parser.add_argument("--seed", type=int, default=0, help="of the split into three parts")
    options = parser.parse_args(arguments)
    if resvg_py is None:
        print("error: needs resvg-py (pip install resvg-py)", file=sys.stderr)
        return 1
    try:
        styles, annotations = read_packages(options.packages)
        options.output.mkdir(parents=True)
    except (ValueError, OSError, KeyError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    parts = split_classes(choose_classes(styles, annotations, options.least), options.seed)
    write(parts, styles, options.output, options.size)
    images = sum(len(emoji.drawings) for classes in parts.values() for emoji in classes)
    counts = ", ".join(f"{len(classes)} {name}" for name, classes in parts.items())
    print(f"{options.output}: {images} images of {counts} classes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
