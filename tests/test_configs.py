"""The published experiments: one file each, read by every command, with the recipe's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvla_fast.data.splits import load_split_list
from dvla_fast.engine.config import EvaluateRun, MetatuneRun, PretrainRun
from dvla_fast.engine.settings import UsageError, read_settings, settings_file
from tests.test_cli import fails

FOLDER = Path(__file__).parent.parent / "configs"
CROSS = sorted(FOLDER.glob("miniimagenet_to_*.yaml"))
TRAINED = sorted(set(FOLDER.glob("*shot.yaml")) - set(CROSS))


def test_every_published_experiment_has_a_file() -> None:
    data_sets = ("miniimagenet", "tieredimagenet", "cifar_fs", "fc100", "cub", "cars", "dogs")
    expected = {f"{name}_{shot}shot" for name in data_sets for shot in (1, 5)}
    assert {path.stem for path in TRAINED} == expected
    assert len(CROSS) == 6


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_recipe(path: Path) -> None:
    pretrain = read_settings(str(path), PretrainRun, PretrainRun())
    metatune = read_settings(str(path), MetatuneRun, MetatuneRun())
    evaluate = read_settings(str(path), EvaluateRun, EvaluateRun())
    known = load_split_list(pretrain.data.splits)
    shot = metatune.metatune.shots[0]
    assert path.stem.endswith(f"_{shot}shot")
    assert metatune.metatune.shots == evaluate.evaluate.shots == [shot]
    images = known.images_per_split["train"]
    assert metatune.metatune.steps_per_epoch == images // (5 * (shot + 15))
    assert pretrain.pretrain.epochs == (300 if "tiered" in path.stem else 800)
    recipe = pretrain.pretrain
    assert recipe.batch_size * recipe.views == 512
    assert (recipe.lr, recipe.weight_decay, recipe.warmup_lr) == (5e-4, 5e-2, 1e-6)
    assert (recipe.mixup, recipe.cutmix, recipe.drop_path) == (0.3, 1.0, 0.5)
    assert recipe.augment.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (recipe.augment.color_jitter, recipe.augment.random_erasing) == (0.4, 0.25)
    tuning = metatune.metatune
    assert (tuning.epochs, tuning.lr, tuning.backbone_lr) == (100, 5e-4, 1e-6)
    assert (tuning.reinforce_weight, tuning.entropy_weight) == (0.1, 0.2)
    assert tuning.augment.flip == (known.name in ("cifar_fs", "fc100"))
    assert metatune.model.gated_layers == [[2, 3], [3, 0]]
    assert evaluate.evaluate.episodes == 2000


@pytest.mark.parametrize("path", CROSS, ids=lambda path: path.stem)
def test_cross_domain(path: Path) -> None:
    evaluate = read_settings(str(path), EvaluateRun, EvaluateRun())
    assert load_split_list(evaluate.data.splits).splits["test"]
    assert evaluate.evaluate.episodes == 2000


@pytest.mark.parametrize("given", ["cub_1shot", "cub_1shot.yaml", "configs/cub_1shot.yaml"])
def test_found_by_name_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = settings_file(given)
    assert Path(found).samefile(FOLDER / "cub_1shot.yaml")
    Path("configs").mkdir()
    Path(given).write_text("seed: 7")  # one's own goes first
    assert settings_file(given) == given


def test_other_names_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("mine/cub_1shot.yaml", "cub_1shot.txt", "cub_1sho", "/cub_1shot.yaml", "."):
        assert settings_file(given) == given
    with pytest.raises(UsageError, match="did you mean 'cub_1shot', which"):
        read_settings("cub_1sho", EvaluateRun, EvaluateRun())


def test_command_line_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "caches/cub-224: no such folder" in fails(["pretrain", "--config=cub_1shot"], capsys)
    assert "emoji: no such folder" in fails(["ablate", "ablation_emoji"], capsys)
