"""Every backbone from its first weights to an evaluation, by the command line, on the shapes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from dvla_fast.cli import main
from dvla_fast.data import FewShotData
from dvla_fast.data.shapes import load_shapes
from dvla_fast.engine import build
from dvla_fast.engine.checkpoint import load_checkpoint, save_checkpoint
from dvla_fast.engine.config import ModelConfig
from dvla_fast.engine.episode_lists import build_sampler
from dvla_fast.engine.models import backbone_spec, build_model, model_spec
from dvla_fast.engine.predict import image_features, predict_visual
from dvla_fast.engine.settings import UsageError
from dvla_fast.engine.starting import STATISTICS, normalise_for, published, with_statistics
from dvla_fast.engine.state import TrainingState
from dvla_fast.errors import DVLAError
from dvla_fast.nn import visformer_tiny
from tests.clip_model import TINY, register_tiny_clip
from tests.nn.published import save_their_checkpoint, their_gates, their_layout

DATA = ["--data.dataset=shapes", "--data.image_size=32", "--data.images_per_class=4"]
TEXTS = ["--semantics.bank=shapes", "--semantics.dim=64"]
MODELS: dict[str, list[str]] = {
    "small": ["--model.width=8"],
    "resnet12": ['--model.backbone_options={"widths": [8, 8, 16, 16]}'],
    "visformer_tiny": ['--model.backbone_options={"depth": [1, 4, 1]}'],
    "clip": [f"--model.clip_model={TINY}"],
}


_drawn_once = functools.cache(load_shapes)


@pytest.fixture(autouse=True)
def _shapes_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load_shapes", _drawn_once)


def model(backbone: str) -> list[str]:
    gates = ["--model.num_heads=4", "--model.hidden_dim=8"]
    return [f"--model.backbone={backbone}", *MODELS[backbone], *gates]


def pretrain(backbone: str, output: Path, *more: str) -> Path:
    arguments = ["--device=cpu", "--pretrain.epochs=1", "--pretrain.warmup_epochs=0"]
    arguments += ["--pretrain.validation_episodes=2"]
    assert main(["pretrain", *DATA, *model(backbone), *arguments, f"--output={output}", *more]) == 0
    return output / "checkpoints" / "pretrain-best.safetensors"


def metatune(backbone: str, output: Path, *more: str) -> list[str]:
    arguments = [
        "--device=cpu", "--metatune.epochs=1", "--metatune.steps_per_epoch=1",
        "--metatune.episodes_per_step=1", "--metatune.query=1", "--metatune.validation_episodes=2",
    ]  # fmt: skip
    return ["metatune", *DATA, *TEXTS, *model(backbone), *arguments, f"--output={output}", *more]


def evaluate(checkpoint: Path, output: Path, *more: str) -> dict[str, Any]:
    arguments = ["--device=cpu", "--evaluate.episodes=3", "--evaluate.query=2"]
    run = ["evaluate", f"--checkpoint={checkpoint}", *DATA, *TEXTS, *arguments, *more]
    assert main([*run, "--evaluate.shots=[1]", f"--output={output}"]) == 0
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


@pytest.fixture
def clip_file(tmp_path: Path) -> Path:
    """A file of a whole (very small) CLIP model."""
    import open_clip

    register_tiny_clip(tmp_path)
    torch.save(open_clip.create_model(TINY).state_dict(), tmp_path / "clip.pt")
    return tmp_path / "clip.pt"


@pytest.mark.parametrize("backbone", ["small", "resnet12"])
def test_from_pretraining_to_evaluation(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = pretrain(backbone, tmp_path / "pre")
    arguments = metatune(backbone, tmp_path / "tuned", f"--checkpoint={start}")
    assert main(arguments) == 0
    tuned = tmp_path / "tuned" / "checkpoints" / "metatune-best.safetensors"
    summary = evaluate(tuned, tmp_path / "result")
    assert summary["methods"].keys() == {"visual prototypes", "fixed gate", "learned gate"}
    assert summary["results"][0]["started_from"] == [load_checkpoint(start)[1]["tensors_sha256"]]
    visual = evaluate(start, tmp_path / "visual")
    assert "visual prototypes" in visual["methods"]
    assert visual["results"][0]["started_from"] == [None]
    for run, asked in (("pre", {"way": 5, "shot": 1, "query": 15}), ("tuned", None)):
        told = json.loads((tmp_path / run / "summary.json").read_text())["monitor_episodes"]
        assert (told["way"], told["shot"], told.get("asked")) == (5, 1, asked)


def test_gates_of_a_tuned_checkpoint_learn_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = pretrain("small", tmp_path / "pre")
    still = ["--metatune.lr=0", "--metatune.backbone_lr=0"]  # what it ends with, it began with
    first = tmp_path / "first" / "checkpoints" / "metatune-best.safetensors"
    assert main(metatune("small", tmp_path / "first", f"--checkpoint={start}")) == 0
    tensors, _ = load_checkpoint(first)
    # other settings that fit: nothing in the gates depends on them
    more = [f"--checkpoint={first}", *still, "--seed=7"]
    fits = ["--model.concentration=5", "--model.text_scope=class", "--semantics.top_k=2"]
    assert main([*metatune("small", tmp_path / "second", *more), *fits]) == 0
    assert f"the gates of {first} learn on" in capsys.readouterr().err
    second, info = load_checkpoint(tmp_path / "second/checkpoints/metatune-best.safetensors")
    model_names = [name for name in tensors if name.startswith("model.")]
    assert any(name.startswith("model.gates.") for name in model_names)
    assert all(torch.equal(tensors[name], second[name]) for name in model_names)
    assert [stage["stage"] for stage in info["training"]] == ["pretrain", "metatune", "metatune"]
    summary = json.loads((tmp_path / "second/summary.json").read_text())
    assert (summary["gates"], info["gates"]) == ("continued", "continued")
    summary = json.loads((tmp_path / "first/summary.json").read_text())
    assert summary["gates"] == "new"


def test_a_checkpoint_is_read_once(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backbone and gates are of one file, whatever takes its place meanwhile."""
    reads: list[str] = []
    read = safetensors.safe_open

    def counted(path: str, **options: Any) -> Any:
        reads.append(path)
        return read(path, **options)

    monkeypatch.setattr(safetensors, "safe_open", counted)
    assert main(metatune("small", tmp_path / "run", f"--checkpoint={tuned}")) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["gates"] == "continued"
    assert reads.count(str(tuned)) == 1


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("--model.policy=mlp", "policy: 'beta' -> 'mlp'"),
        ("--model.num_heads=2", "num_heads: 4 -> 2"),
        ("--model.gated_layers=[[2,1]]", "gated_layers: "),
        ("--semantics.dim=32", "text_dim: 64 -> 32"),
    ],
)
def test_gates_that_do_not_fit_start_anew(
    tuned: Path, tmp_path: Path, other: str, named: str
) -> None:
    arguments = metatune("small", tmp_path / "run", f"--checkpoint={tuned}", other)
    with pytest.warns(UserWarning, match="its gates do not fit .*start anew") as caught:
        assert main(arguments) == 0
    assert any(named in str(item.message) for item in caught)
    assert json.loads((tmp_path / "run/summary.json").read_text())["gates"] == "new"


