"""What an evaluation leaves, on disk and in words: predictions, figures of each class, tables."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvla_fast.engine.predict import BEFORE, FIXED, LEARNED, VISUAL
from dvla_fast.engine.result_check import result_fault
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.errors import MissingDependencyError, OutputError
from dvla_fast.files import json_text
from dvla_fast.pictures.confusion import plot_confusion
from dvla_fast.statistics import (
    CHECKPOINT_INTERVAL,
    INTERVAL,
    PAIRED_INTERVAL,
    checkpoint_interval,
    class_accuracies,
    confusion,
    lineage_note,
    p_text,
    points,
    shared_note,
)

_COMMANDS = ("evaluate", "demo")  # whose folders hold records


@dataclass(frozen=True)
class EpisodeRecord:
    """Every prediction on one list of episodes.

    Attributes:
        classes: (n, way) int64, the split's class behind each episode label.
        labels: (n, Q) int64 in [0, way), the truth.
        predictions: method -> (K, n, Q) int64, for K checkpoints.
        alphas: (K, n, L) float32, mean learned gate of each gated layer and episode; None without
            learned gates, and in files of earlier versions.
    """

    classes: Tensor
    labels: Tensor
    predictions: dict[str, Tensor]
    alphas: Tensor | None = None

    def accuracies(self, method: str) -> Tensor:
        """Accuracy of each episode (n,), the mean over checkpoints."""
        return (self.predictions[method] == self.labels).double().mean((0, 2))

    def over_checkpoints(self, method: str) -> dict[str, Any]:
        """Summarise the accuracies of the K >= 2 checkpoints, each over all episodes.

        Checkpoints that got equally many queries right have no spread at all.
        """
        right = (self.predictions[method] == self.labels).double().mean((1, 2))
        found = checkpoint_interval(right.tolist())
        # the mean of equal numbers may differ from them in its last digit
        return found | {key: round(found[key], 12) for key in ("std", "ci95")}

    def write(self, path: Path) -> None:
        """Write a compressed NumPy archive of int32 and int16 arrays."""
        arrays: dict[str, Any] = {
            f"predictions_{index}": predictions.short().numpy()
            for index, predictions in enumerate(self.predictions.values())
        }
        if self.alphas is not None:
            arrays["alphas"] = self.alphas.float().numpy()
        with open(path, "wb") as stream:
            np.savez_compressed(
                stream,
                classes=self.classes.int().numpy(),
                labels=self.labels.short().numpy(),
                methods=np.array(list(self.predictions)),
                **arrays,
            )

    @classmethod
    def read(cls, path: Path) -> EpisodeRecord:
        """Read what :meth:`write` wrote; nothing is unpickled.

        Raises:
            OutputError: missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                methods = [str(name) for name in file["methods"]]
                predictions = {
                    name: torch.from_numpy(file[f"predictions_{index}"]).long()
                    for index, name in enumerate(methods)
                }
                classes, labels = (torch.from_numpy(file[k]).long() for k in ("classes", "labels"))
                alphas = torch.from_numpy(file["alphas"]) if "alphas" in file.files else None
            record = cls(classes, labels, predictions, alphas)
            record._check()
        except Exception as error:  # numpy raises nearly anything on damaged files
            raise OutputError(
                f"{path}: no readable predictions ({error}); run that evaluation again"
            ) from error
        return record

    def _check(self) -> None:
        """Raise ValueError unless shapes and values are those of one list of episodes."""
        (n, way), queries = self.classes.shape, self.labels.shape[1]
        tables = {"labels": self.labels[None], **self.predictions}
        for name, table in tables.items():
            if not len(table) or table.shape[1:] != (n, queries):
                raise ValueError(f"{name}: shape {tuple(table.shape)}")
            if table.min() < 0 or table.max() >= way:
                raise ValueError(f"{name}: not in [0, {way})")
        if self.classes.min() < 0 or not self.predictions:
            raise ValueError("no predictions, or no classes")
        if self.alphas is not None and (self.alphas.dim() != 3 or self.alphas.shape[1] != n):
            raise ValueError(f"alphas: shape {tuple(self.alphas.shape)}")


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Read the summary of an evaluation run.

    Raises:
        OutputError: the folder holds no finished evaluation, or one with a result that cannot be.
    """
    path = Path(folder) / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{folder}: no finished evaluation here ({path.name} is missing or damaged); give the "
            "--output folder of a `dvla-fast evaluate` run"
        ) from error
    if not isinstance(summary, dict) or summary.get("command") not in _COMMANDS:
        raise OutputError(f"{folder}: not a `dvla-fast evaluate` run; give the folder of one")
    results = summary.get("results")
    if not isinstance(results, list) or not results:
        raise OutputError(f"{path}: damaged (no list of results); run that evaluation again")
    for result in results:
        if fault := result_fault(result):
            raise OutputError(f"{path}: damaged ({fault}); run that evaluation again")
    return summary


def result_table(results: list[dict[str, Any]]) -> str:
    """Lay out results as a plain table: a row per method, an accuracy and a difference per shot."""
    names = [name for name in (BEFORE, VISUAL, FIXED, LEARNED) if name in results[0]["methods"]]
    labels = {name: name for name in names}
    if FIXED in labels:
        labels[FIXED] = f"{FIXED} (alpha = {results[0]['fixed_alpha']:g})"
    width = max(map(len, labels.values())) + 2
    way = results[0]["way"]
    header = "".join(f"{way}-way {result['shot']}-shot".rjust(18) for result in results)
    lines = [f"{'method':<{width}}{header}", "-" * (width + 18 * len(results))]
    for name in names:
        cells = [_cell(result["methods"][name], "accuracy") for result in results]
        lines.append(f"{labels[name]:<{width}}" + "".join(cell.rjust(18) for cell in cells))
    main = results[0]["method"]
    if len(names) > 1:
        lines += ["", f"{main} minus, on the same episodes (points)"]
    for name in names:
        if name == main:
            continue
        pairs = [result["paired"][f"{main} - {name}"] for result in results]
        cells = [_cell(pair, "difference").rjust(18) for pair in pairs]
        lines.append(f"  {labels[name]:<{width - 2}}" + "".join(cells))
        lines.append(" " * width + "".join(p_text(pair["p_value"]).rjust(18) for pair in pairs))
    count = results[0]["episodes"]
    lines += ["", f"{count} episode{'s' if count > 1 else ''} each; {INTERVAL}"]
    if len(names) > 1:
        lines.append(f"differences: {PAIRED_INTERVAL}")
    return "\n".join(lines)


def _cell(value: dict[str, float], key: str) -> str:
    sign = "+" if key == "difference" else ""
    return f"{100 * value[key]:{sign}.2f} ± {points(value['ci95'])}"


def checkpoints_table(results: Sequence[dict[str, Any]]) -> str:
    """Lay out what several checkpoints say about training again, in percent; "" for a single one.

    Args:
        results: of one evaluation, with ``over_checkpoints`` where it had several.
    """
    results = [result for result in results if result.get("over_checkpoints")]
    if not results:
        return ""
    rows, notes = [], []
    for result in results:
        for name, found in result["over_checkpoints"].items():
            values = ", ".join(f"{100 * value:.2f}" for value in found["accuracies"])
            rows.append(
                f"  {result['shot']}-shot  {100 * found['accuracy']:.2f} ± {points(found['ci95'])}"
                f"  s = {points(found['std'])}  {name}: {values}"
            )
            notes.append(shared_note(f"{result['shot']}-shot {name}", found["accuracies"]))
    notes.append(lineage_note("", results[0].get("started_from") or []))
    count = len(next(iter(results[0]["over_checkpoints"].values()))["accuracies"])
    head = f"over the {count} checkpoints, which speaks of training again (percent)"
    return "\n".join([head, *rows, *filter(None, notes), CHECKPOINT_INTERVAL])


def keep_record(
    folder: RunFolder, result: dict[str, Any], record: EpisodeRecord, names: Sequence[str]
) -> None:
    """Write what one list of episodes leaves: metrics, predictions, per-class figures."""
    shot = result["shot"]
    folder.log("evaluate", shot, accuracy=result["accuracy"], ci95=result["ci95"])
    folder.write_file(f"episodes-{shot}shot.npz", record.write)
    write_confusion(folder, record, names, result)


def keep_result(folder: RunFolder, result: dict[str, Any]) -> None:
    """Write the result of a list of episodes after all else: the mark that the list is finished."""
    folder.write_text(_result_name(result), json_text(result, indent=2) + "\n")


def finished_result(folder: RunFolder, described: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the result of a list of episodes that an interrupted run finished.

    Args:
        described: what the result must say, as far as it is known before the list is evaluated.

    Returns:
        None where the folder lacks it, or has that of other weights, images, texts or versions,
        which is then removed: its files are about to be replaced. So is the summary of all lists.
    """
    path = folder.path / _result_name(described)
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        EpisodeRecord.read(folder.path / f"episodes-{described['shot']}shot.npz")
        wanted = json.loads(json_text(described))
        same = all(result.get(key) == value for key, value in wanted.items())
        if same and result_fault(result) is None:
            return result
    except (OSError, ValueError, AttributeError, OutputError):
        pass
    path.unlink(missing_ok=True)
    (folder.path / "summary.json").unlink(missing_ok=True)  # written again when all lists are done
    return None


