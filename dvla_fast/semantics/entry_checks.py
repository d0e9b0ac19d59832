"""What is wrong with a class in the file of a bank."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from dvla_fast.characters import is_unicode

HALF_A_CHARACTER = "holds half a character (a lone surrogate such as \\ud83d); correct it"


def entry_problem(entry: Any, stored: bool = False) -> str | None:
    """Say what is wrong with a class's content in a bank file; None: nothing.

    Args:
        stored: the bank has vectors and no words.
    """
    if not is_unicode(entry):
        return HALF_A_CHARACTER
    if stored:
        if not _is_stored(entry):
            return "is not {vectors: {attributes: n, description: 0 or 1}}"
        return _images_problem(entry)
    if not isinstance(entry, dict):
        return "is not an object with 'attributes' and 'description'"
    attributes, candidates = entry.get("attributes", []), entry.get("candidates", [])
    problem = _candidates_problem(candidates)
    if problem:
        return problem
    if not isinstance(attributes, list) or (not attributes and len(candidates) < 2):
        return "has no attributes (and fewer than two candidates to choose from)"
    for index, text in enumerate(attributes):
        if not _is_text(text):
            return f"has an empty attribute (number {index + 1})"
    if not _is_text(entry.get("description")):
        return "has an empty description"
    if not isinstance(entry.get("answers", {}), dict):
        return "has 'answers' that are not an object {stage: answer}"
    return _images_problem(entry)


def name_problem(name: str) -> str | None:
    """Likewise for the name of a class."""
    if not name.strip():
        return "is no name"
    return None if is_unicode(name) else HALF_A_CHARACTER


def _is_stored(entry: Any) -> bool:
    counts = entry.get("vectors") if isinstance(entry, dict) else None
    if not isinstance(counts, dict) or set(counts) != {"attributes", "description"}:
        return False
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in counts.values()):
        return False
    return counts["attributes"] >= 0 and counts["description"] in (0, 1) and any(counts.values())


def _candidates_problem(candidates: Any) -> str | None:
    if not isinstance(candidates, list):
        return "has 'candidates' that are not a list"
    for index, item in enumerate(candidates):
        text = item.get("text") if isinstance(item, dict) else item
        if not _is_text(text):
            return f"has an empty candidate (number {index + 1})"
        scores = item.get("scores", []) if isinstance(item, dict) else []
        if not isinstance(scores, list) or not all(_is_score(score) for score in scores):
            return f"has candidate number {index + 1} with scores that are not numbers or null"
    return None


def _images_problem(entry: Mapping[str, Any]) -> str | None:
    images = entry.get("images", [])
    if not isinstance(images, list) or not all(_is_text(image) for image in images):
        return "has 'images' that are not a list of image ids"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_score(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is None
    return abs(value) <= sys.float_info.max  # an int may be larger than any float
