"""The quick demo as a newcomer runs it: it learns, and leaves everything that it promises."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from dvla_fast.cli import main
from dvla_fast.engine.config import AblateRun, DemoRun, demo_config
from dvla_fast.engine.predict import LEARNED, VISUAL
from dvla_fast.engine.records import result_table
from dvla_fast.engine.run_folder import read_metrics
from dvla_fast.engine.settings import read_settings

CONFIGS = Path(__file__).parents[2] / "configs"
PROMISED = (
    *("dataset", "split", "way", "shot", "query", "episodes", "seed", "accuracy", "ci95"),
    *("interval", "checkpoint", "checkpoints_sha256", "semantics", "device", "dvla_fast", "torch"),
)


@pytest.mark.slow
def test_quick_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["demo", "--quick", "--device", "cpu", "--output", str(folder)]) == 0
    table = capsys.readouterr().out
    assert "learned gate" in table
    assert "fixed gate (alpha = 0.5)" in table
    assert str(folder) in table

    summary = json.loads((folder / "summary.json").read_text())
    assert [result["shot"] for result in summary["results"]] == [1, 5]
    for result in summary["results"]:
        assert not [key for key in PROMISED if key not in result]
        assert (result["split"], result["way"], result["query"]) == ("novel", 5, 15)
        # It learns: far above the 20 % of guessing, on digits never seen in training.
        assert result["accuracy"] - result["ci95"] > 0.3
    assert summary["results"][1]["accuracy"] > summary["results"][0]["accuracy"]

    pretrain = read_metrics(folder, "pretrain")
    assert pretrain[-1]["loss"] < pretrain[0]["loss"]
    rewards = [sum(row["reward"]) for row in read_metrics(folder, "metatune")]
    assert rewards[-1] > rewards[0]

    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((folder / "config.yaml").read_text())["quick"] is True
    assert sorted(path.name for path in (folder / "checkpoints").glob("*.safetensors")) == [
        "metatune-best.safetensors",
        "metatune-last.safetensors",
        "pretrain-best.safetensors",
        "pretrain-last.safetensors",
    ]


def test_table_has_a_p_value_under_each_difference() -> None:
    accuracy = {"accuracy": 0.5, "ci95": 0.01}
    pairs = [{"difference": 0.0123, "ci95": 0.004, "p_value": p} for p in (0.0456, 1e-9, None)]
    results = [
        {
            **{"way": 5, "shot": shot, "episodes": 10, "method": LEARNED},
            **{"methods": {VISUAL: accuracy, LEARNED: accuracy}},
            **{"paired": {f"{LEARNED} - {VISUAL}": pair}},
        }
        for shot, pair in zip((1, 5, 10), pairs)
    ]
    lines = result_table(results).splitlines()
    differences = next(i for i, line in enumerate(lines) if line.startswith(f"  {VISUAL}"))
    row, below = lines[differences : differences + 2]
    assert row.split("+")[1:] == ["1.23 ± 0.40      ", "1.23 ± 0.40      ", "1.23 ± 0.40"]
    assert re.split(r"\s{2,}", below.strip()) == ["p = 0.046", "p < 0.001", "p n/a"]
    assert len(row) == len(below)  # one column a shot


def test_demo_on_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings of the ablation's reference, cut short."""
    path = str(CONFIGS / "demo_shapes.yaml")
    demo = read_settings(path, DemoRun, DemoRun())
    full = read_settings(str(CONFIGS / "ablation_shapes_varied.yaml"), AblateRun, AblateRun())
    for part in ("data", "semantics", "model", "pretrain", "metatune"):
        assert getattr(demo, part) == getattr(full, part)
    short = (
        *("--data.images_per_class=8", "--data.image_size=16", "--pretrain.epochs=1"),
        *("--pretrain.warmup_epochs=0", "--pretrain.validate_every=1", "--metatune.epochs=1"),
        *("--metatune.steps_per_epoch=2", "--metatune.query=2", "--metatune.validate_every=1"),
        *("--metatune.validation_episodes=4", "--evaluate.episodes=6", "--evaluate.query=3"),
    )
    folder = tmp_path / "run"
    assert main(["demo", "--config", path, *short, "--output", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "learned gate" in shown.out
    assert "digits" not in shown.err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["dataset"] == "shapes-varied"
    assert summary["semantics"]["bank"] == "shapes-varied"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_recipe_that_cannot_run_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    arguments = ["demo", "--device=cpu", "--pretrain.batch_size=1", f"--output={output}"]
    assert main(arguments) == 2
    assert "leaves BatchNorm nothing to compare" in capsys.readouterr().err
    construct = ["demo", "--device=cpu", "--evaluate.construct=a.yaml", f"--output={output}"]
    assert main(construct) == 2
    assert "'dvla-fast evaluate' alone" in capsys.readouterr().err
    assert not output.exists()


def test_quick_in_a_settings_file_is_as_quick_as_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("pretrain: {lr: 0.5}\n")
    second.write_text("quick: true\nmetatune: {epochs: 9}\n")
    assert main(["demo", f"--config={first}", f"--config={second}", "--print_settings"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    quick = demo_config(quick=True)
    assert settings["quick"] is True
    assert settings["pretrain"]["epochs"] == quick.pretrain.epochs
    assert settings["evaluate"]["episodes"] == quick.evaluate.episodes
    assert (settings["pretrain"]["lr"], settings["metatune"]["epochs"]) == (0.5, 9)
