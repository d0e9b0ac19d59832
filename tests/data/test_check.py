"""``check_data`` finds what is missing, unreadable, double or in two splits."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvla_fast.data import check_data, prepare_cache
from dvla_fast.data.check import _Rows
from dvla_fast.data.layouts import list_data
from dvla_fast.data.splits import load_split_list
from dvla_fast.errors import DataError
from tests.data import trees


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return trees.split_folders(tmp_path / "photos")


def check(path: Path, splits: str = "", **more):
    return check_data(path, splits, shot=1, query=1, image_size=16, **more)


def test_sound(tree: Path) -> None:
    seen = []
    report = check(tree, advance=lambda done, total: seen.append((done, total)))
    assert report.problems == []
    assert report.notes == []
    assert "train    5 classes      20 images" in report.text()
    assert "48 RGB" in report.text()
    assert seen[-1] == (48, 48)


def test_unreadable_and_small(tree: Path) -> None:
    (tree / "train" / "a" / "a_0.jpg").write_bytes(b"")
    (tree / "val" / "f" / "f_1.jpg").write_bytes(b"nothing")
    Image.new("L", (8, 8)).save(tree / "test" / "h" / "h_0.jpg")
    report = check(tree)
    assert [line.split(":")[0].rsplit("/")[-1] for line in report.problems] == [
        "a_0.jpg",
        "f_1.jpg",
    ]
    assert "1 of 48 images have a side of at most half" in report.text()
    assert "1 L" in report.text()


def test_names_of_files_do_not_steer_the_terminal(tree: Path) -> None:
    (tree / "train" / "a" / "\x1b[2Ja_9.jpg").write_bytes(b"")
    report = check(tree)
    assert "[2Ja_9.jpg" in report.text()
    assert "\x1b" not in report.text()


def test_same_image_in_two_splits_and_twice_in_one(tree: Path) -> None:
    shutil.copy(tree / "train/a/a_0.jpg", tree / "test/h/copy.jpg")
    shutil.copy(tree / "train/b/b_0.jpg", tree / "train/c/copy.jpg")
    # the same pixels in another file are the same image
    with Image.open(tree / "val/f/f_0.jpg") as image:
        image.save(tree / "test/i/copy.png")
    report = check(tree)
    assert len(report.problems) == 2
    assert all("one image in two splits" in line for line in report.problems)
    assert "a_0.jpg (train) and" in report.problems[0]
    assert "copy.jpg (test)" in report.problems[0]
    assert len(report.notes) == 1
    assert "one image twice in a split" in report.notes[0]


def test_small_classes_and_class_in_two_splits(tree: Path) -> None:
    shutil.copytree(tree / "train/a", tree / "test/A")
    report = check_data(tree, shot=1, query=4, image_size=16, decode_images=False)
    assert "class 'A' of test is also 'a' of train" in report.text()
    small = [line for line in report.problems if "classes have fewer images" in line]
    assert [line.split(": ")[0] for line in small] == [
        f"{tree}/{x}" for x in ("train", "val", "test")
    ]
    words = "5 of 5 classes have fewer images than the 5 that an episode takes: 'a' (4), 'b' (4), "
    assert words in small[0]
    assert small[0].endswith("--evaluate.shots, --evaluate.query)")


def test_class_in_two_splits_under_two_spellings(tree: Path) -> None:
    shutil.move(tree / "train/a", tree / "train/Red Panda")
    shutil.move(tree / "test/h", tree / "test/red_panda")
    (problem,) = check(tree, decode_images=False).problems
    assert problem.startswith("class 'red_panda' of test is also 'Red Panda' of train")


def test_two_spellings_within_a_split(tree: Path) -> None:
    shutil.move(tree / "test/h", tree / "test/red panda")
    shutil.move(tree / "test/i", tree / "test/Red_Panda")
    (problem,) = check(tree, decode_images=False).problems
    assert problem == "class 'red panda' of test is also 'Red_Panda' of test; keep each class once"


def test_a_data_set_is_called_like_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees.class_folders(tmp_path / "photos", "abc", 3)
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"splits": {"train": ["a", "b"], "test": ["c"]}}))
    assert "\nphotos, split list mine\n" in check_data(tmp_path / "photos", str(mine)).text()
    monkeypatch.chdir(tmp_path / "photos")
    assert list_data(".", str(mine)).name == "photos"
    mine.write_text(mine.read_text().replace("{", '{"dataset": "pets", ', 1))
    assert "pets, split list mine" in check_data(tmp_path / "photos", str(mine)).text()
    assert list_data(".", str(mine)).name == "pets"


def test_known_counts(tmp_path: Path) -> None:
    known = load_split_list("miniimagenet_ravi")
    trees.split_folders(tmp_path, dict(known.splits), 2)
    report = check(tmp_path, decode_images=False)
    assert "split list miniimagenet_ravi" in report.text()
    assert "known: 38400" in report.text()
    assert len(report.problems) == 3  # one a split
    words = "train: 64 of 64 classes have other numbers of images than are known: 'n01532829' (2, "
    assert words in report.problems[0]
    assert "(2, known: 600), ..." in report.problems[0]


def test_missing_classes_name_the_publisher(tmp_path: Path) -> None:
    trees.dogs(tmp_path)
    shutil.rmtree(tmp_path / "Images" / "n02085620-Chihuahua")
    report = check(tmp_path, "dogs_dn4_70_20_30", decode_images=False)
    (line,) = [line for line in report.problems if "classes missing" in line]
    assert "train: 1 of 70 classes missing (n02085620-Chihuahua)" in line
    assert "vision.stanford.edu" in line


def test_another_split_of_known_classes(tmp_path: Path) -> None:
    known = load_split_list("miniimagenet_ravi")
    trees.split_folders(tmp_path, dict(known.splits), 2)
    key = known.splits["test"][0]
    shutil.move(tmp_path / "test" / key, tmp_path / "train" / key)
    report = check(tmp_path, decode_images=False)
    assert "but not in the split miniimagenet_ravi" in report.text()


def test_arrays(tmp_path: Path) -> None:
    report = check(trees.cifar100(tmp_path), "fc100")
    assert report.problems
    assert all("known: 600" in line or "more of this kind" in line for line in report.problems)


def test_cache(tree: Path, tmp_path: Path) -> None:
    prepare_cache(tree, tmp_path / "cache", 16)
    assert check(tmp_path / "cache").problems == []
    few = check_data(tmp_path / "cache", shot=5, query=15).problems
    assert "than the 20 that an episode takes: 'a' (4), " in few[0]
    with open(tmp_path / "cache" / "images.bin", "rb+") as stream:
        stream.write(b"x")
    assert "differ from their checksum" in check(tmp_path / "cache").text()
    assert check(tmp_path / "cache").notes == []
    with pytest.raises(
        DataError, match=r"prepared with the split of its folders, not fc100; .*--sp"
    ):
        check(tmp_path / "cache", "fc100")
    tree.rename(tmp_path / "elsewhere")
    assert "photos is not here: not compared" in check(tmp_path / "cache").notes[0]


def test_same_image_in_a_cache(tree: Path, tmp_path: Path) -> None:
    for place in ("test/h/copy.jpg", "train/b/copy.jpg"):
        shutil.copy(tree / "train/a/a_0.jpg", tree / place)
    shutil.copy(tree / "val/f/f_0.jpg", tree / "val/f/copy.jpg")
    (tree / "train/c/torn.jpg").write_bytes(b"")
    prepare_cache(tree, tmp_path / "cache", 16, skip_unreadable=True)
    report = check(tmp_path / "cache")
    assert report.problems == [
        "one image in two splits: train/a/a_0.jpg (train) and test/h/copy.jpg (test) and 1 more; "
        "remove one and run 'dvla-fast data prepare' again"
    ]
    assert report.notes[1:] == [
        "one image twice in a split: val/f/copy.jpg (val) and val/f/f_0.jpg (val)"
    ]
    assert check(tmp_path / "cache", decode_images=False).problems == []


@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_equal_rows_of_a_cache(chunk: int) -> None:
    kinds = np.array([0, 1, 2, 1, 3, 0, 0, 4, 5, 4])
    images = np.random.default_rng(0).integers(0, 256, (6, 12), dtype=np.uint8)[kinds]
    with ThreadPoolExecutor(2) as pool:
        rows = _Rows(12, pool)
        for start in range(0, len(images), chunk):
            rows(images[start : start + chunk].tobytes())
    assert list(rows.equal()) == [[0, 5, 6], [1, 3], [7, 9]]
    assert len(rows.hashes) == 8 * len(images)


def test_what_is_not_read_is_counted(tree: Path) -> None:
    for place in ("train/a/x.gif", "test/h/y.GIF", "val/f/notes.txt", "val/f/README", "val/z.jpg"):
        (tree / place).write_bytes(b"")
    (tree / "train/a/.DS_Store").write_bytes(b"")
    trees.write_image(tree / "train/b/more/deep/1.png", 0)
    trees.write_image(tree / "train/b/more/2.png", 1)
    report = check(tree, decode_images=False)
    assert report.problems == []
    others, nested, beside = report.notes
    assert "4 file(s) of other kinds in class folders (2 .gif, 1 without an ending, 1 .t" in others
    assert f"e.g. {tree}/train/a/x.gif; images end in .png, .jpg" in others
    assert f"1 folder(s) inside class folders, with 2 image(s), e.g. {tree}/train/b/mo" in nested
    assert beside == f"passed over 1 file(s) beside class folders, e.g. {tree}/val/z.jpg"


def test_folders_beside_the_splits_are_counted(tree: Path) -> None:
    shutil.move(tree / "val", tree / "development")
    (tree / "notes").mkdir()
    report = check(tree, decode_images=False)
    assert f"{tree}: folders train/, test/" in report.text()
    (note,) = report.notes
    assert (
        "passed over 2 folder(s) beside the splits, with 8 image(s): development/, notes/" in note
    )


def test_what_is_not_read_under_a_split_list(tmp_path: Path) -> None:
    trees.class_folders(tmp_path / "photos", "abcd", 3)
    (tmp_path / "photos/c/movie.mp4").write_bytes(b"")
    (tmp_path / "list.json").write_text('{"splits": {"train": ["a", "b"], "test": ["c", "d"]}}')
    (note,) = check(tmp_path / "photos", str(tmp_path / "list.json")).notes
    assert "1 file(s) of other kinds in class folders (1 .mp4)" in note


def test_one_place_of_each_split_is_named(tree: Path) -> None:
    for number in range(4):
        shutil.copy(tree / "train/a/a_0.jpg", tree / f"train/a/copy{number}.jpg")
    for number in range(2):
        shutil.copy(tree / "train/a/a_0.jpg", tree / f"test/h/other{number}.jpg")
        shutil.copy(tree / "train/b/b_0.jpg", tree / f"train/b/copy{number}.jpg")
    report = check(tree)
    (problem,) = report.problems
    assert f"{tree}/train/a/a_0.jpg (train) and {tree}/test/h/other0.jpg (test) and 5 mo" in problem
    (note,) = report.notes
    assert f"b/b_0.jpg (train) and {tree}/train/b/copy0.jpg (train) and 1 more" in note


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set here"):
        check(tmp_path)
