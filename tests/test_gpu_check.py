"""The GPU check without a GPU: what it says, and the record it makes of a benchmark run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.ratios import markdown, rows

GROUP = "dual_attention T1-G80-H8-D24-N196-P45 bfloat16 forward eager"


def bench(provider: str, median: float) -> dict:
    return {
        "group": GROUP,
        "params": {"provider": provider},
        "stats": {"median": median},
        "extra_info": {"peak_mib": 1.5},
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_rows_are_those_that_the_ratios_read() -> None:
    record = {"benchmarks": [bench("dvla_fast", 2e-5), bench("2xSDPA+lerp flash", 6e-5)]}
    kept = {"gpu": "NVIDIA H200", "medians": gpu_check.benchmark_rows(record)}
    (row,) = rows(json.loads(json.dumps(kept)))
    assert row["ratio"] == pytest.approx(3.0)
    assert GROUP in markdown([row])
    assert kept["medians"][0]["peak_mib"] == 1.5


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H200", "nvidia-h200.json"), ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb.json")],
)
def test_file_name(gpu: str, name: str) -> None:
    assert gpu_check.file_name(gpu) == name


@pytest.mark.parametrize(
    ("program", "outcome"),
    [("pass", "passed"), ("raise SystemExit(3)", "failed"), ("while True: pass", "timed out")],
)
def test_outcome_of_a_step(program: str, outcome: str) -> None:
    seconds = 0.2 if outcome == "timed out" else 60
    assert gpu_check.run("step", [sys.executable, "-c", program], seconds)["outcome"] == outcome


def test_whole_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step's outcome and the rows are in the file; a step that fails shows in the status."""
    steps = []

    def run(name: str, command: list[str], seconds: float, **environment: str) -> dict:
        steps.append(name)
        assert 0 < seconds <= gpu_check.BUDGET_SECONDS
        if name in ("eager", "graph"):  # a step that is killed leaves no record
            target = next(part for part in command if part.startswith("--benchmark-json="))
            record = {"benchmarks": [bench("dvla_fast", 2e-5)]}
            Path(target.partition("=")[2]).write_text(json.dumps(record))
        return {"outcome": "failed" if name == "racecheck" else "passed", "seconds": 1.0}

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "machine", lambda: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    output = tmp_path / "h200.json"
    assert gpu_check.main(["--output", str(output)]) == 1
    assert steps == list(gpu_check.SHARE)
    written = json.loads(output.read_text())
    assert written["gpu"] == "NVIDIA H200"
    assert written["checks"]["racecheck"]["outcome"] == "failed"
    assert [row["provider"] for row in written["medians"]] == ["dvla_fast"] * 2

    steps.clear()
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert gpu_check.main(["--output", str(output)]) == 0
    assert steps == ["tests", "policy", "eager", "long", "graph"]
    assert "not installed" in json.loads(output.read_text())["checks"]["memcheck"]["outcome"]
