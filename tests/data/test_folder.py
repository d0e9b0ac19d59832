"""Image folders: both layouts load; every kind of broken folder is named with its path."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dvla_fast.data import load, load_data
from dvla_fast.errors import DataError


def write_images(folder: Path, count: int, suffix: str = "png") -> None:
    rng = np.random.default_rng(len(folder.name))
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{suffix}")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for split, names in {"train": "ab", "val": "cd", "test": "ef"}.items():
        for name in names:
            write_images(tmp_path / split / name, 4)
    return tmp_path


def test_train_val_test(tree: Path) -> None:
    data = load_data(str(tree), image_size=16)
    assert data.base.images.shape == (8, 3, 16, 16)
    assert data.base.images.dtype == torch.uint8
    assert data.monitor.class_names == ("c", "d")
    assert data.monitor_kind == "validation classes"
    assert data.novel.class_names == ("e", "f")
    assert data.normalise(data.base.images).mean().abs() < 1e-4


def test_base_novel_without_val_holds_images_out(tmp_path: Path) -> None:
    write_images(tmp_path / "base" / "a", 8, "jpg")
    write_images(tmp_path / "base" / "b", 8, "JPEG")
    write_images(tmp_path / "novel" / "c", 4)
    data = load_data(str(tmp_path), image_size=16, holdout=0.25)
    assert (len(data.base), len(data.monitor)) == (12, 4)
    assert data.monitor.class_names == data.base.class_names


def test_the_centre_is_kept(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / split / split
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = np.zeros((32, 96, 3), dtype=np.uint8)
            pixels[:, 32:64] = 200
            Image.fromarray(pixels).save(folder / f"{number}.png")
    data = load_data(str(tmp_path), image_size=32)
    assert (data.base.images[:, :, 8:24, 8:24] == 200).all()


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder.*'dvla-fast data prepare'"):
        load_data(str(tmp_path / "nowhere"))


def test_root_without_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold the folders train/ and test/"):
        load_data(str(tmp_path))


def test_split_without_classes(tree: Path) -> None:
    shutil.rmtree(tree / "test")
    (tree / "test").mkdir()
    with pytest.raises(DataError, match=r"test: no class folders"):
        load_data(str(tree), image_size=16)


def test_class_without_images(tree: Path) -> None:
    (tree / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: 0 image"):
        load_data(str(tree), image_size=16)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_image(tree: Path, content: bytes | None) -> None:
    path = tree / "train" / "a" / "0.png"
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    (tree / "train" / "b" / "2.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"a/0\.png: cannot read this image .*2 of 8 images of .*--skip_unreadable"
    ):
        load_data(str(tree), image_size=16)


def test_class_in_two_splits(tree: Path) -> None:
    shutil.copytree(tree / "train" / "a", tree / "test" / "a")
    with pytest.raises(DataError, match=r"share 1 class.*'a'"):
        load_data(str(tree), image_size=16)


def test_folders_that_may_not_be_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made so here, as root may read everything."""
    for name in ("b", "test", tree.name):
        iterdir, listdir = Path.iterdir, os.listdir

        def barred(folder, name: str = name, whole=iterdir):
            if Path(folder).name == name:
                raise PermissionError(13, "Permission denied", str(folder))
            return whole(folder)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "iterdir", barred)
            patch.setattr(os, "listdir", partial(barred, whole=listdir))
            with pytest.raises(DataError, match=rf"{name}: cannot be read \(Permission"):
                load_data(str(tree), image_size=16)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("place", ["train/b", "train", "."])
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_modes_of_folders(tree: Path, place: str, mode: int) -> None:
    (tree / place).chmod(mode)
    try:
        with pytest.raises(DataError, match=r"cannot (be read|read this)"):
            load_data(str(tree), image_size=16)
    finally:
        (tree / place).chmod(0o755)


def test_progress_of_reading_is_told(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_TOLD", 5)
    told: list[tuple[int, int]] = []
    data = load_data(str(tree), image_size=16, advance=lambda *counts: told.append(counts))
    total = sum(len(part) for part in (data.base, data.monitor, data.novel))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (total, total)
    assert len(told) >= total // 5
