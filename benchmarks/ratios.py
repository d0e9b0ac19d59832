"""Turns a pytest-benchmark JSON file into a table of ratios: the best peer over dvla_fast.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python -m benchmarks.ratios run.json

Ratios are of medians within that one run; above 1 means dvla_fast is faster.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

OURS = "dvla_fast"


def rows(record: dict) -> list[dict]:
    """One row a group: our median, the fastest peer's, and their ratio."""
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for bench in record["benchmarks"]:
        groups[bench["group"]][bench["params"]["provider"]] = bench["stats"]["median"]
    table = []
    for group, medians in groups.items():
        peers = {name: time for name, time in medians.items() if name != OURS}
        if OURS not in medians or not peers:
            continue
        best = min(peers, key=lambda name: peers[name])
        table.append(
            {
                "group": group,
                "ours_us": medians[OURS] * 1e6,
                "peer": best,
                "peer_us": peers[best] * 1e6,
                "ratio": peers[best] / medians[OURS],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON written by --benchmark-json")
    print(markdown(rows(json.loads(parser.parse_args().record.read_text()))))


if __name__ == "__main__":
    main()
