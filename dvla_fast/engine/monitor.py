"""Validation during training: which episodes select a checkpoint, and what is said of the result.

They are drawn from the monitor images: validation classes, or held-out images of the base classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine.progress import Progress
from dvla_fast.errors import DataError
from dvla_fast.statistics import mean_interval, points

HELD_OUT = "held-out"


def monitor_episodes(data: FewShotData, way: int, shot: int, query: int) -> dict[str, Any]:
    """Return the numbers of validation episodes, lowered to what the monitor images allow.

    Returns:
        ``way``, ``shot`` and ``query``, and ``asked``: the same as asked for, where one was
        lowered.

    Raises:
        DataError: a class has no image left to ask about.
    """
    names = data.monitor.class_names
    counts = torch.bincount(data.monitor.labels, minlength=len(names))
    if int(counts.min()) <= shot:
        held_out = ", raise --data.holdout" if monitor_word(data) == HELD_OUT else ""
        raise DataError(
            f"{data.monitor.name}: class {names[int(counts.argmin())]!r} has {int(counts.min())} "
            f"image(s), and {shot}-shot validation takes {shot + 1} or more of each; add images"
            f"{held_out}{', or lower the shots' if shot > 1 else ''}"
        )
    asked = {"way": way, "shot": shot, "query": query}
    real = {
        "way": min(way, len(names)),
        "shot": shot,
        "query": min(query, int(counts.min()) - shot),
    }
    return real if real == asked else {**real, "asked": asked}


def monitor_word(data: FewShotData) -> str:
    """Say in a word what the monitor images are: of validation classes, or of base classes."""
    return HELD_OUT if data.monitor.class_names == data.base.class_names else "validation"


def monitor_sampler(
    data: FewShotData, numbers: dict[str, Any], seed: int, progress: Progress
) -> EpisodeSampler:
    """Return a sampler over the monitor images, and say what it draws.

    Args:
        numbers: from ``monitor_episodes``.

    Warns:
        UserWarning: way or query were lowered.
    """
    way, shot, query = numbers["way"], numbers["shot"], numbers["query"]
    what = f"{way}-way {shot}-shot episodes, {query} {'query' if query == 1 else 'queries'} a class"
    if "asked" in numbers:
        asked = numbers["asked"]
        alone = "; with one class every answer is right: they select nothing" if way == 1 else ""
        warnings.warn(
            f"{data.monitor.name}: too few classes or images to validate on {asked['way']}-way "
            f"{asked['shot']}-shot episodes with {asked['query']} queries a class; checkpoints are "
            f"selected by {what}{alone}",
            UserWarning,
            stacklevel=3,
        )
    progress.note(f"checkpoints are selected on {data.monitor_kind}: {what}")
    return EpisodeSampler(data.monitor, way, shot, query, seed)


def scored(accuracies: Tensor) -> tuple[float, float | None]:
    """Return the mean of episodes' accuracies (n,) and the half width of its 95 % interval."""
    return accuracies.mean().item(), mean_interval(accuracies)[1]


def validation_facts(
    rows: Sequence[Mapping[str, Any]], key: str, numbers: Mapping[str, Any], episodes: int
) -> dict[str, Any]:
    """Summarise the validations of a run.

    Args:
        rows: of its metrics.
        key: what they call the accuracy by which the checkpoint was selected.
        numbers: from ``monitor_episodes``.
        episodes: of a validation.

    Returns:
        ``key`` and ``monitor_ci95`` of the best validation (the highest of several, so
        optimistic), ``validations``, their number, and ``monitor_episodes``.
    """
    validated = [row for row in rows if key in row]
    best = max(validated, key=lambda row: (row[key], row["step"]))
    return {
        "monitor_episodes": {**numbers, "episodes": episodes},
        key: best[key],
        "monitor_ci95": best.get("monitor_ci95"),
        "validations": len(validated),
    }


def validation_text(summary: Mapping[str, Any], key: str) -> str:
    """Say the accuracy of ``validation_facts`` in a line, with what it is of."""
    numbers, count = summary["monitor_episodes"], summary["validations"]
    best = f"; the best of {count} validations" if count > 1 else ""
    accuracy = accuracy_text(summary[key], summary["monitor_ci95"])
    return (
        f"accuracy on {summary['monitor']}: {accuracy} ({numbers['episodes']} {numbers['way']}-way "
        f"{numbers['shot']}-shot episode{'s' if numbers['episodes'] > 1 else ''}, "
        f"{numbers['query']} {'query' if numbers['query'] == 1 else 'queries'} a class{best})"
    )


def accuracy_text(accuracy: float, half: float | None) -> str:
    """Lay out an accuracy in percent, with the half width of its interval where it has one."""
    return f"{accuracy:.2%}" + ("" if half is None else f" ± {points(half)} %")
