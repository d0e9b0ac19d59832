"""Halves of characters and codes that steer a terminal."""

from __future__ import annotations

from dvla_fast.characters import is_unicode, printable, whole_characters


def test_halves_are_joined_or_replaced() -> None:
    assert whole_characters("a \ud83d\ude00 \ud83d é") == "a 😀 \ufffd é"
    assert is_unicode({"é": ["😀", 1, None]})
    assert not is_unicode({"a": [{"b": "\ude00"}]})
    assert not is_unicode({"\ude00": 1})


def test_only_words_and_line_breaks_are_printable() -> None:
    assert printable("a\x1b[2J\x9b\r\x07\u202e\n\té 😀") == "a[2J\n\té 😀"
