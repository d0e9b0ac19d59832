"""What a result that an evaluation left must hold before it is shown or compared.

Results are read back from files that an editor or another program may have changed: an accuracy of
12, or NaN, would stand in a table like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_Check = Callable[[Any], bool]


def _number(low: float, high: float) -> _Check:
    def check(value: Any) -> bool:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return plain and low <= value <= high  # NaN is in no range

    return check


def _whole(value: Any) -> bool:
    return isinstance(value, int) and _number(1, 10**9)(value)


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _list_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _each(**checks: _Check) -> _Check:
    """A mapping of mappings, all of which hold these keys with such values."""
    return lambda value: (
        _mapping(value)
        and all(
            _mapping(item)
            and all(key in item and check(item[key]) for key, check in checks.items())
            for item in value.values()
        )
    )


def _leaks(value: Any) -> bool:
    classes = (value.get("classes") or {}) if isinstance(value, Mapping) else None
    return isinstance(classes, Mapping) and all(
        isinstance(classes.get(key) or [], list) for key in ("stages", "same_name")
    )


_share, _half = _number(0, 1), _or_none(_number(0, 1e6))
_difference, _p = _number(-1, 1), _or_none(_number(0, 1))

GATED_LAYERS = _list_of(lambda pair: isinstance(pair, list) and len(pair) == 2)

_NEEDED: dict[str, _Check] = {
    "shot": _whole, "way": _whole, "episodes": _whole, "method": _text, "accuracy": _share,
    "ci95": _half, "methods": _each(accuracy=_share, ci95=_half),
}  # fmt: skip
# Evaluations of other kinds or of earlier versions lack some of these.
_OPTIONAL: dict[str, _Check] = {
    "paired": _each(difference=_difference, ci95=_half, p_value=_p),
    "over_checkpoints": _each(accuracies=_list_of(_share), accuracy=_share, ci95=_half),
    "fixed_alpha": _share, "seed": _number(0, 2**63), "dataset": _text, "split": _text,
    "split_sha256": _or_none(_text), "images_sha256": _or_none(_text), "checkpoint": _text,
    "checkpoints": _list_of(_text), "checkpoints_sha256": _list_of(_or_none(_text)),
    "gated_layers": GATED_LAYERS,
    "recipe": _or_none(_mapping), "text_differences": _each(), "leaks": _leaks,
}  # fmt: skip


def result_fault(result: Any) -> str | None:
    """Say in words what is wrong with one result of an evaluation; None where it can be used."""
    if not _mapping(result):
        return f"a result is {_short(result)}, no mapping"
    lacking = [key for key in _NEEDED if key not in result]
    if lacking:
        return f"a result lacks {', '.join(lacking)}"
    for key, check in {**_NEEDED, **_OPTIONAL}.items():
        if key in result and not check(result[key]):
            name = "a result" if key == "shot" else f"the {result['shot']}-shot result"
            return f"{name} has {key} {_short(result[key])}, which cannot be"
    return None


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = "a number"
    return text if len(text) <= 80 else f"{text[:79]}…"
