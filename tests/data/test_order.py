"""Every layout of a data set has one order, that of an image folder, and one name."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from dvla_fast.data import ImageSet, list_data, load_data, load_split_list, prepare_cache
from dvla_fast.data.cache import verify_cache
from dvla_fast.engine.config import EvaluateRun
from dvla_fast.engine.episode_lists import AuthorsEpisodeSampler
from dvla_fast.engine.evaluate import _samplers
from tests.data import trees


def drawn(images: ImageSet) -> list[str]:
    """The files of the authors' first episodes."""
    batch = AuthorsEpisodeSampler(images, 5, 1, 1).batch(0, 8)
    return [Path(images.ids[i]).name for i in batch.support.flatten().tolist()]


def test_an_archive_and_its_folders_have_one_list_of_episodes(tmp_path: Path) -> None:
    root = trees.cub(tmp_path / "archive", 4)
    folder = root / "CUB_200_2011"
    lines = (folder / "images.txt").read_text().splitlines()
    random.Random(0).shuffle(lines)  # the published one does not follow the names either
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    listed = load_data(str(root), 8, splits="cub_100_50_50").novel
    plain = tmp_path / "plain"
    for split, keys in load_split_list("cub_100_50_50").splits.items():
        (plain / split).mkdir(parents=True)
        for key in keys:
            (plain / split / key).symlink_to(folder / "images" / key)
    folders = load_data(str(plain), 8).novel
    assert listed.class_names == folders.class_names
    assert drawn(listed) == drawn(folders)
    prepare_cache(root, tmp_path / "cache", 8, "cub_100_50_50")
    assert drawn(load_data(str(tmp_path / "cache"), 8).novel) == drawn(folders)


def test_classes_are_sorted_by_folder_not_as_the_split_list_has_them(tmp_path: Path) -> None:
    known = load_split_list("tieredimagenet")
    assert list(known.splits["test"]) != sorted(known.splits["test"])
    trees.class_folders(tmp_path / "photos", known.keys, 2)
    listing = list_data(tmp_path / "photos", "tieredimagenet")
    for split, keys in known.splits.items():
        assert list(listing.splits[split].keys) == sorted(keys)


def test_cifar_pickles_are_read_in_the_order_of_their_file_names(tmp_path: Path) -> None:
    trees.cifar100(tmp_path)
    pixels = {}
    for part in ("train", "test"):
        path = tmp_path / "cifar-100-python" / part
        content = pickle.loads(path.read_bytes())
        count = len(content["data"])
        names = [f"{n:04d}.png" for n in np.random.default_rng(count).permutation(count)]
        content["filenames"] = [f"{part[1]}{name}" for name in names]
        trees.dump(path, content)
        pixels |= dict(zip(content["filenames"], content["data"]))
    split = list_data(tmp_path, "cifar_fs").splits["test"]
    seen = [
        next(name for name, row in pixels.items()
             if (row.reshape(3, 32, 32).transpose(1, 2, 0) == split.source(place)).all())
        for place in range(6)
    ]  # fmt: skip
    assert seen == sorted(seen[:3]) + sorted(seen[3:])  # three images of each class
    assert split.file_order


@pytest.mark.parametrize("episode_list", ["own", "authors"])
def test_pickles_without_file_names_are_told(
    tmp_path: Path, episode_list: str, recwarn: pytest.WarningsRecorder
) -> None:
    data = load_data(str(trees.mini_imagenet(tmp_path, count=6)), 84)
    config = EvaluateRun()
    config.evaluate.episode_list, config.evaluate.shots, config.evaluate.query = (
        episode_list,
        [1],
        2,
    )
    _samplers(config, data, None)
    told = [str(w.message) for w in recwarn if "images without file names" in str(w.message)]
    assert len(told) == (episode_list == "authors")


def test_a_linked_data_set_and_its_cache_are_one(tmp_path: Path) -> None:
    trees.split_folders(tmp_path / "x")
    (tmp_path / "birds").symlink_to(tmp_path / "x")
    prepare_cache(tmp_path / "birds", tmp_path / "cache", 8)
    folder, cached = (load_data(str(tmp_path / name), 8) for name in ("birds", "cache"))
    assert (folder.name, cached.name) == ("birds", "birds")
    assert folder.novel.ids == cached.novel.ids


@pytest.mark.parametrize("given", ["link", "relative"])
def test_lists_of_absolute_paths_below_another_name_of_the_folder(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "real"
    for split, keys in (("base", "ab"), ("novel", "cd")):
        trees.class_folders(real / "images", keys, 2, ord(keys[0]))
        names = [str(real / f"images/{key}/{key}_{n}.jpg") for key in keys for n in range(2)]
        content = {"label_names": list(keys), "image_names": names, "image_labels": [0, 0, 1, 1]}
        (real / f"{split}.json").write_text(json.dumps(content))
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(tmp_path)
    root = "link" if given == "link" else "real"
    prepare_cache(root, "cache", 8)
    assert load_data("cache", 8).novel.ids[0] == "images/c/c_0.jpg"
    assert verify_cache("cache") == []
    assert prepare_cache(real, "cache", 8).decoded == 0
