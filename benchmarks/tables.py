"""Fills the tables of README.md and docs/ from the kept records in benchmarks/results.

    python -m benchmarks.tables

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is ``cpu`` or ``gpu``
(summaries of all kept records, a column a machine), the name of a record's file without its ending
(every row of it), or ``gpu-rows`` (those of all GPUs). So a GPU's record, which ``make gpu-check``
makes, is taken up by itself.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.pairing import OURS
from benchmarks.ratios import BOUND, bounds, bounds_markdown, by_group, markdown, rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODES = ("forward", "forward+backward")
# Machines of the summary of CPUs: how the names of their records begin.
CPUS = {
    "EPYC, AVX-512": "amd-epyc-avx512-2-cores",
    "Xeon, AVX-512": "intel-xeon-avx512-2-cores",
    "EPYC, AVX2": "amd-epyc-avx2-2-cores",
    "Xeon, tiles": "intel-xeon-amx-2-cores",
}
NO_GPU = "No GPU record exists yet: `make gpu-check` on a machine with a GPU makes one."
EAGER = "¹"  # a row, or a cell, whose peers are eager PyTorch's alone
FEW_SHOT = (
    "T5-G1-H8-D24-N196-P9", "T1-G80-H8-D24-N196-P45", "T1-G80-H8-D48-N49-P45",
    "T16-G80-H8-D48-N49-P45", "T25-G1-H8-D48-N49-P77", "T25-G1-H6-D64-N196-P77",
)  # fmt: skip
# The full recipe on miniImageNet: 64 classes of 600 images, two views of each.
EPOCHS, VIEWS, TUNING_EPISODES = 800, 2 * 64 * 600, 100 * 480


@dataclass(frozen=True)
class Line:
    """A row of a summary.

    Attributes:
        label: what it says.
        groups: names of the records' groups with ``{mode}`` for the two modes; of several, the
            geometric mean of their ratios is shown and the lowest.
        modes: which of them.
    """

    label: str
    groups: tuple[str, ...]
    modes: tuple[str, ...] = MODES


def attention(dtype: str, shapes: tuple[str, ...] = FEW_SHOT, how: str = "") -> tuple[str, ...]:
    return tuple(f"dual_attention {shape} {dtype} {{mode}}{how}" for shape in shapes)


def gate(images: int, width: int, dtype: str, how: str = "") -> tuple[str, ...]:
    tokens = {192: 196, 384: 49}[width]
    return (f"RLAGate B{images}-d{width}-N{tokens}-P45 {dtype} {{mode}}{how}",)


CPU_LINES = [
    Line("`beta_policy`, 5 states", ("beta_policy {mode} n=5",)),
    Line(
        "the same in a REINFORCE loss, with backward",
        ("beta_policy REINFORCE loss {mode} n=5",),
        MODES[1:],
    ),
    Line("`beta_policy`, 1,000,000 states", ("beta_policy {mode} n=1000000",)),
    Line(
        f"`gate_policy`, one episode of 5 images {EAGER}",
        ("gate_policy T1-G5-N196-P9-d192 float32 {mode}",),
    ),
    Line(f"of 25 images {EAGER}", ("gate_policy T1-G25-N49-P45-d384 float32 {mode}",)),
    Line(f"of 80 images {EAGER}", ("gate_policy T1-G80-N196-P45-d192 float32 {mode}",)),
    Line(
        "`dual_attention`, six few-shot shapes, geometric mean (lowest)", attention("float32")
    ),
    Line("the same in bfloat16", attention("bfloat16")),
    Line(
        "`dual_attention`, 4096 × 1024 tokens",
        attention("float32", ("T2-G1-H8-D64-N4096-P1024",)),
    ),
    Line("the same in bfloat16", attention("bfloat16", ("T2-G1-H8-D64-N4096-P1024",))),
    *(
        Line(label, gate(images, width, dtype))
        for images in (80, 1280)
        for width in (192, 384)
        for label, dtype in (
            (f"`RLAGate`, {images} images, d = {width}", "float32"),
            ("the same in bfloat16", "bfloat16"),
        )
    ),
]  # fmt: skip
LONG = ("T2-G1-H16-D64-N2048-P2048", "T2-G1-H8-D128-N2048-P2048", "T1-G1-H8-D128-N8192-P8192")
GRAPHS = FEW_SHOT[:3]
GPU_LINES = [
    Line("`dual_attention`, six few-shot shapes, bfloat16", attention("bfloat16", how=" eager")),
    Line("the same in float16", attention("float16", how=" eager")),
    Line("three of them in CUDA graphs, bfloat16", attention("bfloat16", GRAPHS, " graph")),
    Line("2,048 tokens and more, bfloat16", attention("bfloat16", LONG, " eager")),
    *(
        Line(f"`beta_policy`, {n:,} states", (f"beta_policy n={n} {{mode}} eager",))
        for n in (100, 1600, 10_000_000)
    ),
    Line("100 states in a CUDA graph", ("beta_policy n=100 {mode} graph",)),
    *(
        Line(label, (f"gate_policy {case} float32 {{mode}} eager",))
        for label, case in (
            ("`gate_policy`, one episode of 5 images", "T1-G5-N196-P9-d192"),
            ("of 80 images", "T1-G80-N196-P45-d192"),
        )
    ),
    *(
        Line(f"`RLAGate`, {images} images, d = {width}, bfloat16",
             gate(images, width, "bfloat16", " eager"))
        for images in (80, 1280)
        for width in (192, 384)
    ),
    Line("80 images in a CUDA graph, d = 192, bfloat16", gate(80, 192, "bfloat16", " graph")),
    Line(
        "pre-training Visformer-Tiny, 224 px",
        ("pretraining visformer_tiny 224 px 2048 images",), MODES[1:],
    ),
    Line("meta-tuning it", ("meta-tuning visformer_tiny 224 px 16 episodes",), MODES[1:]),
]  # fmt: skip


@cache
def record(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def gpu_records() -> list[str]:
    names = sorted(path.stem for path in RESULTS.glob("*.json"))
    return [name for name in names if "gpu" in record(name)]


def ratios(names: list[str]) -> dict[str, float]:
    """Ratio by group; a later record adds what earlier ones lack, with peers that it marks."""
    found: dict[str, float] = {}
    for name in names:
        found = {row["group"]: row["ratio"] for row in rows(record(name))} | found
    return found


def times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:,.0f}×"


def cell(line: Line, found: dict[str, float]) -> str:
    """Both modes' ratios; empty where a group was not measured."""
    shown = []
    for mode in line.modes:
        values = [found.get(group.format(mode=mode)) for group in line.groups]
        measured = [value for value in values if value is not None]
        if len(measured) < len(values):
            return ""
        mean = math.exp(sum(map(math.log, measured)) / len(measured))
        shown.append(times(mean) + (f" ({times(min(measured))})" if len(measured) > 1 else ""))
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


def eager_groups(names: list[str]) -> set[str]:
    """The groups that a machine's records have with eager peers alone."""
    found: dict[str, bool] = {}
    for name in names:
        for group, providers in by_group(record(name)).items():
            peers = [peer for peer in providers if not peer.startswith((OURS, BOUND))]
            if OURS in providers and peers:
                found.setdefault(group, all(peer.startswith("eager ") for peer in peers))
    return {group for group, eager in found.items() if eager}


def cpu_summary() -> str:
    names = sorted(path.stem for path in RESULTS.glob("*.json"))
    return summary(
        CPU_LINES,
        {title: [n for n in names if n.startswith(machine)] for title, machine in CPUS.items()},
    )


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


def gpu_summary() -> str:
    """The table of all GPUs' records, with what each was measured on; or that there is none."""
    names = gpu_records()
    if not names:
        return NO_GPU
    kept: dict[str, list[str]] = {}
    for name in names:
        kept.setdefault(record(name)["gpu"], []).append(name)
    parts = [summary(GPU_LINES, kept)]
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
        return cpu_summary()
    if name == "gpu":
        return gpu_summary()
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
