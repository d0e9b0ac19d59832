"""Pre-training and meta-tuning learn, select on monitor images, and stop safely on NaN."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine import metatune as metatune_module
from dvla_fast.engine import metatune_steps
from dvla_fast.engine import pretrain as pretrain_module
from dvla_fast.engine.build import seed_everything
from dvla_fast.engine.checkpoint import load_checkpoint
from dvla_fast.engine.config import DemoRun, ModelConfig, PretrainConfig
from dvla_fast.engine.divergence import DivergenceWatch
from dvla_fast.engine.execution import Execution, adamw
from dvla_fast.engine.models import (
    backbone_spec,
    build_model,
    build_pretrain_model,
    load_backbone,
    model_spec,
)
from dvla_fast.engine.monitor import (
    monitor_episodes,
    monitor_sampler,
    validation_facts,
    validation_text,
)
from dvla_fast.engine.pretrain import learning_rate, pretrain, turn_classes
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.stages import StageRun
from dvla_fast.engine.state import TrainingState
from dvla_fast.engine.texts import build_texts
from dvla_fast.errors import CheckpointError, DataError, TrainingError
from dvla_fast.rl import rewards

SILENT = Progress({}, enabled=False)


def run_pretrain(folder: RunFolder, data: FewShotData, config: DemoRun) -> Path:
    spec = backbone_spec(config.model, 1, 16)
    return pretrain(
        config.pretrain, data, spec, StageRun(folder, seed_everything(0), progress=Progress({}))
    )


def run_metatune(folder: RunFolder, data: FewShotData, config: DemoRun, start: Path) -> Path:
    texts, _ = build_texts(config.semantics, data, torch.device("cpu"))
    rng = seed_everything(1)
    spec = model_spec(config.model, backbone_spec(config.model, 1, 16), 512)
    model = build_model(spec)
    load_backbone(model, spec["backbone"], start)
    run = StageRun(folder, rng, progress=Progress({}))
    return metatune_module.metatune(config.metatune, model, spec, data, texts, run)


@pytest.mark.parametrize(("batch", "steps", "last"), [(64, 2, 120), (17, 7, 119)])
def test_progress_moves_within_an_epoch(
    batch: int, steps: int, last: int, few_digits: FewShotData, tiny: DemoRun, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One of tieredImageNet takes minutes to hours; a last batch of one image is left out."""
    assert len(few_digits.base) == 120
    recipe = dataclasses.replace(tiny.pretrain, batch_size=batch)
    tiny = dataclasses.replace(tiny, pretrain=recipe)
    shown: list[tuple[str | None, float]] = []

    def advance(self: Progress, count: int = 1) -> None:
        self._done += count
        shown.append((self._current, self._done / self._total))

    monkeypatch.setattr(Progress, "advance", advance)
    best = run_pretrain(RunFolder(tmp_path / "a", {}), few_digits, tiny)
    run_metatune(RunFolder(tmp_path / "b", {}), few_digits, tiny, best)
    trained = [share for stage, share in shown if stage == "pre-train"]
    assert len(trained) == 2 * steps
    assert (trained[0], trained[-1]) == (batch / (2 * last), 1)
    assert [share for stage, share in shown if stage == "meta-tune"] == [0.25, 0.5, 0.75, 1]


