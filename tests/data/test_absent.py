"""Images that a list names and that are not there: refused, counted by `check`, or left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvla_fast.data import check_data, list_data, load_data, prepare_cache
from dvla_fast.data.splits import load_split_list
from dvla_fast.errors import DataError
from tests.data import trees


def check(path: Path, splits: str = "", **more):
    return check_data(path, splits, shot=1, query=2, image_size=16, **more)


def damaged_cub(root: Path) -> Path:
    """Of 600 images two are gone, and one is empty."""
    images = trees.cub(root, count=3) / "CUB_200_2011/images"
    first, second = (images / key for key in sorted(load_split_list("cub_100_50_50").keys)[:2])
    (first / f"{first.name}_0.jpg").unlink()
    (second / f"{second.name}_1.jpg").unlink()
    (second / f"{second.name}_2.jpg").write_bytes(b"")
    return root


def test_check_goes_on_to_the_end(tmp_path: Path) -> None:
    report = check(damaged_cub(tmp_path), "cub_100_50_50")
    assert sum(int(line.split()[3]) for line in report.facts if " classes " in line) == 598
    missing, *listed = report.problems[:3]
    assert missing == (
        f"{tmp_path}: 2 of 600 listed images are missing (2 of images.txt); "
        "extract the archive again"
    )
    assert all(line.endswith(": listed in images.txt, but not there") for line in listed)
    assert "Albatross_0.jpg" in listed[0]
    assert report.text().count("have fewer images than the 3 that an episode takes") == 2
    (empty,) = [line for line in report.problems if "the file is empty, 0 bytes" in line]
    assert "Albatross_2.jpg" in empty
    quick = check(tmp_path, "cub_100_50_50", decode_images=False)
    assert quick.problems[:3] == report.problems[:3]


def test_loading_refuses_and_preparing_leaves_out(tmp_path: Path) -> None:
    root = damaged_cub(tmp_path / "data")
    message = r"Albatross_0\.jpg: listed in images\.txt, but not there \(2 of 600 .*--skip_unread"
    with pytest.raises(DataError, match=message):
        load_data(str(root), 16, splits="cub_100_50_50")
    with pytest.raises(DataError, match=message):
        prepare_cache(root, tmp_path / "cache", 16, "cub_100_50_50")


def test_cache_without_what_is_missing(tmp_path: Path) -> None:
    known = load_split_list("miniimagenet_ravi")
    root = trees.csv_lists(tmp_path / "data", known, count=4)
    path = next((root / "images").glob(f"{known.splits['val'][0]}*.jpg"))
    content = path.read_bytes()
    path.unlink()
    done = prepare_cache(root, tmp_path / "cache", 16, skip_unreadable=True)
    assert done.images == 399
    (skipped,) = done.skipped
    assert skipped == f"{path}: cannot read this image (no such file); restore the file"
    assert check(tmp_path / "cache").problems == []
    path.write_bytes(content)
    assert "have changed since it was made" in check(tmp_path / "cache").text()


def test_lists_of_which_much_is_missing(tmp_path: Path) -> None:
    """The first file of the first list too, which once decided where all of them are looked for."""
    root = trees.csv_lists(tmp_path, load_split_list("miniimagenet_ravi"))
    for path in sorted((root / "images").iterdir())[::10]:
        path.unlink()
    (root / "images").rename(root / "pictures")
    assert "200 of 200 listed images" in check(root).text()
    (root / "pictures").rename(root / "images")
    report = check(root)
    assert "20 of 200 listed images are missing (1" in report.text()
    assert "... and 10 more of this kind" in report.text()
    assert "  modes: 180 RGB" in report.facts


def test_images_of_chestx_are_named(tmp_path: Path) -> None:
    root = trees.chestx(tmp_path)
    (root / "images_001/images/00000001_000.png").unlink()
    report = check(root)
    missing, first = report.problems[:2]
    assert "1 of 14 listed images are missing (1 of Data_Entry_2017.csv); extract all" in missing
    assert first.endswith("00000001_000.png: listed in Data_Entry_2017.csv, but not there")
    with pytest.raises(DataError, match=r"without its unreadable images, class 'Atelectasis' has"):
        prepare_cache(root, tmp_path / "cache", 16, skip_unreadable=True)


def test_what_a_split_list_does_not_use_may_be_missing(tmp_path: Path) -> None:
    trees.cars(tmp_path)
    next((tmp_path / "cars_test").iterdir()).unlink()
    assert not list_data(tmp_path, "cars_fwt_98_49_49").absent
    with pytest.raises(DataError, match=r"1 of 588 listed images"):
        list_data(tmp_path, "cars_dn4_130_17_49")


def test_dangling_link_in_a_class_folder(tmp_path: Path) -> None:
    root = trees.split_folders(tmp_path / "photos")
    (root / "train/a/a_9.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (problem,) = check(root).problems
    assert "a_9.jpg: cannot read this image (no such file)" in problem
    assert prepare_cache(root, tmp_path / "cache", 16, skip_unreadable=True).images == 48
