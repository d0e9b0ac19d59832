"""Seeded few-shot episodes: which classes, which support images, which queries.

Episode number i of a seed is always the same, whatever the batch size, the machine, or the
episodes drawn before it. So every method of a comparison meets the same episodes, and a run
that is resumed needs only a counter.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dvla_fast.arguments import expect_tensor, expect_whole
from dvla_fast.data.images import ImageSet
from dvla_fast.errors import DataError

# Episodes are drawn in blocks of this many, each from its own counter-based stream: a whole block
# is one vectorised draw, and any block can be drawn without those before it. Part of the meaning
# of a seed: never change it.
BLOCK = 128
# Blocks that a sampler remembers: 4,096 episodes, a few megabytes.
_KEPT = 32


class EpisodeBatch(NamedTuple):
    """Index tensors of E episodes (int64); images are class by class inside an episode.

    classes (E, way): class of each episode label; support, support_labels (E, way * shot);
    query, query_labels (E, way * query): positions in the image set, and labels in [0, way).
    """

    classes: Tensor
    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor

    def to(self, device: torch.device | str) -> EpisodeBatch:
        """Return a copy on another device."""
        return EpisodeBatch(*(tensor.to(device) for tensor in self))


class EpisodeSampler:
    """Draws N-way K-shot episodes without replacement from an image set.

    Args:
        images: where to draw from.
        way, shot, query: classes of an episode, and supports and queries of a class.
        seed: fixes the whole (endless) list of episodes.
        not_as_query: (N,) bool, images that may be supports but never queries, because the
            classes' texts were written from them. Without any the list is as without the argument.

    Raises:
        DataError: fewer classes than ``way``, a class with fewer than shot + query images, or too
            few of them for queries.
        TypeError, ValueError: an argument of the wrong kind or shape.
    """

    def __init__(
        self,
        images: ImageSet,
        way: int,
        shot: int,
        query: int,
        seed: int,
        not_as_query: Tensor | None = None,
    ) -> None:
        for name, value in (("way", way), ("shot", shot), ("query", query), ("seed", seed)):
            expect_whole(name, value)
            if name == "seed" and value < 0:
                raise DataError(f"seed must be at least 0, got {value}")
            if name != "seed" and value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")
        self.way, self.shot, self.query, self.seed = way, shot, query, seed
        labels = images.labels.cpu().numpy()
        _check_labels(images, labels)
        counts = np.bincount(labels, minlength=len(images.class_names))
        if len(counts) < way:
            raise DataError(
                f"{images.name}: {len(counts)} classes cannot give a {way}-way episode; lower "
                "way or add classes"
            )
        self._check_counts(images, counts)
        self._counts = counts
        # (C, longest) positions of each class's images, padded at the end
        self._table = np.zeros((len(counts), counts.max()), dtype=np.int64)
        for label, count in enumerate(counts):
            self._table[label, :count] = np.flatnonzero(labels == label)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._barred: np.ndarray | None = None  # [N]
        if not_as_query is not None and bool(_flags(not_as_query, len(labels)).any()):
            self._barred = not_as_query.cpu().numpy()
            left = np.bincount(labels[~self._barred], minlength=len(counts))
            self._check_counts(images, left, written_from=True)

    def _check_counts(
        self, images: ImageSet, counts: np.ndarray, written_from: bool = False
    ) -> None:
        """Find the classes with too few images (DataError).

        Args:
            written_from: the images that texts were written from do not count.
        """
        short = [
            f"{name!r} has {count}"
            for name, count in zip(images.class_names, counts, strict=True)
            if count < self.shot + self.query
        ]
        if short:
            where, remedy = f"{images.name}:", "or add images"
            if written_from:
                where += " without the images that the texts were written from,"
                remedy = "add images, or use a bank that has seen fewer"
            raise DataError(
                f"{where} {len(short)} class(es) have fewer than the {self.shot} support + "
                f"{self.query} query images of an episode ({'; '.join(short[:5])}); lower shot or "
                f"query, {remedy}"
            )

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """One block, drawn once: an evaluation passes several times over its list."""
        if number not in self._blocks:
            if len(self._blocks) == _KEPT:
                del self._blocks[next(iter(self._blocks))]  # the oldest
            self._blocks[number] = self._draw(number)
        return self._blocks[number]

    def _draw(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw one block: classes (BLOCK, way) and image positions (BLOCK, way, shot + query)."""
        stream = np.random.SeedSequence(
            self.seed, spawn_key=(self.way, self.shot, self.query, number)
        )
        rng = np.random.Generator(np.random.Philox(stream))
        classes = rng.random((BLOCK, len(self._counts))).argsort(1, kind="stable")[:, : self.way]
        keys = rng.random((BLOCK, self.way, self._table.shape[1]))
        keys[np.arange(keys.shape[2]) >= self._counts[classes][..., None]] = 2.0  # padding: last
        if self._barred is not None:
            self._bar(keys, classes)
        order = keys.argsort(2, kind="stable")[..., : self.shot + self.query]
        return classes, np.take_along_axis(self._table[classes], order, axis=2)

    def _bar(self, keys: np.ndarray, classes: np.ndarray) -> None:
        """Move barred images behind the queries, unless they are among the supports."""
        assert self._barred is not None
        barred = self._barred[self._table[classes]]  # [BLOCK, way, longest]
        supports = keys.argsort(2, kind="stable")[..., : self.shot]
        np.put_along_axis(barred, supports, False, axis=2)
        keys[barred] += 1.0  # in [1, 2): after the others

    def batch(self, start: int, count: int) -> EpisodeBatch:
        """Return the episodes numbered start .. start + count - 1, on the CPU."""
        if start < 0 or count < 1:
            raise ValueError(f"start must be >= 0 and count >= 1, got {start} and {count}")
        classes, chosen = [], []
        for number in range(start // BLOCK, (start + count - 1) // BLOCK + 1):
            first = max(0, start - number * BLOCK)
            last = min(BLOCK, start + count - number * BLOCK)
            block_classes, block_chosen = self._block(number)
            classes.append(block_classes[first:last])
            chosen.append(block_chosen[first:last])
        index = torch.from_numpy(np.concatenate(chosen))  # (E, way, shot + query)
        labels = torch.arange(self.way).repeat(count, 1)  # (E, way)
        return EpisodeBatch(
            torch.from_numpy(np.concatenate(classes)),
            index[..., : self.shot].flatten(1),
            labels.repeat_interleave(self.shot, 1),
            index[..., self.shot :].flatten(1),
            labels.repeat_interleave(self.query, 1),
        )

    def fingerprint(self, episodes: int) -> str:
        """Return the SHA-256 of the first ``episodes`` episodes, to compare lists across runs."""
        digest = hashlib.sha256()
        for start in range(0, episodes, BLOCK):
            batch = self.batch(start, min(BLOCK, episodes - start))
            for tensor in (batch.classes, batch.support, batch.query):
                digest.update(tensor.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def _check_labels(images: ImageSet, labels: np.ndarray) -> None:
    if len(labels) != len(images.images):
        raise DataError(f"{images.name}: {len(images.images)} images, but {len(labels)} labels")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(images.class_names):
        raise DataError(
            f"{images.name}: labels from {labels.min()} to {labels.max()}, but "
            f"{len(images.class_names)} class names"
        )


def _flags(not_as_query: Tensor, count: int) -> Tensor:
    expect_tensor("not_as_query", not_as_query)
    if not_as_query.dtype != torch.bool or not_as_query.shape != (count,):
        raise ValueError(
            f"not_as_query: expected bool ({count},), one for each image, got "
            f"{not_as_query.dtype} {tuple(not_as_query.shape)}"
        )
    return not_as_query
