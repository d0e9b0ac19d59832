"""Layouts as people really have them: other cases of letters, other folders, odd places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dvla_fast.data import check_data, list_data, prepare_cache
from dvla_fast.data.cache import verify_cache
from dvla_fast.data.splits import SPLITS, load_split_list
from dvla_fast.errors import DataError
from tests.data import trees


def sizes(listing) -> dict[str, tuple[int, int]]:
    return {name: (len(split.keys), len(split)) for name, split in listing.splits.items()}


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "Validation"])
def test_names_of_validation_classes(tmp_path: Path, name: str) -> None:
    trees.split_folders(tmp_path, {"train": "ab", name: "cd", "test": "ef"})
    listing = list_data(tmp_path)
    assert listing.splits["val"].keys == ("c", "d")
    assert listing.layout == f"folders train/, {name}/, test/"
    (tmp_path / "VAL").mkdir()
    with pytest.raises(DataError, match=r"VAL and .*: all are called like validation classes"):
        list_data(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"),
        ("TRAIN", "VALIDATION", "TEST"),
        ("Base", "Val", "Novel"),
        ("train", "val", "novel"),
        ("base", "valid", "test"),
    ],
)
@pytest.mark.parametrize("form", ["folders", "lists"])
def test_names_of_splits_in_any_case(tmp_path: Path, names: tuple[str, ...], form: str) -> None:
    known = load_split_list("miniimagenet_ravi")
    if form == "folders":
        trees.split_folders(tmp_path, dict(zip(names, known.splits.values())), 2)
    else:
        trees.csv_lists(tmp_path, known)
        for split, name in zip(SPLITS, names):
            (tmp_path / f"{split}.csv").rename(tmp_path / f"{name}.CSV")
    listing = list_data(tmp_path)
    assert sizes(listing) == {"train": (64, 128), "val": (16, 32), "test": (20, 40)}
    assert listing.split_list is known


def test_two_folders_of_one_split(tmp_path: Path) -> None:
    trees.split_folders(tmp_path, {"train": "ab", "test": "cd", "Test": "ef"})
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("the file system does not tell case apart")
    with pytest.raises(DataError, match=r"Test and .*test: all are called like test classes"):
        list_data(tmp_path)


def test_whole_pairs_of_names_go_first(tmp_path: Path) -> None:
    trees.split_folders(tmp_path, {"base": "ab", "test": "cd", "novel": "ef"})
    assert list_data(tmp_path).splits["test"].keys == ("e", "f")


def test_a_list_of_validation_classes_by_another_name(tmp_path: Path) -> None:
    trees.csv_lists(tmp_path, load_split_list("miniimagenet_ravi"))
    (tmp_path / "val.csv").rename(tmp_path / "validation.csv")
    assert sizes(list_data(tmp_path))["val"] == (16, 32)


@pytest.mark.parametrize("tables", ["car_devkit/devkit", "car_devkit", "."])
def test_cars_as_copied(tmp_path: Path, tables: str) -> None:
    """Folders within folders of their name, and the tables elsewhere."""
    trees.cars(tmp_path)
    for part in ("cars_train", "cars_test"):
        (tmp_path / part).rename(tmp_path / "moved")
        (tmp_path / part).mkdir()
        (tmp_path / "moved").rename(tmp_path / part / part)
    (tmp_path / tables).mkdir(parents=True, exist_ok=True)
    for path in (tmp_path / "devkit").iterdir():
        path.rename(tmp_path / tables / path.name)
    (tmp_path / "devkit").rmdir()
    listing = list_data(tmp_path, "cars_dn4_130_17_49")
    assert sizes(listing) == {"train": (130, 390), "val": (17, 51), "test": (49, 147)}
    assert not listing.absent


@pytest.mark.parametrize("inner", ["car_ims", "car_ims/car_ims"])
def test_cars_of_which_one_packing_is_whole(tmp_path: Path, inner: str) -> None:
    trees.cars(tmp_path)
    trees.cars(tmp_path, merged=True)
    shutil.move(tmp_path / "car_ims", tmp_path / "moved")
    assert "cars_train" in str(list_data(tmp_path, "cars_dn4_130_17_49").splits["val"].source(0))
    (tmp_path / inner).parent.mkdir(exist_ok=True)
    shutil.move(tmp_path / "moved", tmp_path / inner)
    shutil.rmtree(tmp_path / "cars_train")
    listing = list_data(tmp_path, "cars_dn4_130_17_49")
    assert listing.splits["val"].source(0).parent == tmp_path / inner
    assert not listing.absent


def test_missing_cars_are_those_of_their_table(tmp_path: Path) -> None:
    trees.cars(tmp_path)
    (tmp_path / "cars_test/00003.jpg").unlink()
    message = r"cars_test/00003\.jpg: listed in cars_test_annos_withlabels\.mat, .* \(1 of 588"
    with pytest.raises(DataError, match=message):
        list_data(tmp_path, "cars_dn4_130_17_49")
    (tmp_path / "devkit/cars_train_annos.mat").unlink()
    with pytest.raises(DataError, match=r"devkit/cars_train_annos\.mat: cannot read this"):
        list_data(tmp_path, "cars_dn4_130_17_49")


@pytest.mark.parametrize("inner", ["mini-imagenet", "images"])
def test_one_folder_around(tmp_path: Path, inner: str) -> None:
    root = tmp_path / "photos"
    trees.split_folders(root / inner)
    for name in ("__MACOSX/mini", ".cache/train"):
        (root / name).mkdir(parents=True)
    (root / ".DS_Store").touch()
    listing = list_data(root)
    assert sizes(listing) == {"train": (5, 20), "val": (2, 8), "test": (5, 20)}
    assert listing.name == "photos"
    assert listing.image_id(listing.splits["train"], 0) == f"{inner}/train/a/a_0.jpg"
    assert check_data(root, shot=1, query=1, image_size=16).notes == []


def test_one_folder_around_an_archive(tmp_path: Path) -> None:
    trees.cifar100(tmp_path / "downloads/cifar")
    assert sizes(list_data(tmp_path / "downloads", "fc100"))["train"] == (60, 180)


def test_folders_inside_that_are_data_sets_are_named(tmp_path: Path) -> None:
    trees.split_folders(tmp_path / "images")
    (tmp_path / "notes").mkdir()
    trees.dump(tmp_path / "mini/mini-imagenet-cache-train.pkl", {})
    message = r"no data set here; give one of the folders in it that are, such as images/, mini/"
    with pytest.raises(DataError, match=message):
        list_data(tmp_path)
    (tmp_path / "photos/deep/deeper").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no data set here: it must hold"):
        list_data(tmp_path / "photos")


@pytest.mark.parametrize("flat", [("test",), ("val", "test"), ("val",)])
def test_flat_folders_beside_class_folders(tmp_path: Path, flat: tuple[str, ...]) -> None:
    """As of ImageNet's CLS-LOC, whose images of validation and test are in no class folders."""
    known = load_split_list("places365_fwt")
    trees.class_folders(tmp_path / "train", sorted(known.keys), 2)
    for folder in flat:
        trees.write_image(tmp_path / folder / "a.jpg", 1)
    listing = list_data(tmp_path, "places365_fwt")
    assert sizes(listing) == {"train": (183, 366), "val": (91, 182), "test": (91, 182)}
    if "test" in flat:
        with pytest.raises(DataError, match=r"no class folders; .* or --data\.splits names a list"):
            list_data(tmp_path)
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError):
        list_data(tmp_path, "places365_fwt")


