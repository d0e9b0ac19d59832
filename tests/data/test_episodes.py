"""The sampler: valid episodes, fixed by the seed whatever the batching, and clear limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dvla_fast.data import EpisodeSampler, ImageSet
from dvla_fast.errors import DataError

COUNTS = (9, 7, 12, 8)
GOLDEN_CLASSES = [[2, 3], [3, 0], [0, 2]]
GOLDEN_SUPPORT = [[18, 16], [5, 0], [22, 11]]


@pytest.fixture
def images() -> ImageSet:
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(COUNTS)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return ImageSet("toy", torch.zeros(len(labels), 1, 8, 8), labels, ("a", "b", "c", "d"))


def test_episodes_are_valid(images: ImageSet) -> None:
    batch = EpisodeSampler(images, 3, 2, 4, seed=5).batch(0, 300)
    for classes, support, s_labels, query, q_labels in zip(*batch, strict=True):
        assert len(set(classes.tolist())) == 3
        assert torch.equal(images.labels[support], classes[s_labels])
        assert torch.equal(images.labels[query], classes[q_labels])
        used = support.tolist() + query.tolist()
        assert len(set(used)) == 3 * (2 + 4)
        assert torch.bincount(q_labels).tolist() == [4, 4, 4]
    assert set(batch.classes.unique().tolist()) == {0, 1, 2, 3}


def test_every_image_can_be_a_support(images: ImageSet) -> None:
    batch = EpisodeSampler(images, 3, 2, 4, seed=5).batch(0, 300)
    assert set(batch.support.unique().tolist()) == set(range(sum(COUNTS)))


@pytest.mark.parametrize("cuts", [(300,), (1, 299), (127, 2, 171), (64, 64, 64, 64, 44)])
def test_an_episode_does_not_depend_on_the_batching(
    images: ImageSet, cuts: tuple[int, ...]
) -> None:
    whole = EpisodeSampler(images, 3, 2, 4, seed=5).batch(0, 300)
    sampler, start, parts = EpisodeSampler(images, 3, 2, 4, seed=5), 0, []
    for count in cuts:
        parts.append(sampler.batch(start, count))
        start += count
    for index, tensor in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), tensor)


def test_seed_and_shape_fix_the_list(images: ImageSet) -> None:
    prints = {
        EpisodeSampler(images, way, shot, 4, seed).fingerprint(200)
        for way, shot, seed in [(3, 2, 5), (3, 2, 6), (3, 1, 5), (2, 2, 5)]
    }
    assert len(prints) == 4
    assert EpisodeSampler(images, 3, 2, 4, 5).fingerprint(200) in prints


def test_the_list_of_a_seed_never_changes(images: ImageSet) -> None:
    """A golden value: published numbers name a seed, which must keep meaning the same episodes."""
    batch = EpisodeSampler(images, 2, 1, 1, seed=0).batch(0, 3)
    assert batch.classes.tolist() == GOLDEN_CLASSES
    assert batch.support.tolist() == GOLDEN_SUPPORT


def test_too_many_ways(images: ImageSet) -> None:
    with pytest.raises(DataError, match="4 classes cannot give a 5-way episode"):
        EpisodeSampler(images, 5, 1, 1, 0)


def test_too_few_images(images: ImageSet) -> None:
    with pytest.raises(DataError, match=r"1 class.*5 support \+ 3 query.*'b' has 7"):
        EpisodeSampler(images, 2, 5, 3, 0)


def test_barred_images_are_supports_and_never_queries(images: ImageSet) -> None:
    """All else of the list stays as it is."""
    barred = torch.zeros(sum(COUNTS), dtype=torch.bool)
    for label in range(len(COUNTS)):
        barred[(images.labels == label).nonzero()[0]] = True
    plain = EpisodeSampler(images, 3, 2, 4, 5).batch(0, 300)
    found = EpisodeSampler(images, 3, 2, 4, 5, barred).batch(0, 300)
    assert torch.equal(found.classes, plain.classes)
    assert torch.equal(found.support, plain.support)
    assert barred[found.support].any()
    assert not barred[found.query].any()
    same = ~barred[plain.query].any(1)
    assert same.any()
    assert torch.equal(found.query[same], plain.query[same])
    for classes, support, query, labels in zip(
        found.classes, found.support, found.query, found.query_labels, strict=True
    ):
        assert torch.equal(images.labels[query], classes[labels])
        assert len({*support.tolist(), *query.tolist()}) == 3 * (2 + 4)
    nothing = EpisodeSampler(images, 3, 2, 4, 5, torch.zeros_like(barred)).batch(0, 300)
    assert torch.equal(nothing.query, plain.query)
    barred[images.labels == 1] = True
    with pytest.raises(DataError, match=r"without the images that the texts .*'b' has 0.*bank"):
        EpisodeSampler(images, 3, 2, 4, 5, barred)


def test_a_set_of_one_class(images: ImageSet) -> None:
    one = replace(images, labels=torch.zeros_like(images.labels), class_names=("a",))
    batch = EpisodeSampler(one, 1, 1, 1, 0).batch(0, 5)
    assert batch.classes.tolist() == [[0]] * 5


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 0)])
def test_episodes_that_there_are_not(images: ImageSet, start: int, count: int) -> None:
    with pytest.raises(ValueError, match="start must be >= 0 and count >= 1"):
        EpisodeSampler(images, 2, 1, 1, 0).batch(start, count)


@pytest.mark.parametrize(("way", "shot", "query"), [(0, 1, 1), (2, 0, 1), (2, 1, 0)])
def test_nothing_to_draw(images: ImageSet, way: int, shot: int, query: int) -> None:
    with pytest.raises(DataError, match="at least 1"):
        EpisodeSampler(images, way, shot, query, 0)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("seed", None, TypeError), ("seed", 1.5, TypeError), ("seed", -1, DataError),
     ("way", 2.0, TypeError)],
)  # fmt: skip
def test_numbers_that_name_no_list(
    images: ImageSet, name: str, value: Any, error: type[Exception]
) -> None:
    given = {"way": 2, "shot": 1, "query": 1, "seed": 0, name: value}
    with pytest.raises(error, match=name):
        EpisodeSampler(images, **given)


@pytest.mark.parametrize(
    ("given", "error"),
    [([True], TypeError), (torch.ones(3, dtype=torch.bool), ValueError),
     (torch.ones(sum(COUNTS), 1).bool(), ValueError), (torch.ones(sum(COUNTS)).int(), ValueError)],
)  # fmt: skip
def test_images_barred_in_no_way(images: ImageSet, given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="not_as_query: expected"):
        EpisodeSampler(images, 2, 1, 1, 0, given)


def test_labels_that_do_not_fit_the_images(images: ImageSet) -> None:
    for labels in (images.labels + 1, images.labels - 1):
        with pytest.raises(DataError, match=r"labels from -?\d to \d, but 4 class names"):
            EpisodeSampler(replace(images, labels=labels), 2, 1, 1, 0)
    with pytest.raises(DataError, match=r"images, but .* labels"):
        EpisodeSampler(replace(images, images=images.images[:3]), 2, 1, 1, 0)
