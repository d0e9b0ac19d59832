"""Steps of meta-tuning: the episodes that they play, what learns, and the figures of an epoch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dvla_fast.data import EpisodeBatch, EpisodeSampler, FewShotData
from dvla_fast.engine import metatune as metatune_module
from dvla_fast.engine.build import seed_everything, split_classes
from dvla_fast.engine.config import AugmentConfig, DemoRun, ExecutionConfig, MetatuneConfig
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.execution import Execution, adamw
from dvla_fast.engine.gating import Episodes, GateTraining, Rollout
from dvla_fast.engine.metatune import parameter_groups
from dvla_fast.engine.metatune_steps import Step, _Totals, _training_mode
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.stages import StageRun
from dvla_fast.engine.texts import build_texts
from dvla_fast.rl import episode_accuracy
from dvla_fast.semantics import EncodedTexts
from tests.engine.runs import random_model, small_spec


@pytest.fixture
def texts(tiny: DemoRun, few_digits: FewShotData) -> EncodedTexts:
    return build_texts(tiny.semantics, few_digits, torch.device("cpu"))[0]


def make_step(config: MetatuneConfig, data: FewShotData, texts: EncodedTexts) -> Step:
    model = random_model(small_spec(512)).train()
    gates = GateTraining(config, model)
    gates.begin_epoch()
    optimizer = adamw(parameter_groups(model, config, gates.baseline), lr=config.lr)
    return Step(config, model, data, texts, optimizer, gates, Execution(), seed=0)


def play(gates: GateTraining, data: FewShotData, texts: EncodedTexts, first: int = 0) -> Rollout:
    """Two 5-way episodes of the base classes, from number ``first`` of their list."""
    batch = EpisodeSampler(data.base, 5, 1, 3, 0).batch(first, 2)
    images = data.normalise(data.base.images.float() / 255)
    text = texts.episodes(split_classes(data, "base")[batch.classes])
    episodes = Episodes(
        images[batch.support], batch.support_labels, images[batch.query], batch.query_labels, text
    )
    return gates.play(episodes, 5)


def test_augmentation_is_not_rounded_to_the_half_type(
    few_digits: FewShotData,
    texts: EncodedTexts,
    tiny: DemoRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bfloat16 the places that pixels are taken from would be off by tenths of a pixel."""
    seen: list[torch.Tensor] = []
    real = GateTraining.play

    def play(self: GateTraining, episodes: Episodes, *rest: Any, **more: Any) -> Rollout:
        seen.append(episodes.support)
        return real(self, episodes, *rest, **more)

    monkeypatch.setattr(GateTraining, "play", play)
    config = replace(tiny.metatune, augment=AugmentConfig(shift=0.1, rotate=10.0))
    for precision in ("float32", "bfloat16"):
        step = make_step(config, few_digits, texts)
        step.execution = Execution(ExecutionConfig(precision=precision))
        torch.manual_seed(1)
        step(0)
    assert seen[0].dtype == torch.float32
    assert torch.equal(*seen)


