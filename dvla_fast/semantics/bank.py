"""Semantic banks: of every class a list of attributes (low level) and a description (high level).

A bank is a JSON file, so it can be read, reviewed and corrected by hand::

    {"format": "dvla-fast-bank/2", "name": "digits", "provenance": {...},
     "classes": {"zero": {"candidates": [{"text": "...", "scores": [0.31, 0.29]}, "..."],
                          "attributes": ["...", "..."], "description": "...",
                          "answers": {...}, "images": ["..."]}}}

``candidates`` are what a language model or a person proposed, ``attributes`` what was chosen of
them, in order; a class with at least two candidates need not have chosen yet. ``answers`` keeps the
language model's own words, ``images`` the support images that it was shown. ``provenance`` says who
or what wrote the texts: text written with a look at the images of an evaluation would leak them
into it. A bank of format /1 is one of /2 without the optional parts.

A bank of published vectors has no words (``semantics.importing`` makes them)::

    {"format": "dvla-fast-bank/2", "name": "...", "provenance": {...},
     "vectors": {"encoder": "...", "dim": 512, "sha256": "..."},
     "classes": {"apple": {"vectors": {"attributes": 0, "description": 1}}}}

Its vectors are in the file beside it (``semantics.vectors``). ``bank.schema.json`` is the format as
a JSON Schema.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dvla_fast.characters import is_unicode
from dvla_fast.errors import BankError
from dvla_fast.files import write_text_atomic
from dvla_fast.names import normalised_name
from dvla_fast.semantics.bundled import bank_path, bundled_banks, is_made, made_content
from dvla_fast.semantics.entry_checks import HALF_A_CHARACTER, entry_problem, name_problem

FORMAT = "dvla-fast-bank/2"
FORMATS = ("dvla-fast-bank/1", FORMAT)
SCHEMA = Path(__file__).parent / "bank.schema.json"
_ENTRY_KEYS = ("candidates", "attributes", "description", "answers", "images")
_LINE = 100


@dataclass(frozen=True)
class Candidate:
    """A proposed attribute.

    ``scores[i]`` is its cosine with the template of selection round i (docs/method.md §2); none
    after the round that chose it.
    """

    text: str
    scores: tuple[float | None, ...] = ()


class StoredCount(NamedTuple):
    """How many vectors a class of a bank without words has of each level."""

    attributes: int
    description: int


@dataclass(frozen=True)
class StoredVectors:
    """What a bank without words says about its vectors: encoder, length, and their SHA-256."""

    encoder: str
    dim: int
    sha256: str


@dataclass(frozen=True)
class ClassEntry:
    """The texts of one class.

    Attributes:
        attributes: the chosen attributes in order of selection; empty: none chosen yet.
        description: one fluent description.
        candidates: what could be chosen from, in the order proposed.
        answers: raw answers of the language model, by stage.
        images: ids of the support images that the texts were written from.
        extra: other keys of the entry in the file, kept as they are.
        stored: numbers of vectors, in a bank without words; else None.
    """

    attributes: tuple[str, ...]
    description: str
    candidates: tuple[Candidate, ...] = ()
    answers: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    stored: StoredCount | None = None

    def __post_init__(self) -> None:
        for name in ("attributes", "candidates", "images"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected a tuple of texts, got one text")

    @property
    def proposals(self) -> tuple[str, ...]:
        """What top-k selection chooses from: the candidates, or else the attributes."""
        return tuple(item.text for item in self.candidates) or self.attributes

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as in the file; optional parts that are empty are left out."""
        content: dict[str, Any] = {}
        if self.candidates:
            content["candidates"] = [
                {"text": item.text, "scores": list(item.scores)} if item.scores else item.text
                for item in self.candidates
            ]
        if self.attributes:
            content["attributes"] = list(self.attributes)
        if self.stored:
            content["vectors"] = self.stored._asdict()
        else:
            content["description"] = self.description
        if self.answers:
            content["answers"] = dict(self.answers)
        if self.images:
            content["images"] = list(self.images)
        return {**content, **self.extra}


