"""Plantae: the published rule, against what is published of its outcome."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvla_fast.data import list_data, load_split_list
from dvla_fast.data.plantae import derive, main, plantae_split, split_of_position
from dvla_fast.errors import DataError
from tests.data import trees

SIZES = {"train": 100, "val": 50, "test": 50}


def tally(found: dict[str, str]) -> dict[str, int]:
    return {split: list(found.values()).count(split) for split in SIZES}


def test_the_rule() -> None:
    counts = {f"c{index:03d}": 10 + index for index in range(230)}
    found, undecided = derive(counts, {})
    assert (tally(found), undecided) == (SIZES, 0)
    assert set(found) == {f"c{index:03d}" for index in range(30, 230)}  # the largest
    order = [found[f"c{index:03d}"] for index in range(30, 230)]  # ascending
    assert order[:5] == ["train", "val", "train", "test", "train"]
    assert order[-1] == "test"


def test_ties_follow_what_is_published() -> None:
    counts = {f"c{index:03d}": 10 + index // 4 for index in range(232)}  # fours, one at the cut
    truth, undecided = derive(counts, {})
    assert tally(truth) == SIZES
    assert undecided == 200
    known = {"c228": "val", "c231": "train"}  # the largest four hold positions 196 to 199
    found, _ = derive(counts, known)
    assert tally(found) == SIZES
    assert known.items() <= found.items()
    with pytest.raises(DataError, match=r"class 'c\d+' with .* published as val"):
        derive(counts, {"c228": "val", "c229": "val"})
    with pytest.raises(DataError, match=r"1 published class.* not among the 200 largest"):
        derive(counts, {"c000": "train"})


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes that fit the published part of the split: everything else falls into its place."""
    known = load_split_list("plantae_fwt")
    rows = {split: list(keys) for split, keys in known.splits.items()}
    made = iter(range(90000, 90200))
    for split in ("val", "test"):  # the published part is the upper end
        rows[split] = [str(next(made)) for _ in range(50 - len(rows[split]))] + rows[split]
    folder = tmp_path / "Plantae"
    for position in range(200):
        key = rows[split_of_position(position)].pop(0)
        (folder / key).mkdir(parents=True)
        for number in range(2 + position // 40):
            (folder / key / f"{number}.jpg").touch()
    content = plantae_split(folder)
    assert {split: len(keys) for split, keys in content["splits"].items()} == SIZES
    for split, keys in known.splits.items():
        assert set(keys) <= set(content["splits"][split])
    assert main([str(folder), str(tmp_path / "own.json")]) == 0
    assert json.loads((tmp_path / "own.json").read_text()) == content
    assert main([str(folder), str(tmp_path / "none" / "own.json")]) == 1
    assert "own.json: cannot write (No such file or directory)" in capsys.readouterr().err
    listing = list_data(folder, str(tmp_path / "own.json"))
    assert {name: len(split.keys) for name, split in listing.splits.items()} == SIZES
    capsys.readouterr()
    trees.class_folders(tmp_path / "few", "abc", 1)
    assert main([str(tmp_path / "few"), str(tmp_path / "no.json")]) == 1
    assert "3 class folders, but its rule takes the 200 largest" in capsys.readouterr().err
    assert main([]) == 2
    assert main([str(tmp_path / "none"), "x"]) == 1
