"""Containers for images held in memory: one labelled set, and the splits of a few-shot data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dvla_fast.errors import DataError

_PIECE = 2**23  # values


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of some classes.

    Attributes:
        name: for messages, e.g. ``"digits/base"``.
        images: (N, C, H, W), uint8 in 0..255 or float32 in [0, 1].
        labels: (N,) int64 indices into ``class_names``.
        mapped: the images are a read-only map of a file: they stay on disk, and ``gather`` and
            ``chunks`` bring what is asked for to the device of the labels. Never write to them.
        ids: (N,) what each image is called wherever it is loaded from (``Listing.image_id``);
            empty: not known.
        file_order: the images of a class are in the order of their file names, as an image folder
            has them; False: they came without names, in an order of their publisher's.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    mapped: bool = False
    ids: tuple[str, ...] = ()
    file_order: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape, kind = tuple(self.images.shape), str(self.images.dtype).removeprefix("torch.")
        return f"ImageSet({self.name!r}, {shape} {kind}, {len(self.class_names)} classes)"

    def to(self, device: torch.device | str) -> ImageSet:
        """Return a copy on another device; mapped images stay on disk."""
        images = self.images if self.mapped else self.images.to(device)
        return replace(self, images=images, labels=self.labels.to(device))

    @property
    def device(self) -> torch.device:
        """Where ``gather`` and ``chunks`` deliver."""
        return self.labels.device

    def gather(self, index: Tensor) -> Tensor:
        """Return the images at ``index`` (…) int64 as (…, C, H, W) on ``device``.

        An index on the CPU never makes the host wait for a GPU.
        """
        return to_device_of(self.labels, self.images[to_device_of(self.images, index)])

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Yield all images in order, (at most size, C, H, W) at a time, on ``device``."""
        for chunk in self.images.split(size):
            yield chunk.to(self.device)

    def subset(self, index: Tensor, name: str) -> ImageSet:
        """Return the images at ``index`` (int64) under another name, in memory."""
        ids = tuple(self.ids[place] for place in index.tolist()) if self.ids else ()
        return replace(
            self, name=name, images=self.images[index], labels=self.labels[index], mapped=False,
            ids=ids,
        )  # fmt: skip


@dataclass(frozen=True)
class FewShotData:
    """The splits of a few-shot data set.

    Attributes:
        base: images to train on.
        monitor: images for monitoring and selection: those of the validation classes where the
            data set has some, else held-out images of the base classes. Never the novel ones.
        novel: images of classes that training never sees.
        monitor_kind: what ``monitor`` holds, in words.
        mean, std: (C,) channel statistics of ``base`` in [0, 1] units.
        split_list: name of the bundled split list that the classes follow, all of them; empty:
            none, whatever the data set is called.
        shared: the images that lie in two splits (by their pixels), a line each.
        reduced: side of the smaller copies that the images were published as; 0: full-size images.
    """

    name: str
    base: ImageSet
    monitor: ImageSet
    novel: ImageSet
    monitor_kind: str
    mean: Tensor
    std: Tensor
    split_list: str = ""
    shared: tuple[str, ...] = ()
    reduced: int = 0

    @property
    def channels(self) -> int:
        return self.base.images.shape[1]

    @property
    def image_size(self) -> int:
        return self.base.images.shape[-1]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Every class once: base, then monitored, then novel ones."""
        names = self.base.class_names + self.monitor.class_names + self.novel.class_names
        return tuple(dict.fromkeys(names))

    def split(self, name: str) -> ImageSet:
        """Return a split by name: base, monitor or novel.

        Raises:
            DataError: unknown name.
        """
        splits = {"base": self.base, "monitor": self.monitor, "novel": self.novel}
        if name not in splits:
            raise DataError(f"split {name!r} is unknown; choose one of {', '.join(splits)}")
        return splits[name]

    def to(self, device: torch.device | str) -> FewShotData:
        """Return a copy on another device."""
        return replace(
            self,
            base=self.base.to(device),
            monitor=self.monitor.to(device),
            novel=self.novel.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Turn stored images (..., C, H, W) into float32 network input of zero mean, unit std."""
        images = unit_range(images)
        return (images - self.mean[:, None, None]) / self.std[:, None, None]


def to_device_of(target: Tensor, values: Tensor) -> Tensor:
    """Bring a tensor to another one's device; from the CPU without waiting for a GPU."""
    if values.device.type == "cpu" and target.device.type == "cuda":
        values = values.pin_memory()
    return values.to(target.device, non_blocking=True)


def unit_range(images: Tensor) -> Tensor:
    """Return float32 images in [0, 1] from stored ones (uint8 or float32)."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and std (C,) of stored images (N, C, H, W) in [0, 1] units."""
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    square = torch.zeros_like(total)
    # float64 in pieces of 64 MiB: a large set would not fit twice
    for chunk in images.split(max(1, _PIECE // max(1, images[0].numel()))):
        values = chunk.double() / scale
        total += values.sum((0, 2, 3))
        square += values.square().sum((0, 2, 3))
    count = images.shape[0] * images.shape[2] * images.shape[3]
    mean = total / count
    std = (square / count - mean.square()).clamp_min(1e-8).sqrt()
    return mean.float(), std.float()


def hold_out(
    labels: Tensor, share: float, seed: int, names: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Split images class by class at random.

    Args:
        labels: (N,) int64.
        share: part of each class to hold out, in [0, 1); rounded, at least one image when > 0.
        names: of the classes, for the message.

    Returns:
        Sorted index tensors (kept, held_out).

    Raises:
        DataError: a class would have no image left.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}")
    rng = np.random.Generator(np.random.Philox(seed))
    kept, held = [], []
    for label in range(int(labels.max()) + 1):
        index = rng.permutation(np.flatnonzero(labels.numpy() == label))
        count = max(1, round(share * len(index))) if share > 0 else 0
        if count and count >= len(index) > 0:
            name = names[label] if names else label
            raise DataError(
                f"class {name!r} has {len(index)} image(s), and --data.holdout {share:g} would "
                "hold out all of them, so that none is left to train on; lower it, add images, or "
                "give validation classes (val/), which need no holdout"
            )
        held.append(index[:count])
        kept.append(index[count:])
    return (
        torch.from_numpy(np.sort(np.concatenate(kept))),
        torch.from_numpy(np.sort(np.concatenate(held))),
    )
