"""Averaging checkpoints: trainings of one recipe, each once, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dvla_fast.cli import main
from dvla_fast.engine.predict import VISUAL
from tests.engine.runs import another_training, evaluate_arguments
from tests.test_cli import fails


def test_several_checkpoints_on_the_command_line(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = another_training(backbone, tmp_path / "other.safetensors")
    assert main(evaluate_arguments(backbone, tmp_path / "a", f"--checkpoints=[{other}]")) == 0
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["checkpoints"] == [backbone, str(other)]
    found = summary["over_checkpoints"][VISUAL]
    assert found["std"] > 0
    first, second = found["accuracies"]
    assert "over the 2 checkpoints, which speaks of training again (percent)" in said
    assert (
        f"1-shot  {100 * found['accuracy']:.2f} ± {100 * found['ci95']:.2f}  "
        f"s = {100 * found['std']:.2f}  {VISUAL}: {100 * first:.2f}, {100 * second:.2f}\n"
    ) in said
    assert json.loads((tmp_path / "a/confusion-1shot.json").read_text())["counts"]
    assert main(evaluate_arguments(backbone, tmp_path / "b")) == 0
    assert "training again" not in capsys.readouterr().out
    link = tmp_path / "link.safetensors"
    link.symlink_to(other)
    twice = evaluate_arguments(backbone, tmp_path / "c", f"--checkpoints=[{other},{link}]")
    message = fails(twice, capsys, 2)
    assert "the same training twice" in message
    last = backbone.replace("-best.", "-last.")
    copy = shutil.copy(backbone, tmp_path / "copy.safetensors")
    for again in (last, copy):
        arguments = evaluate_arguments(backbone, tmp_path / "c", f"--checkpoints=[{again}]")
        assert "the same training twice" in fails(arguments, capsys, 2)
    assert not (tmp_path / "c").exists()
