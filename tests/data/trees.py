"""Small data sets of made images, laid out exactly as the real ones are."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dvla_fast.data.splits import SplitList, load_split_list


def picture(seed: int, side: tuple[int, int] = (20, 16)) -> np.ndarray:
    """A made image (H, W, 3), another for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (*side, 3), dtype=np.uint8)


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path)


def class_folders(folder: Path, keys: Iterable[str], count: int, seed: int = 0) -> None:
    for key in keys:
        for number in range(count):
            seed += 1
            write_image(folder / key / f"{key}_{number}.jpg", seed)


def split_folders(
    root: Path, splits: dict[str, Iterable[str]] | None = None, count: int = 4
) -> Path:
    splits = splits or {"train": "abcde", "val": "fg", "test": "hijkl"}
    for index, (split, keys) in enumerate(splits.items()):
        class_folders(root / split, keys, count, 10000 * index)
    return root


def cub(root: Path, count: int = 2) -> Path:
    """CUB_200_2011 as its archive unpacks: all 200 classes."""
    folder = root / "CUB_200_2011"
    keys = sorted(load_split_list("cub_100_50_50").keys)
    class_folders(folder / "images", keys, count)
    images, labels = [], []
    for number, key in enumerate(keys, 1):
        for item in range(count):
            images.append(f"{len(images) + 1} {key}/{key}_{item}.jpg")
            labels.append(f"{len(images)} {number}")
    classes = [f"{number} {key}" for number, key in enumerate(keys, 1)]
    for name, lines in (
        ("images.txt", images), ("image_class_labels.txt", labels), ("classes.txt", classes)
    ):  # fmt: skip
        (folder / name).write_text("\n".join(lines) + "\n")
    return root


def dogs(root: Path) -> Path:
    """Stanford Dogs as its archive unpacks: Images/n02085620-Chihuahua/..."""
    class_folders(root / "Images", load_split_list("dogs_dn4_70_20_30").keys, 2)
    return root


def cars(root: Path, *, labelled_test: bool = True, merged: bool = False) -> Path:
    """Stanford Cars: cars_train/, cars_test/ and devkit/; or car_ims/ and cars_annos.mat."""
    from scipy.io import savemat

    known = json.loads(json.dumps(sorted(load_split_list("cars_dn4_130_17_49").keys)))
    names = np.array(known, dtype=object)
    train, test, everything = [], [], []
    number = 0
    for label in range(1, len(known) + 1):
        for part, rows in (("cars_train", train), ("cars_train", train), ("cars_test", test)):
            number += 1
            name = f"{number:05d}.jpg"
            write_image(root / ("car_ims" if merged else part) / name, number)
            rows.append((name, label))
            everything.append((f"car_ims/{name}", label, int(part == "cars_test")))
    if merged:
        form = [("relative_im_path", object), ("class", object), ("test", object)]
        table = np.array(everything, dtype=form)
        savemat(root / "cars_annos.mat", {"annotations": table, "class_names": names})
        return root
    (root / "devkit").mkdir()
    form = [("fname", object), ("class", object)]
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    train_table = {"annotations": np.array(train, dtype=form)}
    savemat(root / "devkit" / "cars_train_annos.mat", train_table)
    if labelled_test:
        test_table = {"annotations": np.array(test, dtype=form)}
        savemat(root / "cars_test_annos_withlabels.mat", test_table)
    return root