def test_no_step_plays_the_episodes_of_another(
    few_digits: FewShotData,
    texts: EncodedTexts,
    tiny: DemoRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six steps of four episodes: two lists take turns, and each goes on where it stopped."""
    step = make_step(replace(tiny.metatune, shots=[1, 2], episodes_per_step=4), few_digits, texts)
    real, asked = EpisodeSampler.batch, []

    def batch(self: EpisodeSampler, start: int, count: int) -> EpisodeBatch:
        asked.append((self.shot, start, count))
        return real(self, start, count)

    monkeypatch.setattr(EpisodeSampler, "batch", batch)
    for number in range(6):
        step(number)
    assert asked == [(1, 0, 4), (2, 0, 4), (1, 4, 4), (2, 4, 4), (1, 8, 4), (2, 8, 4)]


def test_a_step_teaches_the_value_network(
    few_digits: FewShotData, texts: EncodedTexts, tiny: DemoRun
) -> None:
    """It begins at 0, so the slope of weight * (V - R)² at its last bias is -2 * weight * R."""
    config = replace(tiny.metatune, baseline="value", value_weight=0.7, clip_norm=0.0)
    step = make_step(config, few_digits, texts)
    assert step.gates.baseline is not None
    before = [value.clone() for value in step.gates.baseline.parameters()]
    figures, _ = step(0)
    assert figures["reward"].abs().min() > 0
    slopes = [network.out.bias.grad for network in step.gates.baseline.networks]
    torch.testing.assert_close(torch.cat(slopes), -2 * 0.7 * figures["reward"])
    after = list(step.gates.baseline.parameters())
    assert all(value.grad is not None for value in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after))


@pytest.mark.parametrize("baseline", ["ema", "value"])
def test_later_updates_subtract_the_baseline_of_the_draws(
    few_digits: FewShotData, texts: EncodedTexts, tiny: DemoRun, baseline: str
) -> None:
    """The clipped surrogate written out, after the policies moved."""
    config = replace(tiny.metatune, objective="ppo", baseline=baseline, policy_epochs=2)
    gates = GateTraining(config, random_model(small_spec(512)).train())
    if baseline == "value":
        for parameter in gates.baseline.parameters():  # type: ignore[union-attr]
            nn.init.normal_(parameter)
    play(gates, few_digits, texts)  # the moving average starts with it
    rollout = play(gates, few_digits, texts, first=2)
    assert rollout.level is not None
    assert rollout.level.abs().min() > 0
    terms = []
    for layer, (gate, trace) in enumerate(zip(gates.model.gates, rollout.output.layers)):
        with torch.no_grad():
            gate.policy.network.out.bias += 0.1
        state, action = trace.state.flatten(0, -2), trace.action_logit
        step = gate.policy(state, action_logit=action.flatten())
        ratio = (step.log_prob.view_as(action) - trace.log_prob).exp()
        advantage = rollout.rewards[layer] - rollout.level[layer]
        advantage = advantage.view(2, *[1] * (action.dim() - 1))
        kept = ratio.clamp(1 - config.clip, 1 + config.clip)
        surrogate = torch.minimum(ratio * advantage, kept * advantage)
        bonus = config.entropy_weight * step.entropy.view_as(action)
        terms.append(-config.reinforce_weight * (surrogate + bonus).mean())
    loss, figures = gates.again(rollout)
    torch.testing.assert_close(loss, torch.stack(terms).sum())
    level = rollout.level.expand_as(rollout.rewards)
    torch.testing.assert_close(figures["baseline"], level.mean(1))


def test_movement_is_the_divergence_of_the_policy_before_from_the_one_after(
    few_digits: FewShotData, texts: EncodedTexts, tiny: DemoRun
) -> None:
    """Of outputs -2 before and 1 after in every state."""
    gates = GateTraining(tiny.metatune, random_model(small_spec(512)).train())
    last = [gate.policy.network.out for gate in gates.model.gates]
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, -2.0)
    rollout = play(gates, few_digits, texts)
    for layer in last:
        nn.init.constant_(layer.bias, 1.0)

    def policy(logit: float) -> torch.distributions.Beta:
        a, b = 10 * torch.sigmoid(torch.tensor([logit, -logit], dtype=torch.float64))
        return torch.distributions.Beta(a, b)

    want = torch.distributions.kl_divergence(policy(-2.0), policy(1.0))
    moved = gates.movement(rollout)["policy_kl"]
    torch.testing.assert_close(moved, want.float().expand(2), rtol=1e-4, atol=1e-5)


def test_the_first_step_is_compared_with_chance(
    few_digits: FewShotData, texts: EncodedTexts, tiny: DemoRun
) -> None:
    """The next one with what that step reached."""
    config = replace(tiny.metatune, rewards={"episode_improvement": 1.0})
    gates = GateTraining(config, random_model(small_spec(512)).train())
    previous = 1 / config.way
    for first in (0, 2):
        kept = gates.modules["history"].state_dict()["accuracy"]
        assert kept.item() == pytest.approx(previous)
        rollout = play(gates, few_digits, texts, first)
        reached = episode_accuracy(rollout.output.logits, rollout.query_labels)
        torch.testing.assert_close(rollout.rewards, (reached - previous).expand(2, 2))
        previous = reached.mean().item()


def test_batch_norms_rest_if_frozen_and_only_then() -> None:
    model = random_model(small_spec(512)).eval()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    others = [m for m in model.modules() if m not in norms]
    assert norms
    for frozen in (True, False, True):
        _training_mode(model, frozen)
        assert all(norm.training != frozen for norm in norms)
        assert all(module.training for module in others)
    model.backbone.requires_grad_(False)  # learns nothing: as in evaluation, whatever is asked for
    _training_mode(model, False)
    assert not any(module.training for module in model.backbone.modules())
    assert all(gate.training for gate in model.gates)


def test_the_episodes_that_select_are_not_those_of_training(
    few_digits: FewShotData,
    texts: EncodedTexts,
    tiny: DemoRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both lists of a run come from its seed; no epoch is played here."""
    seeds: dict[str, list[int]] = {}

    class Seen(Step):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            seeds["training"] = [sampler.seed for sampler in self.samplers]

    def monitor(*args: Any) -> EpisodeSampler:
        sampler = real(*args)
        seeds["monitor"] = [sampler.seed]
        return sampler

    real = metatune_module.monitor_sampler
    monkeypatch.setattr(metatune_module, "Step", Seen)
    monkeypatch.setattr(metatune_module, "monitor_sampler", monitor)
    spec, config = small_spec(512), replace(tiny.metatune, epochs=0, shots=[1, 2])
    run = StageRun(RunFolder(tmp_path / "run", {}), seed_everything(7), 7)
    metatune_module.metatune(config, random_model(spec), spec, few_digits, texts, run)
    assert seeds["training"] == [7, 7]
    assert seeds["monitor"][0] not in seeds["training"]


def test_mean_and_spread_of_alpha_over_an_epoch() -> None:
    """Two steps of two episodes: the spread is that of these four, not of what they stand for."""
    totals = _Totals()
    for alphas in ([[0.0, 0.2], [0.5, 0.5]], [[0.4, 0.6], [0.5, 0.5]]):
        totals.add({"loss": torch.tensor(1.0)}, torch.tensor(alphas))
    row = totals.row(Processes("cpu"))
    assert row["alpha_mean"] == pytest.approx([0.3, 0.5])
    assert row["alpha_std"] == pytest.approx([0.05**0.5, 0.0])
