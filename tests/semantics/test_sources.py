"""Which classes, and which of their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dvla_fast.data import load_digits, prepare_cache
from dvla_fast.data.episodes import EpisodeSampler
from dvla_fast.data.images import ImageSet
from dvla_fast.errors import DataError
from dvla_fast.semantics.language_models.base import ShownImage
from dvla_fast.semantics.sources import (
    check_classes,
    episode_images,
    folder_classes,
    image_set_classes,
    named_classes,
    pick,
    shown_tensor,
)
from dvla_fast.semantics.stages import ClassSource
from tests.data.trees import picture, split_folders, write_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return split_folders(tmp_path / "photos", count=6)


def test_classes_of_a_folder(folder: Path) -> None:
    classes = folder_classes(folder, "", [], 2, 0, 512)
    assert [item.name for item in classes] == list("abcdefghijkl")
    for item in classes:
        assert len(item.images) == 2
        for shown in item.images:
            assert (folder / shown.id).is_file()
            assert shown.id.split("/")[1] == item.name


def test_only_the_splits_asked_for(folder: Path) -> None:
    classes = folder_classes(folder, "", ["test"], 3, 0, 512)
    assert [item.name for item in classes] == list("hijkl")
    assert all(shown.id.startswith("test/") for item in classes for shown in item.images)
    with pytest.raises(DataError, match="has no split 'novel'; it has train, val, test"):
        folder_classes(folder, "", ["novel"], 3, 0, 512)


def test_the_seed_chooses_and_other_classes_do_not_matter(folder: Path) -> None:
    def ids(seed: int, parts: list[str]) -> list[list[str]]:
        return [
            [s.id for s in item.images] for item in folder_classes(folder, "", parts, 2, seed, 9)
        ]

    assert ids(0, ["test"]) == ids(0, ["test"]) == ids(0, [])[-5:]
    assert ids(0, ["test"]) != ids(1, ["test"])
    chosen = {tuple(row) for row in ids(0, [])}
    assert len({tuple(name.rsplit("_", 1)[1] for name in row) for row in chosen}) > 1


def test_few_or_no_images(folder: Path) -> None:
    assert {len(item.images) for item in folder_classes(folder, "", [], 99, 0, 9)} == {6}
    assert {len(item.images) for item in folder_classes(folder, "", [], 0, 0, 9)} == {0}
    assert pick(np.arange(5), 0, 0, "x") == []


def test_cache_shows_the_same_images_under_the_same_ids(folder: Path, tmp_path: Path) -> None:
    prepare_cache(folder, tmp_path / "cache", 16)
    from_files = folder_classes(folder, "", ["val", "test"], 2, 3, 512)
    from_cache = folder_classes(tmp_path / "cache", "", ["val", "test"], 2, 3, 512)
    for one, other in zip(from_files, from_cache, strict=True):
        assert one.name == other.name
        assert [shown.id for shown in one.images] == [shown.id for shown in other.images]
    (shown, _) = from_cache[-1].images
    from dvla_fast.data.decode import decode

    expected = decode(folder / shown.id, 16).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(shown.picture()), expected)
    with pytest.raises(DataError, match="prepared with the split of its folders, not fc100"):
        folder_classes(tmp_path / "cache", "fc100", [], 2, 3, 512)


def test_classes_of_image_sets() -> None:
    data = load_digits()
    classes = image_set_classes([("digits/novel", data.novel)], 3, 0, 512)
    assert [item.name for item in classes] == ["one", "three", "five", "seven", "nine"]
    for label, item in enumerate(classes):
        rows = [data.novel.ids.index(shown.id) for shown in item.images]
        assert (data.novel.labels[rows] == label).all()
        grey = np.asarray(item.images[0].picture())
        assert grey.shape == (16, 16, 3)
        assert np.array_equal(grey[..., 0], (data.novel.images[rows[0], 0] * 255).round().byte())


def test_images_of_an_episode_are_its_supports_alone() -> None:
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    images = ImageSet("made", pixels, torch.arange(4).repeat_interleave(10), tuple("abcd"))
    batch = EpisodeSampler(images, way=3, shot=2, query=4, seed=0).batch(0, 1)
    shown = episode_images(images, batch.support[0], way=3)
    assert [len(item) for item in shown] == [2, 2, 2]
    ids = [item.id for row in shown for item in row]
    assert ids == [f"made[{place}]" for place in batch.support[0].tolist()]
    queries = {f"made[{place}]" for place in batch.query[0].tolist()}
    assert not queries & set(ids)
    first = np.asarray(shown[0][0].picture())
    assert np.array_equal(first, pixels[batch.support[0, 0]].permute(1, 2, 0))


def test_digest_follows_content_and_size(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 1)
    write_image(tmp_path / "b.png", 1)
    write_image(tmp_path / "c.png", 2)
    one, same, other = (ShownImage(n, tmp_path / f"{n}.png") for n in "abc")
    assert one.digest == same.digest != other.digest
    assert one.digest != ShownImage("a", tmp_path / "a.png", 8).digest
    assert ShownImage("x", picture(1)).digest == ShownImage("y", picture(1)).digest
    assert shown_tensor(torch.zeros(1, 4, 4), "z").picture().size == (4, 4)


def test_classes_that_nothing_can_be_written_about() -> None:
    with pytest.raises(DataError, match="no class to write texts for"):
        named_classes([])
    with pytest.raises(DataError, match="class number 2 has no name"):
        named_classes(["a", " "])
    with pytest.raises(DataError, match="'a' is named twice"):
        named_classes(["a", "b", "a "])
    with pytest.raises(DataError, match=r"1 class\(es\) have no image to show \('a'\)"):
        check_classes([ClassSource("a")], with_images=True)