def dump(path: Path, content: Any, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        pickle.dump(content, stream, protocol)


def cifar100(root: Path) -> Path:
    """CIFAR-100, python version: two train images and one test image a class."""
    names = sorted(load_split_list("cifar_fs").keys)
    for part, each in (("train", 2), ("test", 1)):
        labels = np.repeat(np.arange(100), each)
        rng = np.random.default_rng(each)
        data = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        content = {"data": data, "fine_labels": labels.tolist(), "filenames": ["x.png"] * len(data)}
        dump(root / "cifar-100-python" / part, content)
    dump(root / "cifar-100-python" / "meta", {"fine_label_names": names})
    return root


def mini_imagenet(root: Path, form: str = "cache", count: int = 2) -> Path:
    """miniImageNet pickles of 84-pixel images, in either of the two common forms."""
    known = load_split_list("miniimagenet_ravi")
    for number, (split, keys) in enumerate(known.splits.items()):
        rng = np.random.default_rng(number)
        images = rng.integers(0, 256, (count * len(keys), 84, 84, 3), dtype=np.uint8)
        labels = np.repeat(np.arange(len(keys)), count)
        if form == "cache":
            rows = {key: np.flatnonzero(labels == i).tolist() for i, key in enumerate(keys)}
            dump(
                root / f"mini-imagenet-cache-{split}.pkl",
                {"image_data": images, "class_dict": rows},
            )
        else:
            part = "train_phase_train" if split == "train" else split
            content = {
                "data": images,
                "labels": labels.tolist(),
                "catname2label": {key: i for i, key in enumerate(keys)},
            }
            dump(root / f"miniImageNet_category_split_{part}.pickle", content)
    return root


def metaopt(root: Path, name: str, names: str = "label2catname", count: int = 2) -> Path:
    """CIFAR-FS or FC100 as MetaOptNet's pickles: CIFAR_FS_{train,val,test}.pickle, 32 pixels."""
    known = load_split_list({"CIFAR_FS": "cifar_fs", "FC100": "fc100"}[name])
    fine = sorted(known.keys)
    for number, (split, keys) in enumerate(known.splits.items()):
        rng = np.random.default_rng(number)
        labels = np.repeat([fine.index(key) for key in keys], count).tolist()
        images = rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
        content: dict[str, Any] = {"data": images, "labels": labels}
        if names == "label2catname":
            content[names] = dict(enumerate(fine))
        elif names == "catname2label":
            content[names] = {key: label for label, key in enumerate(fine)}
        dump(root / f"{name}_{split}.pickle", content)
    return root


def tiered(root: Path, form: str = "png", named: bool = True, count: int = 2) -> Path:
    """tieredImageNet: {train,val,test}_images_png.pkl, or _images.npz, with _labels.pkl."""
    known = load_split_list("tieredimagenet")
    for number, (split, keys) in enumerate(known.splits.items()):
        rng = np.random.default_rng(number)
        images = rng.integers(0, 256, (count * len(keys), 84, 84, 3), dtype=np.uint8)
        labels = np.repeat(np.arange(len(keys), dtype=np.int32), count)
        root.mkdir(parents=True, exist_ok=True)
        if form == "npz":  # as OpenCV leaves them: blue first
            np.savez(root / f"{split}_images.npz", images=images[..., ::-1])
        else:
            files = []
            for image in images:
                stream = io.BytesIO()
                Image.fromarray(image).save(stream, "PNG", compress_level=0)
                files.append(np.frombuffer(stream.getvalue(), np.uint8)[:, None])
            dump(root / f"{split}_images_png.pkl", files)
        names = {"label_specific": labels, "label_specific_str": [known.names[k] for k in keys]}
        content = names if named else {"labels": (labels + 1000 * number).tolist()}
        dump(root / f"{split}_labels.pkl", content)
    return root


def csv_lists(root: Path, known: SplitList, count: int = 2) -> Path:
    """images/ with {train,val,test}.csv beside it, as Ravi and Larochelle publish miniImageNet."""
    seed = 0
    for split, keys in known.splits.items():
        rows = [("filename", "label")]
        for key in keys:
            for number in range(count):
                seed += 1
                name = f"{key}{number:08d}.jpg"
                write_image(root / "images" / name, seed)
                rows.append((name, key))
        with (root / f"{split}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    return root


def chestx(root: Path) -> Path:
    """ChestX-ray14: a table, and images over two folders; some rows carry several findings."""
    lines = ["Image Index,Finding Labels,Follow-up #,Patient ID"]
    number = 0
    labels = [*load_split_list("chestx").splits["test"], "Pneumonia", "Mass|Nodule", "No Finding"]
    for label in labels:
        for item in range(2):
            number += 1
            name = f"{number:08d}_000.png"
            write_image(root / f"images_{1 + item:03d}" / "images" / name, number)
            lines.append(f"{name},{label},0,{number}")
    (root / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    return root
