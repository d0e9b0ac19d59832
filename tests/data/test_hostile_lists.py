"""Lists that are wrong in any way give a DataError, and never lead out of the data set's folder."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvla_fast.data import list_data, load_split_list
from dvla_fast.errors import DataError
from tests.data import trees

LIST = {
    "format": "dvla-fast-splits/1",
    "splits": {"train": ["a", "b"], "val": ["c"], "test": ["d", "e"]},
    **{"name": "x", "dataset": "d", "title": "t", "part": "", "published": "p", "notes": "n"},
    **{"names": {"a": "A"}, "images_per_split": {"train": 3}, "images_per_class": {"a": 2}},
    **{"expected_classes": {"train": 2}, "first_images": 1, "source": ["s"]},
    "images_each_class": 3,
}
ROWS = {
    "label_names": ["a", "b"],
    "image_names": ["a/a_0.jpg", "a/a_1.jpg", "b/b_0.jpg", "b/b_1.jpg"],
    "image_labels": [0, 0, 1, 1],
}
ODD: list[Any] = [
    *(None, True, -1, 10**30, 0.5, float("nan"), "", " ", "a", "../x", "/etc/passwd", "x" * 5000),
    *("\0", "\ud800", [], {}, [[]], ["a"], ["a", 1], {"a": 1}, {"a": "b"}, [None]),
]


def spoiled(rng: random.Random, value: Any, depth: int = 0) -> Any:
    if rng.random() < 0.2 and depth:
        return rng.choice(ODD)
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if rng.random() > 0.05}
        return {
            key: spoiled(rng, item, depth + 1) if rng.random() < 0.3 else item
            for key, item in kept.items()
        }
    if isinstance(value, list):
        return [spoiled(rng, item, depth + 1) if rng.random() < 0.3 else item for item in value]
    return rng.choice(ODD)


def outcome(path: Path, splits: str = "") -> str:
    """Anything but a DataError fails the test."""
    try:
        list_data(path, splits)
    except DataError as error:
        return "refused" if len(str(error)) < 1500 else f"long: {error}"
    return "listed"


def test_a_text_is_no_list_of_names(tmp_path: Path) -> None:
    for name in ("base", "novel"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**ROWS, "label_names": "ab"}))
    with pytest.raises(DataError, match=r"base\.json: expected the lists.*one of them is no list"):
        list_data(tmp_path)


def test_spoiled_lists(tmp_path: Path) -> None:
    rng = random.Random(0)
    folder = tmp_path / "data"
    trees.class_folders(folder, "abcde", 2)
    seen = set()
    for _ in range(150):
        (tmp_path / "own.json").write_text(json.dumps(spoiled(rng, LIST)))
        seen.add(outcome(folder, str(tmp_path / "own.json")))
    assert seen == {"listed", "refused"}
    seen.clear()
    other = {**ROWS, "label_names": ["c", "d"]}
    other["image_names"] = [f"{k}/{k}_{i}.jpg" for k in "cd" for i in (0, 1)]
    (folder / "novel.json").write_text(json.dumps(other))
    for _ in range(150):
        (folder / "base.json").write_text(json.dumps(spoiled(rng, ROWS)))
        seen.add(outcome(folder))
    assert seen == {"listed", "refused"}
    for raw in (b"[" * 100_000, b"\xff\xfe", b"", b"1" * 5000):
        (folder / "base.json").write_bytes(raw)
        (tmp_path / "own.json").write_bytes(raw)
        assert outcome(folder) == "refused"
        with pytest.raises(DataError, match=r"own\.json: "):
            load_split_list(str(tmp_path / "own.json"))


@pytest.mark.parametrize("line", ["a", ",a", "a/a_0.jpg,", "x" * 5000 + ",a", "a\0.jpg,a"])
def test_spoiled_csv(tmp_path: Path, line: str) -> None:
    trees.class_folders(tmp_path, "ac", 2)
    (tmp_path / "test.csv").write_text("c/c_0.jpg,c\nc/c_1.jpg,c\n")
    (tmp_path / "train.csv").write_text(f"a/a_0.jpg,a\na/a_1.jpg,a\n{line}\n")
    assert outcome(tmp_path) == "refused"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("names", ["a"]),
        ("names", {"a": " "}),
        ("first_images", "all"),
        ("images_each_class", -1),
        ("expected_classes", {"train": "2"}),
        ("source", "s"),
        ("dataset", 3),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "own.json").write_text(json.dumps({**LIST, field: value}))
    with pytest.raises(DataError, match=rf"own\.json: '{field}' must be"):
        load_split_list(str(tmp_path / "own.json"))


def test_lists_saved_on_windows(tmp_path: Path) -> None:
    """Its editors begin a file with a mark."""
    trees.class_folders(tmp_path / "photos", "abc", 3)
    mine = tmp_path / "mine.json"
    splits = {"splits": {"train": ["a", "b"], "test": ["c"]}}
    mine.write_text(json.dumps(splits), encoding="utf-8-sig")
    assert list_data(tmp_path / "photos", str(mine)).splits["test"].keys == ("c",)


@pytest.mark.parametrize("key", ["../x", "/etc", "a/../../x", " "])
def test_class_names_are_no_paths(tmp_path: Path, key: str) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"splits": {"train": ["a", key], "test": ["c"]}}))
    with pytest.raises(DataError, match="is no class name"):
        load_split_list(str(tmp_path / "own.json"))


@pytest.mark.parametrize("form", ["relative", "absolute"])
def test_files_outside_are_refused(tmp_path: Path, form: str) -> None:
    root, outside = tmp_path / "data", tmp_path / "other/o.jpg"
    trees.class_folders(root, "ac", 2)
    trees.write_image(outside, 1)
    (root / "test.csv").write_text("c/c_0.jpg,c\nc/c_1.jpg,c\n")
    name = "../other/o.jpg" if form == "relative" else str(outside)
    (root / "train.csv").write_text(f"a/a_0.jpg,a\n{name},a\n")
    with pytest.raises(DataError, match=r"train\.csv: names .*o\.jpg', outside of"):
        list_data(root)
    (root / "linked").symlink_to(tmp_path / "other")  # below the folder by name: its owner's will
    (root / "train.csv").write_text(f"a/a_0.jpg,a\n{root}/linked/o.jpg,a\n")
    assert len(list_data(root).splits["train"]) == 2


def test_archive_tables_stay_inside(tmp_path: Path) -> None:
    table = trees.cub(tmp_path) / "CUB_200_2011/images.txt"
    lines = table.read_text().splitlines()
    trees.write_image(tmp_path / "o.jpg", 1)
    table.write_text("\n".join(["1 ../../o.jpg", *lines[1:]]))
    with pytest.raises(DataError, match=r"images\.txt: names .*outside of"):
        list_data(tmp_path, "cub_100_50_50")


@pytest.mark.parametrize("name", ["classes.txt", "images.txt", "image_class_labels.txt"])
def test_tables_of_cub_that_are_no_text(name: str, tmp_path: Path) -> None:
    table = trees.cub(tmp_path) / "CUB_200_2011" / name
    table.write_bytes(table.read_bytes() + b"7 \xff\xfe")
    with pytest.raises(DataError, match=rf"{name}: no text in UTF-8 .*; extract it again"):
        list_data(tmp_path, "cub_100_50_50")


def test_table_of_chestx_that_is_no_text(tmp_path: Path) -> None:
    table = trees.chestx(tmp_path) / "Data_Entry_2017.csv"
    whole = table.read_bytes()
    for damage, message in ((b"\xff\xfe", "no table in UTF-8"), (b"", "expected the columns")):
        table.write_bytes(whole + damage if damage else b"a,b\n1,2\n")
        with pytest.raises(DataError, match=rf"Data_Entry_2017\.csv: {message}"):
            list_data(tmp_path)


@pytest.mark.parametrize("row", ["Mass", ",Mass", "Mass,00000001_000.png"])
def test_rows_of_chestx_without_an_image_of_their_own(tmp_path: Path, row: str) -> None:
    """An image that is there twice could be support and query of one episode."""
    table = trees.chestx(tmp_path) / "Data_Entry_2017.csv"
    lines = ["Finding Labels,Image Index", "Mass,00000001_000.png", row]
    table.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"2017\.csv, line 3: expected another image and its find"):
        list_data(tmp_path)


def test_labels_of_cifar_below_zero(tmp_path: Path) -> None:
    """Numpy would count them from the end, or here leave their images out without a word."""
    trees.cifar100(tmp_path)
    rows = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, -1]}
    trees.dump(tmp_path / "cifar-100-python" / "test", rows)
    with pytest.raises(DataError, match="test: images and labels disagree; download it again"):
        list_data(tmp_path, "cifar_fs")


@pytest.mark.parametrize("label", [float("nan"), np.zeros(2), "x"])
def test_annotations_of_cars_that_are_no_numbers(
    label: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees.cars(tmp_path, merged=True)
    kinds = [("relative_im_path", object), ("class", object), ("test", object)]
    table = np.array([("car_ims/1.jpg", label, 0)], dtype=kinds)
    content = {"annotations": table, "class_names": np.array(["a", "b"], dtype=object)}
    monkeypatch.setattr("dvla_fast.data.cars._mat", lambda path: content)
    with pytest.raises(DataError, match=r"cars_annos\.mat: damaged annotations .* get the file"):
        list_data(tmp_path, "cars_dn4_130_17_49")


def test_array_whose_header_is_damaged(tmp_path: Path) -> None:
    """numpy's reader of headers raises errors of Python's own parser."""
    trees.tiered(tmp_path, "npz")
    with zipfile.ZipFile(tmp_path / "val_images.npz", "w") as archive:
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4L, (, }\n"
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + bytes([len(header), 0]) + header)
    with pytest.raises(DataError, match=r"val_images\.npz: no array 'images' to read"):
        list_data(tmp_path)
