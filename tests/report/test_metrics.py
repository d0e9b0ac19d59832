"""``metrics.jsonl`` that others have changed: curves show what can be drawn of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dvla_fast.engine.run_folder import RunFolder, read_config
from dvla_fast.report.collect import read_runs
from dvla_fast.report.figures import (
    collapse_line,
    gate_figures,
    policy_figures,
    training_figures,
)

WRONG = ["0.5", None, {"a": 1}, [], [0.5], ["x"], [[1]], True, 0.5, -1, 10**400, [1.5, 10**400]]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
def test_metrics_of_other_kinds(copied: Path, value: Any) -> None:
    """Whatever stands in the place of a figure, curves are drawn of the others."""
    rows = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    tuned = [row for row in rows if row["stage"] == "metatune"]
    for key in {key for row in tuned for key in row} - {"stage", "step"}:
        for changed in (tuned[0], tuned[-1]):
            before, changed[key] = changed.get(key), value
            (copied / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
            (run,), _ = read_runs([str(copied)])
            assert training_figures([run])
            assert gate_figures(run)
            assert policy_figures(run)
            assert collapse_line(run)
            changed[key] = before


def test_lines_that_no_run_wrote_are_passed_over(copied: Path) -> None:
    path = copied / "metrics.jsonl"
    (whole,), notes = read_runs([str(copied)])
    odd = ['"x"', "[1]", "5", "{}", '{"stage": 1, "step": 1}', '{"stage": "metatune"}',
           '{"stage": "metatune", "step": "2"}', '{"stage": "metatune", "step": null}',
           "[" * 10**5, "1" * 5000]  # fmt: skip
    path.write_text("\n".join(odd) + "\n" + path.read_text())
    (run,), now = read_runs([str(copied)])
    assert (run.metrics, now) == (whole.metrics, notes)
    folder = RunFolder(copied, read_config(copied), resume=True)
    folder.trim("metatune", 1)
    assert [row["step"] for row in folder.rows("metatune")] == [1]
    folder.close()
