"""Turns a benchmark record into a table and a picture of ratios: the best peer over dvla_fast.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python -m benchmarks.ratios run.json
    python -m benchmarks.ratios run.json --save benchmarks/results/machine.json
    python -m benchmarks.ratios run.json --plot ratios.png
    python -m benchmarks.ratios benchmarks/results/amd-epyc-avx2-2-cores.json

A ratio is the median over rounds of the fastest peer's time over ours in the same round
(``benchmarks.pairing``), in older records and on GPUs that of the medians; above 1 means dvla_fast
is faster. Another backend of dvla_fast is no peer. Neither is a bound, the time of something that
every implementation must do: where a group has one, a second table says how near we come.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from benchmarks.pairing import OURS

BOUND = "bound: "  # how the name of a provider begins that no implementation can be faster than


def medians(record: dict) -> list[dict]:
    """Every provider's median, from pytest-benchmark's JSON or from a file kept with --save."""
    if "medians" in record:
        return record["medians"]
    table = []
    for bench in record["benchmarks"]:
        row = {
            "group": bench["group"],
            "provider": bench["params"]["provider"],
            "median_us": round(bench["stats"]["median"] * 1e6, 2),
        }
        extra = bench.get("extra_info", {})
        row |= {key: extra[key] for key in ("ratio", "peak_mib") if extra.get(key) is not None}
        table.append(row)
    return table


def by_group(record: dict) -> dict[str, dict[str, dict]]:
    """The rows of each group by provider."""
    groups: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in medians(record):
        groups[row["group"]][row["provider"]] = row
    return groups


def rows(record: dict, among: str = "") -> list[dict]:
    """One row a group: our median and peak memory, the fastest peer's, and the ratio of times.

    Args:
        record: as :func:`medians` takes it.
        among: how the names of the peers begin that count.
    """
    table = []
    for group, providers in by_group(record).items():
        peers = {
            name: row
            for name, row in providers.items()
            if name.startswith(among) and not name.startswith((OURS, BOUND))
        }
        if OURS not in providers or not peers:
            continue
        ours = providers[OURS]
        times = {
            name: row.get("ratio", row["median_us"] / ours["median_us"])
            for name, row in peers.items()
        }
        best = min(times, key=times.__getitem__)
        peer = peers[best]
        table.append(
            {
                "group": group,
                "ours_us": ours["median_us"],
                "peer": best,
                "peer_us": peer["median_us"],
                "ratio": times[best],
                "ours_mib": ours.get("peak_mib"),
                "peer_mib": peer.get("peak_mib"),
            }
        )
    return table


def bounds(record: dict) -> list[dict]:
    """One row a group that has a bound: our median, the bound's, and how many times it ours is."""
    return [
        {
            "group": group,
            "ours_us": providers[OURS]["median_us"],
            "bound": name.removeprefix(BOUND),
            "bound_us": row["median_us"],
            "ratio": providers[OURS]["median_us"] / row["median_us"],
        }
        for group, providers in by_group(record).items()
        for name, row in providers.items()
        if name.startswith(BOUND) and OURS in providers
    ]


def markdown(table: list[dict]) -> str:
    """The table; peak memory of one call, results included, where it was measured."""
    lines = [
        "| case | dvla_fast | best peer | peer | ratio | MiB | peer's MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['group']} | {r['ours_us']:,.1f} µs | {r['peer']} | {r['peer_us']:,.1f} µs"
        f" | {r['ratio']:.1f}× | {_mib(r['ours_mib'])} | {_mib(r['peer_mib'])} |"
        for r in table
    ]
    return "\n".join(lines)


def bounds_markdown(table: list[dict]) -> str:
    lines = ["| case | dvla_fast | bound | its time | times the bound |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['group']} | {r['ours_us']:,.1f} µs | {r['bound']} | {r['bound_us']:,.1f} µs"
        f" | {r['ratio']:.1f}× |"
        for r in table
    ]
    return "\n".join(lines)


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def plot(table: list[dict], path: Path, title: str) -> None:
    """A bar a row: how many times faster than the fastest peer; behind the line at 1 is slower."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ratios = [row["ratio"] for row in table]
    figure, axis = plt.subplots(figsize=(11, 1.2 + 0.26 * len(table)), layout="constrained")
    colours = ["#2a7f62" if ratio >= 1 else "#b5443c" for ratio in ratios]
    axis.barh([row["group"] for row in table], ratios, color=colours)
    for place, row in enumerate(table):
        axis.text(row["ratio"] * 1.02, place, f"{row['ratio']:.1f}× {row['peer']}",
                  va="center", fontsize=8)  # fmt: skip
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(min(0.5, *ratios) * 0.9, max(ratios) * 2.2)
    ticks = [x for x in (0.5, 1, 2, 3, 5, 10, 20) if x < max(ratios) * 2]
    axis.set_xticks(ticks, [f"{x:g}×" for x in ticks])
    axis.set_xticks([], minor=True)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_xlabel("time of the fastest peer / time of dvla_fast, median")
    axis.set_title(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compact(record: dict) -> dict:
    """What is worth keeping of a run: the machine, the commit, and every provider's median."""
    machine, commit = record["machine_info"], record["commit_info"]
    cpu = machine["cpu"]
    return {
        "date": record["datetime"][:10],
        "commit": commit.get("id"),
        "uncommitted_changes": commit.get("dirty"),
        "cpu": cpu.get("brand_raw"),
        # Virtual machines often name no more of their processor than these.
        "cpu_family": cpu.get("family"),
        "cpu_model": cpu.get("model"),
        "cores": cpu.get("count"),
        **{key: machine["dvla_fast"][key] for key in ("dvla_fast", "torch", "threads")},
        "cpu_capability": machine["dvla_fast"]["cpu_capability"],
        "medians": medians(record),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON written by --benchmark-json or --save")
    parser.add_argument("--save", type=Path, help="keep the medians in this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios into this PNG")
    arguments = parser.parse_args()
    record = json.loads(arguments.record.read_text())
    if arguments.save and "medians" in record:
        parser.error(f"--save: {arguments.record} holds nothing but the medians already")
    table = rows(record)
    print(markdown(table))
    if limits := bounds(record):
        print("\n" + bounds_markdown(limits))
    if arguments.save:
        arguments.save.write_text(json.dumps(compact(record), indent=1) + "\n")
    if arguments.plot:
        where = record.get("cpu") or record.get("gpu")
        where = where or record.get("machine_info", {}).get("cpu", {}).get("brand_raw", "")
        plot(table, arguments.plot, f"Speed beside the fastest peer, {where}")


if __name__ == "__main__":
    main()
