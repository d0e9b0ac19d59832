"""Evaluation: the interval's formula, pairing, and agreement of its short cuts with the model."""

from __future__ import annotations

import math

import pytest
import torch

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine.build import (
    backbone_spec,
    build_model,
    build_texts,
    model_spec,
    split_classes,
)
from dvla_fast.engine.config import DemoRun
from dvla_fast.engine.evaluate import (
    FIXED,
    LEARNED,
    compare,
    evaluate_shot,
    gated_accuracies,
    image_features,
    mean_interval,
    visual_accuracies,
)
from dvla_fast.errors import TrainingError
from dvla_fast.nn import DVLA


@pytest.fixture
def model(tiny: DemoRun) -> DVLA:
    return build_model(model_spec(tiny.model, backbone_spec(tiny.model, 1, 16), 512))


def test_interval_formula() -> None:
    mean, half = mean_interval(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * math.sqrt(0.2 / 3) / 2, rel=1e-6)
    assert mean_interval(torch.tensor([0.3]))[1] == math.inf


def test_differences_are_paired() -> None:
    """A constant gap on episodes of very different difficulty has no spread."""
    hard = torch.rand(50)
    result = compare({"a": hard, "b": hard + 0.1}, "b")
    assert result["paired"]["b - a"]["difference"] == pytest.approx(0.1, abs=1e-6)
    assert result["paired"]["b - a"]["ci95"] < 1e-6 < result["methods"]["a"]["ci95"]


def test_gated_accuracies_match_the_plain_model(
    tiny: DemoRun, few_digits: FewShotData, model: DVLA
) -> None:
    model.eval()
    texts, _ = build_texts(tiny.semantics, few_digits, torch.device("cpu"))
    sampler = EpisodeSampler(few_digits.novel, 5, 1, 4, 0)
    scores, alphas = gated_accuracies(model, few_digits, texts, "novel", sampler, tiny.evaluate)
    batch = sampler.batch(0, tiny.evaluate.episodes)
    images = few_digits.normalise(few_digits.novel.images)
    text = texts.episodes(split_classes(few_digits, "novel")[batch.classes])
    for name, alpha in ((LEARNED, None), (FIXED, 0.5)):
        with torch.no_grad():
            output = model(
                images[batch.support],
                batch.support_labels,
                images[batch.query],
                text,
                way=5,
                alpha=alpha,
            )
        expected = (output.logits.argmax(-1) == batch.query_labels).float().mean(1)
        torch.testing.assert_close(scores[name], expected, atol=0.051, rtol=0)
        if alpha is None:
            expected = torch.stack([trace.alpha for trace in output.layers], 1)
            torch.testing.assert_close(alphas, expected, atol=1e-4, rtol=0)


def test_result_has_the_promised_fields(
    tiny: DemoRun, few_digits: FewShotData, model: DVLA
) -> None:
    texts, _ = build_texts(tiny.semantics, few_digits, torch.device("cpu"))
    result = evaluate_shot(
        model, {"visual": model.backbone}, few_digits, texts, tiny.evaluate, 1, seed=3
    )
    promised = {"dataset", "split", "way", "shot", "query", "episodes", "seed", "interval"}
    assert promised | {"accuracy", "ci95"} <= set(result)
    assert set(result["methods"]) == {"visual", FIXED, LEARNED}
    assert set(result["paired"]) == {f"{LEARNED} - visual", f"{LEARNED} - {FIXED}"}
    again = evaluate_shot(
        model, {"visual": model.backbone}, few_digits, texts, tiny.evaluate, 1, seed=3
    )
    assert again == result


def test_separable_features_are_classified(few_digits: FewShotData) -> None:
    features = torch.nn.functional.one_hot(few_digits.novel.labels, 5).float()
    sampler = EpisodeSampler(few_digits.novel, 5, 1, 4, 0)
    assert visual_accuracies(features, sampler, 130).tolist() == [1.0] * 130


def test_broken_weights_are_reported(tiny: DemoRun, few_digits: FewShotData, model: DVLA) -> None:
    sampler = EpisodeSampler(few_digits.novel, 5, 1, 4, 0)
    texts, _ = build_texts(tiny.semantics, few_digits, torch.device("cpu"))
    with torch.no_grad():
        model.gates[1].out_projection.weight[0, 0] = float("nan")  # type: ignore[union-attr,index]
    with pytest.raises(TrainingError, match=r"'gates\.1\.out_projection\.weight' hold NaN"):
        gated_accuracies(model, few_digits, texts, "novel", sampler, tiny.evaluate)
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="digits/novel: features of 120 of 120 images"):
        image_features(model.backbone, few_digits, few_digits.novel)