def bertinetto(root: Path) -> Path:
    known = load_split_list("cifar_fs")
    trees.class_folders(root / "data", sorted(known.keys), 2)
    for split, keys in known.splits.items():
        path = root / "splits/bertinetto" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(keys) + "\n\n")
    return root


@pytest.mark.parametrize("outer", ["", "downloads"])
def test_class_folders_with_lists_of_classes(tmp_path: Path, outer: str) -> None:
    bertinetto(tmp_path / outer / "cifar100")
    listing = list_data(tmp_path / outer if outer else tmp_path / "cifar100")
    assert sizes(listing) == {"train": (64, 128), "val": (16, 32), "test": (20, 40)}
    assert listing.split_list is load_split_list("cifar_fs")
    other = list_data(tmp_path / outer / "cifar100/data", "fc100")
    assert sizes(other)["train"] == (60, 120)


def test_lists_of_classes_that_are_wrong(tmp_path: Path) -> None:
    bertinetto(tmp_path)
    table = tmp_path / "splits/bertinetto/test.txt"
    whole = table.read_text()
    table.write_text(whole + "griffin\n")
    with pytest.raises(DataError, match=r"test\.txt: class 'griffin': 0 image\(s\)"):
        list_data(tmp_path)
    for content, message in ((b"\n", "lists no class"), (b"\xff\xfe", "no list in UTF-8")):
        table.write_bytes(content)
        with pytest.raises(DataError, match=rf"test\.txt: {message}"):
            list_data(tmp_path)
    table.write_text(whole)
    shutil.copytree(table.parent, tmp_path / "splits/mine")
    with pytest.raises(DataError, match=r"splits: holds 2 splits \(bertinetto, mine\); keep one"):
        list_data(tmp_path)


