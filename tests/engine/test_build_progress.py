"""Reading images shows how far it is, unless it is asked not to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dvla_fast.engine import progress
from dvla_fast.engine.build import build_data
from dvla_fast.engine.config import DataConfig
from tests.data import trees


@pytest.mark.parametrize("dataset", ["folder", "shapes"])
@pytest.mark.parametrize("quiet", [True, False])
def test_reading_shows_how_far_it_is(
    dataset: str,
    quiet: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "_SILENCE", 0.0)
    if dataset == "folder":
        dataset = str(trees.split_folders(tmp_path / "photos"))
    config = DataConfig(dataset=dataset, image_size=16, images_per_class=2)
    build_data(config, torch.device("cpu"), quiet=quiet)
    said = capsys.readouterr().err
    assert ("[100 %" in said and "] read images\n" in said) != quiet, said
