"""Every layout is recognised by itself and gives the published classes and readable names."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from dvla_fast.data import list_data, load_data
from dvla_fast.data.shapes import KINDS
from dvla_fast.data.splits import (
    SPLITS,
    bundled_split_lists,
    candidates,
    class_names,
    load_split_list,
    published_name,
    split_list_names,
)
from dvla_fast.errors import DataError, MissingDependencyError
from tests.data import trees

CLASSES = {
    "cars_dn4_130_17_49": (130, 17, 49),
    "cars_fwt_98_49_49": (98, 49, 49),
    "chestx": (0, 0, 7),
    "cifar_fs": (64, 16, 20),
    "cub_100_50_50": (100, 50, 50),
    "cub_140_30_30": (140, 30, 30),
    "cub_dn4_130_20_50": (130, 20, 50),
    "cub_feat_100_50_50": (100, 50, 50),
    "cub_frn_100_50_50": (100, 50, 50),
    "dogs_dn4_70_20_30": (70, 20, 30),
    "dogs_fslssl_60_30_30": (60, 30, 30),
    "fc100": (60, 20, 20),
    "miniimagenet_ravi": (64, 16, 20),
    "places365_fwt": (183, 91, 91),
    "plantae_fwt": (100, 17, 18),
    "tieredimagenet": (351, 97, 160),
}


def sizes(listing) -> dict[str, tuple[int, int]]:
    return {name: (len(split.keys), len(split)) for name, split in listing.splits.items()}


def test_bundled_lists() -> None:
    assert set(split_list_names()) == set(CLASSES)
    for item in bundled_split_lists():
        assert tuple(len(item.splits[split]) for split in SPLITS) == CLASSES[item.name]
        assert len(item.keys) == sum(CLASSES[item.name])  # no class in two splits
        assert item.source
        assert item.published
        assert len(set(class_names(sorted(item.keys), item))) == len(item.keys)
        if item.images_per_class and item.images_per_split:
            for split, keys in item.splits.items():
                total = sum(item.images_per_class[key] for key in keys)
                assert total == item.images_per_split[split], item.name
    assert [item.name for item in bundled_split_lists() if item.missing_classes] == ["plantae_fwt"]


def test_classes_that_can_belong_to_a_list() -> None:
    """More than half of its own, and for its name exactly those, each in its split."""
    known = load_split_list("miniimagenet_ravi")
    keys = sorted(known.keys)
    assert known in candidates(keys[:51])
    assert known not in candidates(keys[:50])
    assert published_name(known.name, known.splits) == known.name
    moved = {**known.splits, "val": known.splits["val"][1:]}
    assert published_name(known.name, moved) == ""
    assert published_name("mine", known.splits) == ""


@pytest.mark.parametrize("name", ["miniimagenet_ravi", "tieredimagenet"])
def test_bundled_names_agree_with_imagenet(name: str) -> None:
    pytest.importorskip("timm")
    known = load_split_list(name)
    keys = sorted(known.keys)
    assert class_names(keys, known) == class_names(keys)


def test_wordnet_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    assert class_names(["n01532829", "cat"]) == ("house finch", "cat")
    # two ImageNet classes are called crane
    assert class_names(["n02012849", "n03126707"]) == ("crane (n02012849)", "crane (n03126707)")
    with pytest.raises(DataError, match="n99999999"):
        class_names(["n99999999"])
    from dvla_fast.data import splits

    splits._imagenet.cache_clear()
    monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dvla-fast\[vision\]'"):
        class_names(["n01532829"])


@pytest.mark.parametrize("names", [("train", "val", "test"), ("base", "val", "novel")])
def test_split_folders_of_a_published_split(tmp_path: Path, names: tuple[str, ...]) -> None:
    known = load_split_list("miniimagenet_ravi")
    trees.split_folders(tmp_path, dict(zip(names, known.splits.values())), 2)
    listing = list_data(tmp_path)
    assert listing.split_list is known
    assert sizes(listing) == {"train": (64, 128), "val": (16, 32), "test": (20, 40)}
    assert "house finch" in listing.splits["train"].names


def test_layout_says_which_folders_are_there(tmp_path: Path) -> None:
    trees.split_folders(tmp_path, {"base": "ab", "novel": "cd"})
    assert list_data(tmp_path).layout == "folders base/, novel/"


def test_named_split_must_match_the_folders(tmp_path: Path) -> None:
    known = load_split_list("miniimagenet_ravi")
    trees.split_folders(tmp_path, dict(known.splits), 2)
    key = known.splits["test"][0]
    shutil.move(tmp_path / "test" / key, tmp_path / "train" / key)
    assert list_data(tmp_path).split_list is None
    with pytest.raises(DataError, match=f"does not follow miniimagenet_ravi.*{key}.*in train"):
        list_data(tmp_path, "miniimagenet_ravi")


def test_csv_lists(tmp_path: Path) -> None:
    known = load_split_list("miniimagenet_ravi")
    listing = list_data(trees.csv_lists(tmp_path, known))
    assert listing.split_list is known
    assert sizes(listing) == {"train": (64, 128), "val": (16, 32), "test": (20, 40)}
    twice = known.splits["train"][0]
    with (tmp_path / "test.csv").open("a") as stream:
        stream.write(f"{twice}{0:08d}.jpg,{known.splits['test'][0]}\n")
    with pytest.raises(DataError, match=rf"{twice}0+\.jpg: listed in train, .* and again in test"):
        list_data(tmp_path)
    lines = (tmp_path / "test.csv").read_text().splitlines()
    detour = lines[-1].replace(twice, f"../images/{twice}", 1)
    (tmp_path / "test.csv").write_text("\n".join([*lines[:-1], detour]))
    with pytest.raises(DataError, match=r"listed in train, .* and again in test"):
        list_data(tmp_path)
    (tmp_path / "test.csv").write_text("\n".join(lines[:-1]))
    (tmp_path / "images" / f"{known.splits['val'][0]}{1:08d}.jpg").unlink()
    with pytest.raises(DataError, match=r"1\.jpg: listed in val\.csv, but not there \(1 of 200"):
        list_data(tmp_path)


def test_json_lists(tmp_path: Path) -> None:
    trees.class_folders(tmp_path / "images", "abcd", 2)
    for split, keys in {"base": "ab", "novel": "cd"}.items():
        content = {
            "label_names": list("abcd"),
            "image_names": [
                str(tmp_path / f"images/{k}/{k}_{i}.jpg") for k in keys for i in (0, 1)
            ],
            "image_labels": ["abcd".index(k) for k in keys for _ in (0, 1)],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    assert sizes(list_data(tmp_path)) == {"train": (2, 4), "test": (2, 4)}
    for wrong in ({"image_labels": [0, -1, 0, 0]}, {"image_labels": [], "image_names": []}):
        (tmp_path / "base.json").write_text(json.dumps(content | wrong))
        with pytest.raises(DataError, match=r"base\.json: .*negative label"):
            list_data(tmp_path)
    (tmp_path / "base.json").write_text("{}")
    with pytest.raises(DataError, match=r"base\.json: expected the lists label_names"):
        list_data(tmp_path)


@pytest.mark.parametrize("inner", ["", "CUB_200_2011"])
def test_cub(tmp_path: Path, inner: str) -> None:
    root = trees.cub(tmp_path) / inner
    listing = list_data(root, "cub_100_50_50")
    assert sizes(listing) == {"train": (100, 200), "val": (50, 100), "test": (50, 100)}
    assert listing.splits["train"].names[0] == "Black footed Albatross"
    with pytest.raises(DataError, match=r"5 published splits fit; choose one.*cub_frn_100_50_50"):
        list_data(root)
    (tmp_path / "CUB_200_2011/images/001.Black_footed_Albatross").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"listed in images.txt, but not there \(2 of 400"):
        list_data(root, "cub_100_50_50")


def test_dogs(tmp_path: Path) -> None:
    listing = list_data(trees.dogs(tmp_path), "dogs_dn4_70_20_30")
    assert sizes(listing) == {"train": (70, 140), "val": (20, 40), "test": (30, 60)}
    assert "Chihuahua" in listing.splits["train"].names
    shutil.rmtree(tmp_path / "Images" / "n02085620-Chihuahua")
    with pytest.raises(DataError, match=r"1 of the 120 classes.*Chihuahua.*vision.stanford.edu"):
        list_data(tmp_path, "dogs_dn4_70_20_30")


@pytest.mark.parametrize("merged", [False, True])
def test_cars(tmp_path: Path, merged: bool) -> None:
    trees.cars(tmp_path, merged=merged)
    whole = list_data(tmp_path, "cars_dn4_130_17_49")
    assert sizes(whole) == {"train": (130, 390), "val": (17, 51), "test": (49, 147)}
    part = list_data(tmp_path, "cars_fwt_98_49_49")  # uses cars_train/ alone
    assert sizes(part) == {"train": (98, 196), "val": (49, 98), "test": (49, 98)}


def test_cars_without_test_labels(tmp_path: Path) -> None:
    trees.cars(tmp_path, labelled_test=False)
    assert sizes(list_data(tmp_path, "cars_fwt_98_49_49"))["train"] == (98, 196)
    with pytest.raises(DataError, match=r"cars_test_annos_withlabels\.mat"):
        list_data(tmp_path, "cars_dn4_130_17_49")


@pytest.mark.parametrize(("name", "train"), [("cifar_fs", 64), ("fc100", 60)])
def test_cifar100(tmp_path: Path, name: str, train: int) -> None:
    trees.cifar100(tmp_path)
    listing = list_data(tmp_path, name)
    assert sizes(listing)["train"] == (train, 3 * train)
    data = load_data(str(tmp_path), 32, splits=name)
    split = listing.splits["train"]
    assert (data.base.images[5].permute(1, 2, 0).numpy() == split.source(5)).all()
    with pytest.raises(DataError, match=r"cifar_fs \| fc100"):
        list_data(tmp_path)


def test_cifar100_pixels_belong_to_their_class(tmp_path: Path) -> None:
    trees.cifar100(tmp_path)
    split = list_data(tmp_path, "fc100").splits["test"]
    names = sorted(load_split_list("fc100").keys)
    label = names.index(split.keys[3])
    data = np.random.default_rng(2).integers(0, 256, (200, 3072), dtype=np.uint8)
    first = split.source(int(np.flatnonzero(split.labels == 3)[0]))
    assert (first == data[2 * label].reshape(3, 32, 32).transpose(1, 2, 0)).all()


@pytest.mark.parametrize("form", ["cache", "metaoptnet"])
def test_mini_imagenet_pickles(tmp_path: Path, form: str) -> None:
    trees.mini_imagenet(tmp_path, form)
    data = load_data(str(tmp_path), 84)
    assert data.base.images.shape == (128, 3, 84, 84)
    assert data.name == "miniImageNet"
    assert "house finch" in data.base.class_names
    with pytest.warns(UserWarning, match=r"84-pixel images, enlarged here to 96"):
        load_data(str(tmp_path), 96)


@pytest.mark.parametrize("names", ["label2catname", "catname2label"])
@pytest.mark.parametrize(("name", "known"), [("CIFAR_FS", "cifar_fs"), ("FC100", "fc100")])
def test_metaoptnet_pickles(tmp_path: Path, name: str, known: str, names: str) -> None:
    listing = list_data(trees.metaopt(tmp_path, name, names))
    assert listing.split_list is load_split_list(known)
    assert [len(split.keys) for split in listing.splits.values()] == list(CLASSES[known])
    assert not any(split.reduced for split in listing.splits.values())
    train = listing.splits["train"]
    fine = sorted(load_split_list(known).keys)
    with (tmp_path / f"{name}_train.pickle").open("rb") as stream:
        content = pickle.load(stream)
    for row in (0, 5):
        label = fine.index(train.keys[train.labels[row]])
        rows = np.flatnonzero(np.asarray(content["labels"]) == label)
        assert (train.source(row) == content["data"][rows[row % 2]]).all()


def test_metaoptnet_pickles_without_names_and_damaged(tmp_path: Path) -> None:
    listing = list_data(trees.metaopt(tmp_path, "CIFAR_FS", "none"))
    assert listing.split_list is None
    assert all(key.startswith("class ") for key in listing.splits["test"].keys)
    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    for wrong in (
        {"data": pixels, "labels": [0, 0, 1]},
        {"data": pixels, "labels": ["a"] * 4},
        {"data": pixels, "labels": [0, 0, 1, 1], "label2catname": {0: "x", 1: "x"}},
        {"data": pixels[0], "labels": [0] * 32},
        {"data": pixels.astype(float), "labels": [0, 0, 1, 1]},
        [],
    ):
        trees.dump(tmp_path / "CIFAR_FS_val.pickle", wrong)
        with pytest.raises(DataError, match=r"CIFAR_FS_val\.pickle: "):
            list_data(tmp_path)
    (tmp_path / "CIFAR_FS_val.pickle").unlink()
    with pytest.raises(DataError, match=r"CIFAR_FS_val\.pickle: missing beside"):
        list_data(tmp_path)


@pytest.mark.parametrize("form", ["png", "npz"])
def test_tiered_imagenet_pickles(tmp_path: Path, form: str) -> None:
    known = load_split_list("tieredimagenet")
    listing = list_data(trees.tiered(tmp_path, form))
    assert [len(split.keys) for split in listing.splits.values()] == list(CLASSES["tieredimagenet"])
    assert all(split.reduced for split in listing.splits.values())
    test = listing.splits["test"]
    expected = np.random.default_rng(2).integers(0, 256, (320, 84, 84, 3), dtype=np.uint8)
    rows = [test.references[place] for place in (0, 7, 319)]
    assert sorted(test.references) == list(range(320))
    assert all((test.source(p) == expected[r]).all() for p, r in zip((0, 7, 319), rows))
    names = [known.names[key] for key in known.splits["train"]]
    if len(set(names)) == len(names):
        assert listing.split_list is known
        assert listing.splits["train"].keys == tuple(sorted(known.splits["train"]))
    assert set(listing.splits["train"].names) == set(names)


def test_tiered_imagenet_without_names_and_damaged(tmp_path: Path) -> None:
    listing = list_data(trees.tiered(tmp_path, "npz", named=False))
    assert listing.split_list is None
    assert listing.splits["val"].keys[:2] == ("class 1000", "class 1001")
    whole = (tmp_path / "val_images.npz").read_bytes()
    (tmp_path / "val_images.npz").write_bytes(whole[:1000])
    with pytest.raises(DataError, match=r"val_images\.npz: no array 'images'"):
        list_data(tmp_path)
    for wrong in ([b"no png"], [], {"a": 1}, [object], [np.zeros(9, np.uint8)]):
        trees.dump(tmp_path / "val_images_png.pkl", wrong)
        with pytest.raises(DataError, match=r"val_images_png\.pkl: "):
            list_data(tmp_path)
    (tmp_path / "val_images_png.pkl").unlink()
    (tmp_path / "val_images.npz").write_bytes(whole)
    trees.dump(tmp_path / "val_labels.pkl", {"label_specific": np.zeros(3, np.int32)})
    with pytest.raises(DataError, match=r"val_labels\.pkl: no labels"):
        list_data(tmp_path)


def test_chestx_is_for_evaluation_only(tmp_path: Path) -> None:
    listing = list_data(trees.chestx(tmp_path))
    assert sizes(listing) == {"test": (7, 14)}  # single findings of the seven classes
    data = load_data(str(tmp_path), 16)
    assert (len(data.base), len(data.monitor), len(data.novel)) == (0, 0, 14)
    assert data.normalise(data.novel.images).isfinite().all()
    (tmp_path / "images_001/images/00000001_000.png").unlink()
    with pytest.raises(DataError, match=r"1_000\.png: .*1 of 14 .*extract all image archives"):
        list_data(tmp_path)


def test_places_takes_the_first_200_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = load_split_list("places365_fwt")
    trees.class_folders(tmp_path / "train", sorted(known.keys), 2)
    for number in range(201):
        trees.write_image(tmp_path / "train" / "airfield" / f"{number:08d}.jpg", number)
    listing = list_data(tmp_path)
    assert listing.split_list is known
    split = listing.splits["train"]
    assert split.counts()[split.keys.index("airfield")] == 200
    assert "airport terminal" in split.names


def test_plantae_list_is_incomplete(tmp_path: Path) -> None:
    known = load_split_list("plantae_fwt")
    trees.class_folders(tmp_path, known.keys, 2)
    with pytest.raises(DataError, match="lacks 65 classes of the published split"):
        list_data(tmp_path)
    assert sizes(list_data(tmp_path, "plantae_fwt"))["test"] == (18, 36)


def test_class_folders_with_own_split(tmp_path: Path) -> None:
    trees.class_folders(tmp_path / "photos", "abcd", 3)
    with pytest.raises(DataError, match=r"class folders without a split.*--data.splits FILE.json"):
        list_data(tmp_path / "photos")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"splits": {"train": ["a"], "test": ["c", "b"]}}))
    listing = list_data(tmp_path / "photos", str(path))
    assert listing.splits["test"].keys == ("b", "c")
    assert listing.ignored == ("d",)
    path.write_text(json.dumps({"splits": {"train": ["a", "b"], "test": ["b"]}}))
    with pytest.raises(DataError, match="class 'b' is listed in train and again in test"):
        list_data(tmp_path / "photos", str(path))
    with pytest.raises(DataError, match="split list 'cub' is unknown; choose one of cars_dn4"):
        list_data(tmp_path / "photos", "cub")


def test_names_that_differ_in_case(tmp_path: Path) -> None:
    trees.split_folders(tmp_path, {"train": ["Dog", "dog"], "test": ["cat", "cow"]})
    with pytest.raises(DataError, match="'Dog' and 'dog' have the same name"):
        list_data(tmp_path)


def test_two_spellings_within_a_split(tmp_path: Path) -> None:
    trees.split_folders(tmp_path, {"train": ["cat", "cow"], "test": ["Red_Panda", "red panda"]})
    with pytest.raises(DataError, match=r"test: the classes 'Red_Panda' and 'red panda' have the"):
        list_data(tmp_path)


def test_two_spellings_within_a_split_list(tmp_path: Path) -> None:
    """Appending the keys would only hide that these are one."""
    trees.class_folders(tmp_path / "photos", ["cat", "cow", "Red_Panda", "Red Panda"], 3)
    path = tmp_path / "mine.json"
    splits = {"train": ["cat", "cow"], "test": ["Red_Panda", "Red Panda"]}
    path.write_text(json.dumps({"splits": splits}))
    with pytest.raises(DataError, match=r"'Red_Panda' and 'Red Panda' have the same name"):
        list_data(tmp_path / "photos", str(path))


@pytest.mark.parametrize(
    "test",
    [
        ["n02012849", "n03126707"],  # crane, twice
        ["n02113186", "n02963159"],  # Cardigan, the dog, and cardigan
        ["001.Cat", "002.cat"],
    ],
)
def test_numbers_tell_classes_of_one_name_apart(tmp_path: Path, test: list[str]) -> None:
    pytest.importorskip("timm")
    trees.split_folders(tmp_path / "within", {"train": "ab", "test": test})
    names = list_data(tmp_path / "within").splits["test"].names
    assert all(name.endswith(f" ({key})") for name, key in zip(names, test))
    trees.split_folders(tmp_path / "across", {"train": test[:1], "test": test[1:]})
    assert sizes(list_data(tmp_path / "across")) == {"train": (1, 4), "test": (1, 4)}


def test_one_class_under_two_spellings(tmp_path: Path) -> None:
    """Evaluation would refuse what training on such folders leaves."""
    trees.split_folders(tmp_path, {"train": ["Red Panda", "cow"], "test": ["cat", "red_panda"]})
    with pytest.raises(DataError, match=r"share 1 class\(es\) \('Red Panda' and 'red_panda'"):
        list_data(tmp_path)


@pytest.mark.parametrize("form", ["NFC", "NFD"])  # of the list
def test_names_in_the_decomposed_form_of_a_mac(tmp_path: Path, form: Literal["NFC", "NFD"]) -> None:
    names = ["épagneul", "zèbre", "cat", "Ångström"]
    photos = tmp_path / "photos"
    trees.class_folders(photos, [unicodedata.normalize("NFD", name) for name in names], 3)
    path = tmp_path / "mine.json"
    listed = [unicodedata.normalize(form, name) for name in names]
    path.write_text(json.dumps({"splits": {"train": listed[:2], "test": listed[2:]}}))
    listing = list_data(photos, str(path))
    assert set(listing.splits["train"].keys) == {"épagneul", "zèbre"}
    assert listing.ignored == ()
    assert len(listing.splits["train"]) == 6
    trees.class_folders(photos, ["zèbre"], 3)
    with pytest.raises(DataError, match=r"photos: two folders are called 'zèbre'"):
        list_data(photos, str(path))


def test_archive_file_instead_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "CUB_200_2011.tgz").write_bytes(b"x")
    with pytest.raises(DataError, match="extract the archive first"):
        list_data(tmp_path / "CUB_200_2011.tgz")


def test_data_sets_that_have_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits", *KINDS):
        with pytest.raises(DataError, match=f"{name}: comes with dvla-fast, and has no folder"):
            list_data(name)
