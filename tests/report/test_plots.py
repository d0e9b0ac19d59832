"""The picture is drawn from a run folder, in full size and with ink on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvla_fast.data import load_digits
from dvla_fast.engine.predict import FIXED, LEARNED, VISUAL
from dvla_fast.report.plots import plot_run


@pytest.mark.parametrize("epochs", [1, 6])
@pytest.mark.parametrize("shots", [[1], [1, 5]])
def test_picture(tmp_path: Path, epochs: int, shots: list[int]) -> None:
    rows = []
    for step in range(1, epochs + 1):
        rows.append(
            {"stage": "pretrain", "step": step, "loss": 2 / step, "accuracy": 1 - 1 / (step + 1)}
        )
        rows.append(
            {
                **{"stage": "metatune", "step": step, "accuracy": 0.8},
                **{"reward": [0.1 * step, 0.2], "baseline": [0.1, 0.1]},
                **{"alpha_mean": [0.6, 0.4], "alpha_std": [0.1, 0.1]},
            }
        )
    rows[-1]["monitor_accuracy"] = 0.9
    rows[-2]["monitor_episode_accuracy"] = 0.9
    rows[0]["loss"] = None  # written where it is not a number
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods = {
        name: {"accuracy": 0.5 + 0.01 * index, "ci95": 0.01}
        for index, name in enumerate((VISUAL, FIXED, LEARNED))
    }
    results = [
        {
            **{"way": 5, "shot": shot, "episodes": 10, "accuracy": 0.5, "ci95": None},
            **{"methods": methods, "fixed_alpha": 0.5},
        }
        for shot in shots
    ]
    output = tmp_path / "curves.tmp"  # a temporary name on the way to an atomic replacement
    summary = {"results": results, "gated_layers": [[2, 1], [3, 0]]}
    plot_run(tmp_path, output, load_digits(), summary)
    with Image.open(output) as image:
        assert image.format == "PNG"
        assert image.width > 1500
        pixels = np.asarray(image.convert("L"))
    assert 0.02 < (pixels < 200).mean() < 0.5
