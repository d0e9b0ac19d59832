"""A small data set, small models and small recipes that the engine's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla_fast.cli import main
from dvla_fast.data import FewShotData, load_digits
from dvla_fast.data.images import ImageSet
from dvla_fast.engine.checkpoint import save_checkpoint
from dvla_fast.engine.config import (
    DemoRun,
    EvaluateConfig,
    MetatuneConfig,
    ModelConfig,
    PretrainConfig,
)
from dvla_fast.engine.models import build_model, build_pretrain_model

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]  # channel statistics of make_checkpoint


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models here are tiny: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The best checkpoint of a short pre-training on the digits; the last is beside it."""
    folder = tmp_path_factory.mktemp("backbone") / "run"
    tiny = ["--pretrain.epochs=1", "--pretrain.warmup_epochs=0", "--model.width=8"]
    tiny += ["--pretrain.validation_episodes=4"]
    assert main(["pretrain", "--device=cpu", f"--output={folder}", *tiny]) == 0
    return str(folder / "checkpoints" / "pretrain-best.safetensors")


@pytest.fixture
def few_digits() -> FewShotData:
    """The digits with at most 24 images of a class."""
    data = load_digits()

    def cut(images: ImageSet) -> ImageSet:
        classes = range(len(images.class_names))
        index = torch.cat([(images.labels == c).nonzero()[:24, 0] for c in classes])
        return images.subset(index, images.name)

    return FewShotData(
        "digits", cut(data.base), cut(data.monitor), cut(data.novel), "held out", data.mean,
        data.std,
    )  # fmt: skip


@pytest.fixture
def tiny() -> DemoRun:
    """Settings of a run that takes a second or two."""
    return DemoRun(
        device="cpu",
        model=ModelConfig(width=8, num_heads=4, hidden_dim=8),
        pretrain=PretrainConfig(
            epochs=2, batch_size=64, warmup_epochs=1, validate_every=1, validation_episodes=8
        ),
        metatune=MetatuneConfig(
            epochs=2, steps_per_epoch=2, episodes_per_step=2, query=3, validate_every=1,
            validation_episodes=4,
        ),
        evaluate=EvaluateConfig(episodes=6, query=4, batch_episodes=4),
    )  # fmt: skip


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint of random weights, for 16-pixel images and hashed texts."""

    def make(
        kind: str = "metatune",
        channels: int = 3,
        encoder: str = "hashed-ngram",
        truncate: bool = False,
        parts: str = "all",
        **options: Any,
    ) -> Path:
        torch.manual_seed(1)
        backbone = {"name": "small", "image_size": 16, "in_channels": channels, "width": 8}
        spec = {"backbone": backbone, "text_dim": 64, "gated_layers": [], **options}
        info: dict[str, Any] = {"kind": kind, "model": spec}
        info["normalisation"] = {"mean": MEAN[:channels], "std": STD[:channels]}
        if kind == "metatune":
            model: torch.nn.Module = build_model(spec)
            info["semantics"] = {"top_k": 0, "parts": parts, "encoder": encoder}
            info["semantics"]["truncate"] = truncate
            info["semantics"]["dim"] = spec["text_dim"]
        else:
            model, info["model"] = build_pretrain_model(backbone, 5), {"backbone": backbone}
            info["model"]["classes"] = 5
        path = tmp_path / f"{kind}.safetensors"
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        save_checkpoint(path, tensors, info)
        return path

    return make
