"""Evaluation: short cuts that change no number, pairing, episode lists, and what is written."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.evaluation import predict_afresh
from dvla_fast.cli import main
from dvla_fast.data import EpisodeSampler, FewShotData, load_digits
from dvla_fast.engine import evaluate
from dvla_fast.engine.build import without_test_split
from dvla_fast.engine.checkpoint import load_checkpoint, save_checkpoint
from dvla_fast.engine.config import DemoRun, EvaluateConfig
from dvla_fast.engine.evaluate import Contender, Evaluation, compare, trained_normalisation
from dvla_fast.engine.predict import (
    FIXED,
    LEARNED,
    ONCE,
    PREFIX,
    SUPPORTS,
    VISUAL,
    EpisodePredictor,
    image_features,
    predict_visual,
)
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.records import EpisodeRecord
from dvla_fast.engine.run_folder import read_metrics
from dvla_fast.engine.texts import build_texts
from dvla_fast.errors import DataError, TrainingError
from dvla_fast.nn import DVLA
from dvla_fast.nn.dvla import TEXT_SCOPES
from dvla_fast.semantics import EncodedTexts
from tests.engine.runs import (
    another_training,
    evaluate_arguments,
    random_model,
    small_spec,
    write_tuned,
)


@pytest.fixture
def make_model() -> Callable[..., DVLA]:
    return lambda **options: random_model(small_spec(512, **options))


@pytest.fixture
def texts(tiny: DemoRun, few_digits: FewShotData) -> EncodedTexts:
    """The digits' texts, one class with an attribute less than the others."""
    whole = build_texts(tiny.semantics, few_digits, torch.device("cpu"))[0]
    mask, tokens = whole.mask.clone(), whole.tokens.clone()
    mask[6, 1], tokens[6, 1] = False, 0.0
    return replace(whole, mask=mask, tokens=tokens)


PLANS = [
    ("class", "image", "beta", ONCE, ONCE),
    ("class", "image", "categorical", ONCE, ONCE),
    ("class", "episode", "fixed", ONCE, ONCE),
    ("class", "episode", "static", ONCE, ONCE),
    ("class", "episode", "beta", SUPPORTS, ONCE),
    ("class", "episode", "mlp", SUPPORTS, ONCE),
    ("episode", "episode", "beta", PREFIX, PREFIX),
    ("episode", "image", "beta", PREFIX, PREFIX),
    ("candidate", "episode", "beta", PREFIX, PREFIX),
    ("candidate", "image", "beta", PREFIX, PREFIX),
]