@dataclass(frozen=True)
class SemanticBank:
    """Texts of a set of classes, by class name, with a note on where they come from.

    Attributes:
        source: the file, for messages and for the vectors beside it; of a made bank its name.
        vectors: of a bank that has vectors and no words; else None.
    """

    name: str
    classes: dict[str, ClassEntry]
    provenance: dict[str, Any] = field(default_factory=dict)
    source: str = "<memory>"
    vectors: StoredVectors | None = None

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
        if content.get("format", FORMAT) not in FORMATS:
            raise BankError(
                f"{source}: bank format {content['format']!r} is unknown; this version reads "
                f"{' and '.join(map(repr, FORMATS))}"
            )
        if not content["classes"]:
            raise BankError(f"{source}: the bank holds no class; add at least one")
        vectors = _stored_vectors(content["vectors"], source) if "vectors" in content else None
        classes = {}
        problems: list[str] = []
        for name, entry in content["classes"].items():
            problem = name_problem(name) or entry_problem(entry, vectors is not None)
            if problem:
                problems.append(f"{name!r} {problem}")
            else:
                classes[name] = _entry(entry, vectors is not None)
        if problems:
            raise BankError(f"{source}: fix these classes: {some_of(problems, '; ')}")
        provenance = {} if content.get("provenance") is None else content["provenance"]
        if not isinstance(provenance, dict):
            raise BankError(f"{source}: 'provenance' must be an object, got {provenance!r}")
        if not is_unicode([value for key, value in content.items() if key != "classes"]):
            raise BankError(f"{source}: its name or its provenance {HALF_A_CHARACTER}")
        name = str(content.get("name", Path(source).stem))
        return cls(name, classes, provenance, source, vectors)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the bank's file, in format /2."""
        return {
            "format": FORMAT,
            "name": self.name,
            "provenance": self.provenance,
            **({"vectors": asdict(self.vectors)} if self.vectors else {}),
            "classes": {name: entry.to_dict() for name, entry in self.classes.items()},
        }

    def to_json(self) -> str:
        """Return the text of the bank's file; the same bank always gives the same text.

        Raises:
            BankError: a number that is NaN or infinite, which JSON lacks.
        """
        try:
            return format_json(self.to_dict()) + "\n"
        except ValueError as error:
            raise BankError(
                f"bank {self.name!r}: holds a number that is NaN or infinite, which JSON lacks"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the bank, atomically.

        Raises:
            BankError: as ``to_json``.
            OutputError: the file cannot be written; an old one stays as it was.
        """
        write_text_atomic(Path(path), self.to_json())

    def resolve(self, class_names: Iterable[str], of: str = "the data set") -> list[str]:
        """Return the bank's own names of classes, in order.

        An exact name wins; else case, spaces, underscores, hyphens and the prefixes of class
        folders (``003.``, ``n02085620-``) do not count.

        Args:
            of: what has these classes, for messages.

        Raises:
            BankError: classes that the bank lacks, or a name that fits several of its classes.
        """
        names = list(class_names)
        matches = self._matches(names)
        ambiguous = [
            f"{name!r} fits {' and '.join(map(repr, own))}"
            for name, own in matches.items()
            if len(own) > 1
        ]
        if ambiguous:
            raise BankError(
                f"{self.source}: {some_of(ambiguous, '; ')}; give the right one in the bank this "
                "very name"
            )
        missing = [name for name, own in matches.items() if not own]
        if missing:
            near = difflib.get_close_matches(missing[0], self.classes, 3)
            hint = f" (near {missing[0]!r}: {', '.join(map(repr, near))})" if near else ""
            raise BankError(
                f"{self.source}: the bank lacks {len(missing)} class(es) of {of}: "
                f"{some_of(list(map(repr, missing)))}{hint}; give a bank that has them, or add "
                "them to its 'classes'"
            )
        return [matches[name][0] for name in names]

    def missing(self, class_names: Iterable[str]) -> list[str]:
        """Return the named classes that are not in the bank."""
        return [name for name, own in self._matches(class_names).items() if not own]

    def _matches(self, class_names: Iterable[str]) -> dict[str, list[str]]:
        alike: dict[str, list[str]] = {}
        for own in self.classes:
            alike.setdefault(normalised_name(own), []).append(own)
        return {
            name: [name] if name in self.classes else alike.get(normalised_name(name), [])
            for name in class_names
        }

    @property
    def kind(self) -> str:
        """What the texts were made from, as the provenance says: "unknown" where it does not."""
        return str(self.provenance.get("kind", "unknown"))

    def require(self, class_names: Iterable[str], of: str = "the data set") -> None:
        """Check that every named class is in the bank (BankError as :meth:`resolve`)."""
        self.resolve(class_names, of)

    def select(self, class_names: Iterable[str]) -> list[ClassEntry]:
        """Return the entries of the named classes, in that order (BankError as for `resolve`)."""
        return [self.classes[name] for name in self.resolve(class_names)]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the texts, to tie a result to the bank that it used."""
        if self.vectors:
            return self.vectors.sha256
        content = {
            name: [list(entry.attributes), entry.description]
            + ([[item.text for item in entry.candidates]] if entry.candidates else [])
            for name, entry in sorted(self.classes.items())
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_bank(name_or_path: str | Path) -> SemanticBank:
    """Load a bank that comes with the package by name, or any bank by the path of its JSON file.

    Raises:
        BankError: no such bank, unreadable or malformed file, incomplete classes.
    """
    content, source = read_bank(name_or_path)
    return SemanticBank.from_dict(content, source)


def read_bank(name_or_path: str | Path) -> tuple[Any, str]:
    """Return a bank's content, not looked at, and its source (BankError as `read_bank_json`)."""
    if is_made(name_or_path):
        return made_content(str(name_or_path)), str(name_or_path)
    path = bank_path(name_or_path)
    return read_bank_json(path), str(path)


def read_bank_json(path: Path) -> Any:
    """Parse a bank's JSON without looking at its content.

    Raises:
        BankError: missing or unreadable file, invalid JSON, a key that appears twice, or a number
            that is NaN or infinite.
    """
    try:
        # utf-8-sig: editors on Windows begin a file with a mark
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BankError(
            f"{path}: cannot read the semantic bank ({_reason(error)}); give the path of a bank "
            f"JSON file or a bundled name ({', '.join(bundled_banks())})"
        ) from error
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> Any:
    """Parse JSON strictly: no key twice, no NaN (BankError naming ``where`` and the line)."""

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise BankError(f"{where}: {text} is no number that JSON has; correct or remove it")
        return value

    try:
        return json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique(pairs, where),
            parse_constant=number,
            parse_float=number,
        )
    except (ValueError, RecursionError) as error:
        raise BankError(
            f"{where}: not valid JSON ({json_problem(error)}); the file is damaged or not a "
            "semantic bank"
        ) from error


def json_problem(error: ValueError | RecursionError) -> str:
    """Say why ``json.loads`` could not read a text."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}: {error.msg}"
    return "too deep" if isinstance(error, RecursionError) else "a number of too many digits"


def format_json(value: Any, indent: int = 0) -> str:
    """Format JSON with short lists and objects on one line, so that a diff shows what changed.

    Raises:
        ValueError: a number that is NaN or infinite.
    """
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    short = isinstance(value, dict | list) and indent >= 4 and indent + len(flat) <= _LINE
    if short or not value or not isinstance(value, dict | list):
        return flat
    space = " " * (indent + 2)
    if isinstance(value, dict):
        rows = [
            f"{json.dumps(key, ensure_ascii=False)}: {format_json(item, indent + 2)}"
            for key, item in value.items()
        ]
        opening, closing = "{", "}"
    else:
        rows = [format_json(item, indent + 2) for item in value]
        opening, closing = "[", "]"
    body = f",\n{space}".join(rows)
    return f"{opening}\n{space}{body}\n{' ' * indent}{closing}"


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    # json keeps the last of two equal keys silently: a class written twice would lose its texts.
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise BankError(f"{where}: {', '.join(map(repr, twice))} appears twice; keep one of them")
    return result


def _stored_vectors(content: Any, source: str) -> StoredVectors:
    keys = {"encoder": str, "dim": int, "sha256": str}
    sound = isinstance(content, dict) and set(content) == set(keys)
    sound = sound and all(isinstance(content[key], kind) for key, kind in keys.items())
    if not sound or content["dim"] < 1 or isinstance(content["dim"], bool):
        raise BankError(
            f"{source}: 'vectors' must be {{encoder, dim, sha256}} of a bank without words, got "
            f"{content!r}; import the bank again, or remove 'vectors' from a bank of words"
        )
    return StoredVectors(**content)


def _entry(content: Mapping[str, Any], stored: bool) -> ClassEntry:
    if stored:
        images = tuple(content.get("images") or ())
        return ClassEntry((), "", (), {}, images, stored=StoredCount(**content["vectors"]))
    candidates = []
    for item in content.get("candidates") or ():
        text, scores = (item, ()) if isinstance(item, str) else (item["text"], item.get("scores"))
        candidates.append(Candidate(text.strip(), tuple(scores or ())))
    return ClassEntry(
        tuple(text.strip() for text in content.get("attributes") or ()),
        content["description"].strip(),
        tuple(candidates),
        content.get("answers") or {},
        tuple(content.get("images") or ()),
        {key: value for key, value in content.items() if key not in _ENTRY_KEYS},
    )


def some_of(items: list[str], separator: str = ", ", limit: int = 8) -> str:
    """Return the first items and how many more there are."""
    rest = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + rest


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
