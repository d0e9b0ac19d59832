"""The questions put to language models: plain files, each with a version and a SHA-256.

A file begins with a line ``version: ...`` and an empty line; the rest is the text, with its fields
in braces: ``{class}``, ``{count}``, ``{attributes}``, ``{prompt}``, ``{problem}``. Other braces are
ordinary text. A bank records version and hash of the files that it was built with.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dvla_fast.errors import LanguageModelError

_FOLDER = Path(__file__).parent
# The fields that a prompt must hold.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "candidates": ("class",),
    "candidates-by-name": ("class",),
    "description": ("attributes", "class"),
    "again": ("prompt",),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt file.

    Attributes:
        name: "candidates" (with images), "candidates-by-name", "description" or "again" (put
            around a prompt whose answer could not be used).
        version: as the file says, or "none".
        sha256: of the whole file.
        text: with fields in braces.
        path: where it was read.
    """

    name: str
    version: str
    sha256: str
    text: str
    path: Path

    def fill(self, **values: str) -> str:
        """Put values into the fields."""
        return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], self.text)

    def record(self) -> dict[str, str]:
        """Return what a bank records: version and SHA-256."""
        return {"version": self.version, "sha256": self.sha256}


def prompt_names() -> tuple[str, ...]:
    """Return the names of the prompts."""
    return tuple(_FIELDS)


def load_prompt(name: str, path: str | Path = "") -> Prompt:
    """Read a prompt of the package, or the user's own file in its place.

    Raises:
        LanguageModelError: unreadable, empty, or without a field that the prompt needs.
    """
    where = Path(path) if str(path) else _FOLDER / f"{name}.txt"
    required = _FIELDS[name]
    needs = " and ".join(f"{{{item}}}" for item in required)
    try:
        content = where.read_bytes()
        # utf-8-sig: editors on Windows begin a file with a mark
        whole = content.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LanguageModelError(
            f"{where}: cannot read this prompt ({reason}); give the path of a text file that holds "
            f"{needs}"
        ) from error
    head = re.match(r"version: *(.+)\n+", whole)
    text = (whole[head.end() :] if head else whole).strip()
    missing = [item for item in required if f"{{{item}}}" not in text]
    if missing:
        raise LanguageModelError(
            f"{where}: the prompt lacks {' and '.join(f'{{{item}}}' for item in missing)}; prompt "
            f"{name!r} needs {needs}"
        )
    version = head[1].strip() if head else "none"
    return Prompt(name, version, hashlib.sha256(content).hexdigest(), text, where)
