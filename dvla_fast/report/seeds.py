"""What several trainings of one recipe say together: an interval that speaks of training again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dvla_fast.engine.compare import difference_in_episodes
from dvla_fast.engine.entries import list_of, mapping, record, text
from dvla_fast.engine.recipes import result_differences, training_of
from dvla_fast.report.collect import Run
from dvla_fast.statistics import checkpoint_interval, lineage_note, points, shared_note

Found = tuple[Run, dict[str, Any]]

# What is compared of a recipe; files may hold anything.
_RECIPE = record(
    kind=lambda value: True,
    dataset=lambda value: True,
    normalisation=lambda value: True,
    pretrained=lambda value: True,
    model=mapping,
    semantics=mapping,
    training=list_of(record(stage=text)),
)


def over_checkpoints(run: Run, result: Mapping[str, Any]) -> str:
    """What several checkpoints of one evaluation say; "" for a single one."""
    found = (result.get("over_checkpoints") or {}).get(result.get("method"))
    if not found or len(found.get("accuracies", ())) < 2:
        return ""
    count = f"{len(found['accuracies'])} checkpoints"
    started_from = result.get("started_from") or []
    return _sentence(f"{run.name}, over {count}", str(result["method"]), found, started_from)


def recipe_groups(runs: Sequence[Run]) -> list[list[Found]]:
    """Results of one recipe, evaluated alike on one list of episodes, together.

    A training is in a group once: its other evaluations make a group of their own, and a result
    that does not tell its recipe or its training is alone.
    """
    groups: list[list[Found]] = []
    for run in runs:
        for result in run.results:
            told = _RECIPE(result.get("recipe")) and _trainings(result)
            group = next((group for group in groups if told and _belongs(result, group)), None)
            if group is None:
                groups.append(group := [])
            group.append((run, result))
    return groups


def over_runs(runs: Sequence[Run]) -> list[str]:
    """What evaluations of one recipe, each of another training, say: a sentence a group and shot.

    Raises:
        MissingDependencyError: SciPy is not installed.
    """
    return [_group_sentence(group) for group in recipe_groups(runs) if len(group) > 1]


def accuracies_of(group: Sequence[Found], method: str) -> list[float]:
    """Accuracy that each training of a group reached with a method."""
    found: list[float] = []
    for _, result in group:
        several = (result.get("over_checkpoints") or {}).get(method) or {}
        mine = result if method == result["method"] else result["methods"][method]
        found += several.get("accuracies") or [mine["accuracy"]]
    return found


def origins_of(group: Sequence[Found]) -> list[str | None]:
    """The checkpoints that the trainings of a group started from; empty: not known."""
    return [origin for _, result in group for origin in result.get("started_from") or []]


def _belongs(result: dict[str, Any], group: Sequence[Found]) -> bool:
    first = group[0][1]
    same = all(result[key] == first[key] for key in ("shot", "method"))
    return (
        same
        and _RECIPE(first.get("recipe"))
        and difference_in_episodes(first, result) is None
        and not result_differences(first, result)
        and not any(_trainings(result) & _trainings(other) for _, other in group)
    )


def _trainings(result: Mapping[str, Any]) -> set[str]:
    """By what the trainings of a result are known: where checkpoints lie, and their hashes."""
    files = result.get("checkpoints") or [result.get("checkpoint") or ""]
    # a relative path says where only to the folder in which the run was started
    known = {training_of(file) for file in files if os.path.isabs(file)}
    return known | set(filter(None, result.get("checkpoints_sha256") or []))


def _group_sentence(group: Sequence[Found]) -> str:
    first = group[0][1]
    accuracies = accuracies_of(group, first["method"])
    names = ", ".join(run.name for run, _ in group)
    who = f"{first['way']}-way {first['shot']}-shot, {first['method']}, over {len(accuracies)} "
    found = checkpoint_interval(accuracies)
    who = f"{who}trainings of one recipe ({names})"
    return _sentence(who, first["method"], found, origins_of(group))


def _sentence(
    who: str, method: str, found: Mapping[str, Any], started_from: Sequence[str | None]
) -> str:
    values = ", ".join(f"{100 * value:.1f}" for value in found["accuracies"])
    note = (
        shared_note(method, found["accuracies"])
        or lineage_note(method, started_from)
        or "this t interval speaks of training again"
    )
    return (
        f"{who}: {100 * found['accuracy']:.2f} ± {points(found.get('ci95'))} % ({values}); {note}."
    )
