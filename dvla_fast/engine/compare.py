"""``dvla-fast compare``: two evaluations, or two groups of them, on the same episodes, in words.

The difference is taken episode by episode, so the spread of the episodes' difficulty cancels. With
several runs a side (seeds), an episode's accuracy is the mean over their checkpoints, and a second
interval over these says what training again would change.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dvla_fast.engine.recipes import result_differences, training_of
from dvla_fast.engine.records import EpisodeRecord, read_summary
from dvla_fast.engine.settings import UsageError, checked
from dvla_fast.engine.tool_config import CompareRun
from dvla_fast.errors import OutputError
from dvla_fast.files import check_new, check_writable, json_text, write_text_atomic
from dvla_fast.statistics import (
    LEVEL,
    PAIRED_INTERVAL,
    episode_class_accuracies,
    holm,
    lineage_note,
    p_text,
    paired_difference,
    points,
    require_scipy,
    shared_note,
    unpaired_difference,
)

# Two evaluations meet the same episodes when all of these agree; what a difference means, in words.
SAME_EPISODES = {
    "dataset": "different data sets",
    "split": "different splits",
    "split_sha256": "splits of different classes or images",
    "images_sha256": "different images (renamed, added or taken away)",
    "way": "different numbers of classes in an episode",
    "shot": "different numbers of supports",
    "query": "different numbers of queries",
    "episodes": "different numbers of episodes",
    "episodes_sha256": "different episode lists (another seed, or another kind of list)",
}


class NotComparableError(OutputError):
    """Two runs did not meet the same episodes, or lack what a comparison reads."""


def difference_in_episodes(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Say why two results cannot be paired, in words; None when they met the same episodes."""
    for key, words in SAME_EPISODES.items():
        if key not in first or key not in second:
            return f"{key} was not recorded"
        if first[key] != second[key]:
            shown = [_short(result[key]) for result in (first, second)]
            seeds = [result["seed"] for result in (first, second) if "seed" in result]
            if key == "episodes_sha256" and len(set(seeds)) == 2:
                return (
                    f"different episode lists, because of different seeds ({seeds[0]} and"
                    f" {seeds[1]}: evaluate that of seed {max(seeds)} again with --seed"
                    f" {min(seeds)})"
                )
            return f"{words} ({shown[0]} and {shown[1]})"
    return None


def check_paired(first: EpisodeRecord, second: EpisodeRecord, paths: Sequence[Any]) -> None:
    """Check that two records hold the same classes and queries, whatever their summaries say.

    Raises:
        OutputError: they do not: a record is not that of its run.
    """
    for mine, theirs in ((first.classes, second.classes), (first.labels, second.labels)):
        if not torch.equal(mine, theirs):
            raise OutputError(
                f"{paths[0]} and {paths[1]}: predictions on other episodes than their summaries "
                "say; a file of one is another run's: run that evaluation again"
            )