def test_gates_that_learned_from_another_encoder_start_anew(tuned: Path, tmp_path: Path) -> None:
    tensors, info = load_checkpoint(tuned)
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, tensors, {**info, "semantics": {**info["semantics"], "encoder": "x"}})
    with pytest.warns(UserWarning, match=r"gates do not fit \(encoder: 'x' -> 'hashed-ngram'\)"):
        assert main(metatune("small", tmp_path / "run", f"--checkpoint={other}")) == 0


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "load_shapes", _drawn_once)
        start = pretrain("small", folder / "pre")
        assert main(metatune("small", folder / "run", f"--checkpoint={start}")) == 0
    return folder / "run" / "checkpoints" / "metatune-best.safetensors"


def test_visformer_from_the_authors_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = visformer_tiny(32, depth=(1, 4, 1))
    path = save_their_checkpoint(tmp_path / "visformer-miniImageNet.pth", their_layout(theirs))
    arguments = metatune("visformer_tiny", tmp_path / "tuned", f"--checkpoint={path}")
    frozen = ["--metatune.backbone_lr=0", "--metatune.freeze_norm=false"]
    assert main([*arguments, *frozen, "--model.backbone_options.drop_path_rate=0.5"]) == 0
    tuned = tmp_path / "tuned" / "checkpoints" / "metatune-best.safetensors"
    tensors, info = load_checkpoint(tuned, ("metatune",))
    for name, tensor in theirs.state_dict().items():  # frozen: still theirs, to the bit
        assert torch.equal(tensors[f"model.backbone.{name}"], tensor), name
    last = tmp_path / "tuned" / "checkpoints" / "metatune-last.safetensors"
    tensors, resumed = load_checkpoint(last)
    backbone = resumed["resume"]["optimizer"]["groups"][1]["params"]
    assert backbone
    assert not any(f"optimizer.{index}.exp_avg" in tensors for index in backbone)
    assert info["model"]["backbone"]["drop_path_rate"] == 0.5
    assert info["normalisation"]["mean"] == pytest.approx(STATISTICS["imagenet"][0])
    assert info["started_from"] == str(path)
    assert info["start"]["left_out"].keys() == {"head", "log_tau"}
    assert evaluate(tuned, tmp_path / "result")["episodes"] == 3


