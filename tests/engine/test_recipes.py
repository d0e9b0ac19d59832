"""Averaging checkpoints: trainings of one recipe, each once, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dvla_fast.cli import main
from dvla_fast.engine.predict import VISUAL
from tests.engine.runs import another_training, evaluate_arguments, write_tuned
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


TEXTS = {"parts": "all", "top_k": 0, "template": None, "bank_sha256": "one"}


@pytest.mark.parametrize(
    ("texts", "options", "differs"),
    [
        ({}, {"text_scope": "class"}, "model.text_scope: 'episode' -> 'class'"),
        ({}, {"policy": "categorical"}, "model.policy: 'beta' -> 'categorical'"),
        ({}, {"gated_layers": [[3, 0]]}, "model.gated_layers: [[2, 1], [3, 0]] -> [[3, 0]]"),
        ({}, {"temperature": 0.1}, "model.temperature: 0.2 -> 0.1"),
        ({"top_k": 3, "template": "all"}, {}, "semantics.top_k: 0 -> 3"),
        ({"bank_sha256": "two"}, {}, "semantics.bank_sha256: 'one' -> 'two'"),
        ({"parts": "name"}, {}, "semantics.parts: 'all' -> 'name'"),
    ],
)
def test_other_recipes_are_not_averaged(
    texts: dict[str, Any],
    options: dict[str, Any],
    differs: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = write_tuned(tmp_path / "first.safetensors", 512, texts=TEXTS)
    other = write_tuned(tmp_path / "other.safetensors", 512, 1, {**TEXTS, **texts}, **options)
    run = evaluate_arguments(first, tmp_path / "run", f"--checkpoints=[{other}]")
    message = fails(run, capsys)
    assert f"{other}: of another recipe than {first} (" in message
    assert differs in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (TEXTS, {}),
        ({}, {}),  # an earlier version's, which say nothing of their texts
        (TEXTS, {"gated_layers": [[2, 1], [3, 0]], "level_weights": [[0.7, 0.3], [0.3, 0.7]]}),
        (TEXTS, {"alpha_scope": "episode", "temperature": 0.2}),
    ],
    ids=["another seed", "texts not recorded", "layers in words", "defaults in words"],
)
def test_trainings_of_one_recipe_are_averaged(
    texts: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    first = write_tuned(tmp_path / "first.safetensors", 64, texts=TEXTS)
    other = write_tuned(tmp_path / "other.safetensors", 64, 1, texts, **options)
    arguments = [f"--checkpoints=[{other}]", "--semantics.dim=64", "--evaluate.episodes=2"]
    assert main(evaluate_arguments(first, tmp_path / "run", *arguments)) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["checkpoints"] == [str(first), str(other)]
