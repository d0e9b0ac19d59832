"""Whether an evaluation reads the texts that the checkpoint's gates learned to read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from dvla_fast.errors import CheckpointError

# What changes the texts without changing their encoder.
COMPARED = ("parts", "top_k", "template", "bank_sha256")


def check_semantics(semantics: Mapping[str, Any], info: Mapping[str, Any], path: str) -> None:
    """Check that texts are encoded as the checkpoint's gates learned to read them.

    Args:
        semantics: the description that ``build_texts`` returns; info: the checkpoint's.

    Raises:
        CheckpointError: another encoder or vector length.
    """
    theirs = info.get("semantics") or {}
    for key in ("encoder", "dim"):
        value = semantics[key]
        if key in theirs and theirs[key] != value:
            raise CheckpointError(
                f"{path}: its gates read texts with {key}={theirs[key]!r}, not {value!r}; give the "
                "text encoder that it was trained with, or the bank of vectors"
            )


def text_differences(
    semantics: Mapping[str, Any],
    infos: Mapping[str, Mapping[str, Any]],
    dataset: str,
    compared: Sequence[str] = COMPARED,
) -> dict[str, Any]:
    """Find text settings that differ from those that the checkpoints' gates learned with.

    Args:
        semantics: the description that ``build_texts`` returns.
        infos: description of each checkpoint, by its path; what one does not say is passed over.
        dataset: the data set evaluated on: another one than that of the training takes another
            bank, which is then no difference.
        compared: the settings to compare.

    Returns:
        setting -> ``{"trained": value, "evaluated": value}``; of several checkpoints, the first
        that differs.

    Warns:
        UserWarning: there are differences.
    """
    found: dict[str, Any] = {}
    for path, info in infos.items():
        theirs = info.get("semantics") or {}
        own = {
            key: {"trained": theirs[key], "evaluated": semantics[key]}
            for key in compared
            if theirs.get(key, semantics[key]) != semantics[key]
            and _matters(key, theirs, semantics, info.get("dataset") == dataset)
        }
        found = own | found
        if own:
            shown = "; ".join(_words(key, theirs, semantics) for key in own)
            warnings.warn(
                f"{path}: its gates learned with other texts ({shown}); give the --semantics "
                "options that it was trained with, unless that difference is what you measure",
                UserWarning,
                stacklevel=3,
            )
    return found


def _matters(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], same: bool) -> bool:
    """Whether a setting that differs changes any text."""
    if key == "bank_sha256":
        return same
    if key == "template":  # None: nothing is selected; then top_k says the difference
        return None not in (theirs["template"], ours["template"])
    # Names, and descriptions alone, are the same whatever attributes are selected.
    parts = {theirs.get("parts", "all"), ours["parts"]}
    return key == "parts" or not parts <= {"name", "description"}


def _words(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    if key == "bank_sha256":
        names = theirs.get("bank"), ours["bank"]
        told = "has changed" if names[0] == names[1] else f"was {names[0]!r}, now {names[1]!r}"
        return f"the bank {told}"
    return f"{key} was {theirs[key]!r}, now {ours[key]!r}"
