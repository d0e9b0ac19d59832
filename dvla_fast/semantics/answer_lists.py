"""The lists in the words of a language model: in JSON, bullets, a table, lines or a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from dvla_fast.semantics.answer_json import complete_strings, json_values

MAX_WORDS, MAX_CHARACTERS = 16, 160  # of an attribute

FENCE = re.compile(r"```[a-zA-Z]*\n?|```")
# "3. bill" and "16: bill", but not "3.5 cm" and "16:9".
MARK = r"[-+*•–▪◦]\s+|\(?\d{1,3}[.):](?!\d)\s*"
_LINE_BULLET = re.compile(rf"^\s*(?:{MARK}|[a-zA-Z][.)]\s+)(.+)$")  # "a) bill" too: lines only
_TABLE_ROW = re.compile(r"^\s*\|([^|]+)\|\s*$")
# A line that is an item without a bullet: no part of a sentence, no heading, no "bill: red".
_PHRASE = re.compile(
    r"(?!(?:and|or|but|with|of|in|that|which|i|it|they|we|you|this|these|there)\b)"
    r"[^\W_][^,;:.!?\[\]{}|*#<>\"]+",
    re.IGNORECASE,
)
_LIST_KEYS = ("attributes", "candidates", "features", "characteristics", "answer", "items", "list")
# Of an object in a list: what it is about, and what it says of that.
_LABEL_KEYS = ("part", "feature", "name", "attribute", "key", "label", "aspect", "category", "type")
_TEXT_KEYS = ("value", "text", "description", "details", "detail", "attribute")
# Keys that say something about the answer or the class instead of what it looks like.
_OTHER_KEYS = frozenset(
    (
        *("class", "class name", "name", "label", "species", "category", "object", "id"),
        *("description", "summary", "reason", "reasons", "reasoning", "explanation", "evidence"),
        *("confidence", "score", "note", "notes", "comment", "source", "sources", "references"),
    )
)


def find_lists(text: str) -> Iterator[tuple[list[str], bool]]:
    """Yield (texts, whether it was cut off) of what may be an answer's list, the likeliest first.

    Words outside of JSON count only where no JSON has words: the rest is about it then.
    """
    worded = False
    for value, cut in json_values(text, mend=True):
        try:
            found = _texts(value)
        except RecursionError:
            continue
        if found is not None:
            worded = worded or _has_words(found)
            yield found, cut
    if not worded and (found := complete_strings(text)):
        worded = _has_words(found)
        yield found, True
    if worded:
        return
    lines = FENCE.sub("", text).splitlines()
    found = bullets(text)
    if len(found) >= 2:
        yield found, False
    elif not re.search(r'\{\s*"', text):  # else the commas are those of broken JSON
        found = _table(lines) or _phrases(lines) or _enumeration(" ".join(lines))
        if found:
            yield found, False


def bullets(text: str) -> list[str]:
    """Return the texts of the bulleted and numbered lines."""
    lines = FENCE.sub("", text).splitlines()
    return [match[1] for line in lines if (match := _LINE_BULLET.match(line))]


def comparable(text: str) -> str:
    """Reduce a text to what counts when two are compared."""
    text = re.sub(r"[\W_]+", " ", text).strip().casefold()
    return re.sub(r"^(?:an?|the) ", "", text)


def _has_words(texts: list[str]) -> bool:
    return any(re.search(r"[^\W\d_]{2}", text) for text in texts)


def _texts(value: Any) -> list[str] | None:
    """Return the texts of a JSON value that is, or holds, a list; None: it does not."""
    if isinstance(value, dict):
        return _object_texts(value)
    if not isinstance(value, list):
        return None
    found: list[str] = []
    for item in value:
        if isinstance(item, dict):
            found += _member_texts(item)
        elif isinstance(item, list):
            found += _texts(item) or []
        else:
            found.append(item if isinstance(item, str) else json.dumps(item))
    return found


def _object_texts(value: dict[str, Any]) -> list[str] | None:
    for key in _LIST_KEYS:
        if isinstance(value.get(key), list):
            return _texts(value[key])
        if isinstance(value.get(key), dict):
            return _object_texts(value[key]) or _pairs(value[key])
    about = _about_looks(value)
    lists = [item for item in about.values() if isinstance(item, list)]
    if lists:
        return [text for item in lists for text in _texts(item) or []]
    if any(isinstance(item, dict) for item in about.values()):
        return _nested(about)
    return _pairs(about) if len(value) >= 2 else None


def _nested(about: dict[str, Any]) -> list[str] | None:
    """Return {"bill": "red", "wings": {"tip": "black"}} as "bill: red", "wings tip: black"."""
    found: list[str] = []
    for key, item in about.items():
        if isinstance(item, str):
            found.append(f"{key}: {item}")
        elif isinstance(item, dict):
            pairs = _pairs(_about_looks(item)) or []
            label = f"{key} " if len(about) > 1 else ""  # an only key is no part, but e.g. a class
            found += [label + pair for pair in pairs] or _texts(item) or []
    return found or None


def _member_texts(item: dict[str, Any]) -> list[str]:
    """Return the attributes in an object of a list: usually one."""
    label = next((key for key in _LABEL_KEYS if isinstance(item.get(key), str)), "")
    texts = [item[key] for key in _TEXT_KEYS if key != label and isinstance(item.get(key), str)]
    if texts:
        return [_joined(item[label], texts[0])] if label else texts[:1]
    listed = any(isinstance(item.get(key), list) for key in _LIST_KEYS)
    if label in ("attribute", "feature", "name") and not listed:
        return [item[label]]
    found = _texts(item) or _pairs(_about_looks(item))
    return found or [json.dumps(item, ensure_ascii=False)]


def _joined(label: str, text: str) -> str:
    """Return "bill: red"; the text alone where it names the label, too."""
    if f" {comparable(label)} " in f" {comparable(text)} ":
        return text
    whole = f"{label}: {text}"
    long = len(whole.split()) > MAX_WORDS or len(whole) > MAX_CHARACTERS
    return label if long and len(label.split()) > 1 else whole


def _about_looks(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if comparable(key) not in _OTHER_KEYS}


def _pairs(value: dict[str, Any]) -> list[str] | None:
    """Return {"bill": "red"} as "bill: red"; None: not all values are texts, or there are none."""
    if not value or not all(isinstance(item, str) for item in value.values()):
        return None
    return [f"{key}: {item}" for key, item in value.items()]


def _table(lines: list[str]) -> list[str]:
    """Read a Markdown table of one column, without its head; empty: there is none."""
    rows = [match[1].strip() for line in lines if (match := _TABLE_ROW.match(line))]
    rules = [place for place, row in enumerate(rows) if re.fullmatch(r":?-+:?", row)]
    return rows[rules[0] + 1 :] if len(rules) == 1 else []


def _phrases(lines: list[str]) -> list[str]:
    """Read lines of a short phrase each, at least three; empty: they may be something else.

    One written line may be a wrapped part of a sentence, and blank ones between them may part
    headings from texts, so all lines must look alike.
    """
    text = "\n".join(lines).strip()
    found = [line.strip() for line in text.split("\n")]
    if found[0].endswith(":"):  # "Attributes:"
        found = [line.strip() for line in "\n".join(found[1:]).strip().split("\n")]
    alike = len({line[:1].isupper() for line in found}) == 1
    short = all(2 <= len(line.split()) <= 8 and _PHRASE.fullmatch(line) for line in found)
    return found if len(found) >= 3 and alike and short else []


def _enumeration(text: str) -> list[str]:
    """Read "..., are a long bill, dark wings, and a white face": at least three short parts."""
    if re.search(r"[\[\]{}]", text):
        return []  # pieces of a list that could not be read
    match = re.search(r"(?:\b(?:are|is|includes?|including|has|have)\b|:)\s+(.+)$", text)
    sentence = match[1] if match else text
    if re.search(r"[.!?]\s", sentence.strip()):
        return []  # several sentences: which of it is the list would be a guess
    parts = [re.sub(r"^and\s+", "", part.strip()) for part in re.split(r"[,;]", sentence)]
    if len(parts) < 3 or any(not 0 < len(part.split()) <= 8 for part in parts):
        return []
    marks = [_LINE_BULLET.match(part) for part in parts]
    return [mark[1] if all(marks) and mark else part for part, mark in zip(parts, marks)]
