"""Fills the tables of README.md and docs/ from the kept records in benchmarks/results.

    python -m benchmarks.tables

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is ``cpu`` or ``gpu``
(summaries of all kept records, a column a machine), ``cpu-floors`` or ``gpu-floors`` (what was
asked for beside what they reach), the name of a record's file without its ending (every row of it),
or ``gpu-rows`` (those of all GPUs). So a GPU's record, which ``make gpu-check`` makes, is taken up
by itself.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path

from benchmarks.lines import (
    CPU_FLOORS,
    CPU_LINES,
    EAGER,
    GPU_FLOORS,
    GPU_LINES,
    MODES,
    Floor,
    Line,
)
from benchmarks.pairing import OURS
from benchmarks.ratios import BOUND, bounds, bounds_markdown, by_group, markdown, rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Machines of the summary of CPUs: how the names of their records begin.
CPUS = {
    "EPYC, Zen 5": "amd-epyc-zen5-2-cores",
    "EPYC, Zen 4": "amd-epyc-avx512-2-cores",
    "Xeon, AVX-512": "intel-xeon-avx512-2-cores",
    "EPYC, AVX2": "amd-epyc-avx2-2-cores",
    "Xeon, tiles": "intel-xeon-amx-2-cores",
}
NO_GPU = "No GPU record exists yet: `make gpu-check` on a machine with a GPU makes one."
# The full recipe on miniImageNet: 64 classes of 600 images, two views of each.
EPOCHS, VIEWS, TUNING_EPISODES = 800, 2 * 64 * 600, 100 * 480


@cache
def record(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def gpu_records() -> list[str]:
    names = sorted(path.stem for path in RESULTS.glob("*.json"))
    return [name for name in names if "gpu" in record(name)]


def ratios(names: list[str], among: str = "") -> dict[str, float]:
    """Ratio by group; a later record adds what earlier ones lack, with peers that it marks."""
    found: dict[str, float] = {}
    for name in names:
        found = {row["group"]: row["ratio"] for row in rows(record(name), among)} | found
    return found


def times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:,.0f}×"


def together(
    groups: tuple[str, ...], mode: str, found: dict[str, float]
) -> tuple[float, float] | None:
    """Geometric mean and lowest of the groups' ratios; None where one was not measured."""
    values = [found.get(group.format(mode=mode)) for group in groups]
    measured = [value for value in values if value is not None]
    if len(measured) < len(values):
        return None
    return math.exp(sum(map(math.log, measured)) / len(measured)), min(measured)


def cell(line: Line, found: dict[str, float]) -> str:
    """Both modes' ratios; empty where a group was not measured."""
    shown = []
    for mode in line.modes:
        measured = together(line.groups, mode, found)
        if measured is None:
            return ""
        mean, lowest = measured
        shown.append(times(mean) + (f" ({times(lowest)})" if len(line.groups) > 1 else ""))
    return ", ".join(shown)


