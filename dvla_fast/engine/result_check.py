"""What a result that an evaluation left must hold before it is shown or compared.

Results are read back from files that an editor or another program may have changed: an accuracy of
12, or NaN, would stand in a table like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dvla_fast.engine.entries import (
    Check,
    count,
    list_of,
    mapping,
    mapping_of,
    number,
    or_none,
    record,
    short,
    text,
)


def _leaks(value: Any) -> bool:
    classes = (value.get("classes") or {}) if isinstance(value, Mapping) else None
    return isinstance(classes, Mapping) and all(
        isinstance(classes.get(key) or [], list) for key in ("stages", "same_name")
    )


_share, _half = number(0, 1), or_none(number(0, 1e6))
_difference, _p = number(-1, 1), or_none(number(0, 1))

GATED_LAYERS = list_of(lambda pair: isinstance(pair, list) and len(pair) == 2)

_NEEDED: dict[str, Check] = {
    "shot": count(1), "way": count(1), "episodes": count(1), "method": text, "accuracy": _share,
    "ci95": _half, "methods": mapping_of(record(accuracy=_share, ci95=_half)),
}  # fmt: skip
# Evaluations of other kinds or of earlier versions lack some of these.
_OPTIONAL: dict[str, Check] = {
    "paired": mapping_of(record(difference=_difference, ci95=_half, p_value=_p)),
    "over_checkpoints": mapping_of(record(accuracies=list_of(_share), accuracy=_share, ci95=_half)),
    "fixed_alpha": _share, "seed": number(0, 2**63), "dataset": text, "split": text,
    "split_sha256": or_none(text), "images_sha256": or_none(text), "checkpoint": text,
    "checkpoints": list_of(text), "checkpoints_sha256": list_of(or_none(text)),
    "started_from": list_of(or_none(text)),
    "gated_layers": GATED_LAYERS,
    "recipe": or_none(mapping), "semantics": or_none(mapping),
    "text_differences": mapping_of(mapping), "leaks": _leaks,
}  # fmt: skip


def result_fault(result: Any) -> str | None:
    """Say in words what is wrong with one result of an evaluation; None where it can be used."""
    if not mapping(result):
        return f"a result is {short(result)}, no mapping"
    lacking = [key for key in _NEEDED if key not in result]
    if lacking:
        return f"a result lacks {', '.join(lacking)}"
    for key, check in {**_NEEDED, **_OPTIONAL}.items():
        if key in result and not check(result[key]):
            name = "a result" if key == "shot" else f"the {result['shot']}-shot result"
            return f"{name} has {key} {short(result[key])}, which cannot be"
    return None