def other_pixels(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """Say in words that images of the same names and size have other pixels; None: not known."""
    if first.get("image_size") != second.get("image_size"):
        return None
    hashes = [result.get("pixels_sha256") for result in (first, second)]
    if None in hashes or hashes[0] == hashes[1]:
        return None
    return "the images have the same names but other pixels: edited, or decoded by another library"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text


def compare_groups(
    first: Sequence[str], second: Sequence[str], methods: Sequence[str] = ("", "")
) -> dict[str, Any]:
    """Compare two groups of evaluation runs, shot by shot.

    Args:
        first, second: run folders; the runs of a group are of one recipe (seeds).
        methods: recorded method of each group; empty: the runs' main method.

    Returns:
        ``{"a", "b", "interval", "results": [...]}``; a result has ``shot``, ``methods``,
        ``accuracies``, ``difference`` (a minus b), ``ci95``, ``p_value``, ``checkpoints`` (of each
        group), ``over_checkpoints`` (with the ``test`` that was made: pair by pair for two methods
        of the same trainings, else Welch's; None with one checkpoint in a group), ``notes`` on it,
        ``classes`` (each with ``name``, ``episodes``, ``accuracies``, ``difference``, ``ci95``,
        ``p_value`` and ``p_holm``, corrected for the number of classes), and ``verdict``.

    Raises:
        NotComparableError: no shot in common, other episodes, or a method that was not recorded.
        OutputError: a folder holds no finished evaluation, or predictions on other episodes.
        UsageError: a group has a training twice, or trainings of several recipes.

    Warns:
        UserWarning: images of the same names and size have other pixels.
    """
    groups = [[(path, _by_shot(path)) for path in paths] for paths in (first, second)]
    for group in groups:
        _check_once_each(group)
        _check_one_recipe(group)
    everyone = [run for group in groups for run in group]
    shots = _shared_shots(everyone)
    rows = [_compare_shot(shot, groups, methods) for shot in shots]
    return {"a": list(first), "b": list(second), "interval": PAIRED_INTERVAL, "results": rows}


def _shared_shots(runs: Sequence[tuple[str, dict[int, dict[str, Any]]]]) -> list[int]:
    """The shots that all runs have, once it is known that their episodes are the same."""
    shots = sorted(set.intersection(*(set(results) for _, results in runs)))
    if not shots:
        raise NotComparableError(
            "not comparable: no number of supports is in all runs ("
            + "; ".join(f"{path}: {sorted(results)}" for path, results in runs)
            + ")"
        )
    reference, expected = runs[0]
    for path, results in runs[1:]:
        for shot in shots:
            reason = difference_in_episodes(expected[shot], results[shot])
            if reason:
                raise NotComparableError(
                    f"not comparable: {reference} and {path}, {shot}-shot: {reason}; a paired "
                    "comparison needs the same data set, settings and episode list: evaluate one "
                    "of the two again"
                )
        differs = other_pixels(expected[shots[0]], results[shots[0]])
        if differs:
            warnings.warn(f"{reference} and {path}: {differs}", UserWarning, stacklevel=3)
    return shots


def check_comparable(results: Sequence[dict[str, Any]], other: str) -> None:
    """Check that an evaluation that is about to begin can be compared with a finished one.

    Args:
        results: what the evaluation's results will say of their episodes.
        other: folder of the finished one.

    Raises:
        NotComparableError: no shot in common, or other episodes.
        OutputError: the folder holds no finished evaluation.

    Warns:
        UserWarning: images of the same names and size have other pixels.
    """
    mine = {result["shot"]: result for result in results}
    _shared_shots([("this evaluation", mine), (other, _by_shot(other))])


def _by_shot(path: str) -> dict[int, dict[str, Any]]:
    return {result["shot"]: result for result in read_summary(path)["results"]}


def _check_once_each(group: Sequence[tuple[str, dict[int, dict[str, Any]]]]) -> None:
    """Check that no training is in a group twice, which would look like training without spread.

    A training is known by the hashes of its checkpoints and by where they lie: its best and its
    last epoch are one. Runs that record neither are told apart by their folders.
    """
    known: dict[str, str] = {}
    for path, results in group:
        result = next(iter(results.values()), {})
        files = result.get("checkpoints") or [result.get("checkpoint") or ""]
        keys = {os.path.realpath(path), *filter(None, result.get("checkpoints_sha256") or [])}
        # a relative path says where only to the folder in which the run was started
        keys |= {training_of(file) for file in files if os.path.isabs(file)}
        again = next((known[key] for key in keys if key in known), None)
        if again is not None:
            raise UsageError(
                f"compare: {again} and {path} evaluate the same checkpoint, or the best and the "
                "last of one training, which would count twice; name one evaluation of each "
                "training"
            )
        known |= dict.fromkeys(keys, path)


def _check_one_recipe(group: Sequence[tuple[str, dict[int, dict[str, Any]]]]) -> None:
    """Check that a group is of one recipe; runs that do not tell theirs are passed over."""
    told = [(path, next(iter(results.values()), {})) for path, results in group]
    told = [(path, result) for path, result in told if result.get("recipe")]
    for path, result in told[1:]:
        first, reference = told[0]
        changed = result_differences(reference, result)
        if changed:
            raise UsageError(
                f"compare: {first} and {path} are of different recipes "
                f"({'; '.join(changed[:4])}), and their mean would say nothing of either; put "
                "runs of one recipe on a side, and the others on the other"
            )


def _compare_shot(
    shot: int, groups: Sequence[Sequence[tuple[str, Any]]], methods: Sequence[str]
) -> dict[str, Any]:
    names, sides = [], []
    first: tuple[str, EpisodeRecord] | None = None
    for group, wanted in zip(groups, methods):
        name = wanted or group[0][1][shot]["method"]
        names.append(name)
        found = [(path, _record(path, shot, name)) for path, _ in group]
        first = first or found[0]
        for path, record in found:
            check_paired(first[1], record, [_record_path(p, shot) for p in (first[0], path)])
        sides.append(_together([record for _, record in found], name))
    means = [side.accuracies(name) for side, name in zip(sides, names)]
    trained = [_checkpoint_accuracies(side, name) for side, name in zip(sides, names)]
    several = min(map(len, trained)) > 1
    told = [f"{side} ({name})" for side, name in zip("AB", names)]
    origins = [
        [key for _, results in group for key in results[shot].get("started_from") or []]
        for group in groups
    ]
    of_sides = [*map(shared_note, told, trained), *map(lineage_note, told, origins)]
    notes = [note for note in of_sides if note and several]
    row: dict[str, Any] = {
        "shot": shot,
        "way": groups[0][0][1][shot]["way"],
        "episodes": len(means[0]),
        "methods": names,
        "accuracies": [mean.mean().item() for mean in means],
        **paired_difference(means[0], means[1]),
        "checkpoints": [len(found) for found in trained],
        "over_checkpoints": _over_trainings(trained, groups, shot) if several else None,
        "notes": notes,
        "classes": _compare_classes(sides, names, _class_names(groups[0][0][0], shot)),
    }
    row["verdict"] = verdict(row)
    return row


def _over_trainings(
    trained: Sequence[list[float]], groups: Sequence[Sequence[tuple[str, Any]]], shot: int
) -> dict[str, Any]:
    """Compare what trainings reached; pair by pair where both sides are of the same ones.

    Two methods of one training share its backbone and its luck, which the pairs take out.
    """
    known = [
        [key for _, results in group for key in results[shot].get("checkpoints_sha256") or [None]]
        for group in groups
    ]
    told = None not in known[0] and list(map(len, known)) == list(map(len, trained))
    once = len(set(known[0])) == len(known[0])
    if not (told and once and set(known[0]) == set(known[1])):
        return {**unpaired_difference(*trained), "test": "Welch's t test"}
    second = dict(zip(known[1], trained[1]))
    paired = (trained[0], [second[key] for key in known[0]])
    values = (torch.tensor(side, dtype=torch.float64) for side in paired)
    return {**paired_difference(*values), "test": "paired t test"}


def _record_path(path: str, shot: int) -> Path:
    return Path(path) / f"episodes-{shot}shot.npz"


def _record(path: str, shot: int, method: str) -> EpisodeRecord:
    record = EpisodeRecord.read(_record_path(path, shot))
    if method not in record.predictions:
        raise NotComparableError(
            f"not comparable: {path} holds no predictions of {method!r}; it has "
            f"{', '.join(map(repr, record.predictions))}"
        )
    return record


def _together(records: Sequence[EpisodeRecord], method: str) -> EpisodeRecord:
    """Join what a method said in several runs of the same episodes: each checkpoint counts once."""
    predictions = torch.cat([record.predictions[method] for record in records])
    return EpisodeRecord(records[0].classes, records[0].labels, {method: predictions})


def _checkpoint_accuracies(side: EpisodeRecord, method: str) -> list[float]:
    right = side.predictions[method] == side.labels
    accuracies: list[float] = right.double().mean((1, 2)).tolist()
    return accuracies


def _class_names(path: str, shot: int) -> list[str] | None:
    try:
        content = json.loads((Path(path) / f"confusion-{shot}shot.json").read_text("utf-8"))
        return [str(name) for name in content["classes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # numbers will do


def _compare_classes(
    sides: Sequence[EpisodeRecord], methods: Sequence[str], names: list[str] | None
) -> list[dict[str, Any]]:
    tables = [
        episode_class_accuracies(side.classes, side.labels, side.predictions[method]).flatten()
        for side, method in zip(sides, methods)
    ]
    owner = sides[0].classes.flatten()
    rows: list[dict[str, Any]] = []
    for index in owner.unique().tolist():
        mine = owner == index
        first, second = tables[0][mine], tables[1][mine]
        rows.append(
            {
                "name": names[index] if names and index < len(names) else f"class {index}",
                "episodes": int(mine.sum()),
                "accuracies": [first.mean().item(), second.mean().item()],
                **paired_difference(first, second),
                "p_holm": None,
            }
        )
    tested = [row for row in rows if row["p_value"] is not None]  # one episode tells no spread
    for row, corrected in zip(tested, holm([row["p_value"] for row in tested])):
        row["p_holm"] = corrected
    return rows


def verdict(row: dict[str, Any], names: Sequence[str] = ("A", "B")) -> str:
    """Say in one sentence what a paired difference shows.

    Args:
        row: with ``difference``, ``ci95`` and ``p_value``, in shares.
        names: of the first and the second.
    """
    value, half, p = (row[key] for key in ("difference", "ci95", "p_value"))
    if half is None:
        return f"no difference shown: {100 * value:+.1f} points, without a spread to judge by"
    sign = 1 if value >= 0 else -1
    low, high = sorted((100 * sign * (value - half), 100 * sign * (value + half)))
    evidence = f"95 % interval {low:.1f} to {high:.1f}, {p_text(p)}"
    if p < LEVEL:
        better, worse = names if value > 0 else reversed(names)
        return f"{better} is better than {worse} by {100 * abs(value):.1f} points, {evidence}"
    return (
        f"no difference shown: {names[0]} - {names[1]} = {100 * value:+.1f} points, 95 % interval "
        f"{100 * (value - half):+.1f} to {100 * (value + half):+.1f}, {p_text(p)}"
    )


def comparison_text(compared: dict[str, Any], classes: int = 10) -> str:
    """Lay out the result of :func:`compare_groups` for a terminal.

    Args:
        classes: how many classes to list, those with the largest differences first; 0: all.
    """
    lines = [f"A  {', '.join(compared['a'])}", f"B  {', '.join(compared['b'])}"]
    for row in compared["results"]:
        first, second = (f"{100 * value:.2f} %" for value in row["accuracies"])
        lines += [
            "",
            f"{row['way']}-way {row['shot']}-shot, {_episodes(row['episodes'])}: "
            f"A {first} ({row['methods'][0]}), B {second} ({row['methods'][1]})",
            f"  {row['verdict']}",
            f"  {_reach(row)}",
            *(f"  {note}" for note in row["notes"]),
            *_class_lines(row["classes"], classes),
        ]
    return "\n".join([*lines, "", compared["interval"]])


def _reach(row: dict[str, Any]) -> str:
    over = row["over_checkpoints"]
    if over is None:
        return (
            "this speaks of more episodes with these weights, not of training again: "
            f"{row['checkpoints'][0]} and {row['checkpoints'][1]} checkpoint(s)"
        )
    counts = f"{row['checkpoints'][0]} and {row['checkpoints'][1]} checkpoints, {over['test']}"
    but = " (but see below)" if row["notes"] else ""
    return f"over training runs ({counts}): {verdict(over)}{but}"


def _episodes(count: int) -> str:
    return f"{count:,} episode{'s' if count > 1 else ''}"


def _class_lines(rows: Sequence[dict[str, Any]], limit: int) -> list[str]:
    ordered = sorted(rows, key=lambda row: -abs(row["difference"]))
    shown = ordered[:limit] if limit else ordered
    width = max((len(row["name"]) for row in shown), default=5)
    lines = [f"  by class (p corrected for {len(rows)} classes, Holm):"]
    for row in shown:
        half = "" if row["ci95"] is None else f" ± {points(row['ci95'], 1)}"
        lines.append(
            f"    {row['name']:<{width}}  {100 * row['accuracies'][0]:5.1f} - "
            f"{100 * row['accuracies'][1]:5.1f} = {100 * row['difference']:+5.1f}{half}  "
            f"{p_text(row['p_holm'])}  ({_episodes(row['episodes'])})"
        )
    if len(shown) < len(rows):
        lines.append(
            f"    and {len(rows) - len(shown)} more; `dvla-fast compare A B --classes 0` lists all"
        )
    return lines


def run_compare(config: CompareRun) -> dict[str, Any]:
    """Do what ``dvla-fast compare`` does, and return the comparison."""
    config = checked(config)
    sides = [[part for part in given.split(",") if part] for given in (config.run_a, config.run_b)]
    if not all(sides):
        raise UsageError("compare needs two run folders: dvla-fast compare RUN_A RUN_B")
    require_scipy()
    if config.output:
        check_new(Path(config.output), config.overwrite)
        check_writable(Path(config.output))
    compared = compare_groups(sides[0], sides[1], methods=(config.method_a, config.method_b))
    if config.output:
        write_text_atomic(Path(config.output), json_text(compared, 2) + "\n")
    return compared
