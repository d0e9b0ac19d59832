"""Reading run folders for the report: whatever is there, and plain words for what is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvla_fast.engine.compare import difference_in_episodes, other_pixels
from dvla_fast.engine.entries import count, number
from dvla_fast.engine.records import EpisodeRecord
from dvla_fast.engine.result_check import GATED_LAYERS, result_fault
from dvla_fast.engine.run_folder import read_metrics
from dvla_fast.engine.settings import load_yaml
from dvla_fast.errors import OutputError

_SECTIONS = ("data", "model", "semantics", "pretrain", "metatune", "evaluate")
_FIGURE = number(-1e100, 1e100)  # charts calculate with them
# Of what every run logs: whether it is a list, an entry a gated layer.
_LISTED = {
    "loss": False, "supervised": False, "accuracy": False, "monitor_accuracy": False,
    "monitor_episode_accuracy": False, "alpha_mean": True, "alpha_std": True,
    "advantage_mean": True, "advantage_std": True, "collapsed": True,
}  # fmt: skip
# null where there is none: the interval of a single episode, the share of no untied pairs
_NONE = ("ci95", "preference_accuracy")
STAGES = {"pretrain": "pre-training", "metatune": "meta-tuning"}


@dataclass
class Run:
    """One run folder, as far as it can be read.

    Attributes:
        name: short, and no other run's.
        kind: pretrain, metatune, evaluate, demo, or unknown.
        config, summary: as saved; empty where missing.
        metrics: stage -> rows, in order of steps.
        results: of an evaluation or a demo, one for each shot.
        records, class_names: by shot.
        notes: what is missing or damaged.
    """

    path: Path
    name: str
    kind: str = "unknown"
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    records: dict[int, EpisodeRecord] = field(default_factory=dict)
    class_names: dict[int, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def dataset(self) -> str:
        """Name of the data set, or what the configuration calls it."""
        given = self.config.get("data", {}).get("dataset", "")
        return str(self.summary.get("dataset") or Path(str(given)).name)

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary."""
        return bool(self.summary)

    def result(self, shot: int) -> dict[str, Any] | None:
        """The result with this number of supports."""
        return next((result for result in self.results if result.get("shot") == shot), None)

    @property
    def layers(self) -> list[str]:
        """Names of the gated layers, from wherever they are known."""
        for source in (self.summary, *self.results, self.config.get("model", {})):
            pairs = source.get("gated_layers")
            if pairs and GATED_LAYERS(pairs):
                return [f"stage {stage}, block {block}" for stage, block in pairs]
        rows = [row for row in self.metrics.get("metatune", []) if "alpha_mean" in row]
        layers = len(rows[0]["alpha_mean"]) if rows else 0
        return [f"gated layer {index + 1}" for index in range(layers)]


