"""What is settled before work: paths from the root, the image size, and remarks on settings."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from dvla_fast.data import prepare_cache
from dvla_fast.engine.build import pick_device
from dvla_fast.engine.config import (
    DataConfig,
    DemoRun,
    EvaluateRun,
    MetatuneRun,
    PretrainConfig,
    PretrainRun,
    SemanticsConfig,
)
from dvla_fast.engine.next_steps import evaluate_command, metatune_command
from dvla_fast.engine.settings import UsageError
from dvla_fast.engine.settle import absolute_paths, settle, size_line, sized
from dvla_fast.errors import DVLAError


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images in the working folder."""
    monkeypatch.chdir(tmp_path)
    for place in ("train/cat", "test/dog"):
        folder = tmp_path / "photos" / place
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_image_size(photos: Path, tmp_path: Path) -> None:
    assert sized(DataConfig()).image_size == 16
    assert sized(DataConfig("shapes")).image_size == 32
    assert sized(DataConfig("digits", image_size=24)).image_size == 24
    prepare_cache(photos, tmp_path / "cache", 40)
    assert sized(DataConfig(str(tmp_path / "cache"))).image_size == 40
    assert sized(DataConfig(str(photos), image_size=8)).image_size == 8
    with pytest.raises(UsageError, match=r"data\.image_size: photos holds .*--data\.image_size 84"):
        sized(DataConfig("photos"))


def test_paths_that_exist_are_named_from_the_root(photos: Path, tmp_path: Path) -> None:
    for name in ("bank.json", "a.safetensors", "digits", "siglip"):
        (tmp_path / name).write_text("{}")
    config = MetatuneRun(
        checkpoint="a.safetensors",
        data=DataConfig("photos", image_size=8),
        semantics=SemanticsConfig(bank="bank.json", encoder="transformers:siglip"),
    )
    found = settle(config)
    assert found.checkpoint == str(tmp_path / "a.safetensors")
    assert found.data.dataset == str(photos)
    assert found.semantics.bank == str(tmp_path / "bank.json")
    assert found.semantics.encoder == f"transformers:{tmp_path / 'siglip'}"
    assert config.data.dataset == "photos"
    kept = MetatuneRun(checkpoint="gone.safetensors")  # bundled names, whatever lies beside them
    assert settle(kept) == MetatuneRun(
        checkpoint="gone.safetensors", data=DataConfig("digits", image_size=16)
    )
    several = absolute_paths({"checkpoints": ["a.safetensors", "b"], "data": None})
    assert several == {"checkpoints": [str(tmp_path / "a.safetensors"), "b"], "data": None}
    for backend, model in (("openai", "siglip"), ("transformers", str(tmp_path / "siglip"))):
        asked = {"language_model": {"backend": backend, "model": "siglip"}}
        assert absolute_paths(asked)["language_model"]["model"] == model
    for name in ("open_clip:ViT-B-16/openai", "hashed-ngram", "transformers:google/siglip"):
        assert settle(EvaluateRun(semantics=SemanticsConfig(encoder=name))).semantics.encoder == (
            name
        )


def test_remarks(photos: Path) -> None:
    own = DataConfig("photos", image_size=8)
    with pytest.warns(UserWarning, match=r"quarter_turns is on.*--pretrain\.quarter_turns false"):
        settle(PretrainRun(data=own))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settle(PretrainRun(data=own, pretrain=PretrainConfig(quarter_turns=False)))
        settle(DemoRun())


def test_warm_up_without_an_end() -> None:
    for epochs, instead in ((4, 0), (16, 2)):
        config = PretrainRun(pretrain=PretrainConfig(epochs=epochs, warmup_epochs=epochs))
        words = rf"{epochs} of {epochs} epoch.*never reach.*--pretrain\.warmup_epochs {instead}$"
        with pytest.raises(UsageError, match=words):
            settle(config)
        config.pretrain.warmup_epochs -= 1
        assert settle(config).pretrain == config.pretrain


def test_size_that_was_not_asked_for_is_said(photos: Path) -> None:
    said = {
        "shapes: images of 32 pixels (--data.image_size)": EvaluateRun(data=DataConfig("shapes")),
        "digits: images of 16 pixels (--data.image_size)": PretrainRun(),
        "": MetatuneRun(data=DataConfig("shapes", image_size=32)),
    }
    for line, given in said.items():
        assert size_line(given, settle(given)) == line
    own = EvaluateRun(data=DataConfig("photos", image_size=8))
    assert size_line(own, settle(own)) == ""


def test_next_commands(photos: Path, tmp_path: Path) -> None:
    best = "my runs/pre/checkpoints/best.safetensors"
    line = "dvla-fast metatune --config 'my runs/pre/config.yaml' --checkpoint '" + best + "'"
    assert metatune_command(PretrainRun(), best) == line
    shapes = PretrainRun(data=DataConfig("shapes"))
    assert metatune_command(shapes, best) == f"{line} --semantics.bank shapes"
    own = PretrainRun(data=DataConfig("photos"))
    assert metatune_command(own, best).startswith(f"{line} --semantics.bank BANK.json\n")
    (tmp_path / "all.yaml").write_text("semantics: {bank: mine.json}\nmetatune: {epochs: 3}\n")
    assert metatune_command(own, best, ["all.yaml"]) == line.replace(
        "--config", "--config all.yaml --config", 1
    )
    assert evaluate_command("r/checkpoints/b.safetensors") == (
        "dvla-fast evaluate --config r/config.yaml --checkpoint r/checkpoints/b.safetensors"
    )
    # the episodes' seed is not the training's
    assert evaluate_command("b", seed=1) == f"{evaluate_command('b')} --seed 0"


@pytest.mark.parametrize("name", ["mps", "meta", "cpu:7", "cuda:x", "gpu:0", ""])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(UsageError, match=r"is unknown; choose cpu, cuda, cuda:N or auto"):
        pick_device(name)


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(pick_device("cuda:1")) == "cuda:1"
    with pytest.raises(DVLAError, match="'cuda:2': torch sees 2 GPU"):
        pick_device("cuda:2")
