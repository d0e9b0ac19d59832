"""The data set of emoji, from made archives of npm: what becomes a class, an image and a text."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.emoji import main
from dvla_fast.data import load_data
from dvla_fast.semantics import load_bank

pytest.importorskip("resvg_py")

GROUPS = [{"order": 0, "key": "animals-nature", "message": "animals & nature"},
          {"order": 1, "key": "flags", "message": "flags"}]  # fmt: skip
PARTS = [{"order": 0, "key": "animal-mammal", "message": "animal-mammal"}]
LABELS = ["cat", "dog’s house", "lion", "wolf", "fox", "red heart", "blue heart"]


def archive(path: Path, members: dict[str, Any]) -> None:
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def square(colour: str) -> dict[str, str]:
    return {"body": f'<path fill="{colour}" d="M0 0h8v8H0z"/>'}


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    entries = [
        {"label": label, "tags": ["pet", "*", label, "good"], "group": 0, "subgroup": 0}
        for label in LABELS
    ]
    flag = {"label": "white flag", "tags": [], "group": 1, "subgroup": 0}
    folder = tmp_path / "npm"
    folder.mkdir()
    archive(
        folder / "emojibase-data-1.0.0.tgz",
        {
            "en/data.json": [*entries, flag, {"label": "no group"}],
            "en/messages.json": {"groups": GROUPS, "subgroups": PARTS},
        },
    )
    for number, name in enumerate(["plain-1.2.3", "plain-v1-1.0.0", "bright-2.0.1"]):
        icons = {
            label.replace("’", "").replace(" ", "-"): square(f"#{place}0{number}0ff")
            for place, label in enumerate(LABELS)
        }
        icons["red-heart"] = icons["blue-heart"] = square("currentColor")  # one drawing for both
        aliases = {"fox": {"parent": "wolf", "hFlip": True}, "white-flag": {"parent": "cat"}}
        del icons["fox"]
        content = {"icons": icons, "aliases": aliases, "width": 8, "height": 8}
        licence = {"license": {"title": f"licence {number}"}}
        archive(folder / f"iconify-json-{name}.tgz", {"icons.json": content, "info.json": licence})
    return folder


def test_images_texts_and_parts(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = packages.parent / "emoji"
    arguments = [str(packages), str(output), "--size", "16", "--least", "3"]
    assert main(arguments) == 0
    # no flag, no mirrored fox, no hearts that are one drawing
    assert "12 images of 2 train, 1 val, 1 test classes" in capsys.readouterr().out
    found = {path.parent.name: path for path in output.glob("*/*/plain-v1.png")}
    assert set(found) == {"cat", "dogs house", "lion", "wolf"}
    assert Image.open(found["lion"]).getpixel((3, 3)) == (0x20, 0x10, 0xFF)
    assert (output / "SOURCES.txt").read_text().startswith("bright: licence 2\nplain: licence 0\n")
    entry = load_bank(str(output / "bank.json")).classes["lion"]
    assert entry.proposals == ("pet", "good", "animal-mammal", "animals", "nature")
    assert entry.description == "lion, of the group animals and nature, animal-mammal."
    data = load_data(str(output), 16)
    assert len(data.novel) == 3
    assert main(arguments) == 1  # never over what is there
    assert "exists" in capsys.readouterr().err


def test_missing_packages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "needs emojibase-data-*.tgz and iconify-json-*.tgz" in capsys.readouterr().err
