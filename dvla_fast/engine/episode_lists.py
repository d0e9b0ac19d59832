"""Which list of episodes an evaluation runs on: ours, or the one of the method's authors."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dvla_fast.data import EpisodeSampler, ImageSet
from dvla_fast.data.episodes import BLOCK
from dvla_fast.engine.config import EvaluateConfig
from dvla_fast.engine.settings import UsageError

_SEEDS = 2**32  # that RandomState knows


class AuthorsEpisodeSampler(EpisodeSampler):
    """The fixed list that the code of VT-FSL and DVLA-RL++ evaluates on, episode for episode.

    NumPy's legacy generator, seeded once, draws each episode's classes and then, class by class,
    its shot + query images without replacement; the first ``shot`` are the supports. Their lists
    use seed 0. The same list needs the same images in the same order: classes sorted by folder
    name and images by file name, as ``torchvision.datasets.ImageFolder`` does and ``load_data``
    here, whatever the layout; but for pickles without file names (``ImageSet.file_order``).

    Arguments and errors are those of :class:`~dvla_fast.data.EpisodeSampler`. Episode i costs the
    draw of all episodes before it, once.
    """

    def __init__(self, images: ImageSet, way: int, shot: int, query: int, seed: int = 0) -> None:
        super().__init__(images, way, shot, query, seed)
        # RandomState is frozen by NumPy's compatibility policy: the stream cannot change.
        self._stream = np.random.RandomState(seed)
        self._drawn: list[tuple[np.ndarray, np.ndarray]] = []

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        while len(self._drawn) <= number:
            classes = np.empty((BLOCK, self.way), dtype=np.int64)
            chosen = np.empty((BLOCK, self.way, self.shot + self.query), dtype=np.int64)
            for episode in range(BLOCK):
                drawn = self._stream.choice(len(self._counts), self.way, replace=False)
                classes[episode] = drawn
                for label, name in enumerate(drawn):
                    places = self._stream.choice(
                        self._counts[name], self.shot + self.query, replace=False
                    )
                    chosen[episode, label] = self._table[name, places]
            self._drawn.append((classes, chosen))
        return self._drawn[number]


def build_samplers(
    config: EvaluateConfig, images: ImageSet, seed: int, not_as_query: Tensor | None = None
) -> list[EpisodeSampler]:
    """Return the samplers of an evaluation, one for each of its shots; see :func:`build_sampler`.

    Args:
        images: of the evaluated split.
    """
    return [
        build_sampler(
            config.episode_list, images, config.way, shot, config.query, seed, not_as_query
        )
        for shot in config.shots
    ]


def build_sampler(
    name: str,
    images: ImageSet,
    way: int,
    shot: int,
    query: int,
    seed: int,
    not_as_query: Tensor | None = None,
) -> EpisodeSampler:
    """Return the sampler of an episode list.

    Args:
        name: own or authors.
        not_as_query: as for :class:`~dvla_fast.data.EpisodeSampler`.

    Raises:
        UsageError: a seed that the authors' list cannot have, or images to be left out of it.
        DataError: too few classes or images for the episodes.
    """
    if name == "own":
        return EpisodeSampler(images, way, shot, query, seed, not_as_query)
    assert name == "authors"  # the option checks what is given
    if not 0 <= seed < _SEEDS:
        raise UsageError(
            f"--seed {seed}: the authors' list takes seeds from 0 to {_SEEDS - 1}, and theirs is 0"
        )
    if not_as_query is not None and bool(not_as_query.any()):
        raise UsageError(
            f"the authors' list is fixed and cannot leave out the {int(not_as_query.sum())} images "
            "that the bank's texts were written from; set --semantics.seen_images report, which "
            "counts them in the summary, or --evaluate.episode_list own"
        )
    return AuthorsEpisodeSampler(images, way, shot, query, seed)