def summary(lines: list[Line], columns: dict[str, list[str]]) -> str:
    """A table of ratios with a column for each machine, from its records."""
    table = [
        f"| forward, forward + backward | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    found = {column: ratios(names) for column, names in columns.items()}
    eager = {column: eager_groups(names) for column, names in columns.items()}
    for line in lines:
        cells = []
        for column in columns:
            text = cell(line, found[column])
            alone = any(g.format(mode=m) in eager[column] for g in line.groups for m in line.modes)
            cells.append(f"{text} {EAGER}" if text and alone and EAGER not in line.label else text)
        if any(cells):
            table.append(f"| {line.label} | {' | '.join(cells)} |")
    return "\n".join(table)


def floors(asked: list[Floor], columns: dict[str, list[str]]) -> str:
    """A table of what was asked for and what each machine's records show, bold where it is less."""
    table = [
        f"| forward, forward + backward | asked | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for floor in asked:
        wanted = [(mode, least) for mode, least in zip(MODES, floor.asked) if least is not None]
        cells = []
        for names in columns.values():
            found = ratios(names, floor.peers)
            measured = [together(floor.groups, mode, found) for mode, _ in wanted]
            shown = [
                against(each[0 if floor.mean else 1], least)
                for each, (_, least) in zip(measured, wanted)
                if each is not None
            ]
            cells.append(", ".join(shown) if len(shown) == len(wanted) else "")
        least = ", ".join(f"{least:g}×" for _, least in wanted)
        table.append(f"| {floor.figure} | {least} | {' | '.join(cells)} |")
    return "\n".join(table)


def against(ratio: float, least: float) -> str:
    """The ratio, bold where it is less than was asked, with the digits that show it."""
    if ratio >= least:
        return times(ratio)
    short = times(ratio) if ratio < least - 0.05 else f"{ratio:.2f}×"
    return f"**{short}**"


def eager_groups(names: list[str]) -> set[str]:
    """The groups that a machine's records have with eager peers alone."""
    found: dict[str, bool] = {}
    for name in names:
        for group, providers in by_group(record(name)).items():
            peers = [peer for peer in providers if not peer.startswith((OURS, BOUND))]
            if OURS in providers and peers:
                found.setdefault(group, all(peer.startswith("eager ") for peer in peers))
    return {group for group, eager in found.items() if eager}


def cpu_records() -> dict[str, list[str]]:
    """Each CPU's records."""
    names = sorted(path.stem for path in RESULTS.glob("*.json"))
    return {title: [n for n in names if n.startswith(machine)] for title, machine in CPUS.items()}


def recipe_hours(name: str) -> tuple[float, float] | None:
    """Hours that the full recipe's steps take at a record's rates: pre-training, meta-tuning."""
    groups = by_group(record(name))
    found = []
    for stage, share in (
        ("pretraining visformer_tiny 224 px 2048 images", EPOCHS * VIEWS / 2048),
        ("meta-tuning visformer_tiny 224 px 16 episodes", TUNING_EPISODES / 16),
    ):
        if OURS not in groups.get(stage, {}):
            return None
        found.append(groups[stage][OURS]["median_us"] * share / 3.6e9)
    return found[0], found[1]


def by_gpu() -> dict[str, list[str]]:
    """Each GPU's records."""
    kept: dict[str, list[str]] = {}
    for name in gpu_records():
        kept.setdefault(record(name)["gpu"], []).append(name)
    return kept


def gpu_summary() -> str:
    """The table of all GPUs' records, with what each was measured on; or that there is none."""
    names = gpu_records()
    if not names:
        return NO_GPU
    parts = [summary(GPU_LINES, by_gpu())]
    for name in names:
        of = record(name)
        parts.append(
            f"{of['gpu']}: {of['date']}, driver {of['driver']}, torch {of['torch']}, Triton "
            f"{of['triton']}, commit {(of['commit'] or 'unknown')[:7]}."
        )
        if hours := recipe_hours(name):
            parts.append(
                "At these rates the steps of the full miniImageNet recipe (800 epochs of "
                "pre-training, 48,000 episodes of meta-tuning) take "
                f"{hours[0]:.1f} + {hours[1]:.1f} hours, without validation, colour jitter and "
                "checkpoints."
            )
    return "\n\n".join(parts)


def table(name: str) -> str:
    """What stands between the marks of a name.

    Raises:
        FileNotFoundError: no record is called so.
    """
    if name == "cpu":
        return summary(CPU_LINES, cpu_records())
    if name == "cpu-floors":
        return floors(CPU_FLOORS, cpu_records())
    if name == "gpu":
        return gpu_summary()
    if name == "gpu-floors":
        return floors(GPU_FLOORS, by_gpu()) if gpu_records() else NO_GPU
    if name == "gpu-rows":
        parts = [f"### {record(name)['gpu']}\n\n{every_row(name)}" for name in gpu_records()]
        return "\n\n".join(parts) or NO_GPU
    return every_row(name)


def every_row(name: str) -> str:
    kept = record(name)
    limits = bounds(kept)
    return markdown(rows(kept)) + ("\n\n" + bounds_markdown(limits) if limits else "")


def filled(page: str) -> str:
    """The page with every table made anew."""
    return TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", page)


def main() -> None:
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        new = filled(page)
        if new != page:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: written")


if __name__ == "__main__":
    main()