@pytest.mark.parametrize("small_stem", [True, False])
def test_authors_backbone_alone(
    small_stem: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = visformer_tiny(32, small_stem=small_stem)
    path = save_their_checkpoint(tmp_path / "visformer-CUB.pth", their_layout(theirs))
    summary = evaluate(path, tmp_path / "result", "--evaluate.split=monitor")
    assert summary["methods"].keys() == {"visual prototypes"}
    data = with_statistics(_drawn_once(32, 4), *STATISTICS["imagenet"])
    sampler = build_sampler("own", data.monitor, 5, 1, 2, 0)
    features = image_features(theirs, data, data.monitor)
    expected = predict_visual(features, sampler, 3).accuracies.mean().item()
    assert summary["accuracy"] == pytest.approx(expected)


def test_authors_backbone_and_images_that_it_does_not_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = visformer_tiny(32, small_stem=False)
    path = save_their_checkpoint(tmp_path / "visformer-CUB.pth", their_layout(theirs))
    arguments = ["evaluate", f"--checkpoint={path}", f"--output={tmp_path / 'run'}"]
    arguments += ["--device=cpu", "--data.dataset=shapes", "--data.image_size=20"]
    assert "image_size: expected at least 32" in fails(arguments, capsys, 2)


def test_backbone_of_a_dvla_rl_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = visformer_tiny(32, depth=(1, 4, 1))
    state = {**their_layout(theirs), **their_gates()}
    path = save_their_checkpoint(tmp_path / "dvla_rl-CIFAR-FS-1shot.pth", state)
    arguments = metatune("visformer_tiny", tmp_path / "tuned", f"--checkpoint={path}")
    with pytest.warns(UserWarning, match="only its backbone was loaded"):
        assert main(arguments) == 0
    last = tmp_path / "tuned" / "checkpoints" / "metatune-last.safetensors"
    _, info = load_checkpoint(last, ("metatune",))
    assert info["start"]["format"] == "dvla-rl"
    assert info["normalisation"]["mean"] == pytest.approx(STATISTICS["cifar"][0])


def test_clip_without_pretraining(
    clip_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned, whole = tmp_path / "tuned", tmp_path / "whole"
    settings = [f"--model.pretrained={clip_file}", "--metatune.validate_every=1"]
    settings.append("--metatune.epochs=2")
    assert main([*metatune("clip", whole), *settings]) == 0
    with monkeypatch.context() as stopped:
        save = TrainingState.save

        def save_and_stop(state: TrainingState, score: float | None = None) -> None:
            save(state, score)
            raise DVLAError("stopped")

        stopped.setattr(TrainingState, "save", save_and_stop)
        assert main([*metatune("clip", tuned), *settings]) == 1
    assert main([*metatune("clip", tuned), *settings, "--resume"]) == 0
    runs = [
        load_checkpoint(run / "checkpoints" / "metatune-last.safetensors")[0]
        for run in (tuned, whole)
    ]
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())
    best = whole / "checkpoints" / "metatune-best.safetensors"
    _, info = load_checkpoint(best)
    assert info["model"]["backbone"] == {"name": "clip", "image_size": 32, "architecture": TINY}
    assert info["normalisation"]["mean"] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
    assert json.loads((whole / "summary.json").read_text())["started_from"] == str(clip_file)
    assert evaluate(best, tmp_path / "result")["method"] == "learned gate"


def test_clip_pretrains_from_published_weights(
    clip_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = ["--pretrain.lr=0", "--pretrain.warmup_lr=0"]
    start = pretrain("clip", tmp_path / "pre", f"--model.pretrained={clip_file}", *rate)
    tensors, _ = load_checkpoint(start)
    weights = torch.load(clip_file, weights_only=True)
    name = "transformer.resblocks.3.mlp.c_fc.weight"
    assert torch.equal(tensors[f"model.backbone.net.{name}"], weights[f"visual.{name}"])
    assert main(metatune("clip", tmp_path / "tuned", f"--checkpoint={start}")) == 0


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int) -> str:
    assert main(arguments) == status
    return capsys.readouterr().err


def test_no_start_and_wrong_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert "--model.pretrained TAG_OR_FILE" in fails(metatune("small", run), capsys, 2)
    arguments = metatune("resnet12", run, "--model.pretrained=x.pth")
    assert "no published weights" in fails(arguments, capsys, 2)
    arguments = metatune("resnet12", run, "--checkpoint=x.pth")
    assert "no published weights" in fails(arguments, capsys, 1)
    arguments = metatune("visformer_tiny", run, "--checkpoint=x.pth")
    assert "x.pth: no such file" in fails(arguments, capsys, 1)
    arguments = metatune("visformer_tiny", run, "--model.normalisation=imagnet")
    assert "'imagnet' is unknown" in fails([*arguments, "--checkpoint=x.pth"], capsys, 2)
    assert not run.exists()


@pytest.mark.parametrize(
    ("backbone", "options", "channels"),
    [("resnet12", {"widths": [8, 8, 16, 16]}, 1), ("visformer_tiny", {"depth": [1, 1, 1]}, 1)],
)
def test_description_builds_the_same_model(
    backbone: str, options: dict[str, Any], channels: int
) -> None:
    layers = [[2, 0], [3, 0]]
    config = ModelConfig(backbone=backbone, backbone_options=options, gated_layers=layers)
    spec = model_spec(config, backbone_spec(config, channels, 32), 64)
    first = build_model(json.loads(json.dumps(spec)))
    again = build_model(spec)
    again.load_state_dict(first.state_dict())
    assert first.gated_layers == ((2, 0), (3, 0))
    images = torch.randn(2, channels, 32, 32)
    assert torch.equal(first.eval().features(images), again.eval().features(images))


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="image_size has its own option"):
        backbone_spec(ModelConfig(backbone_options={"image_size": 3}), 3, 32)
    with pytest.raises(UsageError, match="clip backbone takes 3 colours"):
        backbone_spec(ModelConfig(backbone="clip"), 1, 32)
    config = ModelConfig(backbone="resnet12", backbone_options={"depth": 3})
    with pytest.raises(UsageError, match=r"cannot build the backbone 'resnet12'.*depth"):
        build_model(model_spec(config, backbone_spec(config, 3, 32), 64))


