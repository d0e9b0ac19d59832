"""An ablation as a forest plot of paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from dvla_fast.pictures import (
    BLUE,
    GREY,
    GRID,
    INK,
    MUTED,
    ORANGE,
    new_figure,
    plain,
    styled,
)  # fmt: skip
from dvla_fast.statistics import LEVEL


def plot_ablation(summary: Mapping[str, Any], output: str | Path) -> None:
    """Draw paired differences with their intervals, a row a variant and a column a shot, as PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    places, heads, labels = _places(summary)
    shots = summary["shots"]
    height = 1.6 + 0.23 * max(places.values(), default=0)
    with styled():
        figure = new_figure(3.4 + 3.9 * len(shots), height, 150)
        axes = figure.subplots(1, len(shots), sharey=True, squeeze=False)[0]
        for column, axis in enumerate(axes):
            _forest(axis, summary, column, places)
            axis.set_ylim(max(places.values(), default=0) + 1, -0.5)
        axes[0].set_yticks(list(labels), list(labels.values()), fontsize=8.5, color=INK)
        for place, title in heads.items():
            axes[0].annotate(
                title, (0, place), xycoords=("axes fraction", "data"), xytext=(-8, 0),
                textcoords="offset points", ha="right", va="center", fontsize=8.5,
                fontweight="bold", annotation_clip=False,
            )  # fmt: skip
        note = f"; {summary['note']}" if summary["note"] else ""
        seeds = len(summary["seeds"])
        over = " over seeds and episodes" if seeds > 1 else ""  # else the note says over what
        figure.text(
            0.01, 0.008,
            f"{plain(summary['dataset'])}, {summary['way']}-way, {summary['episodes']} paired "
            f"episodes, {seeds} seed{'s' if seeds > 1 else ''}; 95 % intervals{over}; "
            f"filled: p < {LEVEL} after Holm{note}",
            fontsize=7.5, color=MUTED,
        )  # fmt: skip
        figure.tight_layout(rect=(0, 0.35 / height, 1, 1))
        figure.savefig(output, format="png")


def _places(summary: Mapping[str, Any]) -> tuple[dict[str, int], dict[int, str], dict[int, str]]:
    """Where rows stand: variant -> place, place -> group's title, place -> label."""
    places: dict[str, int] = {}
    heads: dict[int, str] = {}
    labels: dict[int, str] = {}
    place = 0
    for title, rows in groupby(summary["rows"], key=lambda row: row["group_title"]):
        drawn = [row for row in rows if row["variant"] != summary["reference"]]
        if not drawn:
            continue
        heads[place] = title
        for offset, row in enumerate(drawn, 1):
            places[row["variant"]] = place + offset
            labels[place + offset] = row["variant"] + _paired(row, len(summary["seeds"]))
        place += len(drawn) + 1
    return places, heads, labels


def _paired(row: Mapping[str, Any], seeds: int) -> str:
    counts = [x["difference"]["seeds"] for x in row["results"] if x["difference"] is not None]
    if not counts:
        return " (not computed)"
    return f" ({min(counts)} of {seeds} seeds)" if min(counts) < seeds else ""


def _forest(axis: Any, summary: Mapping[str, Any], column: int, places: Mapping[str, int]) -> None:
    shot = summary["shots"][column]
    axis.axvline(0, color=MUTED, linewidth=1)
    for row in summary["rows"]:
        result = row["results"][column]
        if row["variant"] == summary["reference"]:
            known = result["accuracy"]
            level = f"{100 * known['estimate']:.1f} %" if known else "not computed"
            axis.set_title(f"{shot}-shot: minus {row['variant']} ({level})", fontsize=10)
        difference = result["difference"]
        if difference is None:
            continue
        place, estimate = places[row["variant"]], 100 * difference["estimate"]
        stands = difference["p_holm"] < LEVEL
        colour = GREY if not stands else (BLUE if estimate > 0 else ORANGE)
        ink = colour if stands else MUTED
        if difference["low"] is not None:
            ends = [100 * difference["low"], 100 * difference["high"]]
            axis.plot(ends, [place, place], color=ink, linewidth=1.6)
        axis.plot(
            [estimate], [place], "o", markersize=5, color=ink,
            markerfacecolor=colour if stands else "white",
        )  # fmt: skip
    axis.set_xlabel("difference in accuracy, points")
    axis.grid(axis="y", color=GRID, linewidth=0.4)
    axis.tick_params(axis="y", length=0)
