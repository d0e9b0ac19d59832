"""The benchmark suite itself: it runs, and its ratios are the ones its numbers imply."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ratios import markdown, rows

ROOT = Path(__file__).parent.parent


def bench(group: str, provider: str, median: float) -> dict:
    return {"group": group, "params": {"provider": provider}, "stats": {"median": median}}


def test_ratio_table() -> None:
    record = {
        "benchmarks": [
            bench("op n=5", "dvla_fast", 2e-6),
            bench("op n=5", "slow peer", 9e-6),
            bench("op n=5", "fast peer", 6e-6),
            bench("no peer", "dvla_fast", 1e-6),
        ]
    }
    (row,) = rows(record)
    assert (row["peer"], row["ratio"]) == ("fast peer", pytest.approx(3.0))
    assert "| op n=5 | 2.0 µs | fast peer | 6.0 µs | 3.0× |" in markdown([row])


def test_documented_table_is_the_kept_record() -> None:
    kept = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores.json"
    assert markdown(rows(json.loads(kept.read_text()))) in (ROOT / "docs/benchmarks.md").read_text()


@pytest.mark.slow
def test_every_benchmark_runs(tmp_path: Path) -> None:
    """Each benchmark once, without timing, small cases only: an exception would show."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-disable", "-q",
            "-p", "no:cacheprovider", "-k", "not 1000000 and not N4096 and not T16 and not compile",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
