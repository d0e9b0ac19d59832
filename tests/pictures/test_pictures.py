"""Pictures are drawn in full size and with ink on them, whatever names are in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from dvla_fast import pictures
from dvla_fast.data import load_digits
from dvla_fast.engine.demo import _samples as _typical
from dvla_fast.engine.predict import FIXED, LEARNED, VISUAL
from dvla_fast.pictures.confusion import plot_confusion
from dvla_fast.pictures.demo import _gates, _rewards, _samples, _whole_epochs, plot_demo


def test_every_gated_layer_is_drawn() -> None:
    """More layers than colours, all of them in the legend of the gates."""
    layers = [f"stage {stage}, block {block}" for stage in (1, 2, 3) for block in range(4)]
    values = dict.fromkeys(("reward", "baseline", "alpha_mean", "alpha_std"), [0.5] * 12)
    rows = [{"step": step, **values} for step in (1, 2)]
    rewards, gates = Figure().subplots(1, 2)
    _rewards(rewards, rows, layers)
    _gates(gates, rows, layers)
    assert len(rewards.lines) == 2 * 12 + 1  # rewards, baselines, and the key of these
    assert [text.get_text() for text in gates.get_legend().get_texts()] == layers


@pytest.mark.parametrize("last", [1, 2, 7, 16, 100])
def test_epochs_are_whole(last: int) -> None:
    axis = Figure(figsize=(4, 3)).subplots()
    axis.plot(range(1, last + 1), [0.5] * last)
    _whole_epochs(axis)
    assert all(tick == int(tick) for tick in axis.get_xticks())


FORMULA = r"5 $\frac{$ bill"  # what matplotlib would take for a formula, and fail on


def confusion_size(path: Path, names: list[str]) -> tuple[int, int]:
    """Size of the picture of names that are never confused, and of its matrix."""
    plot_confusion(torch.eye(len(names)), names, path, f"{FORMULA}, 5-way")
    with Image.open(path) as image:
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(int), 2, 0)
    hit = (red == 8) & (green == 48) & (blue == 107)  # the darkest blue: the diagonal
    rows = np.flatnonzero(hit.any(1))
    return image.width, int(rows[-1] - rows[0])


def test_confusion_of_any_names(tmp_path: Path) -> None:
    """Long names are cut, and take nothing of the matrix's place."""
    short = confusion_size(tmp_path / "short.png", list("abcdef"))
    names = [FORMULA, *("long name " * 20 + letter for letter in "abcde")]
    long = confusion_size(tmp_path / "long.png", names)
    assert long[1] > 0.9 * short[1]
    assert long[0] < 1.7 * short[0]


def test_confusion_in_other_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Fonts that have the letters are taken where they are installed; else numbers stand there."""
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    names = ["\u65e5\u672c\u732b", "cat"]
    rates = torch.tensor([[1.0, float("nan")], [0.5, 0.5]])
    monkeypatch.setattr(pictures, "_OTHER_SCRIPTS", ("No such font",))
    plot_confusion(rates, names, tmp_path / "a.png")
    plot_confusion(torch.eye(2), ["dog", "cat"], tmp_path / "b.png")
    first, second = (
        next(axis for axis in figure.axes if axis.get_label() != "<colorbar>") for figure in drawn
    )
    assert [label.get_text() for label in first.get_xticklabels()] == ["class 0", "cat"]
    assert [label.get_text() for label in second.get_yticklabels()] == ["dog", "cat"]
    bars = [figure.axes[-1].get_ylabel() for figure in drawn]
    assert "grey: the two were never in one episode" in bars[0]
    assert "grey" not in bars[1]
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_names_under_samples_are_whole_in_two_lines() -> None:
    names = ("Rote Drossel", "n02085620", FORMULA, "Pneumonoultramicroscopic bird", "x")
    figure = Figure()
    samples = {"learned": dict.fromkeys(names, np.zeros((4, 4)))}
    _samples(figure, Bbox([[0, 0], [1, 1]]), samples)
    found = [axis.get_xlabel() for axis in figure.axes[:5]]
    assert found[:2] == ["Rote\nDrossel", "n02085620"]
    assert all(len(line.replace("\\$", "$")) <= 10 for label in found for line in label.split("\n"))
    assert all(label.count("\n") <= 1 for label in found)
    FigureCanvasAgg(figure).draw()  # the formula is none


@pytest.mark.parametrize("epochs", [1, 6])
@pytest.mark.parametrize("shots", [[1], [1, 5]])
def test_picture(tmp_path: Path, epochs: int, shots: list[int]) -> None:
    pretrain: list[dict[str, Any]] = []
    metatune: list[dict[str, Any]] = []
    for step in range(1, epochs + 1):
        pretrain.append({"step": step, "loss": 2 / step, "accuracy": 1 - 1 / (step + 1)})
        metatune.append(
            {
                **{"step": step, "accuracy": 0.8, "reward": [0.1 * step, 0.2]},
                **{"baseline": [0.1, 0.1], "alpha_mean": [0.6, 0.4], "alpha_std": [0.1, 0.1]},
            }
        )
    metatune[-1]["monitor_accuracy"] = 0.9
    pretrain[-1]["monitor_episode_accuracy"] = 0.9
    pretrain[0]["loss"] = None  # written where it is not a number
    methods = {
        name: {"accuracy": 0.5 + 0.01 * index, "ci95": 0.01}
        for index, name in enumerate((VISUAL, FIXED, LEARNED))
    }
    results = [
        {
            **{"way": 5, "shot": shot, "episodes": 10, "accuracy": 0.5, "ci95": None},
            **{"methods": methods, "fixed_alpha": 0.5, "method": LEARNED},
        }
        for shot in shots
    ]
    output = tmp_path / "curves.tmp"  # a temporary name on the way to an atomic replacement
    summary = {"dataset": "digits", "results": results, "gated_layers": [[2, 1], [3, 0]]}
    digits = load_digits()
    samples = {"learned in training": _typical(digits.base), "never seen": _typical(digits.novel)}
    plot_demo(output, summary, pretrain, metatune, samples, {FIXED: f"{FIXED}, α = 0.5"})
    with Image.open(output) as image:
        assert image.format == "PNG"
        assert image.width > 1500
        pixels = np.asarray(image.convert("L"))
    assert 0.02 < (pixels < 200).mean() < 0.5
