"""What a checkpoint must say of itself before a model is built from it or a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvla_fast.engine.entries import (
    Check,
    count,
    flag,
    list_of,
    mapping,
    mapping_of,
    number,
    or_none,
    record,
    short,
    text,
)
from dvla_fast.errors import CheckpointError

REMEDY = (
    "it was edited, or written by another version: use another checkpoint, train again, or read "
    "it with the version that wrote it"
)


def _stage(value: Any) -> bool:
    needed = record(stage=text, dataset=or_none(text), classes=or_none(mapping_of(text)))
    return needed(value) and or_none(mapping)(value.get("settings"))


def _statistics(value: Any) -> bool:
    both = record(mean=list_of(number(-1e6, 1e6)), std=list_of(number(1e-6, 1e6)))
    return both(value) and len(value["mean"]) == len(value["std"]) > 0


# By dotted name. What builds the model checks its other settings.
_MODEL: dict[str, Check] = {"model.backbone.name": text, "model.backbone.image_size": count(1)}
_OF_KIND: dict[str, dict[str, Check]] = {
    "pretrain": {"model.classes": count(1)},
    "metatune": {"model.gated_layers": or_none(list_of(list_of(count())))},
}
_OPTIONAL: dict[str, Check] = {
    "model.backbone.in_channels": count(1),
    "dataset": or_none(text), "split_list": or_none(text), "classes": list_of(text),
    "normalisation": or_none(_statistics), "training": list_of(_stage),
    "start": or_none(mapping), "start.pretrained": text, "inputs": or_none(mapping),
    "semantics": mapping, "semantics.encoder": text, "semantics.dim": count(1),
    "semantics.bank": text, "semantics.bank_sha256": text, "semantics.top_k": count(),
    "semantics.template": or_none(text), "semantics.parts": text, "semantics.truncate": flag,
}  # fmt: skip
RESUMED: dict[str, Check] = {
    "epoch": count(), "step": count(), "best": number(), "best_epoch": count(-1),
    "resume.optimizer": mapping, "resume.rng": mapping,
}  # fmt: skip


def check_description(path: str | Path, info: Mapping[str, Any]) -> None:
    """Check that a model can be built from a description, and its other entries be read.

    Raises:
        CheckpointError: an entry is missing, not of its kind, or does not fit another.
    """
    check_entries(path, info, {**_MODEL, **_OF_KIND.get(info["kind"], {})})
    check_entries(path, info, _OPTIONAL, optional=True)
    channels = info["model"]["backbone"].get("in_channels", 3)
    given = len((info.get("normalisation") or {"mean": [0.0] * channels})["mean"])
    if given != channels:
        raise CheckpointError(
            f"{path}: has a normalisation of {given} channel(s) for a backbone of {channels}; "
            f"{REMEDY}"
        )


def check_entries(
    path: str | Path, info: Mapping[str, Any], checks: Mapping[str, Check], optional: bool = False
) -> None:
    """Check entries of a checkpoint's description.

    Args:
        path: the checkpoint; checks: by dotted name; optional: whether entries may be missing.

    Raises:
        CheckpointError: an entry is missing, or fails its check.
    """
    for name, check in checks.items():
        value, *inner = info, *name.split(".")
        met: list[str] = []
        while inner and mapping(value) and inner[0] in value:
            met.append(inner.pop(0))
            value = value[met[-1]]
        missing = bool(inner)
        if missing and optional:
            continue
        if missing and mapping(value):
            raise CheckpointError(f"{path}: lacks the entry {name}; {REMEDY}")
        if missing or not check(value):
            shown = f"has {'.'.join(met)} {short(value)}, which cannot be"
            raise CheckpointError(f"{path}: {shown}; {REMEDY}")
