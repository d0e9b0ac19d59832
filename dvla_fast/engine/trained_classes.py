"""Which classes a checkpoint was trained on, in all its stages, and whether others ask about them.

Few-shot accuracy is about classes that no stage of the training has seen. A checkpoint therefore
carries its stages, the first one first: each with its data set, the names of its classes, and
hashes of a few images of each. Names tell where to look; equal images tell a class that was trained
on under another split list, or in another folder, from one that merely has the same name.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvla_fast.data import FewShotData, ImageSet
from dvla_fast.errors import CheckpointError
from dvla_fast.names import normalised_name

# Of a stage: "stage", "dataset", "classes" (name -> hashes of images, None where not known), and
# "settings" where they are known.
Stage = dict[str, Any]

_SAMPLES = 3  # images of a class that a checkpoint remembers
_SHOWN = 5  # classes that a message names


def unknown_stage(stage: str, dataset: str | None = None) -> Stage:
    """Return a stage whose classes are not known, such as weights that others published."""
    return {"stage": stage, "dataset": dataset, "classes": None}


def training_stage(stage: str, data: FewShotData, config: Any) -> Stage:
    """Describe training on the base classes of a data set, by the settings in a dataclass."""
    described = {"stage": stage, "dataset": data.name, "classes": class_digests(data.base)}
    return {**described, "settings": asdict(config)}


def class_digests(images: ImageSet) -> dict[str, str]:
    """Return hashes of the pixels of a few images of each class, by its name."""
    classes = {}
    for label, name in enumerate(images.class_names):
        index = _members(images, label)
        chosen = np.linspace(0, len(index) - 1, min(_SAMPLES, len(index))).round().astype(int)
        classes[name] = " ".join(_digests(images, index[chosen]))
    return classes


def training_stages(info: Mapping[str, Any]) -> list[Stage]:
    """Return the stages of a checkpoint from its description, the first one first.

    Checkpoints that do not list them get what they do say: pre-training the names of its classes,
    meta-tuning nothing.
    """
    stages: list[Stage] | None = info.get("training")
    if stages is not None:
        return stages
    stage = unknown_stage(info.get("kind", "published"), info.get("dataset"))
    if "classes" in info:
        stage["classes"] = dict.fromkeys(info["classes"], "")
    return [stage]


def trained_classes(stages: Sequence[Stage], data: FewShotData, split: str) -> dict[str, Any]:
    """Compare the classes of a split with those that a checkpoint was trained on.

    Args:
        stages: of all checkpoints that are used, as from ``training_stages``.
        split: base, monitor or novel.

    Returns:
        For a summary: ``split``; ``trained_on``, the classes of the split that are of a training
        stage on the same data set, or share an image with one; ``same_name``, those that share
        only the name with a class of another data set; ``stages``, each with its data set and
        number of classes; and ``verdict``: "trained on", "same names", "unknown" (a stage does
        not list its classes), "clean", or "base classes" for a split that consists of them: those
        may be trained on.
    """
    images = data.split(split)
    listed = [
        {
            "stage": stage["stage"],
            "dataset": stage["dataset"],
            "classes": None if stage["classes"] is None else len(stage["classes"]),
        }
        for stage in stages
    ]
    facts: dict[str, Any] = {"split": split, "trained_on": [], "same_name": [], "stages": listed}
    if images.class_names == data.base.class_names:
        return {**facts, "verdict": "base classes"}
    for label, name in enumerate(images.class_names):
        met = [entry for stage in stages for entry in _entries(stage, name)]
        if any(dataset == data.name for dataset, _ in met):
            facts["trained_on"].append(name)
        elif met:
            known = {digest for _, digests in met for digest in digests.split()}
            same = known and any(d in known for d in _digests(images, _members(images, label)))
            facts["trained_on" if same else "same_name"].append(name)
    unknown = any(stage["classes"] is None for stage in stages)
    verdict = "unknown" if unknown else "clean"
    verdict = "same names" if facts["same_name"] else verdict
    return {**facts, "verdict": "trained on" if facts["trained_on"] else verdict}


def require_untrained(
    stages: Mapping[str, Sequence[Stage]], data: FewShotData, split: str
) -> dict[str, Any]:
    """Check that checkpoints were not trained on classes of a split.

    Args:
        stages: of each checkpoint, by its path; the rest as for ``trained_classes``.

    Returns:
        What ``trained_classes`` says of all of them together.

    Raises:
        CheckpointError: one was, naming the classes.

    Warns:
        UserWarning: classes of another data set have the same names.
    """
    for path, own in stages.items():
        trained = trained_classes(own, data, split)["trained_on"]
        if trained:
            raise CheckpointError(
                f"{path}: was trained on {len(trained)} of the {split} classes of {data.name} "
                f"({_some(trained)}), so results on them would not be about unseen classes; train "
                "on a split without them, or use another checkpoint (other classes that merely "
                "share these names: rename them, or the data set's folder)"
            )
    together = [stage for own in stages.values() for stage in own]
    facts = trained_classes(together, data, split)
    if facts["same_name"]:
        others = sorted(
            {
                str(dataset)
                for name in facts["same_name"]
                for stage in together
                for dataset, _ in _entries(stage, name)
            }
        )
        warnings.warn(
            f"{len(facts['same_name'])} of the {split} classes of {data.name} "
            f"({_some(facts['same_name'])}) have the names of classes of {', '.join(others)}, "
            f"which {', '.join(stages)} was trained on; if they are the same things, results on "
            "them are not about unseen classes",
            UserWarning,
            stacklevel=3,
        )
    return facts


def _entries(stage: Stage, name: str) -> Iterator[tuple[str | None, str]]:
    """Yield (data set, hashes) of the classes of a stage that go by a name."""
    wanted = normalised_name(name)
    for other, digests in (stage["classes"] or {}).items():
        if normalised_name(other) == wanted:
            yield stage["dataset"], digests


def _members(images: ImageSet, label: int) -> np.ndarray:
    return np.flatnonzero(images.labels.cpu().numpy() == label)


def _digests(images: ImageSet, index: np.ndarray) -> Iterator[str]:
    """Yield a hash of each image at ``index``, read one by one."""
    for place in index.tolist():
        image: Tensor = images.gather(torch.tensor([place])).cpu().contiguous()
        yield hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
