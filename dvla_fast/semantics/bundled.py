"""The banks that come with the package: JSON files, and banks made with the made data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_BUNDLED = Path(__file__).parent / "banks"


def bundled_banks() -> tuple[str, ...]:
    """Return the names of the banks that come with the package."""
    return tuple(sorted([*_made(), *(path.stem for path in _BUNDLED.glob("*.json"))]))


def bank_path(name_or_path: str | Path) -> Path:
    """Return the file of a bundled bank, or the path as it is; a made bank has no file."""
    if is_made(name_or_path) or str(name_or_path) not in bundled_banks():
        return Path(name_or_path)
    return _BUNDLED / f"{name_or_path}.json"


def is_made(name_or_path: str | Path) -> bool:
    """Whether a name is that of a bank which is made, as the images of its data set are."""
    return str(name_or_path) in _made()


def made_content(name: str) -> dict[str, Any]:
    """Return what the file of a made bank would hold."""
    from dvla_fast.data.shapes import KINDS, make_classes

    kind, hallucinated = _made()[name]
    return {
        "name": name,
        "provenance": {
            "kind": "definitions",
            "writer": "made with the images' definitions, without a look at an image",
        },
        "classes": make_classes(varied=KINDS[kind]).bank(hallucinated),
    }


def _made() -> dict[str, tuple[str, bool]]:
    from dvla_fast.data.shapes import BANKS  # where used: text alone needs no images

    return BANKS
