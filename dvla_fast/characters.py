"""Characters of texts that others wrote: which can be written to a file, and to a terminal."""

from __future__ import annotations

import json
import unicodedata
from typing import Any


def is_unicode(value: Any) -> bool:
    """Whether all texts of a JSON value can be written: none holds half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_characters(text: str) -> str:
    """Join the halves of surrogate pairs; a half that is alone becomes the character U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str) -> str:
    """Return a text without what steers a terminal: of control characters, line breaks stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c)[0] != "C")
