"""Turns a benchmark record into a table of ratios: the best peer over dvla_fast.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python -m benchmarks.ratios run.json
    python -m benchmarks.ratios run.json --save benchmarks/results/machine.json
    python -m benchmarks.ratios benchmarks/results/amd-epyc-2-cores.json

Ratios are of medians within that one run; above 1 means dvla_fast is faster.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

OURS = "dvla_fast"


def medians(record: dict) -> list[dict]:
    """Every provider's median, from pytest-benchmark's JSON or from a file kept with --save."""
    if "medians" in record:
        return record["medians"]
    return [
        {
            "group": bench["group"],
            "provider": bench["params"]["provider"],
            "median_us": round(bench["stats"]["median"] * 1e6, 2),
        }
        for bench in record["benchmarks"]
    ]


def rows(record: dict) -> list[dict]:
    """One row a group: our median, the fastest peer's, and their ratio."""
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for row in medians(record):
        groups[row["group"]][row["provider"]] = row["median_us"]
    table = []
    for group, times in groups.items():
        peers = {name: time for name, time in times.items() if name != OURS}
        if OURS not in times or not peers:
            continue
        best = min(peers, key=lambda name: peers[name])
        table.append(
            {
                "group": group,
                "ours_us": times[OURS],
                "peer": best,
                "peer_us": peers[best],
                "ratio": peers[best] / times[OURS],
            }
        )
    return table


def markdown(table: list[dict]) -> str:
    lines = ["| case | dvla_fast | best peer | peer | ratio |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['group']} | {r['ours_us']:,.1f} µs | {r['peer']} | {r['peer_us']:,.1f} µs"
        f" | {r['ratio']:.1f}× |"
        for r in table
    ]
    return "\n".join(lines)


def compact(record: dict) -> dict:
    """What is worth keeping of a run: the machine, the commit, and every provider's median."""
    machine, commit = record["machine_info"], record["commit_info"]
    cpu = machine["cpu"]
    return {
        "date": record["datetime"][:10],
        "commit": commit.get("id"),
        "uncommitted_changes": commit.get("dirty"),
        "cpu": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
        **{key: machine["dvla_fast"][key] for key in ("dvla_fast", "torch", "threads")},
        "cpu_capability": machine["dvla_fast"]["cpu_capability"],
        "medians": medians(record),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON written by --benchmark-json or --save")
    parser.add_argument("--save", type=Path, help="keep the medians in this file")
    arguments = parser.parse_args()
    record = json.loads(arguments.record.read_text())
    print(markdown(rows(record)))
    if arguments.save:
        arguments.save.write_text(json.dumps(compact(record), indent=1) + "\n")


if __name__ == "__main__":
    main()
