"""Checkpoints whose description was edited, or written by another version, are refused by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dvla_fast import FewShotClassifier
from dvla_fast.data import load_digits
from dvla_fast.engine.checkpoint import load_checkpoint, save_checkpoint
from dvla_fast.engine.evaluate import load_model
from dvla_fast.errors import CheckpointError
from tests.test_cli import fails

MISSING = object()


def edit(path: str | Path, name: str, value: Any, to: Path) -> Path:
    """Copy a checkpoint with one entry of its description replaced or left out."""
    tensors, info = load_checkpoint(path)
    info = inner = copy.deepcopy(info)
    *parents, last = name.split(".")
    for key in parents:
        inner = inner[key] if isinstance(inner, dict) else inner[int(key)]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    save_checkpoint(to, tensors, info)
    return to


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", MISSING, "a None checkpoint"),
        ("model", MISSING, "lacks the entry model.backbone.name;"),
        ("model", ["small"], r"has model \['small'\], which cannot be;"),
        ("model.backbone.name", MISSING, "lacks the entry model.backbone.name;"),
        ("model.backbone.name", 3, "has model.backbone.name 3,"),
        ("model.backbone.name", "vit-9000", "its entry model: .*unknown 'vit-9000'"),
        ("model.backbone.image_size", MISSING, "lacks the entry model.backbone.image_size;"),
        ("model.backbone.image_size", "16", "has model.backbone.image_size '16',"),
        ("model.backbone.width", {}, "its entry model: cannot build the backbone"),
        ("model.backbone.width", -8, "its entry model: "),
        ("model.backbone.colour", 1, "its entry model: .*colour"),
        ("model.gated_layers", MISSING, "lacks the entry model.gated_layers;"),
        ("model.gated_layers", 1, "has model.gated_layers 1,"),
        ("model.gated_layers", [[9, 9]], "its entry model: "),
        ("model.text_dim", None, "its entry model: "),
        ("model.policy", 1, "its entry model: "),
        ("normalisation", {"mean": [0.5]}, "has normalisation {'mean': "),
        ("normalisation", {"mean": [0.0], "std": [0.0]}, "has normalisation"),
        ("semantics", [], r"has semantics \[\],"),
        ("semantics.top_k", "2", "has semantics.top_k '2',"),
        ("dataset", 7, "has dataset 7,"),
        ("training", {}, "has training {},"),
        ("training", [{"stage": "pretrain"}], "has training"),
    ],
)
def test_edited(
    make_checkpoint: Callable[..., Path], tmp_path: Path, name: str, value: Any, message: str
) -> None:
    path = edit(make_checkpoint(channels=1), name, value, tmp_path / "edited.safetensors")
    for load in (
        lambda: load_model(str(path), load_digits()),
        lambda: FewShotClassifier.load(path, "cpu"),
    ):
        with pytest.raises(CheckpointError, match=rf"edited\.safetensors: {message}"):
            load()


def test_pretrained_without_its_number_of_classes(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_checkpoint("pretrain", channels=1)
    path = edit(whole, "model.classes", MISSING, tmp_path / "edited.safetensors")
    message = fails(["evaluate", f"--checkpoint={path}", f"--output={tmp_path / 'run'}"], capsys)
    assert "edited.safetensors: lacks the entry model.classes; it was edited, or" in message
    assert not (tmp_path / "run").exists()


def test_statistics_of_another_number_of_channels(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    grey = {"mean": [0.5], "std": [0.2]}
    path = edit(make_checkpoint(), "normalisation", grey, tmp_path / "edited.safetensors")
    with pytest.raises(CheckpointError, match="a normalisation of 1 channel"):
        FewShotClassifier.load(path, "cpu")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epoch", MISSING, "lacks the entry epoch;"),
        ("step", "6", "has step '6', which cannot be;"),
        ("best", None, "has best None,"),
        ("inputs", "x", "has inputs .x.,"),
        ("resume", MISSING, "lacks the entry resume.optimizer;"),
        ("resume.optimizer.groups", MISSING, "has resume.optimizer that cannot be .*'groups'"),
        ("resume.optimizer.groups", [], "has resume.optimizer that cannot be restored"),
        ("resume.optimizer.scalars", {"x": {}}, "has resume.optimizer that cannot be restored"),
        ("resume.rng.numpy", {"state": 1}, "has resume.rng that cannot be restored"),
        ("resume.rng.numpy.state.state", -1, "has resume.rng that cannot be restored"),
        ("resume.rng.python", [3, ["x"], None], "has resume.rng that cannot be restored"),
    ],
)
def test_resume(
    backbone: str, tmp_path: Path, name: str, value: Any, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = Path(backbone).parents[1]
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text((run / "config.yaml").read_text())
    last = "checkpoints/pretrain-last.safetensors"
    edit(run / last, name, value, folder / last)
    told = fails(["pretrain", "--resume", f"--output={folder}", "--device=cpu"], capsys)
    assert re.search(rf"pretrain-last\.safetensors: {message}", told)