def read_runs(paths: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Read run folders, and say what is missing or not comparable.

    Returns:
        The runs that could be read, and notes about all of them, one sentence each.

    Raises:
        OutputError: none of the folders holds a run.
    """
    runs: list[Run] = []
    notes: list[str] = []
    for name, path in zip(_short_names(paths), map(Path, paths)):
        run = None if _is_ablation(path) else _read_run(path, name)
        if run is None and _is_ablation(path):
            notes.append(
                f"{path}: an ablation, which is no single run; its table and plot are ablation.md "
                "and ablation.png there."
            )
        elif run is None:
            notes.append(f"{path}: no run here (no config.yaml, metrics.jsonl or summary.json).")
        else:
            runs.append(run)
            notes += [f"{run.name}: {note}" for note in run.notes]
    if not runs:
        raise OutputError(
            f"nothing to report: {' '.join(notes)} Give folders of 'dvla-fast pretrain', metatune, "
            "evaluate or demo"
        )
    return runs, [*notes, *_comparability(runs)]


def _short_names(paths: Sequence[str]) -> list[str]:
    parts = [Path(path).resolve().parts for path in paths]
    length = 1
    longest = max(map(len, parts))
    while len({part[-length:] for part in parts}) < len(set(parts)) and length < longest:
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _is_ablation(path: Path) -> bool:
    cells = (path / "cells").is_dir() and (path / "config.yaml").is_file()
    return cells or (path / "ablation.json").is_file()


def _read_run(path: Path, name: str) -> Run | None:
    files = ("config.yaml", "metrics.jsonl", "summary.json")
    if not any((path / file).is_file() for file in files):
        return None
    run = Run(path, name)
    run.config = _config(run)
    run.summary = _summary(run)
    run.kind = _kind(run)
    run.metrics = _metrics(run)
    run.results = _results(run)
    _check_finished(run)
    for result in run.results:
        _read_record(run, result)
        leaks = result.get("leaks") or {}
        if leaks.get("verdict") == "leak":
            run.notes.append(
                f"{result.get('shot')}-shot: {leaks.get('seen_queries')} of {leaks.get('queries')} "
                "queries are images that the texts were written from: the accuracy is too high."
            )
    if run.results:  # the same for all shots
        run.notes += _class_notes(run.results[0]) + _text_notes(run.results[0])
    return run


def _class_notes(result: dict[str, Any]) -> list[str]:
    """Say where it is open whether training saw the classes that the result is about."""
    facts = (result.get("leaks") or {}).get("classes") or {}
    stages = [stage for stage in facts.get("stages") or [] if isinstance(stage, dict)]
    split, notes = facts.get("split", result.get("split")), []
    if same := [str(name) for name in facts.get("same_name") or []]:
        others = sorted({str(stage["dataset"]) for stage in stages if stage.get("classes")})
        notes.append(
            f"{len(same)} class(es) of the split {split} ({_first(same)}) have the names of "
            f"classes that the checkpoint was trained on ({', '.join(others)}), but none of the "
            "remembered images: if they are the same things, the accuracy is not about unseen "
            "classes."
        )
    if facts.get("verdict") == "unknown" or (same and any(not s.get("classes") for s in stages)):
        silent = [str(stage.get("stage")) for stage in stages if not stage.get("classes")]
        notes.append(
            f"Whether training saw classes of the split {split} is not known: a stage "
            f"({', '.join(dict.fromkeys(silent)) or '?'}) does not list its classes."
        )
    return notes


def _text_notes(result: dict[str, Any]) -> list[str]:
    """Say how the texts differ from those that the gates learned with."""
    found = []
    for key, values in (result.get("text_differences") or {}).items():
        if key == "bank_sha256":
            found.append("another bank, or a bank that has changed")
        else:
            found.append(f"{key} was {values.get('trained')!r}, now {values.get('evaluated')!r}")
    return [f"The gates learned with other texts: {'; '.join(found)}."] if found else []


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _config(run: Run) -> dict[str, Any]:
    import yaml

    try:
        content = load_yaml((run.path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        run.notes.append("config.yaml is missing or damaged: its settings are not known.")
        return {}
    sections = {key: content[key] or {} for key in _SECTIONS if key in content}
    wrong = [key for key, value in sections.items() if not isinstance(value, dict)]
    if wrong:
        run.notes.append(f"config.yaml is damaged: no settings under {', '.join(wrong)}.")
    return {**content, **sections, **{key: {} for key in wrong}}


def _summary(run: Run) -> dict[str, Any]:
    path = run.path / "summary.json"
    if not path.exists():
        return {}  # said by _check_finished
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict):
        return content
    run.notes.append("summary.json is damaged: results are not shown.")
    return {}


def _results(run: Run) -> list[dict[str, Any]]:
    found = run.summary.get("results", [])
    if not isinstance(found, list):
        run.notes.append("summary.json is damaged (no list of results): results are not shown.")
        return []
    faults = [result_fault(result) for result in found]
    run.notes += [
        f"summary.json is damaged ({fault}): that result is not shown." for fault in faults if fault
    ]
    return [result for result, fault in zip(found, faults) if not fault]


def _kind(run: Run) -> str:
    if run.summary.get("command") in ("pretrain", "metatune", "evaluate", "demo"):
        return str(run.summary["command"])
    parts = [key for key in ("pretrain", "metatune", "evaluate") if key in run.config]
    if len(parts) == 3:
        return "demo"
    return parts[-1] if parts else "unknown"


def _metrics(run: Run) -> dict[str, list[dict[str, Any]]]:
    try:
        rows = read_metrics(run.path)
    except (OSError, ValueError):
        run.notes.append("metrics.jsonl cannot be read: no curves.")
        return {}
    stages: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, None] = {}  # in order
    shapes = dict(_LISTED)
    for row in rows:
        known = _drawable(row, shapes)
        lacking = (key for key in row if key not in known)
        left_out |= {key: None for key in lacking if row[key] is not None or key not in _NONE}
        stages.setdefault(row["stage"], []).append(known)
    if left_out:
        run.notes.append(
            f"metrics.jsonl holds values of {_first(list(left_out))} that are not the finite "
            "numbers that a run logs there: curves leave them out."
        )
    for rows_of_stage in stages.values():
        rows_of_stage.sort(key=lambda row: row["step"])
    return stages


def _drawable(row: dict[str, Any], shapes: dict[str, bool]) -> dict[str, Any]:
    """What charts can draw of a row: finite numbers, and lists of them.

    Args:
        shapes: key -> whether it holds lists; keys that it lacks are added, as this row has them.
    """
    known = {"stage": row["stage"]}
    for key, value in row.items():
        listed = isinstance(value, list)
        entry = count() if key == "collapsed" else _FIGURE
        if (
            all(map(entry, value if listed else [value]))
            and shapes.setdefault(key, listed) == listed
        ):
            known[key] = value
    return known


def _check_finished(run: Run) -> None:
    for stage, words in STAGES.items():
        rows = run.metrics.get(stage, [])
        section = run.config.get(stage)
        planned = section.get("epochs") if isinstance(section, dict) else None
        mine = run.kind in (stage, "demo")
        if mine and not rows:
            run.notes.append(f"no epoch of {words} was logged: its curves are missing.")
        elif mine and isinstance(planned, int) and rows[-1]["step"] < planned:
            run.notes.append(
                f"cut off half-way, or still going: {words} logged {rows[-1]['step']} of {planned}"
                " epochs; figures show what there is."
            )
    if not run.finished and run.kind in ("evaluate", "demo"):
        run.notes.append("no summary.json: the evaluation did not finish, so it has no result.")
    elif not run.finished:
        run.notes.append("no summary.json: the run did not finish.")


def _read_record(run: Run, result: dict[str, Any]) -> None:
    shot = result.get("shot")
    if not isinstance(shot, int):
        return
    try:
        record = EpisodeRecord.read(run.path / f"episodes-{shot}shot.npz")
        if result.get("method", next(iter(record.predictions))) not in record.predictions:
            raise OutputError("of another evaluation")
        run.records[shot] = record
    except OutputError:
        run.notes.append(
            f"{shot}-shot: episodes-{shot}shot.npz is missing or damaged, so there are no paired "
            "comparison, classes, confusion or single episodes for it."
        )
        return
    count = int(run.records[shot].classes.max()) + 1
    if run.records[shot].alphas is None and "alpha" in result and result["alpha"]:
        run.notes.append(
            f"{shot}-shot: gates of single episodes were not recorded (an earlier version wrote "
            "this run): evaluate again to see them."
        )
    try:
        content = json.loads((run.path / f"confusion-{shot}shot.json").read_text("utf-8"))
        run.class_names[shot] = [str(name) for name in content["classes"]]
        if len(run.class_names[shot]) < count:
            raise ValueError("of another record")
    except (OSError, ValueError, KeyError, TypeError):
        run.class_names[shot] = [f"class {index}" for index in range(count)]
        run.notes.append(f"{shot}-shot: class names were not found; numbers stand for them.")


def _comparability(runs: Sequence[Run]) -> list[str]:
    """Sentences about what must not be compared, and about a single seed."""
    notes = []
    datasets = sorted({run.dataset for run in runs if run.dataset})
    if len(datasets) > 1:
        notes.append(
            f"The runs are of different data sets ({', '.join(datasets)}): their accuracies and "
            "rewards cannot be compared with each other."
        )
    evaluated = [run for run in runs if run.results]
    for shot in sorted({r["shot"] for run in evaluated for r in run.results if "shot" in r}):
        holders = [(run, run.result(shot)) for run in evaluated if run.result(shot)]
        first, reference = holders[0]
        for run, result in holders[1:]:
            reason = difference_in_episodes(reference or {}, result or {})
            if reason and first.dataset == run.dataset:  # else it is said above
                notes.append(
                    f"{shot}-shot results of {first.name} and {run.name} are not comparable episode"
                    f" by episode: {reason}."
                )
            differs = other_pixels(reference or {}, result or {})
            if differs and not reason:
                notes.append(f"{first.name} and {run.name}: {differs} ({shot}-shot).")
    if len(evaluated) == 1 or len({_seed(run) for run in evaluated}) == 1:
        checkpoints = {path for run in evaluated for path in _checkpoints(run)}
        if len(checkpoints) == 1:
            notes.append(
                "All results are of one checkpoint, from one training seed: intervals speak of "
                "more episodes with these weights, not of training again."
            )
    return notes


def _seed(run: Run) -> str:
    return str(run.summary.get("seed", run.config.get("seed")))  # whatever a file holds


def _checkpoints(run: Run) -> list[str]:
    found = run.results[0].get("checkpoints") or [run.results[0].get("checkpoint", run.name)]
    return [str(path) for path in found]
