"""Committed results: their pages say what their data say."""

from __future__ import annotations

import json
from pathlib import Path

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
