"""A small data set, small models and small recipes that the engine's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dvla_fast.data import FewShotData, load_digits
from dvla_fast.data.images import ImageSet
from dvla_fast.engine.config import (
    DemoRun,
    EvaluateConfig,
    MetatuneConfig,
    ModelConfig,
    PretrainConfig,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models here are tiny: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