@pytest.mark.parametrize("top", ["data_256", "data_large", "."])
def test_places_by_letters(tmp_path: Path, top: str) -> None:
    known = load_split_list("places365_fwt")
    for number, key in enumerate(sorted(known.keys)):
        folder = tmp_path / top / key[0] / key.replace("-", "/")
        for item in range(2):
            trees.write_image(folder / f"{item:08d}.jpg", 10 * number + item)
    if top != ".":
        trees.write_image(tmp_path / "val_256/Places365_val_00000001.jpg", 1)
    listing = list_data(tmp_path, "places365_fwt")
    assert sizes(listing) == {"train": (183, 366), "val": (91, 182), "test": (91, 182)}
    split = listing.splits["train"]
    place = split.keys.index("field-cultivated")
    assert split.source(2 * place) == tmp_path / top / "f/field/cultivated/00000000.jpg"


@pytest.mark.parametrize("name", ["cache", "cache.partial"])
def test_a_cache_beside_the_inner_folder_hides_nothing(tmp_path: Path, name: str) -> None:
    trees.split_folders(tmp_path / "set" / "inner")
    prepare_cache(tmp_path / "set", tmp_path / "set" / "cache", 8)
    if name == "cache.partial":
        (tmp_path / "set" / "cache").rename(tmp_path / "set" / name)
        (tmp_path / "set" / name / "index.json").unlink()
    assert list_data(tmp_path / "set").layout.startswith("folders train/")
    if name == "cache":
        assert verify_cache(tmp_path / "set" / "cache") == []


def test_tables_of_something_else_beside_split_folders(tmp_path: Path) -> None:
    trees.split_folders(tmp_path)
    for name in ("Train.csv", "Test.csv"):
        (tmp_path / name).write_text("Width,Height,Roi\n27,26,5\n")
    assert list_data(tmp_path).layout == "folders train/, val/, test/"


def test_classes_that_are_called_like_splits(tmp_path: Path) -> None:
    trees.class_folders(tmp_path / "books", ("train", "novel", "poem", "drama"), 2)
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"splits": {"train": ["train", "novel"], "test": ["poem", "drama"]}})
    )
    listing = list_data(tmp_path / "books", str(path))
    assert listing.layout == "class folders"
    assert listing.splits["train"].keys == ("novel", "train")
