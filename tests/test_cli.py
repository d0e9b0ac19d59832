"""The command line: exit status 0, 1 or 2, one-line errors with a remedy, help with examples."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dvla_fast.cli import main
from dvla_fast.engine.checkpoint import save_checkpoint
from dvla_fast.engine.run_folder import read_config, read_metrics
from tests.data import trees

TINY_MODEL = ["--model.width=8", "--model.num_heads=4", "--model.hidden_dim=8"]
TINY_PRETRAIN = [
    "--device=cpu",
    "--pretrain.epochs=1",
    "--pretrain.warmup_epochs=0",
    "--pretrain.batch_size=16",
    "--pretrain.validation_episodes=4",
    *TINY_MODEL,
]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    """Run the command line; check its status and that it printed one error line; return that."""
    assert main(arguments) == status
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image-folder data set of five base and five novel classes, with a bank."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, classes in (("train", "abcde"), ("test", "fghij")):
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(6):
                pixels = rng.integers(0, 80, (20, 20, 3)) + 30 * index
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    texts = {
        name: {"attributes": [f"mark {name}", "a frame"], "description": f"The sign {name}."}
        for name in "abcdefghij"
    }
    (root / "bank.json").write_text(json.dumps({"classes": texts}))
    return root


@pytest.fixture(scope="module")
def pretrained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pre") / "run"
    arguments = [f"--data.dataset={photos}", "--data.image_size=16", f"--output={folder}"]
    assert main(["pretrain", *arguments, *TINY_PRETRAIN]) == 0
    return folder / "checkpoints" / "pretrain-best.safetensors"


def test_too_few_images_to_validate_on_is_told_before_the_run(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = trees.split_folders(tmp_path / "few", {"train": "ab", "test": "cd"}, 4)
    settings = [f"--data.dataset={data}", "--data.image_size=16", f"--output={tmp_path / 'run'}"]
    words = "class 'a' has 1 image(s), and 1-shot validation takes 2 or more of each; add images, "
    assert words + "raise --data.holdout" in fails(["pretrain", *settings, *TINY_PRETRAIN], capsys)
    tune = metatune(photos, pretrained, f"--output={tmp_path / 'run'}", "--metatune.shots=[2]")
    said = fails(tune, capsys)
    assert "class 'a' has 2 image(s), and 2-shot validation takes 3 or more of each; add" in said
    assert said.endswith("raise --data.holdout, or lower the shots")
    assert not (tmp_path / "run").exists()


def metatune(photos: Path, checkpoint: Path, *more: str) -> list[str]:
    return [
        "metatune",
        f"--checkpoint={checkpoint}",
        f"--data.dataset={photos}",
        "--data.image_size=16",
        f"--semantics.bank={photos / 'bank.json'}",
        "--device=cpu",
        *TINY_MODEL,
        "--metatune.epochs=1",
        "--metatune.steps_per_epoch=1",
        "--metatune.query=2",
        "--metatune.validation_episodes=2",
        *more,
    ]


def test_folder_data_set_from_pretraining_to_evaluation(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "tuned"
    assert main(metatune(photos, pretrained, f"--output={tuned}")) == 0
    said = capsys.readouterr().out
    assert "next        dvla-fast evaluate" in said
    told = json.loads((tuned / "summary.json").read_text())
    assert (
        f"accuracy on held-out images of the base classes: {told['monitor_accuracy']:.2%} ± "
        f"{100 * told['monitor_ci95']:.2f} % (2 5-way 1-shot episodes, 1 query a class)\n"
    ) in said
    arguments = [
        "evaluate",
        f"--checkpoint={tuned / 'checkpoints' / 'metatune-best.safetensors'}",
        f"--data.dataset={photos}",
        "--data.image_size=16",
        f"--semantics.bank={photos / 'bank.json'}",
        "--evaluate.episodes=4",
        "--evaluate.query=2",
        "--evaluate.shots=[1]",
        f"--output={tmp_path / 'result'}",
    ]
    assert main(arguments) == 0
    assert "learned gate" in capsys.readouterr().out
    summary = json.loads((tmp_path / "result" / "summary.json").read_text())
    assert (summary["shot"], summary["query"], summary["episodes"]) == (1, 2, 4)
    assert summary["semantics"]["bank_sha256"]
    # the same output again: refused, and nothing touched
    before = (tmp_path / "result" / "summary.json").read_bytes()
    assert "already holds a run" in fails(arguments, capsys)
    assert (tmp_path / "result" / "summary.json").read_bytes() == before


def test_pretraining_checkpoint_evaluates_visually(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "evaluate",
        f"--checkpoint={pretrained}",
        f"--data.dataset={photos}",
        "--data.image_size=16",
        "--evaluate.episodes=4",
        "--evaluate.query=2",
        "--evaluate.shots=[1]",
        f"--output={tmp_path / 'result'}",
    ]
    assert main(arguments) == 0
    assert "visual prototypes" in capsys.readouterr().out
    one = ["--evaluate.episodes=1", f"--output={tmp_path / 'one'}"]
    assert main([*arguments[:-1], *one]) == 0
    said = capsys.readouterr()
    assert "\n1 episode each; " in said.out
    assert "n/a" not in said.err


def test_text_tower_from_meta_tuning_to_evaluation(
    photos: Path,
    pretrained: Path,
    tiny_open_clip: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuned, encoder = tmp_path / "tuned", f"--semantics.encoder={tiny_open_clip}"
    assert main(metatune(photos, pretrained, encoder, f"--output={tuned}")) == 0
    arguments = [
        "evaluate",
        f"--checkpoint={tuned / 'checkpoints' / 'metatune-best.safetensors'}",
        f"--data.dataset={photos}",
        "--data.image_size=16",
        f"--semantics.bank={photos / 'bank.json'}",
        "--evaluate.episodes=4",
        "--evaluate.query=2",
        "--evaluate.shots=[1]",
    ]
    assert main([*arguments, encoder, f"--output={tmp_path / 'result'}"]) == 0
    summary = json.loads((tmp_path / "result" / "summary.json").read_text())
    assert summary["semantics"]["dim"] == 10
    assert summary["semantics"]["encoder"].startswith("open_clip:dvla-fast-tiny/sha256-")
    message = fails([*arguments, f"--output={tmp_path / 'other'}"], capsys)
    assert "its gates read texts with encoder='open_clip:dvla-fast-tiny/sha256-" in message
    message = fails([*arguments, encoder, "--semantics.dim=512", "--output=x"], capsys)
    assert "gives vectors of length 10, but semantics.dim asks for 512" in message


def test_config_file_and_overrides(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"seed: 5\ndata: {{dataset: '{photos}', image_size: 16}}\npretrain: {{epochs: 7}}\n"
    )
    output = tmp_path / "run"
    arguments = ["pretrain", "--config", str(config), *TINY_PRETRAIN, f"--output={output}"]
    assert main(arguments) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["seed"], summary["epochs"]) == (5, 1)


def test_bank_that_lacks_a_class(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = metatune(photos, pretrained, f"--output={tmp_path / 'run'}")
    message = fails([*arguments, "--semantics.bank=digits"], capsys)
    assert "the bank lacks 5 class(es) of the data set (splits base and monitor)" in message
    assert message.endswith("give a bank that has them, or add them to its 'classes'")
    assert not (tmp_path / "run").exists()


def test_bank_that_lacks_a_novel_class(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training does not read its texts: it is told there, and refused where it is evaluated."""
    content = json.loads((photos / "bank.json").read_text())
    bank, run = tmp_path / "partial.json", tmp_path / "run"
    content["classes"]["i"]["attributes"].pop()  # it has fewer texts, but lacks none

    def tune(lacking: str) -> list[str]:
        kept = {name: text for name, text in content["classes"].items() if name not in lacking}
        bank.write_text(json.dumps({"classes": kept}))
        return metatune(photos, pretrained, f"--output={run}", f"--semantics.bank={bank}")

    said = fails(tune("aj"), capsys)  # of the classes that it reads alone
    assert "lacks 1 class(es) of the data set (splits base and monitor): 'a'; give" in said
    with pytest.warns(UserWarning, match="lacks 2 class.* and evaluating will: 'h', 'j'"):
        assert main(tune("hj")) == 0
    command = ["evaluate", f"--config={run / 'config.yaml'}", f"--output={tmp_path / 'result'}"]
    command += [f"--checkpoint={run}/checkpoints/metatune-best.safetensors"]
    command += ["--evaluate.query=2", "--evaluate.shots=1", "--evaluate.episodes=2"]
    capsys.readouterr()
    tune("ahj")
    assert "lacks 2 class(es) of the data set (split novel): 'h', 'j'; give" in fails(
        command, capsys
    )
    tune("")  # the texts of the base classes are the same
    assert main(command) == 0


