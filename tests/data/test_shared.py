"""Images that lie in two splits, and images that come enlarged, are told wherever they are read."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest

from dvla_fast.data import check_data, load_data, prepare_cache
from dvla_fast.data.equal import equal_rows, in_two_splits, row_hash
from tests.data import trees


def test_equal_rows_in_order() -> None:
    rows = [b"c", b"a", b"b", b"a", b"c", b"a"]
    assert list(equal_rows(b"".join(map(row_hash, rows)))) == [[0, 4], [1, 3, 5]]
    assert list(equal_rows(b"")) == []
    places = [
        ("train", "0"),
        ("train", "1"),
        ("val", "2"),
        ("train", "3"),
        ("test", "4"),
        ("val", "5"),
    ]
    assert in_two_splits(b"".join(map(row_hash, rows)), places) == (
        "0 (train) and 4 (test)",
        "1 (train) and 5 (val) and 1 more",
    )


@pytest.mark.parametrize("cached", [False, True])
def test_an_image_of_train_in_test(tmp_path: Path, cached: bool) -> None:
    tree = trees.split_folders(tmp_path / "photos")
    shutil.copy(tree / "train/a/a_0.jpg", tree / "test/h/copy.jpg")
    shutil.copy(tree / "train/b/b_0.jpg", tree / "train/b/copy.jpg")  # in one split: no matter
    source = tree
    if cached:
        source = tmp_path / "cache"
        with pytest.warns(UserWarning, match=r"photos: 1 image\(s\) are in two splits"):
            prepare_cache(tree, source, 8)
    told = r"1 image\(s\) are in two splits, e\.g\. train/a/a_0\.jpg \(train\) and test/h/copy\.jpg"
    with pytest.warns(UserWarning, match=told):
        data = load_data(str(source), 8)
    assert data.shared == ("train/a/a_0.jpg (train) and test/h/copy.jpg (test)",)


def test_a_skipped_image_is_in_no_split(tmp_path: Path) -> None:
    """Rows that are left out have no pixels of their own, and shift those after them."""
    tree = trees.split_folders(tmp_path / "photos")
    for name in ("train/a/a_1.jpg", "test/h/h_0.jpg"):
        (tree / name).write_bytes(b"")
    shutil.copy(tree / "train/c/c_0.jpg", tree / "test/k/copy.jpg")
    with pytest.warns(UserWarning, match=r"1 image\(s\) are in two splits, e\.g\. train/c/c_0"):
        prepare_cache(tree, tmp_path / "cache", 8, skip_unreadable=True)


def test_an_enlarged_cache_says_so(tmp_path: Path) -> None:
    trees.mini_imagenet(tmp_path / "pickles")
    with pytest.warns(UserWarning, match="84-pixel images, enlarged here to 96"):
        prepare_cache(tmp_path / "pickles", tmp_path / "large", 96)
    with pytest.warns(UserWarning, match="large: holds 84-pixel images, enlarged here to 96"):
        assert load_data(str(tmp_path / "large"), 96).reduced == 84
    assert any("enlarged here to 96" in note for note in check_data(tmp_path / "large").notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_cache(tmp_path / "pickles", tmp_path / "small", 84)
        assert load_data(str(tmp_path / "small"), 84).reduced == 84
