"""Checks of what files hold that are read back: others may have written or changed them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A number of a range; NaN is in none, and infinity in none without an end."""

    def check(value: Any) -> bool:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return plain and low <= value <= high and abs(value) != math.inf

    return check


def count(low: int = 0, high: int = 10**9) -> Check:
    """A whole number of a range."""
    return lambda value: isinstance(value, int) and number(low, high)(value)


def mapping(value: Any) -> bool:
    """Names with values."""
    return isinstance(value, Mapping)


def text(value: Any) -> bool:
    """A text, if an empty one."""
    return isinstance(value, str)


def flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def or_none(check: Check) -> Check:
    """Null, or what passes another check."""
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    """A list of what passes another check."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def mapping_of(check: Check) -> Check:
    """Names with values that pass another check."""
    return lambda value: mapping(value) and all(map(check, value.values()))


def record(**checks: Check) -> Check:
    """A mapping that holds these keys, with values that pass their checks."""
    return lambda value: (
        mapping(value) and all(key in value and check(value[key]) for key, check in checks.items())
    )


def short(value: Any) -> str:
    """A value for a message."""
    try:
        shown = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        shown = "a number"
    return shown if len(shown) <= 80 else f"{shown[:79]}…"
