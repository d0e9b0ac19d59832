"""What the rewards ask of the gates: against replayed gates, and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine.config import DemoRun
from dvla_fast.engine.models import backbone_spec, build_model, model_spec
from dvla_fast.engine.prefixes import PrefixMaps
from dvla_fast.engine.reward_curves import ALPHAS, best_mean, reward_curves
from dvla_fast.engine.texts import build_texts
from dvla_fast.rl import RewardInputs, weighted_rewards

WEIGHTS = {"similarity": 0.5, "improvement": 1.0}


def test_curves_are_the_rewards_of_replayed_gates(tiny: DemoRun, few_digits: FewShotData) -> None:
    texts, semantics = build_texts(tiny.semantics, few_digits, torch.device("cpu"))
    backbone = backbone_spec(tiny.model, few_digits.channels, few_digits.image_size)
    torch.manual_seed(0)
    model = build_model(model_spec(tiny.model, backbone, semantics["dim"])).eval()
    sampler = EpisodeSampler(few_digits.base, 3, 1, 2, 5)
    maps = PrefixMaps(few_digits).of(model, "base")
    curves = reward_curves(model, few_digits, texts, sampler, WEIGHTS, 10)
    kept = reward_curves(model, few_digits, texts, sampler, WEIGHTS, 10, maps=maps)
    assert curves.shape == (2, len(ALPHAS))
    torch.testing.assert_close(kept, curves, rtol=0, atol=1e-5)
    first, second = model.gated_layers
    for layer, location, column in ((0, first, 2), (1, second, 8)):
        rewards = []
        for number in range(10):
            batch = sampler.batch(number, 1)
            images = [
                few_digits.normalise(few_digits.base.gather(index[0])).unsqueeze(0)
                for index in (batch.support, batch.query)
            ]
            positions = [
                few_digits.class_names.index(few_digits.base.class_names[int(c)])
                for c in batch.classes[0]
            ]
            text = texts.episodes(torch.tensor([positions]))
            output = model(
                images[0], batch.support_labels, images[1], text, way=3,
                alpha={location: ALPHAS[column]},
            )  # fmt: skip
            inputs = RewardInputs(output, batch.query_labels, text)
            rewards.append(weighted_rewards(WEIGHTS, inputs)[0][layer].item())
        assert curves[layer, column].item() == pytest.approx(np.mean(rewards), abs=1e-5)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("rewards", [(0.0, 0.3), (0.2, 0.15), (0.0, 0.2, 0.1)])
def test_best_mean_of_broken_lines(rewards: tuple[float, ...], entropy_weight: float) -> None:
    alphas = np.linspace(0, 1, len(rewards))
    slopes = np.diff(rewards) / np.diff(alphas)
    levels = np.array(rewards[:-1]) - slopes * alphas[:-1]

    def value(p: float) -> float:
        """E[R] in closed form: E[α; α < x] = p · P(α' < x), α' ~ Beta(κp + 1, κ(1 − p))."""
        policy, raised = stats.beta(10 * p, 10 * (1 - p)), stats.beta(10 * p + 1, 10 * (1 - p))
        parts = levels * np.diff(policy.cdf(alphas)) + slopes * p * np.diff(raised.cdf(alphas))
        return float(parts.sum() + entropy_weight * policy.entropy())

    grid = np.arange(1, 100) / 100
    best = grid[int(np.argmax([value(p) for p in grid]))]
    found = best_mean(list(alphas), list(rewards), 10.0, entropy_weight)
    assert found == pytest.approx(best, abs=0.011)


def test_flat_rewards_leave_the_bonus_to_decide() -> None:
    assert best_mean([0.0, 1.0], [0.4, 0.4], 10.0, 0.2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("alphas", "rewards", "message"),
    [
        ([0.5], [1.0], "alphas: expected values increasing from 0 to 1"),
        ([0.0, 1.0], [1.0], "rewards: expected 2, one an alpha, got 1"),
        ([1.0, 0.0], [1.0, 2.0], "increasing"),
        ([0.2, 0.8], [1.0, 2.0], "from 0 to 1"),
        ([0.0, float("nan"), 1.0], [1.0, 1.0, 2.0], "increasing"),
        ([0.0, 1.0], [1.0, float("nan")], "rewards: expected finite"),
    ],
)
def test_best_mean_of_no_curve(alphas: list[float], rewards: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_mean(alphas, rewards, 10.0, 0.0)


def test_no_episodes(few_digits: FewShotData) -> None:
    with pytest.raises(ValueError, match="episodes"):
        reward_curves(None, few_digits, None, None, WEIGHTS, 0)
