"""An ablation as a Markdown page and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from dvla_fast.statistics import LEVEL


def markdown_table(summary: Mapping[str, Any]) -> str:
    """Lay out the summary of an ablation as a Markdown page."""
    reference, shots = summary["reference"], summary["shots"]
    seeds = len(summary["seeds"])
    lines = [f"# Ablation on {summary['dataset']}", ""]
    lines += [
        f"{summary['way']}-way, {summary['query']} queries a class, {summary['episodes']} episodes "
        f"of the {summary['split']} split for each shot, the same for all; {seeds} training "
        f"seed{'s' if seeds > 1 else ''}; accuracies and differences in points.",
        "",
        f"Δ: minus `{reference}` on the same episodes and seeds, with its 95 % interval; p after "
        f"Holm's correction over {summary['comparisons']} comparisons; **bold**: below {LEVEL}.",
        "",
    ]
    if summary["note"]:
        lines += [f"**{summary['note']}.**", ""]
    if summary["failures"]:
        lines += ["Failed cells: " + ", ".join(sorted(summary["failures"])) + ".", ""]
    unfinished = summary["cells"]["all"] - summary["cells"]["finished"]
    if unfinished:
        lines += [f"**Not finished: {unfinished} of {summary['cells']['all']} cells.**", ""]
    head = ["variant"]
    for shot in shots:
        head += [f"{shot}-shot", "Δ", "p"]
    head += [f"α by layer, {shots[0]}-shot", "what it is"]
    for title, rows in _by_group(summary):
        lines += [f"## {title}", "", _line(head), _line(["---"] * len(head))]
        lines += [_line(_cells(row, len(summary["seeds"]))) for row in rows]
        lines.append("")
    lines += _claims(summary["claims"], seeds)
    lines += _pull(summary["pull"])
    lines += [
        "## How",
        "",
        f"Intervals: {summary['intervals']}.",
        "",
        f"- command: `{summary['line'] or 'dvla-fast ablate'}`",
        f"- commit: {summary['commit'] or 'not a git checkout'}; dvla-fast {summary['dvla_fast']}, "
        f"torch {summary['torch']}, Python {summary['python']}",
        f"- machine: {summary['machine']}",
        f"- computing: {_minutes(summary['cells']['core_seconds'])} core-minutes for "
        f"{summary['cells']['finished']} cells (backbones included); finished "
        f"{summary['finished_at']}",
        "",
    ]
    warned = {row["variant"]: row["warnings"] for row in summary["rows"] if row["warnings"]}
    for name, texts in warned.items():
        lines += [f"- `{name}` warned: {text}" for text in texts]
    return "\n".join(lines).rstrip() + "\n"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}" if seconds >= 600 else f"{seconds / 60:.1f}"


def _by_group(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for title, rows in groupby(summary["rows"], key=lambda row: row["group_title"]):
        yield title, list(rows)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Mapping[str, Any], seeds: int) -> list[str]:
    cells = [f"`{row['variant']}`"]
    for result in row["results"]:
        if result["accuracy"] is None:
            cells += ["not computed", "", ""]
            continue
        cells.append(f"{100 * result['accuracy']['estimate']:.2f}")
        difference = result["difference"]
        if difference is None:
            cells += ["", ""]
            continue
        text = _estimate(difference)
        bold = difference["p_holm"] < LEVEL
        cells += [f"**{text}**" if bold else text, _p(difference["p_holm"])]
    alpha = row["results"][0].get("alpha")
    cells.append(" ".join(f"{value:.2f}" for value in alpha) if alpha else "")
    return [*cells, row["title"] + _lacking(row, seeds)]


def _lacking(row: Mapping[str, Any], seeds: int) -> str:
    """Say which seeds a row lacks: its own, or those of the reference in its differences."""
    own = len(row["seeds"])
    apart = [x["difference"]["seeds"] for x in row["results"] if x["difference"] is not None]
    paired = min(apart, default=own)
    words = f" ({own} of {seeds} seeds)" if 0 < own < seeds else ""
    if paired < own:
        words += f" (Δ: {paired} of {seeds} seeds)"
    if apart and paired == 1 < seeds:
        words += " (Δ of one seed: its interval is over episodes alone)"
    return words


def _estimate(value: Mapping[str, Any], scale: float = 100) -> str:
    """A difference with its interval."""
    ends = [] if value["low"] is None else [scale * value["low"], scale * value["high"]]
    digits = 2
    if ends and ends[0] * ends[1] > 0:  # as many as show that the interval leaves zero out
        digits = min(max(2, -math.floor(math.log10(min(map(abs, ends))))), 6)
    elif any(ends):  # as many as show that the interval has a width
        digits = min(max(2, -math.floor(math.log10(max(map(abs, ends))))), 6)
    interval = ", ".join(f"{end:+.{digits}f}" for end in ends) or "unknown"
    return f"{scale * value['estimate']:+.{digits}f} [{interval}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _claims(claims: Sequence[Mapping[str, Any]], seeds: int) -> list[str]:
    lines = ["## The paper's claims", ""]
    lines += ["| claim | here | tests (95 %, not corrected) |", "|---|---|---|"]
    for claim in claims:
        tests = []
        for test in claim["tests"]:
            scale, unit = (1, "") if test["test"].startswith("α") else (100, " points")
            few = f" ({test['seeds']} of {seeds} seeds)" if test["seeds"] < seeds else ""
            tests.append(f"{test['test']}: {_estimate(test, scale)}{unit}{few}")
        lines.append(_line([claim["claim"], claim["verdict"], "; ".join(tests)]))
    lines.append("")
    for claim in claims:
        if "selection" in claim:
            chosen = ", ".join(f"{k}: {x:.0%}" for k, x in claim["selection"]["chosen"].items())
            proposed = claim["selection"]["proposed"]
            lines += [
                f"Hallucinated among the proposed attributes: {proposed:.0%}; among those that "
                f"top-k chooses, by k: {chosen}.",
                "",
            ]
    return lines


def _pull(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    if not layers:
        return []
    shown = layers[0]["alphas"][::2]
    lines = [
        "## What the rewards ask of the gates",
        "",
        "Mean reward of base episodes with one gate of `full` set to α, the other at its policy's "
        "mean, averaged over seeds. Then seed by seed: the mean of a Beta policy that earns most, "
        "without and with the entropy bonus, and the mean α that was learned.",
        "",
        _line(["gate before", *(f"α = {a:g}" for a in shown), "best mean", "with the bonus",
               "learned"]),
        _line(["---"] * (len(shown) + 4)),
    ]  # fmt: skip
    for item in layers:
        stage, block = item["layer"]
        rewards = [f"{value:.4f}" for value in item["rewards"][::2]]
        keys = ("best", "best_with_entropy", "learned")
        means = [" ".join(f"{value:.2f}" for value in item[key]) for key in keys]
        lines.append(_line([f"stage {stage}, block {block}", *rewards, *means]))
    return [*lines, ""]


def csv_table(summary: Mapping[str, Any]) -> str:
    """One line for each variant and shot; accuracies and differences as shares."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["group", "variant", "title", "shot", "seeds", "accuracy", "accuracy_low", "accuracy_high",
         "difference", "difference_low", "difference_high", "p_value", "p_holm", "alpha",
         "difference_seeds"]
    )  # fmt: skip
    for row in summary["rows"]:
        for result in row["results"]:
            accuracy, difference = result["accuracy"] or {}, result["difference"] or {}
            writer.writerow(
                [row["group"], row["variant"], row["title"], result["shot"], len(row["seeds"])]
                + [accuracy.get(key) for key in ("estimate", "low", "high")]
                + [difference.get(key) for key in ("estimate", "low", "high", "p_value", "p_holm")]
                + [" ".join(f"{value:.4f}" for value in result.get("alpha", []))]
                + [difference.get("seeds")]
            )
    return stream.getvalue()
