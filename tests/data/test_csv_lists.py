"""CSV lists as people write them: columns, separators, endings and places of images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dvla_fast.data import check_data, list_data
from dvla_fast.errors import DataError
from tests.data import trees

TRAIN = [("a_0", "a"), ("a_1", "a"), ("b_0", "b"), ("b_1", "b")]
TEST = [("c_0", "c"), ("c_1", "c")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        for item in range(2):
            trees.write_image(tmp_path / "images" / f"{name}_{item}.jpg", 10 * number + item)
    return tmp_path


def write(root: Path, form: str, header: str = "", ends: str = "\n") -> None:
    for split, rows in {"train": TRAIN, "test": TEST}.items():
        lines = [header] if header else []
        lines += [form.format(name=name, label=label, n=n) for n, (name, label) in enumerate(rows)]
        (root / f"{split}.csv").write_bytes("".join(line + ends for line in lines).encode())


def listed(root: Path) -> list[tuple[str, str]]:
    split = list_data(root).splits["train"]
    return [(path.stem, split.keys[label]) for path, label in zip(split.references, split.labels)]


@pytest.mark.parametrize(
    ("header", "form"),
    [
        ("Filename,Label", "{name}.jpg,{label}"),
        ("image_name,class_name", "{name}.jpg,{label}"),
        ("Image Name,Class Name", "{name}.jpg,{label}"),
        ("IMG,wnid", "{name}.jpg,{label}"),
        ("path,target", "images/{name}.jpg,{label}"),
        ("label,filename", "{label},{name}.jpg"),
        (",file,class", "{n},{name}.jpg,{label}"),
        ("index,category,size,image", "{n},{label},500,{name}.jpg"),
        ("filename, label", "{name}.jpg, {label}"),
        ('"filename", "label"', '"{name}.jpg" , "{label}"'),
        ("filename;label", "{name}.jpg;{label}"),
        ("filename\tlabel", "{name}.jpg\t{label}"),
        ("filename;note;label", "{name}.jpg;a, b, c;{label}"),
        ("", "{name}.jpg;{label}"),
        ("", "{name}.jpg\t{label}"),
        ("", "{name},{label},more"),
        ("filename,label", "images\\{name}.jpg,{label}"),
        ("filename,label", "{name},{label}"),
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_forms(root: Path, header: str, form: str, ends: str) -> None:
    write(root, form, header, ends)
    assert listed(root) == TRAIN


def test_empty_lines_do_not_count(root: Path) -> None:
    write(root, "{name}.jpg,{label}\n\n , ", "\nfilename,label")
    assert listed(root) == TRAIN


def test_of_two_columns_the_first_known_is_read(root: Path) -> None:
    write(root, "{n},{label},{name}.jpg", "class_name,label,file")
    assert listed(root) == TRAIN


@pytest.mark.parametrize("place", ["data", "lists", "splits", "."])
def test_places_of_images(root: Path, place: str) -> None:
    """In data/, beside the lists, beside the lists' folder."""
    write(root, "{name}.jpg,{label}", "filename,label")
    if place == "splits":
        (root / "splits").mkdir()
        for name in ("train.csv", "test.csv"):
            shutil.move(root / name, root / "splits" / name)
    if place == "lists":
        (root / "split").mkdir()
        for path in (*root.glob("*.csv"), *(root / "images").iterdir()):
            shutil.move(path, root / "split" / path.name)
    else:
        (root / place).mkdir(exist_ok=True)
        for path in (root / "images").iterdir():
            shutil.move(path, root / place / path.name)
    assert listed(root) == TRAIN


def test_class_folders_in_data(root: Path) -> None:
    write(root, "{name}.jpg,{label}", "filename,label")
    for path in (root / "images").iterdir():
        (root / "data" / path.name[0]).mkdir(parents=True, exist_ok=True)
        shutil.move(path, root / "data" / path.name[0] / path.name)
    assert listed(root) == TRAIN


@pytest.mark.parametrize(
    "header", ["filename,species", "image_id,label", "label,other", "x;y", "sep=;"]
)
def test_unknown_columns(root: Path, header: str) -> None:
    write(root, "{name}.jpg,{label}", header)
    with pytest.raises(DataError, match=r"train\.csv.*expected a first line with the names of the"):
        list_data(root)


def test_columns_in_the_other_order_need_their_names(root: Path) -> None:
    write(root, "{label},{name}.jpg")
    with pytest.raises(DataError, match=r"first line \('a', 'a_0\.jpg'\) names no columns known"):
        list_data(root)


def test_a_first_file_that_is_missing_is_no_wrong_header(root: Path) -> None:
    write(root, "{name}.jpg,{label}")
    (root / "images/a_0.jpg").unlink()
    with pytest.raises(DataError, match=r"a_0\.jpg: listed in train\.csv, but not there \(1 of 6"):
        list_data(root)


def test_short_lines_are_named(root: Path) -> None:
    write(root, "{name}.jpg,{label}", "filename,label")
    with (root / "train.csv").open("a") as stream:
        stream.write("a_0.jpg\n")
    with pytest.raises(DataError, match=r"train\.csv, line 6: expected a file in column 1 and its"):
        list_data(root)
    (root / "train.csv").write_text("filename,label\n")
    with pytest.raises(DataError, match=r"train\.csv: lists no image; expected"):
        list_data(root)


def test_a_name_without_ending_must_fit_one_file(root: Path) -> None:
    write(root, "{name},{label}", "filename,label")
    trees.write_image(root / "images/a_0.PNG", 50)
    with pytest.raises(DataError, match=r"names 'a_0' without an ending, and .* and .* are both"):
        list_data(root)
    (root / "images/a_0.PNG").unlink()
    (root / "images/a_0.jpg").unlink()
    assert f"{root}/images/a_0: listed in train.csv, but not there" in check_data(root).text()