def _result_name(result: Mapping[str, Any]) -> str:
    return f"result-{result['shot']}shot.json"


def write_confusion(
    folder: RunFolder, record: EpisodeRecord, names: Sequence[str], result: dict[str, Any]
) -> None:
    """Write per-class accuracy and the confusion matrix of the main method.

    ``per_class-<shot>shot.csv``, ``confusion-<shot>shot.csv`` (counts, rows are the truth),
    ``confusion-<shot>shot.json`` (counts, and how often each class was a choice), and
    ``confusion-<shot>shot.png`` where matplotlib is installed.
    """
    method, shot = result["method"], result["shot"]
    given = (record.classes, record.labels, record.predictions[method], len(names))
    matrix, rows = confusion(*given), class_accuracies(*given)
    rates = matrix.rates
    table: list[list[Any]] = [
        ["class", "episodes", "accuracy", "ci95", "most_taken_for", "share_of_times_offered"]
    ]
    for index, (name, row) in enumerate(zip(names, rows)):
        others = rates[index].clone().nan_to_num(-1.0)
        others[index] = -1.0
        worst = int(others.argmax())
        rival = [names[worst], f"{others[worst]:.4f}"] if others[worst] > 0 else ["", ""]
        table.append(
            [name, row["episodes"], _number(row["accuracy"]), _number(row["ci95"]), *rival]
        )
    stem = f"confusion-{shot}shot"
    folder.write_file(f"per_class-{shot}shot.csv", lambda path: _write_csv(path, table))
    counts = [["true \\ predicted", *names]]
    counts += [[name, *map(str, row)] for name, row in zip(names, matrix.counts.tolist())]
    folder.write_file(f"{stem}.csv", lambda path: _write_csv(path, counts))
    content = {
        "method": method,
        "classes": list(names),
        "counts": matrix.counts.tolist(),
        "offered": matrix.offered.tolist(),
        "meaning": "counts[i][j]: queries of class i given class j; offered[i][j]: queries of "
        "class i in episodes that held class j",
    }
    folder.write_text(f"{stem}.json", json_text(content) + "\n")
    title = f"{result['dataset']}/{result['split']}, {result['way']}-way {shot}-shot, {method}"
    with contextlib.suppress(MissingDependencyError):
        folder.write_file(f"{stem}.png", lambda path: plot_confusion(rates, names, path, title))


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6f}"


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")
