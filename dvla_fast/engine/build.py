"""From configuration to objects: seeds, devices and data."""

from __future__ import annotations

import random
import re
from dataclasses import fields, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dvla_fast.data import FewShotData, ImageSet, load_data
from dvla_fast.data.shapes import KINDS, load_shapes
from dvla_fast.engine.config import DataConfig
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.settings import UsageError
from dvla_fast.engine.settle import sized
from dvla_fast.errors import DataError, DVLAError


def seed_everything(seed: int) -> np.random.Generator:
    """Seed torch and Python; return the run's own NumPy generator."""
    random.seed(seed)
    torch.manual_seed(seed)
    return np.random.Generator(np.random.PCG64(seed))


def pick_device(name: str | torch.device) -> torch.device:
    """Return the device for cpu, cuda, cuda:N or auto, or the one given if it is of such a kind.

    Raises:
        TypeError: neither a name nor a device.
        UsageError: unknown name.
        DVLAError: no such device here.
    """
    if isinstance(name, torch.device):
        name = name.type if name.type == "cpu" else str(name)
    if not isinstance(name, str):
        raise TypeError(
            f"device: expected cpu, cuda, cuda:N, auto or a torch.device, got {type(name).__name__}"
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise UsageError(f"device {name!r} is unknown; choose cpu, cuda, cuda:N or auto")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise DVLAError(f"device {name!r} was asked for, but torch sees no GPU; choose cpu or auto")
    if device.index is not None and device.index >= count:
        raise DVLAError(f"device {name!r}: torch sees {count} GPU(s), cuda:0 to cuda:{count - 1}")
    return device


def build_data(
    config: DataConfig, device: torch.device, *, training: bool = False, quiet: bool = True
) -> FewShotData:
    """Load the data set onto the device; the images of a cache stay on disk.

    Args:
        training: it is to be trained on.
        quiet: do not show how far it is.

    Raises:
        DataError: missing or unusable; or, for ``training``, without base classes.
    """
    config = sized(config)
    with Progress({"read images": 1.0}, enabled=not quiet) as progress:
        advance = partial(progress.reach, "read images")
        if config.dataset in KINDS:
            size, each = config.image_size, config.images_per_class
            data = load_shapes(size, each, kind=config.dataset, advance=advance)
        else:
            data = load_data(
                config.dataset, config.image_size, config.holdout, config.split_seed,
                config.splits, advance,
            )  # fmt: skip
    if training and not len(data.base):
        raise DataError(
            f"{config.dataset}: no base classes to train on, only classes to evaluate; train on "
            "another data set and give this one to 'dvla-fast evaluate'"
        )
    return _resident(data.to(device), config.resident, device)


def _resident(data: FewShotData, wanted: str, device: torch.device) -> FewShotData:
    """Bring the training images of a cache into GPU memory, where asked for or where they fit."""
    sets = [data.base, data.monitor]
    if wanted == "no" or device.type != "cuda" or not any(item.mapped for item in sets):
        return data
    free, _ = torch.cuda.mem_get_info(device)
    if wanted == "auto" and sum(item.images.nbytes for item in sets) > free / 2:
        return data
    base, monitor = (replace(x, images=x.images.to(device), mapped=False) for x in sets)
    return replace(data, base=base, monitor=monitor)


class TrainingData(FewShotData):
    """A data set without its test images: what pre-training and meta-tuning work on.

    Selection uses ``monitor``. The novel classes' names stay, their images do not, so that no
    training loop can score itself on them.
    """

    def split(self, name: str) -> ImageSet:
        """Return base or monitor.

        Raises:
            DataError: unknown name, or novel, which only an evaluation may read.
        """
        if name == "novel":
            raise DataError(
                f"{self.novel.name}: the test split is not read during training; select by "
                "'monitor', and run `dvla-fast evaluate` when training is done"
            )
        return super().split(name)


def without_test_split(data: FewShotData) -> TrainingData:
    """Return the data set as training may see it; no image is copied."""
    parts = {item.name: getattr(data, item.name) for item in fields(data)}
    novel = data.novel
    empty = replace(novel, images=novel.images[:0], labels=novel.labels[:0], ids=())
    return TrainingData(**{**parts, "novel": empty})


def normalisation(data: FewShotData) -> dict[str, list[float]]:
    """Return the channel statistics for a checkpoint's description."""
    return {"mean": data.mean.tolist(), "std": data.std.tolist()}


def split_classes(data: FewShotData, split: str) -> Tensor:
    """Map a split's class indices to positions in ``data.class_names``: int64 (C,)."""
    position = {name: index for index, name in enumerate(data.class_names)}
    names = data.split(split).class_names
    return torch.tensor([position[name] for name in names], device=data.base.labels.device)