def test_statistics_that_images_get(few_digits: FewShotData) -> None:
    assert normalise_for(few_digits, ModelConfig()) is few_digits
    with pytest.raises(UsageError, match=r"1 channel\(s\).*statistics are for 3"):
        normalise_for(few_digits, ModelConfig(normalisation="imagenet"))
    assert published("a/visformer-CUB.pth")
    assert not published("a/pretrain-best.safetensors")


def test_regularisation_may_change_between_the_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = pretrain("resnet12", tmp_path / "pre")
    other = '--model.backbone_options={"widths": [8, 8, 16, 16], "drop_block": false}'
    assert main([*metatune("resnet12", tmp_path / "a", f"--checkpoint={start}"), other]) == 0
    other = '--model.backbone_options={"widths": [8, 8, 16, 24]}'
    arguments = [*metatune("resnet12", tmp_path / "b", f"--checkpoint={start}"), other]
    assert "of another model" in fails(arguments, capsys, 1)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.gated_layers=[[9, 9]]", "location (9, 9): no such (stage, block)"),
        ("--model.num_heads=7", "num_heads"),
    ],
)
def test_pretraining_refuses_gates_that_the_next_stage_could_not_build(
    option: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", f"--output={tmp_path / 'run'}", "--device=cpu", option]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
