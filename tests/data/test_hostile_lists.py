"""Lists that are wrong in any way give a DataError, and never lead out of the data set's folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

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