@pytest.mark.parametrize(("text_scope", "alpha_scope", "policy", "learned", "fixed"), PLANS)
@pytest.mark.parametrize(("way", "shot", "query"), [(5, 1, 4), (3, 2, 5)])
@pytest.mark.parametrize("cache_mib", [8192, 0], ids=["maps kept", "no maps kept"])
def test_short_cuts_change_no_number(
    few_digits: FewShotData,
    texts: EncodedTexts,
    make_model: Callable[..., DVLA],
    text_scope: str,
    alpha_scope: str,
    policy: str,
    learned: str,
    fixed: str,
    way: int,
    shot: int,
    query: int,
    cache_mib: int,
) -> None:
    """Every plan against the plain loop: all predictions, accuracies and gates, two lists."""
    model = make_model(text_scope=text_scope, alpha_scope=alpha_scope, policy=policy).eval()
    predictor = EpisodePredictor(
        model, few_digits, texts, "novel", fixed_alpha=0.3, visual=True, cache_mib=cache_mib
    )
    assert predictor.plans == {LEARNED: learned, FIXED: fixed}
    for seed in (0, 1):  # the second list finds most images known
        sampler = EpisodeSampler(few_digits.novel, way, shot, query, seed)
        found = predictor.predict(sampler, 9, 4)
        for name, alpha in ((LEARNED, None), (FIXED, 0.3)):
            slow = predict_afresh(model, few_digits, texts, "novel", sampler, 9, alpha)
            torch.testing.assert_close(found[name].logits, slow.logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(found[name].predicted, slow.predicted)
            assert torch.equal(found[name].accuracies, slow.accuracies)
            torch.testing.assert_close(found[name].alphas, slow.alphas, rtol=1e-4, atol=1e-5)
        whole = image_features(model.backbone, few_digits, few_digits.novel)
        visual = predict_visual(whole, sampler, 9)
        assert torch.equal(predictor.visual(sampler, 9).predicted, visual.predicted)


def test_each_image_goes_through_once(
    few_digits: FewShotData, texts: EncodedTexts, make_model: Callable[..., DVLA]
) -> None:
    """Of 120 images: the prefix 120 times, the gated part 120 times, whatever the episodes."""
    model = make_model(text_scope="class", alpha_scope="image")
    counts = {"prefix": 0, "gate": 0}
    prefix = model.prefix

    def counted(images: torch.Tensor) -> torch.Tensor:
        counts["prefix"] += len(images)
        return prefix(images)

    model.prefix = counted  # type: ignore[method-assign]
    model.gates[0].register_forward_hook(
        lambda _m, args, _out: counts.__setitem__("gate", counts["gate"] + len(args[0]))
    )
    predictor = EpisodePredictor(model, few_digits, texts, "novel")
    for shot in (1, 5):
        predictor.predict(EpisodeSampler(few_digits.novel, 5, shot, 15, 0), 60)
    assert counts == {"prefix": 120, "gate": 120}


@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_every_stretch_of_work_shows_itself(
    few_digits: FewShotData,
    texts: EncodedTexts,
    make_model: Callable[..., DVLA],
    text_scope: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Off a terminal, with a clock on which every look finds half a minute gone."""
    model, now = make_model(text_scope=text_scope), [0.0]

    def clock() -> float:
        now[0] += 30.0
        return now[0]

    config = EvaluateConfig(episodes=6, query=4, batch_episodes=2, fixed_alpha=0.5)
    contender = Contender(model, {"plain": make_model().backbone, VISUAL: model.backbone})
    with Progress({"evaluate": 1.0}, clock=clock) as progress:
        progress.begin("evaluate", 6)
        sampler = EpisodeSampler(few_digits.novel, 5, 1, 4, 0)
        Evaluation([contender], few_digits, texts, config).evaluate(sampler, progress)
    lines = capsys.readouterr().err.splitlines()
    assert sum("of 120 images" in line for line in lines) == 4  # all, for the plain backbone
    assert sum(" images" in line for line in lines) > 4  # those that the episodes use
    batches = [line for line in lines if line.endswith("] evaluate")]
    shares = [17, 33, 50, 100] if text_scope == "class" else [17, 33, 50, 67, 83, 100]
    assert [int(line[1:].split("%")[0]) for line in batches] == shares  # of both gates
    assert "100 %" in lines[-1]


def test_predictor_leaves_the_training_mode(
    few_digits: FewShotData, texts: EncodedTexts, make_model: Callable[..., DVLA]
) -> None:
    model = make_model().train()
    frozen = next(part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)).eval()
    before = [part.training for part in model.modules()]
    EpisodePredictor(model, few_digits, texts, "novel").predict(
        EpisodeSampler(few_digits.novel, 5, 1, 2, 0), 2
    )
    assert [part.training for part in model.modules()] == before
    assert model.training
    assert not frozen.training


def test_paired_result_has_the_promised_fields(
    tiny: DemoRun, few_digits: FewShotData, texts: EncodedTexts, make_model: Callable[..., DVLA]
) -> None:
    model = make_model()
    contender = Contender(model, {VISUAL: model.backbone})
    run = Evaluation([contender], few_digits, texts, tiny.evaluate)
    sampler = EpisodeSampler(few_digits.novel, 5, 1, tiny.evaluate.query, seed=3)
    result, record = run.evaluate(sampler)
    promised = {"dataset", "split", "way", "shot", "query", "episodes", "seed", "interval"}
    assert promised | {"accuracy", "ci95"} <= set(result)
    assert set(result["methods"]) == {VISUAL, FIXED, LEARNED}
    assert set(result["paired"]) == {f"{LEARNED} - {VISUAL}", f"{LEARNED} - {FIXED}"}
    assert record.accuracies(LEARNED).mean().item() == pytest.approx(result["accuracy"], abs=1e-6)
    assert result["seed"] == 3
    assert run.evaluate(sampler)[0] == result


def test_checkpoints_are_averaged_episode_by_episode(
    tiny: DemoRun, few_digits: FewShotData, texts: EncodedTexts, make_model: Callable[..., DVLA]
) -> None:
    first, second = make_model(), make_model(temperature=0.1)
    with torch.no_grad():
        for parameter in second.backbone.parameters():
            parameter.mul_(1.5)
    contenders = [Contender(m, {VISUAL: m.backbone}) for m in (first, second)]

    def result(chosen: list[Contender]) -> dict:
        sampler = EpisodeSampler(few_digits.novel, 5, 1, tiny.evaluate.query, 0)
        return Evaluation(chosen, few_digits, texts, tiny.evaluate).evaluate(sampler)[0]

    single, both = [result([contender]) for contender in contenders], result(contenders)
    alone = [one["accuracy"] for one in single]
    assert alone[0] != alone[1]
    alphas = torch.tensor([one["alpha"]["mean"] for one in single])
    assert not torch.equal(alphas[0], alphas[1])
    assert both["alpha"]["mean"] == pytest.approx(alphas.mean(0).tolist(), abs=1e-6)
    assert both["accuracy"] == pytest.approx(sum(alone) / 2, abs=1e-6)
    found = both["over_checkpoints"][LEARNED]
    assert found["accuracies"] == pytest.approx(alone, abs=1e-6)
    assert found["std"] == pytest.approx(abs(alone[0] - alone[1]) / math.sqrt(2), abs=1e-6)


def test_checkpoints_with_equally_many_right_answers_have_no_spread() -> None:
    labels = torch.zeros(3, 15, dtype=torch.long)
    wrong = torch.zeros(3, 3, 15, dtype=torch.long)
    for checkpoint, counts in enumerate([(1, 4, 7), (7, 4, 1), (0, 12, 0)]):
        for episode, count in enumerate(counts):
            wrong[checkpoint, episode, :count] = 1
    found = EpisodeRecord(labels[:, :5], labels, {VISUAL: wrong}).over_checkpoints(VISUAL)
    assert len(set(found["accuracies"])) == 1
    assert (found["std"], found["ci95"]) == (0, 0)


def test_differences_are_paired() -> None:
    """A gap alike on episodes of very different difficulty has hardly any spread."""
    hard = torch.rand(50)
    result = compare({"a": hard, "b": hard + 0.1 + 1e-3 * torch.rand(50)}, "b")
    assert result["paired"]["b - a"]["difference"] == pytest.approx(0.1, abs=1e-3)
    assert result["paired"]["b - a"]["ci95"] < 1e-3 < result["methods"]["a"]["ci95"]


def test_separable_features_are_classified(few_digits: FewShotData) -> None:
    features = torch.nn.functional.one_hot(few_digits.novel.labels, 5).float()
    sampler = EpisodeSampler(few_digits.novel, 5, 1, 4, 0)
    assert predict_visual(features, sampler, 130).accuracies.tolist() == [1.0] * 130


def test_broken_weights_are_reported(
    few_digits: FewShotData, texts: EncodedTexts, make_model: Callable[..., DVLA]
) -> None:
    model = make_model()
    with torch.no_grad():
        model.gates[1].out_projection.weight[0, 0] = float("nan")  # type: ignore[union-attr,index]
    with pytest.raises(TrainingError, match=r"'gates\.1\.out_projection\.weight' hold NaN"):
        EpisodePredictor(model, few_digits, texts, "novel")
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="digits/novel: features of 120 of 120 images"):
        image_features(model.backbone, few_digits, few_digits.novel)


def test_weights_too_large_for_float32_are_reported(
    few_digits: FewShotData, texts: EncodedTexts, make_model: Callable[..., DVLA]
) -> None:
    model = make_model().eval()
    with torch.no_grad():
        model.gates[1].out_projection.weight.fill_(3e38)  # type: ignore[union-attr,operator]
    predictor = EpisodePredictor(model, few_digits, texts, "novel")
    with pytest.raises(TrainingError, match="logits are NaN or infinite; the weights are broken"):
        predictor.predict(EpisodeSampler(few_digits.novel, 5, 1, 2, 0), 2)


def test_training_cannot_read_the_test_split(
    few_digits: FewShotData, texts: EncodedTexts, make_model: Callable[..., DVLA]
) -> None:
    sealed = without_test_split(few_digits)
    assert sealed.class_names == few_digits.class_names
    assert len(sealed.novel) == 0
    with pytest.raises(DataError, match="the test split is not read during training"):
        EpisodePredictor(make_model(), sealed, texts, "novel")
    assert len(sealed.split("monitor")) == len(few_digits.monitor)


def test_checkpoint_brings_its_normalisation(few_digits: FewShotData) -> None:
    info = {"normalisation": {"mean": [0.25], "std": [0.5]}}
    data = trained_normalisation(few_digits, info)
    assert data.normalise(torch.full((1, 1, 1, 1), 0.5)).item() == pytest.approx(0.5)
    assert trained_normalisation(few_digits, {}) is few_digits


def test_wandb_gets_the_accuracies(
    backbone: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that cannot have it ends before its episodes, and does not take the folder."""
    given = evaluate_arguments(backbone, tmp_path / "a", "--wandb=birds")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(given) == 1
    assert "--wandb birds needs wandb" in capsys.readouterr().err
    logged: list[dict[str, float]] = []

    def refuse(dir: str, **arguments: Any) -> None:
        Path(dir, "wandb").mkdir()
        raise ValueError("no key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    assert main(given) == 1
    assert "no key" in capsys.readouterr().err
    run = SimpleNamespace(log=logged.append, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **arguments: run))
    assert main(given) == 0
    accuracy = json.loads((tmp_path / "a/summary.json").read_text())["accuracy"]
    assert [row["evaluate/accuracy"] for row in logged] == [accuracy]


def test_run_leaves_predictions_and_confusion(backbone: str, tmp_path: Path) -> None:
    run = evaluate_arguments(backbone, tmp_path / "a", "--evaluate.episode_list=authors")
    assert main(run) == 0
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert (summary["trained_on"], summary["cross_domain"]) == ("digits", False)
    assert (summary["shared_images"], summary["enlarged_from"]) == (0, 0)
    record = EpisodeRecord.read(tmp_path / "a/episodes-1shot.npz")
    assert record.accuracies(VISUAL).mean().item() == pytest.approx(summary["accuracy"], abs=1e-6)
    content = json.loads((tmp_path / "a/confusion-1shot.json").read_text())
    counts = torch.tensor(content["counts"])
    assert counts.sum() == 30 * 25
    assert counts.diagonal().sum().item() / counts.sum().item() == pytest.approx(
        summary["accuracy"], abs=1e-6
    )
    rows = list(csv.reader((tmp_path / "a/confusion-1shot.csv").open()))
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == content["counts"]
    classes = list(csv.DictReader((tmp_path / "a/per_class-1shot.csv").open()))
    assert [row["class"] for row in classes] == ["one", "three", "five", "seven", "nine"]
    own = [float(row["accuracy"]) for row in classes]
    assert own == pytest.approx((counts.diagonal() / counts.sum(1)).tolist(), abs=1e-5)
    assert (tmp_path / "a/confusion-1shot.png").read_bytes().startswith(b"\x89PNG")


def interrupt(monkeypatch: pytest.MonkeyPatch, stop: int) -> list[int]:
    """Count the shots that are evaluated, and stop before this one."""
    real, seen = Evaluation.evaluate, []

    def evaluate(self: Evaluation, sampler: EpisodeSampler, *more: Any) -> Any:
        seen.append(sampler.shot)
        if sampler.shot == stop:
            raise KeyboardInterrupt
        return real(self, sampler, *more)

    monkeypatch.setattr(Evaluation, "evaluate", evaluate)
    return seen


@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_an_interrupted_evaluation_goes_on(
    text_scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = write_tuned(tmp_path / "tuned.safetensors", 512, text_scope=text_scope)
    run = evaluate_arguments(tuned, tmp_path / "whole", "--evaluate.shots=[3,1,2]")
    run += ["--evaluate.fixed_alpha=0.5", "--evaluate.episodes=4"]
    assert main(run) == 0
    run[2] = f"--output={tmp_path / 'stopped'}"
    with monkeypatch.context() as stopping:
        assert interrupt(stopping, 2) == []
        assert main(run) == 130
    assert not (tmp_path / "stopped/summary.json").exists()
    resumed = ["evaluate", "--resume", run[2]]
    with monkeypatch.context() as counting:
        seen = interrupt(counting, 0)
        assert main(resumed) == 0
        assert seen == [2]
        assert main(resumed) == 0  # a finished one is only written again
        assert seen == [2]

    def files(folder: str) -> dict[str, bytes]:
        found = (tmp_path / folder).glob("*.*")
        return {path.name: path.read_bytes() for path in found if path.suffix != ".npz"}

    assert files("stopped") == files("whole")
    for shot in (3, 1, 2):
        name = f"episodes-{shot}shot.npz"
        ours, theirs = (EpisodeRecord.read(tmp_path / x / name) for x in ("stopped", "whole"))
        assert torch.equal(ours.predictions[LEARNED], theirs.predictions[LEARNED])
        assert ours.alphas is not None
        assert theirs.alphas is not None
        assert torch.equal(ours.alphas, theirs.alphas)
    # what is not whole, or of other weights under the same name, is computed again
    (tmp_path / "stopped/episodes-3shot.npz").write_bytes(b"torn")
    (tmp_path / "stopped/result-1shot.json").write_text("{")
    seen = interrupt(monkeypatch, 0)
    assert main(resumed) == 0
    assert seen == [3, 1]
    assert files("stopped") == files("whole")
    weights, info = load_checkpoint(tuned)
    save_checkpoint(tuned, {key: value * 1.01 for key, value in weights.items()}, info)
    with monkeypatch.context() as stopping:
        interrupt(stopping, 1)
        assert main(resumed) == 130
    # predictions of other weights than those of a summary would be shown beside it
    assert not (tmp_path / "stopped/summary.json").exists()
    assert main(resumed) == 0
    assert seen == [3, 1, 3, 1, 2]


def test_images_go_through_in_the_same_batches_after_a_stop(
    tiny: DemoRun, few_digits: FewShotData, texts: EncodedTexts, make_model: Callable[..., DVLA]
) -> None:
    """A batch of other images may round otherwise."""
    model, batches = make_model(), []
    prefix = model.prefix

    def counted(images: torch.Tensor) -> torch.Tensor:
        batches.append(images.sum((1, 2, 3)).tolist())
        return prefix(images)

    model.prefix = counted  # type: ignore[method-assign]
    config = replace(tiny.evaluate, episodes=2, query=2)
    runs = []
    for finished in (False, True):
        contender = Contender(model, {VISUAL: model.backbone})
        evaluation = Evaluation([contender], few_digits, texts, config)
        first, second = (EpisodeSampler(few_digits.novel, config.way, k, 2, 0) for k in (3, 1))
        if finished:
            evaluation.pass_over(first)
        else:
            evaluation.evaluate(first)
        evaluation.evaluate(second)
        runs.append(batches.copy())
        batches.clear()
    assert runs[0] == runs[1]


def test_an_evaluation_is_of_its_images(
    backbone: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Class names and row numbers are the same where the files behind them are not."""
    run = evaluate_arguments(backbone, tmp_path / "a")
    assert main(run) == 0
    seen, real = interrupt(monkeypatch, 0), evaluate.build_data
    resumed = ["evaluate", "--resume", f"--output={tmp_path / 'a'}"]
    assert main(resumed) == 0
    assert seen == []

    def give(**changes: Any) -> None:
        def build(*given: Any, **more: Any) -> FewShotData:
            data = real(*given, **more)
            return replace(data, novel=replace(data.novel, **changes))

        monkeypatch.setattr(evaluate, "build_data", build)

    novel = load_digits().novel
    give(ids=("another.png", *novel.ids[1:]))
    other = evaluate_arguments(backbone, tmp_path / "b", f"--compare={tmp_path / 'a'}")
    assert main(other) == 1
    assert "1-shot: different images (renamed" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert main(resumed) == 0
    assert seen == [1]
    give(images=novel.images.flip(3))  # under the same names
    assert main(resumed) == 0
    assert seen == [1, 1]
    assert main(resumed) == 0
    assert seen == [1, 1]


def test_one_episode_has_no_interval(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file is JSON by the standard, which knows no infinity; readers take the nulls."""

    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=lambda name: pytest.fail(name))

    one = "--evaluate.episodes=1"
    assert main(evaluate_arguments(backbone, tmp_path / "a", one)) == 0
    other = another_training(backbone, tmp_path / "other.safetensors")
    more = [one, f"--checkpoints=[{other}]", f"--compare={tmp_path / 'a'}"]
    assert main(evaluate_arguments(backbone, tmp_path / "b", *more)) == 0
    assert "without a spread to judge by" in capsys.readouterr().out
    for folder in ("a", "b"):
        for path in (tmp_path / folder).glob("*.json*"):
            for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [""]:
                strict(line or path.read_text())
    summary = strict((tmp_path / "b/summary.json").read_text())
    assert summary["ci95"] is None
    assert summary["compared"]["results"][0]["p_value"] is None
    assert [row["ci95"] for row in read_metrics(tmp_path / "a", "evaluate")] == [None]
