"""Semantic banks: of every class a list of attributes (low level) and a description (high level).

A bank is a JSON file, so it can be read, reviewed and corrected by hand::

    {"format": "dvla-fast-bank/1", "name": "digits", "provenance": {...},
     "classes": {"zero": {"attributes": ["...", "..."], "description": "..."}, ...}}

``provenance`` says who or what wrote the texts and what it saw: text written with a look at the
images of an evaluation would leak them into it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvla_fast.errors import BankError

FORMAT = "dvla-fast-bank/1"
_BUNDLED = Path(__file__).parent / "banks"


@dataclass(frozen=True)
class ClassEntry:
    """The texts of one class: k attributes in order of selection, and one description."""

    attributes: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class SemanticBank:
    """Texts of a set of classes, by class name, with a note on where they come from."""

    name: str
    classes: dict[str, ClassEntry]
    provenance: dict[str, Any] = field(default_factory=dict)
    source: str = "<memory>"

    @classmethod
    def from_dict(cls, content: Any, source: str = "<memory>") -> SemanticBank:
        """Validate the content of a bank file.

        Raises:
            BankError: wrong structure, a class without attributes or description, empty texts.
        """
        if not isinstance(content, dict) or not isinstance(content.get("classes"), dict):
            raise BankError(
                f"{source}: not a semantic bank: expected a JSON object with a 'classes' object "
                "{name: {attributes: [...], description: ...}}"
            )
        if content.get("format", FORMAT) != FORMAT:
            raise BankError(
                f"{source}: bank format {content['format']!r} is unknown; this version reads "
                f"{FORMAT!r}"
            )
        if not content["classes"]:
            raise BankError(f"{source}: the bank holds no class; add at least one")
        classes = {}
        problems: list[str] = []
        for name, entry in content["classes"].items():
            problem = _entry_problem(entry)
            if problem:
                problems.append(f"{name!r} {problem}")
            else:
                attributes = tuple(text.strip() for text in entry["attributes"])
                classes[name] = ClassEntry(attributes, entry["description"].strip())
        if problems:
            raise BankError(f"{source}: fix these classes: {_some(problems, '; ')}")
        provenance = content.get("provenance") or {}
        if not isinstance(provenance, dict):
            raise BankError(f"{source}: 'provenance' must be an object, got {provenance!r}")
        return cls(str(content.get("name", Path(source).stem)), classes, provenance, source)

    def require(self, class_names: Iterable[str]) -> None:
        """Check that every named class is in the bank.

        Raises:
            BankError: naming the classes that are missing.
        """
        missing = [name for name in class_names if name not in self.classes]
        if missing:
            raise BankError(
                f"{self.source}: the bank lacks {len(missing)} class(es) of the data set: "
                f"{_some([repr(name) for name in missing])}; add them to its 'classes', or give "
                "another bank"
            )

    def select(self, class_names: Iterable[str]) -> list[ClassEntry]:
        """Return the entries of the named classes, in that order (BankError for missing ones)."""
        names = list(class_names)
        self.require(names)
        return [self.classes[name] for name in names]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the texts, to tie a result to the bank that it used."""
        content = {
            name: [list(entry.attributes), entry.description]
            for name, entry in sorted(self.classes.items())
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def bundled_banks() -> tuple[str, ...]:
    """Return the names of the banks that ship with the package."""
    return tuple(sorted(path.stem for path in _BUNDLED.glob("*.json")))


def load_bank(name_or_path: str | Path) -> SemanticBank:
    """Load a bundled bank by name, or any bank by the path of its JSON file.

    Raises:
        BankError: no such bank, unreadable or malformed file, incomplete classes.
    """
    path = Path(name_or_path)
    if str(name_or_path) in bundled_banks():
        path = _BUNDLED / f"{name_or_path}.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BankError(
            f"{path}: cannot read the semantic bank ({_reason(error)}); give the path of a bank "
            f"JSON file or a bundled name ({', '.join(bundled_banks())})"
        ) from error
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
    except json.JSONDecodeError as error:
        raise BankError(
            f"{path}: not valid JSON (line {error.lineno}: {error.msg}); the file is damaged or "
            "not a semantic bank"
        ) from error
    return SemanticBank.from_dict(content, str(path))


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    # json keeps the last of two equal keys silently: a class written twice would lose its texts.
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise BankError(f"{path}: {', '.join(map(repr, twice))} appears twice; keep one of them")
    return result


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return "is not an object with 'attributes' and 'description'"
    attributes, description = entry.get("attributes"), entry.get("description")
    if not isinstance(attributes, list) or not attributes:
        return "has no attributes"
    for index, text in enumerate(attributes):
        if not isinstance(text, str) or not text.strip():
            return f"has an empty attribute (number {index + 1})"
    if not isinstance(description, str) or not description.strip():
        return "has an empty description"
    return None


def _some(items: list[str], separator: str = ", ", limit: int = 8) -> str:
    rest = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + rest


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
