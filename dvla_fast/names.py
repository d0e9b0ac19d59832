"""Names of classes, as they are compared."""

from __future__ import annotations

import re
import unicodedata


def normalised_name(name: str) -> str:
    """Reduce a class name to what counts when names are compared."""
    name = unicodedata.normalize("NFC", name)  # names of files on a Mac are in NFD
    name = re.sub(r"^(?:\d{3}\.|n\d{8}-)(?=.)", "", name.strip())
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
