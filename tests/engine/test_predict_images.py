"""``dvla-fast predict``: files in, a table of classes and probabilities out."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import dvla_fast
from dvla_fast.cli import main
from dvla_fast.engine.predict_images import find_images, run_predict
from dvla_fast.engine.tool_config import PredictImages
from tests.test_cli import fails

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")

TEXTS = {
    "jay": {"attributes": ["blue wings", "a crest"], "description": "A loud blue bird."},
    "wren": {"attributes": ["a short tail"], "description": "A small brown bird."},
}
COLOURS = {"jay": (20, 40, 220), "wren": (140, 90, 30)}


@pytest.fixture
def folder(
    tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Supports, a bank, a checkpoint, and queries: in class folders, and loose."""
    monkeypatch.chdir(tmp_path)
    make_checkpoint().rename("tuned.safetensors")
    Path("birds.json").write_text(json.dumps({"classes": TEXTS}))
    rng = np.random.default_rng(0)
    places = ["birds/jay", "birds/wren", "photos/jay", "photos/Wren", "photos/unknown"]
    for place in places:
        Path(place).mkdir(parents=True)
        colour = np.array(COLOURS.get(place.split("/")[1].lower(), (0, 200, 0)))
        for number in range(2):
            pixels = (colour + rng.integers(-20, 20, (16, 16, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(f"{place}/{number}.png")
    return tmp_path


OPTIONS = ["--checkpoint=tuned.safetensors", "--supports=birds", "--device=cpu"]


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_folder_with_and_without_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", "photos/", *OPTIONS, "--bank=birds.json", "--batch=4", "--rows=3"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    found = rows("predictions.csv")
    assert [row["path"] for row in found] == [
        f"photos/{place}" for place in
        ("Wren/0.png", "Wren/1.png", "jay/0.png", "jay/1.png", "unknown/0.png", "unknown/1.png")
    ]  # fmt: skip
    classifier = dvla_fast.FewShotClassifier.load("tuned.safetensors", "cpu")
    classifier.learn("birds", "birds.json")
    expected = classifier.classify([row["path"] for row in found])
    assert [row["predicted"] for row in found] == expected.predicted
    for row, probabilities in zip(found, expected.probabilities.tolist()):
        shown = [float(row["probability_jay"]), float(row["probability_wren"])]
        assert shown == pytest.approx(probabilities, abs=2e-6)
    labels = ["wren", "wren", "jay", "jay", "", ""]
    assert [row["label"] for row in found] == labels
    right = sum(row["predicted"] == row["label"] for row in found)
    assert f"accuracy    {right / 4:.1%} ({right} of 4 images in folders of a class)" in said
    assert "... and 3 more" in said
    assert "written     predictions.csv (6 rows)" in said
    for name in TEXTS:
        count = expected.predicted.count(name)
        assert any(line.split()[:2] == [name, str(count)] for line in said.splitlines())


def test_answers_follow_the_colours(folder: Path) -> None:
    """Of the prototypes alone; each class's queries look like its supports."""
    found = run_predict(
        PredictImages(["photos/jay", "photos/Wren"], "tuned.safetensors", "birds", device="cpu"),
        quiet=True,
    )
    assert [answer.predicted for answer in found.answers] == ["jay", "jay", "wren", "wren"]
    assert "accuracy    100.0% (4 of 4" in found.text(0)


def test_unreadable_files_are_named_and_change_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", "photos/unknown", *OPTIONS]
    assert main([*arguments, "--output=whole.csv"]) == 0
    Path("photos/unknown/0a.png").write_bytes(b"no picture")
    Path("photos/unknown/.hidden.png").write_bytes(b"")
    Path("photos/unknown/folder.png").mkdir()
    capsys.readouterr()
    assert main([*arguments, "--output=all.json"]) == 0
    captured = capsys.readouterr()
    assert "unreadable: photos/unknown/0a.png: cannot read this image" in captured.err
    assert "unreadable  1 of 3 files" in captured.out
    assert "accuracy" not in captured.out  # no class is called "unknown"
    content = json.loads(Path("all.json").read_text())
    assert content["checkpoint"] == "tuned.safetensors"
    assert content["bank"] is None
    assert content["classes"] == ["jay", "wren"]
    first, broken, last = content["images"]
    assert broken["predicted"] is None
    assert "cannot read this image" in broken["error"]
    whole = rows("whole.csv")
    assert [first["predicted"], last["predicted"]] == [row["predicted"] for row in whole]
    for image, row in zip((first, last), whole):
        assert image["error"] is None
        assert image["probabilities"]["jay"] == pytest.approx(
            float(row["probability_jay"]), abs=2e-6
        )
    message = fails(["predict", "photos/unknown/0a.png", *OPTIONS], capsys)
    assert "none of 1 files can be read" in message


def test_supports_do_not_count_as_right_answers(folder: Path) -> None:
    shutil.copy("birds/jay/1.png", "photos/jay/copy.png")
    given = ["birds", "photos/jay", str(Path("photos/jay").absolute())]  # each file counts once
    found = run_predict(PredictImages(given, "tuned.safetensors", "birds"), quiet=True)
    assert "of 2 images in folders of a class; 5 supports do not count)" in found.text(0)
    marked = [row["path"] for row in rows("predictions.csv") if row["support"] == "yes"]
    assert marked == [
        "birds/jay/0.png", "birds/jay/1.png", "birds/wren/0.png", "birds/wren/1.png",
        "photos/jay/copy.png",
    ]  # fmt: skip
    assert len(rows("predictions.csv")) == 7


def test_nothing_that_is_read_is_written_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = Path("birds.json").read_text()
    message = fails(["predict", "photos", *OPTIONS, "--bank=birds.json", "--output=./birds.json"],
                    capsys, 2)  # fmt: skip
    assert "--output birds.json: would take the place of what is read" in message
    assert Path("birds.json").read_text() == texts
    for default in ("predictions.csv", "other.csv"):
        again = ["predict", "photos", *OPTIONS, f"--output={default}"]
        Path(default).write_text("an earlier table")
        message = fails(again, capsys)
        assert f"{default}: exists; give --output another name, or --overwrite" in message
        assert Path(default).read_text() == "an earlier table"
        assert main([*again, "--overwrite"]) == 0
        assert len(rows(default)) == 6


def test_output_is_tried_before_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    monkeypatch.setattr("dvla_fast.engine.predict_images.find_images", lambda given: 1 / 0)
    message = fails(["predict", "photos", *OPTIONS, "--output=table.csv"], capsys)
    assert "table.csv: cannot write (Permission denied)" in message


def test_names_that_are_not_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"photos/unknown/\xff.png")
    Path("photos/unknown/1.png").rename(name)
    for output in ("table.csv", "table.json"):
        assert main(["predict", "photos/unknown", *OPTIONS, f"--output={output}"]) == 0
        assert "photos/unknown/?.png" in capsys.readouterr().out
    assert [row["path"] for row in rows("table.csv")][1] == "photos/unknown/?.png"
    assert json.loads(Path("table.json").read_text())["images"][1]["path"] == name
    name = 'photos/unknown/a,"b"\n\x1b[2J.png'
    Path("photos/unknown/0.png").rename(name)
    assert main(["predict", "photos/unknown", *OPTIONS, "--output=table.csv", "--overwrite"]) == 0
    assert 'photos/unknown/a,"b"??[2J.png' in capsys.readouterr().out
    assert rows("table.csv")[0]["path"] == name


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["photos", "--checkpoint=tuned.safetensors"], "needs --supports", 2),
        (["photos", "--supports=birds"], "needs --checkpoint", 2),
        (["photos", *OPTIONS, "--output=table.txt"], "written as .csv or .json", 2),
        (["photos", *OPTIONS, "--output=a.csv"], "a.csv: is a folder; give --output the", 1),
        (["nowhere.png", *OPTIONS], "no such file or folder", 1),
        (["empty", *OPTIONS], "no images in this folder", 1),
        (["photos", *OPTIONS, "--bank=digits"], "the bank lacks 2 class", 1),
        (["photos", *OPTIONS, "--supports=photos/jay"], "photos/jay: no folders in it; give", 1),
        (["photos", *OPTIONS, "--supports=one"], "at least two are told apart", 1),
        (["photos", *OPTIONS, "--encoder=open_clip:no/x.pt"], "give --bank too, or neither", 2),
        (["photos", *OPTIONS, "--bank=birds.json", "--encoder=open_clip:no/x.pt"], "x.pt", 1),
    ],
)  # fmt: skip
def test_wrong_usage(
    folder: Path,
    arguments: list[str],
    message: str,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("empty", "one/jay", "a.csv"):
        Path(name).mkdir(parents=True)
    shutil.copy("birds/jay/0.png", "one/jay")
    assert message in fails(["predict", *arguments], capsys, status)
    assert not Path("predictions.csv").exists()


def test_folders_that_are_links_are_entered_once(folder: Path) -> None:
    Path("elsewhere").mkdir()
    shutil.move("photos/jay", "elsewhere/jay")
    Path("photos/jay").symlink_to(folder / "elsewhere/jay", target_is_directory=True)
    Path("photos/again").symlink_to(folder / "photos", target_is_directory=True)  # a loop
    Path("photos/Aliased").symlink_to(folder / "photos/Wren", target_is_directory=True)
    Path("photos/.hidden").mkdir()
    shutil.copy("photos/Wren/0.png", "photos/.hidden/0.png")
    names = [str(path) for path in find_images(["photos"])]
    assert names == [f"photos/{name}/{i}.png" for name in ("Wren", "jay", "unknown") for i in "01"]