def test_schedule_warms_up_then_falls_to_zero() -> None:
    config = PretrainConfig(epochs=10, warmup_epochs=2, lr=1.0, warmup_lr=0.1)
    rates = [learning_rate(config, step, 5) for step in range(50)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01
    assert rates[30] == pytest.approx(0.5)  # half of the way down
    assert rates[20] == pytest.approx((1 + 0.5**0.5) / 2)


def test_quarter_turns_are_classes_of_their_own() -> None:
    images = torch.rand(60, 1, 4, 4)
    labels = torch.arange(60) % 5
    turned, new = turn_classes(images, labels, 5)
    assert set((new // 5).tolist()) == {0, 1, 2}
    assert torch.equal(new % 5, labels)
    for image, before, label in zip(turned, images, new, strict=True):
        assert torch.equal(image, before.rot90((0, 1, 3)[int(label) // 5], (1, 2)))


def test_a_step_learns_the_mixed_labels(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of all images: mixed images go in, and the loss is that of their soft labels."""
    outputs = 3 * len(few_digits.base.class_names)
    mixed: list[tuple[Tensor, Tensor]] = []

    def mixer(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        soft = F.one_hot(labels, outputs).float()
        mixed.append((0.7 * images + 0.3 * images.flip(0), 0.7 * soft + 0.3 * soft.flip(0)))
        return mixed[-1]

    updates: list[tuple[Tensor, Any]] = []

    def update(_: Any, loss: Tensor, _optimizer: Any, clip_norms: Any = ()) -> None:
        updates.append((loss.detach(), clip_norms))

    monkeypatch.setattr(pretrain_module, "build_mixer", lambda *_: mixer)
    monkeypatch.setattr(Execution, "update", update)
    config = dataclasses.replace(
        tiny.pretrain, batch_size=len(few_digits.base), label_smoothing=0.1, clip_norm=1.5
    )
    model = build_pretrain_model(backbone_spec(tiny.model, 1, 16), outputs)
    optimizer, seen = adamw(model.parameters(), lr=0.1), {}
    model["backbone"].register_forward_hook(lambda _m, args, _out: seen.update(images=args[0]))
    model["head"].register_forward_hook(lambda _m, _args, out: seen.update(logits=out.detach()))
    folder, rng = RunFolder(tmp_path / "run", {}), np.random.default_rng(0)
    state = TrainingState(folder, "pretrain", {}, {"model": model}, optimizer, rng)
    epoch = pretrain_module.Epoch(config, model, few_digits, optimizer, Execution(), outputs)
    row = epoch(state)
    ((images, soft),), ((loss, limits),) = mixed, updates
    assert torch.equal(seen["images"], images)
    torch.testing.assert_close(loss, F.cross_entropy(seen["logits"], soft, label_smoothing=0.1))
    ((parameters, limit),) = limits
    assert limit == 1.5
    assert [id(value) for value in parameters] == [id(value) for value in model.parameters()]
    assert row["loss"] == pytest.approx(loss.item())


def test_validation_asks_for_upright_classes_alone(few_digits: FewShotData, tiny: DemoRun) -> None:
    """A head that is right among these, and surer of a turned class."""
    count, labels = len(few_digits.base.class_names), few_digits.monitor.labels

    class Head(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            assert len(features) == len(labels)
            upright = F.one_hot(labels, count).float()
            return torch.cat([upright, 5 * upright, 5 * upright], 1)

    model = build_pretrain_model(backbone_spec(tiny.model, 1, 16), 3 * count)
    model["head"] = Head()
    sampler = EpisodeSampler(few_digits.monitor, 5, 1, 1, 0)
    figures = pretrain_module._validate(model.eval(), few_digits, sampler, 2)
    assert figures["monitor_accuracy"] == 1.0


def test_pretraining_learns(tmp_path: Path, few_digits: FewShotData, tiny: DemoRun) -> None:
    tiny.pretrain.epochs, tiny.pretrain.lr, tiny.pretrain.batch_size = 8, 5e-3, 24
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    best = run_pretrain(folder, few_digits, tiny)
    rows = folder.rows("pretrain")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    _, info = load_checkpoint(best, ("pretrain",))
    assert info["best"] == max(row["monitor_episode_accuracy"] for row in rows)


def test_metatuning_updates_gates_and_policy(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun
) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    start = run_pretrain(folder, few_digits, tiny)
    seed_everything(1)
    spec = model_spec(tiny.model, backbone_spec(tiny.model, 1, 16), 512)
    fresh = build_model(spec).state_dict()
    best = run_metatune(folder, few_digits, tiny, start)
    tensors, _ = load_checkpoint(best, ("metatune",))
    changed = {name for name in fresh if not torch.equal(fresh[name], tensors[f"model.{name}"])}
    assert any(".policy." in name for name in changed)
    assert any(".out_projection." in name for name in changed)
    assert any(name.startswith("alignments.") for name in changed)
    row = folder.rows("metatune")[-1]
    for key in ("reward", "baseline", "alpha_mean", "alpha_std", "entropy"):
        assert len(row[key]) == 2
    assert all(0 < alpha < 1 for alpha in row["alpha_mean"])


def test_backbone_of_another_model_is_refused(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun
) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    start = run_pretrain(folder, few_digits, tiny)
    spec = backbone_spec(ModelConfig(width=16), 1, 16)
    model = build_model(model_spec(ModelConfig(width=16), spec, 512))
    with pytest.raises(CheckpointError, match=r"of another model .width: 8 -> 16"):
        load_backbone(model, spec, start)


def test_nan_images_stop_pretraining_before_anything_is_saved(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun
) -> None:
    images = few_digits.base.images.clone()
    images[3, 0, 8, 8] = float("nan")  # in the centre: augmentation moves corners out
    base = dataclasses.replace(few_digits.base, images=images)
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    words = r"pre-training, epoch 1, step \d: the loss became NaN .*no checkpoint was written yet"
    with pytest.raises(TrainingError, match=words):
        run_pretrain(folder, dataclasses.replace(few_digits, base=base), tiny)
    assert not list(folder.checkpoints.iterdir())
    assert folder.rows() == []


def test_nan_in_validation_is_a_training_error(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    start = run_pretrain(folder, few_digits, tiny)

    def broken(message: str) -> Any:
        def predict(*_: Any, **__: Any) -> Any:
            raise ValueError(message)

        return predict

    predictor = metatune_module.EpisodePredictor
    monkeypatch.setattr(predictor, "predict", broken("logits: NaN found"))
    with pytest.raises(TrainingError, match=r"validation of epoch 1: features .*rate is too high"):
        run_metatune(folder, few_digits, tiny, start)
    assert not list(folder.checkpoints.glob("metatune-*"))
    monkeypatch.setattr(predictor, "predict", broken("something else"))
    with pytest.raises(ValueError, match="something else"):
        run_metatune(RunFolder(tmp_path / "b", {"seed": 0}), few_digits, tiny, start)


def with_validation_classes(data: FewShotData, classes: int, images: int) -> FewShotData:
    """The data set, validated on some of its novel classes."""
    labels = data.novel.labels
    kept = torch.cat([(labels == c).nonzero()[:images, 0] for c in range(classes)])
    part = data.novel.subset(kept, "few")
    part = dataclasses.replace(part, class_names=part.class_names[:classes])
    return dataclasses.replace(data, monitor=part, monitor_kind="validation classes")


def test_lowered_validation_episodes_are_said(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, capsys: pytest.CaptureFixture[str]
) -> None:
    few = with_validation_classes(few_digits, 3, 9)
    numbers = monitor_episodes(few, 5, 1, 15)
    assert numbers == {
        "way": 3, "shot": 1, "query": 8, "asked": {"way": 5, "shot": 1, "query": 15}
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"few: .* 5-way .*selected by 3-way .* 8 queries"):
        sampler = monitor_sampler(few, numbers, 0, Progress({}))
    assert (sampler.way, sampler.shot, sampler.query) == (3, 1, 8)
    said = capsys.readouterr().err
    assert "on validation classes: 3-way 1-shot episodes, 8 queries a class" in said
    numbers = monitor_episodes(with_validation_classes(few_digits, 1, 9), 5, 1, 15)
    with pytest.warns(UserWarning, match="with one class every answer is right"):
        monitor_sampler(with_validation_classes(few_digits, 1, 9), numbers, 0, SILENT)


def test_validation_episodes_as_asked_are_no_warning(few_digits: FewShotData) -> None:
    numbers = monitor_episodes(few_digits, 5, 1, 15)
    assert numbers == {"way": 5, "shot": 1, "query": 15}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor_sampler(few_digits, numbers, 0, SILENT)


def test_validation_is_said_with_its_episodes_and_spread() -> None:
    rows = [
        {"step": 1, "score": 0.5, "monitor_ci95": 0.1},
        {"step": 2},
        {"step": 3, "score": 0.625, "monitor_ci95": 0.05},
        {"step": 4, "score": 0.625, "monitor_ci95": 0.04},  # the one whose weights are kept
        {"step": 5, "score": 0.25, "monitor_ci95": 0.2},
    ]
    numbers = {"way": 5, "shot": 1, "query": 15}
    facts = validation_facts(rows, "score", numbers, 200)
    assert (facts["score"], facts["monitor_ci95"], facts["validations"]) == (0.625, 0.04, 4)
    assert validation_text({**facts, "monitor": "validation classes"}, "score") == (
        "accuracy on validation classes: 62.50% ± 4.00 % (200 5-way 1-shot episodes, 15 queries a "
        "class; the best of 4 validations)"
    )
    facts = validation_facts([{"step": 1, "score": 1.0}], "score", {**numbers, "query": 1}, 1)
    assert validation_text({**facts, "monitor": "images"}, "score") == (
        "accuracy on images: 100.00% (1 5-way 1-shot episode, 1 query a class)"
    )


def test_figures_that_do_not_apply_are_left_out(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """The classifier knows no validation classes, so it has no accuracy on them."""
    folder = RunFolder(tmp_path / "classes", {"seed": 0})
    few = with_validation_classes(few_digits, 5, 20)
    best = run_pretrain(folder, few, tiny)
    run_metatune(RunFolder(tmp_path / "tuned", {"seed": 0}), few, tiny, best)
    said = capsys.readouterr().err
    assert said.count("  validation 5-way 1-shot ") == 4  # two epochs of each stage
    assert "held-out" not in said
    assert all("monitor_accuracy" not in row for row in folder.rows("pretrain"))
    assert all(0 <= row["monitor_episode_accuracy"] <= 1 for row in folder.rows("pretrain"))
    folder = RunFolder(tmp_path / "held out", {"seed": 0})
    run_pretrain(folder, few_digits, tiny)
    assert "  held-out 5-way 1-shot " in capsys.readouterr().err
    assert all(0 <= row["monitor_accuracy"] <= 1 for row in folder.rows("pretrain"))


def test_nan_loss_keeps_the_last_good_checkpoint(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    start = run_pretrain(folder, few_digits, tiny)
    real, calls = metatune_steps.total_loss, []

    def breaks_in_the_second_epoch(*args: Any, **kwargs: Any) -> Any:
        loss, figures = real(*args, **kwargs)
        calls.append(1)
        return (loss * float("nan") if len(calls) > 3 else loss), figures

    monkeypatch.setattr(metatune_steps, "total_loss", breaks_in_the_second_epoch)
    words = r"epoch 2, step 4: the loss became .*--metatune\.lr 0\.0005.* are the last good ones"
    with pytest.raises(TrainingError, match=words):
        run_metatune(folder, few_digits, tiny, start)
    _, info = load_checkpoint(folder.checkpoints / "metatune-last.safetensors")
    assert info["epoch"] == 1


def test_nan_of_an_own_reward_is_told_with_its_name(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    start = run_pretrain(folder, few_digits, tiny)
    nothing = {"own": lambda inputs: torch.full((2, inputs.output.logits.shape[0]), torch.nan)}
    monkeypatch.setattr(rewards, "_REWARDS", {**rewards._REWARDS, **nothing})
    tiny.metatune.rewards = {"accuracy": 1.0, "own": 0.1}
    with pytest.raises(TrainingError, match=r"epoch 1, step 1: reward 'own': NaN .* its formula"):
        run_metatune(folder, few_digits, tiny, start)


@pytest.mark.parametrize("rate", [1e38, 1e30])
def test_rates_that_no_training_survives(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, rate: float
) -> None:
    broken = "became NaN or infinite"
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    start = run_pretrain(folder, few_digits, tiny)
    tiny.metatune.lr = tiny.pretrain.lr = rate
    tiny.pretrain.warmup_epochs = 0
    words = rf"meta-tuning, epoch 1, step \d: .*{broken}.*--metatune\.lr {re.escape(f'{rate:g}')}"
    with pytest.raises(TrainingError, match=words):
        run_metatune(folder, few_digits, tiny, start)
    other = RunFolder(tmp_path / "other", {"seed": 0})
    with pytest.raises(TrainingError, match=rf"pre-training, epoch 1, step \d: .*{broken}"):
        run_pretrain(other, few_digits, tiny)
    assert not list(other.checkpoints.iterdir())
    assert not list(folder.checkpoints.glob("metatune-*"))


def test_weights_that_break_in_the_last_step(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss shows it: validation or saving does."""
    real, calls = Execution.update, []

    def breaks_weights(self: Execution, loss: Any, optimizer: Any, *more: Any) -> None:
        real(self, loss, optimizer, *more)
        calls.append(1)
        if len(calls) == 2 * 2:  # of two epochs of two steps
            optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

    folder = RunFolder(tmp_path / "run", {"seed": 0})
    tiny.pretrain.validate_every = 5
    steps = -(-len(few_digits.base) // tiny.pretrain.batch_size)
    assert steps == 2
    tiny.pretrain.epochs = 3
    monkeypatch.setattr(Execution, "update", breaks_weights)
    with pytest.raises(TrainingError, match=r"pre-training, saving of epoch 2: .*last good ones"):
        run_pretrain(folder, few_digits, tiny)
    _, info = load_checkpoint(folder.checkpoints / "pretrain-last.safetensors")
    assert info["epoch"] == 1


def test_other_errors_pass(tmp_path: Path) -> None:
    state = TrainingState(RunFolder(tmp_path / "run", {}), "x", {}, {}, None, None)  # type: ignore[arg-type]
    watch = DivergenceWatch("x", state, {})
    for error in (ValueError("shape"), RuntimeError("out of memory"), DataError("overflow: gone")):
        for place in (watch.training(), watch.after("validation")):
            with pytest.raises(type(error), match=str(error)), place:
                raise error


def test_interrupted_training_continues_to_the_same_weights(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RunFolder(tmp_path / "whole", {"seed": 0})
    expected = load_checkpoint(
        run_metatune(whole, few_digits, tiny, run_pretrain(whole, few_digits, tiny))
    )
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    start = run_pretrain(folder, few_digits, tiny)
    real, calls = metatune_steps.total_loss, []

    def stops_in_the_second_epoch(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(metatune_steps, "total_loss", stops_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        run_metatune(folder, few_digits, tiny, start)
    monkeypatch.setattr(metatune_steps, "total_loss", real)
    torch.manual_seed(999)
    again = RunFolder(tmp_path / "run", {"seed": 0}, resume=True)
    tensors, info = load_checkpoint(run_metatune(again, few_digits, tiny, start))
    assert info["best_epoch"] == expected[1]["best_epoch"]
    for name, tensor in expected[0].items():
        assert torch.equal(tensors[name], tensor), name
    assert again.rows() == whole.rows()


def test_meta_tuning_that_goes_on_for_longer_is_a_longer_run(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun
) -> None:
    start = run_pretrain(RunFolder(tmp_path / "start", {}), few_digits, tiny)
    folder = RunFolder(tmp_path / "run", {})
    run_metatune(folder, few_digits, tiny, start)
    tiny.metatune.epochs = 3
    whole = RunFolder(tmp_path / "whole", {})
    run_metatune(whole, few_digits, tiny, start)
    again = RunFolder(tmp_path / "run", {}, resume=True)
    run_metatune(again, few_digits, tiny, start)
    expected, tensors = (
        load_checkpoint(run.checkpoints / "metatune-last.safetensors")[0] for run in (whole, again)
    )
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert again.rows() == whole.rows()
