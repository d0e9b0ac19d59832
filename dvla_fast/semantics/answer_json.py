"""JSON in the words of a language model: whole, written as Python would, or cut off."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

# strict=False: models break lines inside of texts
_DECODER = json.JSONDecoder(strict=False)
# What a JSON text may end after, once it is cut off; a text that never ends runs to the end.
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)|[\[\]{},]', re.DOTALL)
_PYTHON_TOKEN = re.compile(
    r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|[\[\]{}]|['"].*""", re.DOTALL
)
_DEEPEST = 20
_COMPLETE_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(?=[,\]])')


def json_values(text: str, *, mend: bool = False) -> Iterator[tuple[Any, bool]]:
    """Yield (value, whether it was cut off) of the JSON in a text, outermost first.

    Lists and objects with the quotes of Python count as JSON.

    Args:
        mend: yield the complete part of lists and objects that break off, too; else only whole
            ones, which may lie inside one that breaks off.
    """
    position, tries = 0, 0
    while tries < 50 and (match := re.compile(r"[\[{]").search(text, position)):
        tries += 1
        start = match.start()
        try:
            value, position = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            value, position = _python_value(text, start)
        if position > start:
            yield value, False
            continue
        position = match.end()
        if mend and re.match(r"[\[{]\s*[\"'\[{]", text[start : start + 80]):
            value, closed = _mended(text, start)
            if value is not None:
                yield value, True
            if value is not None or not closed:
                return  # what lies inside belongs to something incomplete


def complete_strings(text: str) -> list[str]:
    """Return the whole texts of the first list in a text, though that list is broken."""
    if not re.search(r'\[\s*"', text):
        return []
    return [unescape(item) for item in _COMPLETE_STRING.findall(text[text.index("[") :])]


def unescape(text: str) -> str:
    """Return what is between the quotes of a JSON text as it is meant."""
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return text.rstrip("\\")


def _python_value(text: str, start: int) -> tuple[Any, int]:
    """Read a list or dict written in Python: (value, its end), or (None, -1)."""
    stack: list[str] = []
    for match in _PYTHON_TOKEN.finditer(text, start):
        token = match[0]
        if token in ("[", "{"):
            stack.append("]" if token == "[" else "}")
        elif token in ("]", "}") and stack.pop() != token:
            break
        if len(stack) > _DEEPEST:
            break
        if not stack:
            # TypeError: what JSON does not have, e.g. a set
            errors = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
            with contextlib.suppress(*errors), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of unknown escapes
                value = ast.literal_eval(text[start : match.end()])
                return json.loads(json.dumps(value)), match.end()
            break
    return None, -1


def _mended(text: str, start: int) -> tuple[Any, bool]:
    """Read the complete members of broken JSON: (value; None: there are none, its end came).

    Objects inside a list are members of it only when they are whole.
    """
    stack: list[str] = []
    ends: list[tuple[int, str]] = []
    for match in _JSON_TOKEN.finditer(text, start):
        token = match[0]
        if token in ("[", "{"):
            stack.append("]" if token == "[" else "}")
            if len(stack) > _DEEPEST:
                break
        elif token in ("]", "}"):
            stack.pop()
        if token in ("]", "}", ",") and "]}" not in "".join(stack):
            ends.append((match.start() + (token != ","), "".join(reversed(stack))))
        if not stack:
            break
    for end, closing in reversed(ends[-_DEEPEST:]):
        with contextlib.suppress(ValueError):
            return json.loads(text[start:end] + closing, strict=False), not stack
    return None, not stack
