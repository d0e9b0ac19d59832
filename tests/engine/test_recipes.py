"""Averaging checkpoints: trainings of one recipe, each once, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dvla_fast.cli import main
from dvla_fast.engine.checkpoint import load_checkpoint, save_checkpoint
from dvla_fast.engine.predict import VISUAL
from dvla_fast.engine.recipes import recipe_differences, recipe_of
from tests.engine.runs import another_training, evaluate_arguments, write_evaluation, write_tuned
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


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"lr": 1e-3}, "pretrain.lr: 0.002 -> 0.001"),
        ({"augment": {"flip": True}}, "pretrain.augment.flip: False -> True"),
        ({"epochs": 7, "validate_every": 1, "validation_episodes": 5}, ""),
    ],
)
def test_rates_are_of_a_recipe_and_epochs_are_not(
    settings: dict[str, Any],
    differs: str,
    backbone: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = another_training(backbone, tmp_path / "other.safetensors")
    tensors, info = load_checkpoint(other)
    own = info["training"][0]["settings"]
    own |= {key: {**own[key], **x} if isinstance(x, dict) else x for key, x in settings.items()}
    save_checkpoint(other, tensors, info)
    run = evaluate_arguments(backbone, tmp_path / "run", f"--checkpoints=[{other}]")
    if differs:
        assert f"of another recipe than {backbone} ({differs})" in fails(run, capsys)
        return
    assert main(run) == 0
    recipe = json.loads((tmp_path / "run/summary.json").read_text())["recipe"]
    assert recipe_differences(recipe, recipe_of(None, info)) == []
    assert (recipe["training"][0]["stage"], recipe["training"][0]["lr"]) == ("pretrain", 0.002)


def described(*stages: tuple[str, Any, dict[str, Any]]) -> dict[str, Any]:
    training = [
        {"stage": stage, "dataset": "photos", "classes": classes, "settings": settings}
        for stage, classes, settings in stages
    ]
    return recipe_of(None, {"kind": "metatune", "dataset": "photos", "training": training})


def test_two_data_sets_of_one_name_are_two_recipes() -> None:
    one, two = {"cat": "", "dog": ""}, {"cat": "", "fox": ""}
    ours = described(("pretrain", one, {"lr": 1.0}), ("metatune", one, {"objective": "reinforce"}))
    theirs = described(("pretrain", one, {"lr": 1.0}), ("metatune", two, {"objective": "ppo"}))
    classes, objective = recipe_differences(ours, theirs)
    assert classes.startswith("metatune.classes: '2, ")
    assert objective == "metatune.objective: 'reinforce' -> 'ppo'"
    short = described(("pretrain", one, {"lr": 1.0}))
    assert recipe_differences(short, ours) == ["training: pretrain -> pretrain, metatune"]
    silent = described(("pretrain", None, {}), ("metatune", one, {}))
    assert recipe_differences(ours, silent) == []  # of an earlier version
    assert recipe_differences(ours, described()) == []


def test_a_side_of_a_comparison_is_of_one_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, **settings: Any) -> str:
        recipe = described(("metatune", {"cat": ""}, settings))
        return str(write_evaluation(tmp_path / name, 0.6, recipe=recipe))

    seed, again, slow = write("seed", lr=1.0), write("again", lr=1.0, epochs=9), write("slow", lr=2)
    old = str(write_evaluation(tmp_path / "old", 0.6))  # does not tell
    assert main(["compare", f"{seed},{again},{old}", slow]) == 0
    for sides in ((f"{seed},{slow}", again), (again, f"{old},{slow},{seed}")):
        said = fails(["compare", *sides], capsys, 2)
        assert "are of different recipes (metatune.lr: " in said
        assert "put runs of one recipe on a side" in said


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"semantics": {"bank_sha256": "a"}}, {"semantics": {"bank_sha256": "b"}}),
        ({"fixed_alpha": 0.5}, {"fixed_alpha": 0.25}),
    ],
)
def test_a_side_of_a_comparison_is_evaluated_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one: Any, other: Any
) -> None:
    """One training's texts and another's would make a mean that says nothing of either."""
    recipe = described(("metatune", {"cat": ""}, {"lr": 1.0}))
    first, second = (
        str(write_evaluation(tmp_path / name, 0.6, recipe=recipe, **chosen))
        for name, chosen in (("first", one), ("second", other))
    )
    assert main(["compare", first, second]) == 0
    said = fails(["compare", f"{first},{second}", first], capsys, 2)
    assert "are of different recipes (evaluated with " in said
