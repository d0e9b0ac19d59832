"""The fixed gate that an evaluation compares with has the value that was asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.evaluation import predict_afresh
from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine.config import DemoRun
from dvla_fast.engine.evaluate import Contender, Evaluation
from dvla_fast.engine.predict import FIXED, VISUAL, EpisodePredictor, Predictions
from dvla_fast.engine.texts import build_texts
from tests.engine.runs import random_model, small_spec


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_fixed_gate_has_the_value_asked_for(
    few_digits: FewShotData, tiny: DemoRun, monkeypatch: pytest.MonkeyPatch, alpha: float
) -> None:
    texts, _ = build_texts(tiny.semantics, few_digits, torch.device("cpu"))
    model = random_model(small_spec(512)).eval()
    real, seen = EpisodePredictor.predict, []

    def predict(self: EpisodePredictor, *args: Any) -> dict[str, Predictions]:
        seen.append(real(self, *args))
        return seen[-1]

    monkeypatch.setattr(EpisodePredictor, "predict", predict)
    config = replace(tiny.evaluate, fixed_alpha=alpha)
    contender = Contender(model, {VISUAL: model.backbone})
    sampler = EpisodeSampler(few_digits.novel, config.way, 1, config.query, 3)
    result, record = Evaluation([contender], few_digits, texts, config).evaluate(sampler)
    (found,) = seen
    gates = found[FIXED].alphas
    assert gates is not None
    torch.testing.assert_close(gates, torch.full_like(gates, alpha))
    assert result["fixed_alpha"] == alpha
    slow = predict_afresh(model, few_digits, texts, "novel", sampler, config.episodes, alpha)
    torch.testing.assert_close(found[FIXED].logits, slow.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(record.predictions[FIXED][0], found[FIXED].predicted)
