"""Committed results: their pages say what their data say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dvla_fast.engine.ablation_tables import csv_table, markdown_table

RESULTS = Path(__file__).parents[1] / "docs" / "results"
ABLATIONS = sorted(RESULTS.glob("ablation-*.json"))


def test_there_are_results() -> None:
    assert {path.stem for path in ABLATIONS} >= {
        *("ablation-shapes", "ablation-shapes-varied", "ablation-digits", "ablation-emoji"),
    }


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablation_pages_follow_from_their_data(path: Path) -> None:
    summary = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == markdown_table(summary)
    assert path.with_suffix(".csv").read_text() == csv_table(summary)
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablations_are_whole(path: Path) -> None:
    summary = json.loads(path.read_text())
    assert summary["cells"]["finished"] == summary["cells"]["all"]
    assert not summary["failures"]
    assert len(summary["seeds"]) >= (3 if path.stem == "ablation-emoji" else 5)
    assert summary["commit"]
    assert not summary["commit"].endswith("+")  # of a clean tree


def intervals(content: Any) -> Iterator[tuple[float, float]]:
    """All intervals of a result, as they are and with the difference the other way round."""
    if isinstance(content, dict) and isinstance(content.get("low"), float):
        low, high = content["low"], content["high"]
        for scale in (1, 100):  # gates, points
            yield scale * low, scale * high
            yield -scale * high, -scale * low
    children = content.values() if isinstance(content, dict) else content
    if isinstance(content, dict | list):
        for child in children:
            yield from intervals(child)


def test_intervals_are_rounded_from_the_data() -> None:
    """Those that the pages quote; rounded twice, the last digit may be off by one."""
    page = RESULTS.with_suffix(".md").read_text()
    unkept = page.index("### A longer meta-tuning"), page.index("### Found on the way")
    readme = (RESULTS.parents[1] / "README.md").read_text()
    page = (page[: unkept[0]] + page[unkept[1] :] + readme).replace("−", "-")
    known = [ends for path in ABLATIONS for ends in intervals(json.loads(path.read_text()))]
    quoted = re.findall(r"\[([+-]\d+\.(\d+)),\s([+-]\d+\.\d+)\]", page)
    assert len(quoted) > 50
    for low, decimals, high in quoted:
        digits = len(decimals)
        rounded = {(round(a, digits), round(b, digits)) for a, b in known}
        assert (float(low), float(high)) in rounded, (low, high)
