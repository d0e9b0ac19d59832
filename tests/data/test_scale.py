"""What a large data set must not cost: files read again, images decoded again, work without a sign.

Counted on small trees: the costs that grow with the images are told by the number of calls.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dvla_fast.cli import main
from dvla_fast.data import (
    EpisodeSampler,
    cache,
    cache_index,
    check_data,
    decode,
    list_data,
    load_data,
    load_digits,
    load_split_list,
    prepare_cache,
)
from dvla_fast.data.images import channel_statistics
from dvla_fast.data.png_images import PngImages
from dvla_fast.errors import DataError
from tests.data import trees


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 7)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return trees.split_folders(tmp_path / "photos")  # 48 images


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Counter[str]:
    """Count the calls of a function from now on."""
    calls: Counter[str] = Counter()
    whole = getattr(owner, name)

    def count(*arguments, **options):
        calls[name] += 1
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_a_finished_cache_is_not_read_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = counted(monkeypatch, os, "pread")
    prepare_cache(tree, tmp_path / "cache", 16)
    assert reads["pread"] == 0
    assert cache.verify_cache(tmp_path / "cache") == []


def test_only_what_moves_is_read_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = list_data(tree).splits["test"].references[-1]
    Path(last).write_bytes(b"no image")
    reads = counted(monkeypatch, os, "pread")
    done = prepare_cache(tree, tmp_path / "cache", 16, skip_unreadable=True)
    assert (done.images, reads["pread"]) == (47, 1)  # the last chunk, one row shorter
    assert cache.verify_cache(tmp_path / "cache") == []


def test_opening_a_cache_reads_its_index_once(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_cache(tree, tmp_path / "cache", 16)
    reads = counted(monkeypatch, cache_index, "index_checksum")
    cache.open_cache(tmp_path / "cache", 16)
    assert reads["index_checksum"] == 1


@pytest.mark.parametrize("decode_images", [True, False])
def test_checking_a_cache_says_how_far_it_is(
    tree: Path, tmp_path: Path, decode_images: bool
) -> None:
    prepare_cache(tree, tmp_path / "cache", 16)
    told: list[tuple[int, int]] = []
    report = check_data(
        tmp_path / "cache", shot=1, query=1, decode_images=decode_images,
        advance=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert report.problems == []
    assert told == [(done, 48) for done in (7, 14, 21, 28, 35, 42, 48)]


def test_kept_images_count_as_they_are_read(tree: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, earlier: int) -> None:
        if done == 21:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_cache(tree, tmp_path / "cache", 16, advance=stop)
    told: list[tuple[int, int]] = []
    done = prepare_cache(
        tree, tmp_path / "cache", 16, advance=lambda done, _, earlier: told.append((done, earlier))
    )
    kept = [(7, 7), (14, 14), (21, 21)]
    assert (done.reused, told) == (21, [*kept, (28, 21), (35, 21), (42, 21), (48, 21)])


def test_png_files_of_a_pickle_are_decoded_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodings = counted(monkeypatch, PngImages, "_decoded")
    listing = list_data(trees.tiered(tmp_path / "tiered", count=2))
    assert decodings["_decoded"] == 3  # the first of each split, for its size
    assert listing.reduced == 84
    images = sum(map(len, listing.splits.values()))
    prepare_cache(tmp_path / "tiered", tmp_path / "cache", 8)
    assert decodings["_decoded"] == 2 * 3 + images
    prepare_cache(tmp_path / "tiered", tmp_path / "cache", 8)  # is there, which the files tell
    assert decodings["_decoded"] == 3 * 3 + images


def test_png_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = trees.tiered(tmp_path / "tiered", count=3) / "val_images_png.pkl"
    array = list_data(path.parent).splits["val"].array
    assert isinstance(array, PngImages)
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "PNG")
    files: list[Any] = [np.asarray(item) for item in array.files]
    files[3], files[290] = files[3][:100], np.frombuffer(small.getvalue(), np.uint8)
    files[5] = None
    trees.dump(path, files)
    report = check_data(path.parent, shot=1, query=1, image_size=84)
    damaged, none, other = (line for line in report.problems if str(path) in line)
    assert damaged.startswith(f"{path}: cannot read image 3 of 291 (")
    assert none.startswith(f"{path}: cannot read image 5 of 291 (")
    assert other.startswith(f"{path}: image 290 is (8, 8, 3), the first (84, 84, 3)")
    with pytest.raises(DataError, match="a class needs at least 2"):
        prepare_cache(path.parent, tmp_path / "cache", 8, skip_unreadable=True)
    files[5] = np.asarray(array.files[5])
    trees.dump(path, files)
    done = prepare_cache(path.parent, tmp_path / "cache", 8, skip_unreadable=True)
    assert len(done.skipped) == 2


def test_listed_paths_are_not_made_absolute_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = trees.csv_lists(tmp_path / "mini", load_split_list("miniimagenet_ravi"))
    absolute = counted(monkeypatch, os.path, "abspath")
    relative = counted(monkeypatch, PurePath, "relative_to")
    listing = list_data(root)
    assert sum(len(listing.image_ids(split)) for split in listing.splits.values()) == 200
    assert (absolute["abspath"], relative["relative_to"]) < (10, 10)


def test_images_of_a_class_are_sorted_by_name(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons = counted(monkeypatch, PurePath, "__lt__")
    check_data(tree, shot=1, query=1, decode_images=False)
    assert comparisons["__lt__"] <= 40  # of folders: eight classes in three splits, several times


@pytest.mark.parametrize("use", [lambda tree: load_data(str(tree), 16), check_data])
def test_few_images_wait_to_be_decoded(
    tree: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Path], object]
) -> None:
    waiting: list[int] = []
    whole = ThreadPoolExecutor.map

    def count(self, work, items):
        waiting.append(len(items))
        return whole(self, work, items)

    monkeypatch.setattr(decode, "_BLOCK", 5)
    monkeypatch.setattr(ThreadPoolExecutor, "map", count)
    use(tree)
    assert (max(waiting), sum(waiting)) == (5, 48)


def test_episodes_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From classes of 9,547 images (ChestX) a list of 2,000 takes seconds."""
    images = load_digits().base
    draws = counted(monkeypatch, np.random, "Philox")
    sampler = EpisodeSampler(images, 5, 1, 2, seed=0)
    first = sampler.fingerprint(300)
    assert sampler.fingerprint(300) == first
    sampler.batch(100, 100)
    assert draws["Philox"] == 3
    late = sampler.batch(128 * 99, 1).query  # what is remembered is bounded
    for number in range(40):
        sampler.batch(128 * number, 1)
    assert len(sampler._blocks) == 32
    assert draws["Philox"] == 41
    assert (sampler.batch(128 * 99, 1).query == late).all()
    assert sampler.fingerprint(300) == first


def test_few_of_many_unreadable_images_are_named(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(tree.rglob("*.jpg"))[::3]:
        path.write_bytes(b"")
    arguments = ["data", "prepare", str(tree), f"--output={tmp_path / 'cache'}", "--image_size=16"]
    assert main([*arguments, "--skip_unreadable"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("left out: ") for line in lines) == 10
    assert lines[10] == "... and 6 more, all named by 'skipped' in its index.json"


def test_channel_statistics_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = torch.randint(0, 256, (90, 3, 224, 224), dtype=torch.uint8)
    expected = stored.float() / 255
    sizes: list[int] = []
    whole = torch.Tensor.double

    def double(self: torch.Tensor) -> torch.Tensor:
        sizes.append(self.numel())
        return whole(self)

    monkeypatch.setattr(torch.Tensor, "double", double)
    mean, std = channel_statistics(stored)
    assert max(sizes) <= 2**23
    torch.testing.assert_close(mean, expected.mean((0, 2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(std, expected.std((0, 2, 3)), rtol=1e-4, atol=0)