def test_text_longer_than_the_encoder_reads(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((photos / "bank.json").read_text())
    content["classes"]["a"]["description"] = "very " * 80 + "long"
    bank = tmp_path / "long.json"
    bank.write_text(json.dumps(content))
    arguments = metatune(photos, pretrained, f"--output={tmp_path / 'run'}")
    message = fails([*arguments, f"--semantics.bank={bank}"], capsys)
    assert "1 of 30 texts are longer than the 77 words" in message


def test_truncated_and_foreign_checkpoints(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(pretrained.read_bytes()[:-10])
    output = f"--output={tmp_path / 'run'}"
    assert "truncated" in fails(metatune(photos, cut, output), capsys)
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, {"x": torch.zeros(2)}, {"kind": "something"})
    assert "this command needs" in fails(metatune(photos, other, output), capsys)
    wide = metatune(photos, pretrained, output, "--model.width=16")
    assert "of another model (width: 8 -> 16)" in fails(wide, capsys)
    assert "needs --checkpoint" in fails(["metatune", output], capsys, 2)
    assert not (tmp_path / "run").exists()


def test_too_few_images_for_the_episodes(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = metatune(photos, pretrained, "--metatune.query=9", f"--output={tmp_path / 'run'}")
    assert "fewer than the 1 support + 9 query" in fails(arguments, capsys)
    assert not (tmp_path / "run").exists()


def test_data_check(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shot=1", "--query=5", "--image_size=16"]
    assert main(["data", "check", str(photos), *options]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["data", "check", str(photos), "--counts_only", "--query=6", "--shot=1"]) == 1
    captured = capsys.readouterr()
    assert "problem: " in captured.out
    assert captured.err.count("error:") == 1
    assert "no such folder" in fails(["data", "check", str(tmp_path / "none")], capsys)
    message = fails(["data", "check", str(photos), "--splits=cub"], capsys)
    assert "split list 'cub' is unknown; choose one of" in message


def test_prepared_cache_from_pretraining_to_evaluation(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same seed gives the same run from the cache as from the images."""
    cache = tmp_path / "cache"
    prepare = ["data", "prepare", str(photos), f"--output={cache}", "--image_size=16"]
    assert main(prepare) == 0
    assert "60 images (60 decoded, 0 kept)" in capsys.readouterr().out
    assert main(prepare) == 0
    assert "60 images (0 decoded, 60 kept)" in capsys.readouterr().out
    accuracies = {}
    for name, dataset in (("images", photos), ("cache", cache)):
        data = [f"--data.dataset={dataset}", "--data.image_size=16", "--device=cpu"]
        run = tmp_path / name
        assert main(["pretrain", *data, *TINY_PRETRAIN, f"--output={run / 'pre'}"]) == 0
        best = run / "pre" / "checkpoints" / "pretrain-best.safetensors"
        tune = [item for item in metatune(photos, best) if not item.startswith("--data.")]
        assert main([*tune, *data, f"--output={run / 'tuned'}"]) == 0
        best = run / "tuned" / "checkpoints" / "metatune-best.safetensors"
        arguments = [
            "evaluate",
            *data,
            f"--checkpoint={best}",
            f"--semantics.bank={photos / 'bank.json'}",
            "--evaluate.episodes=4",
            "--evaluate.query=2",
            "--evaluate.shots=[1]",
            f"--output={run / 'result'}",
        ]
        assert main(arguments) == 0
        summary = json.loads((run / "result" / "summary.json").read_text())
        accuracies[name] = (summary["accuracy"], summary["episodes_sha256"], summary["alpha"])
    assert accuracies["images"] == accuracies["cache"]
    message = fails(["pretrain", f"--data.dataset={cache}", "--data.image_size=32"], capsys)
    assert "holds 16-pixel images, not 32; set --data.image_size 16" in message


def test_pretraining_without_base_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.chestx(tmp_path / "chestx")
    arguments = [f"--data.dataset={tmp_path / 'chestx'}", f"--output={tmp_path / 'run'}"]
    message = fails(["pretrain", *arguments, "--data.image_size=16"], capsys)
    assert "no base classes to train on" in message
    assert not (tmp_path / "run").exists()


def test_pretraining_that_cannot_run_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    for option, message in (
        ("--pretrain.batch_size=1", "leaves BatchNorm nothing to compare"),
        ("--pretrain.label_smoothing=2", "label_smoothing: expected 0 to 1"),
        ("--model.pretrained=nofile.pth", "nofile.pth"),
    ):
        assert main(["pretrain", "--model.backbone=visformer_tiny", "--data.image_size=32",
                     "--device=cpu", "--model.normalisation=data", option,
                     f"--output={output}"]) != 0  # fmt: skip
        assert message in capsys.readouterr().err
        assert not output.exists()


def test_evaluation_on_the_splits_that_data_sets_name(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A data set without validation classes says what "val" stands for."""
    arguments = ["evaluate", f"--checkpoint={pretrained}", f"--data.dataset={photos}",
                 "--data.image_size=16", "--evaluate.episodes=2", "--evaluate.query=1",
                 "--evaluate.shots=1"]  # fmt: skip
    for given, kept in (("val", "monitor"), ("train", "base")):
        output = tmp_path / given
        assert main([*arguments, f"--evaluate.split={given}", f"--output={output}"]) == 0
        said = {"monitor": "held-out images of the base classes",
                "base": "classes that training works on"}  # fmt: skip
        assert f"\nsplit       {kept}: {said[kept]}\n" in capsys.readouterr().out
        assert json.loads((output / "summary.json").read_text())["split"] == kept


def test_checkpoint_of_other_images_says_what_to_give(
    photos: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default data set is the digits, of one channel: another size would not help."""
    given = ["evaluate", f"--checkpoint={pretrained}"]
    message = fails(given, capsys)
    assert "made for images of 3 channel(s) and 16 pixels, but digits gives 1 and 16" in message
    assert "give the data set that it is for (--data.dataset, or --config" in message
    message = fails([*given, f"--data.dataset={photos}", "--data.image_size=24"], capsys)
    assert f"but {photos.name} gives 3 and 24; set --data.image_size 16, or" in message


def test_printed_next_commands_work(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pre-training, meta-tuning and evaluation of one's own images, each as the last one said.

    Trained with another seed than 0, the model is evaluated on the episodes of seed 0 all the same.
    """
    monkeypatch.chdir(tmp_path)
    small = ["--metatune.epochs=1", "--metatune.steps_per_epoch=1", "--metatune.query=2",
             "--metatune.validation_episodes=2"]  # fmt: skip
    few = ["--evaluate.episodes=2", "--evaluate.query=2", "--evaluate.shots=1"]
    Path("photos").symlink_to(photos)
    arguments = ["pretrain", "--data.dataset=photos", "--data.image_size=24", "--seed=1"]
    arguments += TINY_PRETRAIN
    small += ["--output=runs/metatune of mine"]
    few += ["--output=runs/evaluate of mine"]
    page = ["--text_only", "--output=pages/of mine.html"]
    for more, words in ((small, "metatune"), (few, "evaluate"), (page, "report"), ([], "")):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert words != "report" or "learned gate" in said
        if not words:
            break
        start = "page " if words == "report" else "next "
        (line,) = [line for line in said.splitlines() if line.startswith(start)]
        program, *arguments = shlex.split(line.removeprefix(start))
        assert (program, arguments[0]) == ("dvla-fast", words)
        arguments = [x.replace("BANK.json", "photos/bank.json") for x in arguments] + more
    assert Path("pages/of mine.html").is_file()
    seeds = {re.split("[- ]", path.parent.name)[0]: read_config(path.parent)["seed"]
             for path in Path("runs").glob("*/config.yaml")}  # fmt: skip
    assert seeds == {"pretrain": 1, "metatune": 1, "evaluate": 0}


def test_resuming_from_another_folder(
    photos: Path,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photos)
    arguments = metatune(Path(), pretrained, f"--output={tmp_path / 'run'}")
    assert main(arguments) == 0
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["metatune", "--resume", "--output=run"]) == 0
    assert (tmp_path / "run" / "summary.json").exists()
    monkeypatch.chdir(photos)  # as first given, too
    assert main([*arguments, "--resume"]) == 0
    capsys.readouterr()
    message = fails(["pretrain", "--resume", f"--output={tmp_path / 'run'}"], capsys, 2)
    assert f"continue it with dvla-fast metatune --resume --output {tmp_path / 'run'}" in message


def test_a_resumed_run_remembers_its_settings_files(
    photos: Path,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They hold the sections of the commands that follow, which the run's own record lacks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp.yaml").write_text("evaluate: {episodes: 2, query: 2, shots: [1]}\n")

    def following(*arguments: str) -> str:
        assert main([*arguments]) == 0
        return capsys.readouterr().out.split("next        ")[1].strip()

    again = ["metatune", "--resume", "--output=run"]
    first = following(*metatune(photos, pretrained, "--output=run", "--config=exp.yaml"))
    assert "--config exp.yaml --config run/config.yaml" in first
    assert following(*again) == first.replace("exp.yaml", f"{tmp_path}/exp.yaml")
    (tmp_path / "more.yaml").write_text("evaluate: {episodes: 3}\n")
    both = following(*again, "--config=exp.yaml", "--config=more.yaml")
    assert following(*again) == both
    assert main([*shlex.split(both)[1:], "--output=result"]) == 0
    assert read_config("result")["evaluate"]["episodes"] == 3
    assert read_config("result")["evaluate"]["query"] == 2
    (tmp_path / "exp.yaml").unlink()
    assert "exp.yaml" not in following(*again)
    (tmp_path / "run" / "config-files.json").unlink()  # a run of an earlier version
    assert following(*again).startswith("dvla-fast evaluate --config run/config.yaml")
    capsys.readouterr()
    # pre-training names the bank no more once a file names it
    (tmp_path / "exp.yaml").write_text("semantics: {bank: digits}\n")
    arguments = [f"--data.dataset={photos}", "--data.image_size=16", *TINY_PRETRAIN]
    for more in (["--config=exp.yaml", *arguments], ["--resume"]):
        assert "BANK.json" not in following("pretrain", "--output=pre", *more)


def test_going_on_for_longer(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(metatune(photos, pretrained, f"--output={run}")) == 0
    assert main(["metatune", "--resume", f"--output={run}", "--metatune.epochs=2"]) == 0
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2
    again = ["metatune", "--resume", f"--output={run}"]
    assert main(again) == 0
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    capsys.readouterr()
    assert "metatune.epochs: 2 -> 1" in fails([*again, "--metatune.epochs=1"], capsys)
    folder = pretrained.parent.parent
    longer = ["pretrain", "--resume", f"--output={folder}", "--pretrain.epochs=9"]
    assert "a longer pre-training begins anew, in another --output" in fails(longer, capsys)


def test_record_with_relative_paths_is_resumed_where_it_began(
    photos: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    arguments = metatune(Path(photos.name), pretrained, f"--output={tmp_path / 'run'}")
    assert main(arguments) == 0
    record = tmp_path / "run" / "config.yaml"
    assert str(photos) in record.read_text()
    record.write_text(record.read_text().replace(str(photos), photos.name))
    assert main(["metatune", "--resume", f"--output={tmp_path / 'run'}"]) == 0
