"""The limits of what is read out of an answer, from both sides."""

from __future__ import annotations

import json

import pytest

from dvla_fast.errors import LanguageModelError
from dvla_fast.semantics.language_models.base import Answer
from dvla_fast.semantics.parsing import MAX_WORDS, parse_attributes, parse_description

OTHERS = ("long hooked bill", "white face")


def words(count: int) -> str:
    return " ".join(f"red{index}" for index in range(count))


def read(*attributes: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    found = parse_attributes(Answer(json.dumps(attributes)), "Albatross")
    return found.kept, found.dropped


def test_an_attribute_has_at_most_the_largest_number_of_words() -> None:
    longest, longer = words(MAX_WORDS), words(MAX_WORDS + 1)
    assert read(longest, *OTHERS) == ((longest, *OTHERS), ())
    kept, dropped = read(longer, *OTHERS)
    assert kept == OTHERS
    assert [why for _, why in dropped] == [
        f"too long ({len(longer)} characters, {MAX_WORDS + 1} words)"
    ]


def test_one_foreign_word_makes_no_foreign_answer() -> None:
    """Names of things may hold one: "von", "del", "le"."""
    assert read("von Willebrand pattern", *OTHERS)[0] == ("von Willebrand pattern", *OTHERS)
    with pytest.raises(LanguageModelError, match="not in English"):
        read("von Willebrand pattern", "cresta del macho", *OTHERS)
    text = "Sierra del Norte birds, large, hooked bills."
    assert parse_description(Answer(text)) == text
