"""Classes that a checkpoint was trained on, in any stage, are not evaluated as novel ones."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla_fast.cli import main
from dvla_fast.data import FewShotData
from dvla_fast.data.images import ImageSet
from dvla_fast.engine.checkpoint import load_checkpoint, save_checkpoint
from dvla_fast.engine.config import PretrainConfig
from dvla_fast.engine.trained_classes import (
    require_untrained,
    trained_classes,
    training_stage,
    training_stages,
    unknown_stage,
)
from dvla_fast.errors import CheckpointError
from tests.data import trees

PIXELS = torch.Generator().manual_seed(0)


def part(*names: str, count: int = 8) -> ImageSet:
    labels = torch.arange(len(names)).repeat_interleave(count)
    images = torch.randint(0, 256, (len(labels), 3, 4, 4), dtype=torch.uint8, generator=PIXELS)
    return ImageSet("/".join(names), images, labels, names)


def dataset(name: str, base: ImageSet, monitor: ImageSet, novel: ImageSet) -> FewShotData:
    return FewShotData(name, base, monitor, novel, "made", torch.zeros(3), torch.ones(3))


@pytest.fixture
def animals() -> FewShotData:
    return dataset("animals", part("cat", "Red_Fox"), part("dog"), part("hen", "owl"))


def stages_of(data: FewShotData) -> list[dict[str, Any]]:
    # as a checkpoint brings them back
    stage = training_stage("pretrain", data, PretrainConfig())
    stages: list[dict[str, Any]] = json.loads(json.dumps([stage]))
    return stages


def test_a_clean_split(animals: FewShotData) -> None:
    facts = trained_classes(stages_of(animals), animals, "novel")
    assert facts == {
        "split": "novel", "trained_on": [], "same_name": [], "verdict": "clean",
        "stages": [{"stage": "pretrain", "dataset": "animals", "classes": 2}],
    }  # fmt: skip
    assert trained_classes(stages_of(animals), animals, "base")["verdict"] == "base classes"
    held_out = replace(animals, monitor=part("cat", "Red_Fox"))
    assert trained_classes(stages_of(animals), held_out, "monitor")["verdict"] == "base classes"


@pytest.mark.parametrize("split", ["novel", "monitor"])
def test_classes_of_the_same_data_set(animals: FewShotData, split: str) -> None:
    other = replace(animals, base=part("x"), **{split: part("owl", "red fox", "hen")})
    with pytest.raises(CheckpointError, match=rf"a.pt: .*1 of the {split} .*'red fox'"):
        require_untrained({"b.pt": [], "a.pt": stages_of(animals)}, other, split)


def test_every_stage_counts(animals: FewShotData) -> None:
    tuned = [*stages_of(animals), *stages_of(replace(animals, base=part("x", "y")))]
    other = replace(animals, novel=part("cat"), base=part("z"))
    assert trained_classes(tuned, other, "novel")["trained_on"] == ["cat"]


def test_equal_images_in_a_data_set_of_another_name(animals: FewShotData) -> None:
    cat = animals.base.subset(torch.arange(8), "cat")
    order = torch.randperm(8, generator=PIXELS)
    moved = replace(cat, images=cat.images[order], class_names=("Cat",))
    same = dataset("pets", part("x"), part("y"), moved)
    assert trained_classes(stages_of(animals), same, "novel")["trained_on"] == ["Cat"]


def test_a_name_that_merely_coincides(animals: FewShotData) -> None:
    other = dataset("pets", part("x"), part("y"), part("cat", "z"))
    with pytest.warns(UserWarning, match=r"1 of the novel classes of pets \('cat'\).*animals"):
        facts = require_untrained({"a.pt": stages_of(animals)}, other, "novel")
    assert (facts["verdict"], facts["same_name"]) == ("same names", ["cat"])
    plants = stages_of(dataset("plants", part("moss"), part("x"), part("y")))
    with pytest.warns(UserWarning, match=r"have the names of classes of animals, which"):
        require_untrained({"a.pt": [*plants, *stages_of(animals)]}, other, "novel")


def test_unknown_stages(animals: FewShotData) -> None:
    stages = [unknown_stage("published"), *stages_of(animals)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert require_untrained({"a": stages}, animals, "novel")["verdict"] == "unknown"
    with pytest.raises(CheckpointError):  # what is known counts all the same
        require_untrained({"a": stages}, replace(animals, novel=part("cat")), "novel")


def test_checkpoints_that_list_no_stages(animals: FewShotData) -> None:
    before = training_stages({"kind": "pretrain", "dataset": "animals", "classes": ["cat", "x"]})
    other = replace(animals, novel=part("cat"))
    assert trained_classes(before, other, "novel")["trained_on"] == ["cat"]
    assert trained_classes(before, animals, "novel")["verdict"] == "clean"
    tuned = training_stages({"kind": "metatune", "dataset": "animals"})
    assert trained_classes(tuned, other, "novel")["verdict"] == "unknown"


MODEL = ["--model.width=8", "--model.num_heads=4", "--model.hidden_dim=8"]
TINY = ["--device=cpu", "--data.image_size=16"]
PRETRAIN = ["--pretrain.epochs=1", "--pretrain.warmup_epochs=0", "--pretrain.validation_episodes=2"]
METATUNE = [
    "--metatune.epochs=1", "--metatune.steps_per_epoch=1", "--metatune.episodes_per_step=1",
    "--metatune.way=2", "--metatune.query=1", "--metatune.validation_episodes=2",
]  # fmt: skip
EVALUATE = [
    "--evaluate.episodes=3", "--evaluate.way=2", "--evaluate.query=1", "--evaluate.shots=[1]",
]  # fmt: skip


def run(command: str, output: Path, *more: str) -> tuple[int, Path]:
    status = main([command, *TINY, f"--output={output}", *more])
    return status, output / "checkpoints" / f"{command}-best.safetensors"


@pytest.fixture
def lists(tmp_path: Path) -> list[str]:
    """One folder of classes, and two split lists that disagree about "c"."""
    trees.class_folders(tmp_path / "photos", "abcdefgh", 6)
    classes = {name: {"attributes": [f"{name} like"], "description": name} for name in "abcdefgh"}
    (tmp_path / "bank.json").write_text(json.dumps({"classes": classes}))
    for name, (train, test) in {"one": ("abc", "ef"), "two": ("abd", "ce")}.items():
        splits = {"train": list(train), "val": ["g", "h"], "test": list(test)}
        (tmp_path / f"{name}.json").write_text(json.dumps({"splits": splits}))
    data = [f"--data.dataset={tmp_path / 'photos'}"]
    return [*data, *(f"--data.splits={tmp_path / f'{name}.json'}" for name in ("one", "two"))]


def test_on_the_command_line(
    tmp_path: Path, lists: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, first, second = lists
    texts = [f"--semantics.bank={tmp_path / 'bank.json'}", "--semantics.dim=64"]
    status, start = run("pretrain", tmp_path / "pre", folder, first, *MODEL, *PRETRAIN)
    assert status == 0
    tune = [f"--checkpoint={start}", folder, *MODEL, *METATUNE, *texts]
    capsys.readouterr()
    assert run("metatune", tmp_path / "refused", second, *tune)[0] == 1
    assert "was trained on 1 of the novel classes of photos ('c')" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    status, tuned = run("metatune", tmp_path / "tuned", first, *tune)
    assert status == 0
    summary = json.loads((tmp_path / "tuned/summary.json").read_text())
    assert summary["leaks"]["classes"]["monitor"]["verdict"] == "clean"
    assert summary["leaks"]["classes"]["novel"]["verdict"] == "clean"
    # without what the tuning says of itself, its pre-training still tells
    tensors, info = load_checkpoint(tuned)
    assert [stage["stage"] for stage in info["training"]] == ["pretrain", "metatune"]
    for checkpoint in (start, tuned):
        asked = [f"--checkpoint={checkpoint}", folder, *EVALUATE, *texts]
        assert run("evaluate", tmp_path / "wrong", second, *asked)[0] == 1
        assert "was trained on 1 of the novel classes" in capsys.readouterr().err
        output = tmp_path / f"right-{checkpoint.stem}"
        assert run("evaluate", output, first, *asked)[0] == 0
        leaks = json.loads((output / "summary.json").read_text())["leaks"]
        assert leaks["classes"]["verdict"] == "clean"
    # other images under a list of the same name share a class's name, and no more
    trees.class_folders(tmp_path / "other" / "birds", "abcdefgh", 6, 5000)
    (tmp_path / "other" / "one.json").write_bytes((tmp_path / "two.json").read_bytes())
    others = [f"--data.dataset={tmp_path / 'other' / 'birds'}", *EVALUATE, *texts]
    others += [f"--data.splits={tmp_path / 'other' / 'one.json'}", f"--checkpoint={tuned}"]
    assert run("evaluate", tmp_path / "abroad", *others)[0] == 0
    abroad = json.loads((tmp_path / "abroad/summary.json").read_text())
    assert (abroad["dataset"], abroad["trained_on"]) == ("birds", "photos")
    assert abroad["cross_domain"]
    assert abroad["leaks"]["classes"]["same_name"] == ["c"]
    del info["training"]
    save_checkpoint(tmp_path / "old.safetensors", tensors, info)
    asked = [f"--checkpoint={tmp_path / 'old.safetensors'}", folder, *EVALUATE, *texts]
    assert run("evaluate", tmp_path / "old", second, *asked)[0] == 0
    leaks = json.loads((tmp_path / "old/summary.json").read_text())["leaks"]
    assert leaks["classes"]["verdict"] == "unknown"
