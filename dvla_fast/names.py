"""Names of classes, as they are compared."""

from __future__ import annotations

import re
import unicodedata


def composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC); Macs write those of files in another."""
    return unicodedata.normalize("NFC", name)


def normalised_name(name: str) -> str:
    """Reduce a class name to what counts when names are compared."""
    name = re.sub(r"^(?:\d{3}\.|n\d{8}-)(?=.)", "", composed(name).strip())
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
