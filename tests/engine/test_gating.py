"""Meta-tuning with every objective, baseline and reward; what does not fit is refused early."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.policy_gradient import RECIPES as DIGITS_RECIPES
from benchmarks.policy_gradient import digits_table
from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine import metatune as metatune_module
from dvla_fast.engine import metatune_steps
from dvla_fast.engine.build import seed_everything, split_classes
from dvla_fast.engine.checkpoint import load_checkpoint
from dvla_fast.engine.config import DemoRun, MetatuneConfig, ModelConfig
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.gating import Episodes, GateTraining, Rollout, _repeat
from dvla_fast.engine.models import backbone_spec, build_model, model_spec
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.settings import UsageError
from dvla_fast.engine.stages import StageRun
from dvla_fast.engine.texts import build_texts
from dvla_fast.nn import DVLA
from dvla_fast.ops import value_checks
from dvla_fast.rl import BASELINES, OBJECTIVES, reward_names


def make_model(config: DemoRun) -> tuple[DVLA, dict[str, Any]]:
    seed_everything(1)
    spec = model_spec(config.model, backbone_spec(config.model, 1, 16), 512)
    return build_model(spec), spec


def tune(folder: RunFolder, data: FewShotData, config: DemoRun) -> Path:
    texts, _ = build_texts(config.semantics, data, torch.device("cpu"))
    model, spec = make_model(config)
    rng = seed_everything(2)
    run = StageRun(folder, rng)
    return metatune_module.metatune(config.metatune, model, spec, data, texts, run)


def with_gating(config: DemoRun, **settings: Any) -> DemoRun:
    return dataclasses.replace(config, metatune=dataclasses.replace(config.metatune, **settings))


def episodes_of(data: FewShotData, config: DemoRun, count: int = 2) -> Episodes:
    texts, _ = build_texts(config.semantics, data, torch.device("cpu"))
    batch = EpisodeSampler(data.base, 5, 1, 3, 0).batch(0, count)
    images = data.normalise(data.base.images.float() / 255)
    text = texts.episodes(split_classes(data, "base")[batch.classes])
    return Episodes(
        images[batch.support], batch.support_labels, images[batch.query], batch.query_labels, text
    )


def rollout_of(data: FewShotData, config: DemoRun) -> tuple[GateTraining, Rollout]:
    model, _ = make_model(config)
    gates = GateTraining(config.metatune, model.train())
    gates.begin_epoch()
    return gates, gates.play(episodes_of(data, config), 5)


RECIPES: dict[str, dict[str, Any]] = {
    "no baseline": {"baseline": "none"},
    "value network": {"baseline": "value"},
    "leave-one-out": {"baseline": "leave-one-out"},
    "normalised, discounted": {"normalise_advantage": True, "discount": 1.0},
    "kl": {"kl_weight": 0.1, "reference": "epoch"},
    "ppo": {"objective": "ppo"},
    "ppo, value": {"objective": "ppo", "baseline": "value", "samples": 2},
    "grpo": {"objective": "grpo", "kl_weight": 0.1},
    "counterfactual": {"objective": "counterfactual"},
    "counterfactual, epoch": {"objective": "counterfactual", "reference": "epoch", "samples": 2},
    "dpo": {"objective": "dpo"},
    "dpo, epoch": {"objective": "dpo", "reference": "epoch"},
    "pathwise": {"objective": "pathwise"},
    "rewards": {"rewards": {"accuracy": 1.0, "episode_improvement": 0.5, "log_likelihood": 0.1}},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train_the_policies(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, recipe: str
) -> None:
    config = with_gating(tiny, epochs=1, **RECIPES[recipe])
    before, _ = make_model(config)
    folder = RunFolder(tmp_path / "run", {})
    best = tune(folder, few_digits, config)
    tensors, _ = load_checkpoint(best, ("metatune",))
    for name, tensor in before.state_dict().items():
        if name.endswith("policy.network.out.weight"):
            assert not torch.equal(tensors[f"model.{name}"], tensor), name
    (row,) = folder.rows("metatune")
    keys = ["policy_kl", "entropy", "alpha", "alpha_spread", "advantage_mean", "advantage_std"]
    keys += ["gradient_variance", "gradient_mean"]
    keys += ["clip_fraction"] if recipe.startswith(("ppo", "grpo")) else []
    keys += ["value_error"] if "value" in recipe else []
    keys += ["kl_reference"] if recipe in ("kl", "grpo") else []
    keys += [f"reward_{name}" for name in RECIPES[recipe].get("rewards", {})]
    for key in keys:
        assert len(row[key]) == 2, key
        assert all(value == value for value in row[key]), key
    assert row["collapsed"] == []
    assert all(value > 0 for value in row["policy_kl"])


@pytest.mark.parametrize("scopes", [
    ("image", "episode"), ("image", "class"), ("episode", "class"), ("image", "candidate"),
    ("episode", "candidate"),
])  # fmt: skip
@pytest.mark.parametrize("recipe", ["ppo, value", "dpo", "counterfactual, epoch"])
def test_other_scopes(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, recipe: str, scopes: tuple[str, str]
) -> None:
    model = dataclasses.replace(tiny.model, alpha_scope=scopes[0], text_scope=scopes[1])
    config = with_gating(tiny, epochs=1, steps_per_epoch=1, **RECIPES[recipe])
    folder = RunFolder(tmp_path / "run", {})
    tune(folder, few_digits, dataclasses.replace(config, model=model))
    assert folder.rows("metatune")[0]["loss"] > 0


@pytest.mark.parametrize("recipe", ["ppo, value", "counterfactual, epoch", "rewards"])
def test_an_interrupted_run_continues_to_the_same_weights(
    tmp_path: Path,
    few_digits: FewShotData,
    tiny: DemoRun,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
) -> None:
    config = with_gating(tiny, **RECIPES[recipe])
    expected, _ = load_checkpoint(tune(RunFolder(tmp_path / "whole", {}), few_digits, config))
    real, calls = metatune_steps.total_loss, []

    def stops_in_the_second_epoch(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(metatune_steps, "total_loss", stops_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        tune(RunFolder(tmp_path / "run", {}), few_digits, config)
    monkeypatch.setattr(metatune_steps, "total_loss", real)
    best = tune(RunFolder(tmp_path / "run", {}, resume=True), few_digits, config)
    tensors, _ = load_checkpoint(best)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_the_accuracy_of_the_step_before_is_kept(few_digits: FewShotData, tiny: DemoRun) -> None:
    """For the reward that compares with it; in the checkpoint as "history.accuracy"."""
    gates, rollout = rollout_of(few_digits, with_gating(tiny, rewards={"episode_improvement": 1.0}))
    right = rollout.output.logits.argmax(-1) == rollout.query_labels
    kept = gates.modules["history"].state_dict()
    assert kept["accuracy"].item() == pytest.approx(right.float().mean().item())
    gates.modules["history"].load_state_dict({"accuracy": torch.tensor(0.25)})
    again = gates.play(episodes_of(few_digits, tiny), 5)
    right = again.output.logits.argmax(-1) == again.query_labels
    expected = right.float().mean(1) - 0.25
    torch.testing.assert_close(again.reward_parts["episode_improvement"][-1], expected)
    assert "history" not in rollout_of(few_digits, tiny)[0].modules


def test_draws_of_one_episode_share_the_first_gates_state(
    few_digits: FewShotData, tiny: DemoRun
) -> None:
    _, rollout = rollout_of(few_digits, with_gating(tiny, objective="grpo", samples=3))
    first = rollout.output.layers[0]
    assert first.state is not None
    states, logits = first.state.view(2, 3, -1), first.action_logit.view(2, 3)
    torch.testing.assert_close(states, states[:, :1].expand_as(states))
    assert len(set(logits.flatten().tolist())) == 6
    assert not torch.equal(states[0], states[1])
    assert rollout.rewards.shape == (2, 6)


def test_the_cached_prefix_changes_nothing(few_digits: FewShotData, tiny: DemoRun) -> None:
    """K = 2 from the prefix equals the whole forward pass with the same gates."""
    config = with_gating(tiny, baseline="leave-one-out", samples=2)
    gates, rollout = rollout_of(few_digits, config)
    episodes = episodes_of(few_digits, config)
    whole = gates.model(
        episodes.support,
        episodes.support_labels,
        episodes.query,
        episodes.text,
        way=5,
        action_logit=[trace.action_logit[::2] for trace in rollout.output.layers],
    )
    torch.testing.assert_close(rollout.output.logits[::2], whole.logits, rtol=1e-4, atol=1e-4)
    rollout.output.logits.sum().backward()
    assert all(p.grad is not None for p in gates.model.backbone.parameters())


def test_the_fixed_reference_is_a_constant_gate(few_digits: FewShotData, tiny: DemoRun) -> None:
    """Its rewards are those of replaying that alpha, and no draw of the policy changes them."""
    config = with_gating(tiny, objective="counterfactual", reference_alpha=0.3, samples=2)
    gates, rollout = rollout_of(few_digits, config)
    with torch.no_grad():
        for gate in gates.model.gates:
            gate.policy.network.out.bias.fill_(2.0)
    again = gates.play(episodes_of(few_digits, config), 5)
    first, second = rollout.reference.rewards, again.reference.rewards
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first[:, ::2], first[:, 1::2])
    assert not torch.equal(rollout.rewards, again.rewards)
    torch.testing.assert_close(again.signal, again.rewards - second)
    assert all(gate.policy.training for gate in gates.model.gates)  # the learner sits there again


def test_policy_updates_reevaluate_the_stored_actions(
    few_digits: FewShotData, tiny: DemoRun
) -> None:
    gates, rollout = rollout_of(few_digits, with_gating(tiny, objective="ppo"))
    loss, figures = gates.again(rollout)  # nothing moved yet: the ratio is 1
    assert figures["clip_fraction"].tolist() == [0.0, 0.0]
    loss.backward()
    for name, parameter in gates.model.named_parameters():
        assert (parameter.grad is not None) == (".policy." in name), name
    with torch.no_grad():
        for gate in gates.model.gates:
            gate.policy.network.out.bias += 3.0
    _, figures = gates.again(rollout)
    assert min(figures["clip_fraction"].tolist()) > 0.5
    assert min(gates.movement(rollout)["policy_kl"].tolist()) > 1.0


def test_pathwise_gradient_reaches_the_policy_through_the_classifier(
    few_digits: FewShotData, tiny: DemoRun
) -> None:
    for objective in ("pathwise", "reinforce"):
        gates, rollout = rollout_of(few_digits, with_gating(tiny, objective=objective))
        rollout.output.logits.square().sum().backward()
        for gate in gates.model.gates:
            gradient = gate.policy.network.out.weight.grad
            assert (gradient is not None and bool(gradient.any())) == (objective == "pathwise")


def test_a_step_reads_nothing_from_the_device(
    few_digits: FewShotData, tiny: DemoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would wait for a GPU raises, whatever the recipe; a GPU's values are not checked."""
    monkeypatch.setattr(value_checks, "_enabled", False)
    for recipe in RECIPES.values():
        gates, _ = rollout_of(few_digits, with_gating(tiny, **recipe))
        episodes = episodes_of(few_digits, tiny)

        def refuse(*_: Any) -> Any:
            raise AssertionError("a host synchronisation")

        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
                patch.setattr(Tensor, name, refuse)
            rollout = gates.play(episodes, 5)
            gates.again(rollout) if gates.loss.objective.repeatable else None
            gates.extra_loss(rollout)
            gates.movement(rollout)


def test_collapse_is_warned_of_once_a_layer(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metatune_module.GateTraining

    class Collapsed(real):
        def __init__(self, config: MetatuneConfig, model: DVLA, processes: Processes) -> None:
            super().__init__(config, model, processes)
            with torch.no_grad():
                model.gates[1].policy.network.out.bias.fill_(-9.0)

    monkeypatch.setattr(metatune_module, "GateTraining", Collapsed)
    folder = RunFolder(tmp_path / "run", {})
    with pytest.warns(RuntimeWarning, match="stage 3, block 0 has collapsed") as caught:
        tune(folder, few_digits, tiny)
    assert len([w for w in caught if "collapsed" in str(w.message)]) == 1
    assert [row["collapsed"] for row in folder.rows("metatune")] == [[1], [1]]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"clip": 0.5}, "clip"),
        ({"reference": "epoch"}, "reference"),
        ({"reference": "epoch", "kl_weight": 0.1, "reference_alpha": 0.3}, "reference_alpha"),
        ({"value_weight": 3.0}, "value_weight"),
        ({"baseline": "none", "baseline_momentum": 0.5}, "baseline_momentum"),
        ({"rewards": {"accuracy": 1.0}, "lambda_sim": 0.9}, "lambda_sim"),
    ],
)
def test_settings_without_effect_are_told(
    tiny: DemoRun, settings: dict[str, Any], name: str
) -> None:
    model, _ = make_model(tiny)
    with pytest.warns(UserWarning, match=f"metatune.{name} has no effect here"):
        GateTraining(dataclasses.replace(tiny.metatune, **settings), model)


@pytest.mark.parametrize("policy", ["static", "fixed", "mlp"])
def test_settings_of_a_policy_loss_that_is_nought_are_told(tiny: DemoRun, policy: str) -> None:
    gates = dataclasses.replace(tiny.model, policy=policy)
    model, _ = make_model(dataclasses.replace(tiny, model=gates))
    for name, value in {
        "baseline": "value",
        "discount": 0.5,
        "entropy_weight": 0.1,
        "lambda_imp": 0.5,
        "rewards": {"accuracy": 1.0},
    }.items():
        with pytest.warns(UserWarning, match=f"metatune.{name} has no effect here.* draws its"):
            GateTraining(dataclasses.replace(tiny.metatune, **{name: value}), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GateTraining(dataclasses.replace(tiny.metatune, baseline="ema"), model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "ppo", "clip": 0.5, "baseline_momentum": 0.5, "lambda_imp": 0.2},
        {"kl_weight": 0.1, "reference_alpha": 0.3},
        {"baseline": "value", "value_weight": 3.0, "rewards": {"accuracy": 1.0}},
    ],
)
def test_settings_with_effect_are_not(tiny: DemoRun, settings: dict[str, Any]) -> None:
    model, _ = make_model(tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GateTraining(dataclasses.replace(tiny.metatune, **settings), model)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"objective": "trpo"}, "objective: unknown 'trpo'"),
        ({"baseline": "mean"}, "baseline: unknown 'mean'"),
        ({"rewards": {"glory": 1.0}}, "rewards: unknown 'glory'"),
        ({"objective": "ppo", "clip": 1.5}, r"clip: expected a number in \(0, 1\)"),
        ({"objective": "dpo", "samples": 3}, "samples: dpo compares pairs, got 3"),
        ({"objective": "grpo", "samples": 1}, "samples: expected at least 2"),
        ({"baseline": "leave-one-out", "samples": 1}, "leave-one-out needs at least 2"),
        ({"objective": "grpo", "baseline": "ema"}, "baseline: grpo takes none, got 'ema'"),
        ({"policy_epochs": 3}, "policy_epochs: reinforce is exact for fresh draws only"),
        ({"objective": "counterfactual", "reference_alpha": 1.0}, r"alpha: expected .* \(0, 1\)"),
        ({"freeze_norm": False, "samples": 2}, "freeze_norm: several passes"),
        ({"freeze_norm": False, "objective": "counterfactual"}, "freeze_norm: several passes"),
        ({"discount": 2.0}, r"discount: expected a number in \[0, 1\]"),
        ({"discount": 0.5, "objective": "dpo"}, "discount: PreferencePairs compares whole"),
        ({"normalise_advantage": True, "episodes_per_step": 1}, "two or more episodes"),
        ({"normalise_advantage": True, "objective": "dpo"}, "normalise: PreferencePairs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tiny: DemoRun, settings: dict[str, Any], match: str
) -> None:
    model, _ = make_model(tiny)
    with pytest.raises(UsageError, match=match):
        GateTraining(with_gating(tiny, **settings).metatune, model)


def test_advantages_are_normalised_within_a_process(tiny: DemoRun) -> None:
    model, _ = make_model(tiny)
    processes = Processes("cpu")
    processes.count = 2
    settings = {"normalise_advantage": True, "episodes_per_step": 2}
    with pytest.raises(UsageError, match="two or more episodes a step for each process"):
        GateTraining(with_gating(tiny, **settings).metatune, model, processes)
    GateTraining(with_gating(tiny, samples=2, **settings).metatune, model, processes)


def test_draws_of_one_episode_are_compared_with_each_other(tiny: DemoRun) -> None:
    config = with_gating(tiny, baseline="leave-one-out").metatune
    gates = GateTraining(config, make_model(tiny)[0])
    assert gates.samples == 4
    assert gates.baseline is not None
    assert gates.baseline.samples == 4


def test_statistics_may_move_where_an_episode_passes_once(tiny: DemoRun) -> None:
    config = with_gating(tiny, freeze_norm=False).metatune
    assert GateTraining(config, make_model(tiny)[0]).samples == 1


def test_draws_of_one_episode_have_its_padding(few_digits: FewShotData, tiny: DemoRun) -> None:
    episodes = episodes_of(few_digits, tiny)
    mask = torch.rand(episodes.text.tokens.shape[:2]) < 0.5
    repeated = _repeat(episodes._replace(text=episodes.text._replace(mask=mask)), 3).text
    assert repeated.mask is not None
    for place in range(6):
        assert torch.equal(repeated.mask[place], mask[place // 3])
        assert torch.equal(repeated.tokens[place], episodes.text.tokens[place // 3])


def test_accuracy_of_preferences_counts_untied_pairs() -> None:
    """Steps of 1, 0 and 3 untied pairs of 4: three of the four are right."""

    def row_of(*steps: tuple[float, float]) -> dict[str, Any]:
        totals = metatune_steps._Totals()
        for accuracy, ties in steps:
            figures = {"preference_accuracy": accuracy, "preference_ties": ties, "loss": 0.0}
            totals.add({k: torch.tensor(v) for k, v in figures.items()}, torch.zeros(1, 4))
        return totals.row(Processes("cpu"))

    row = row_of((0.0, 0.75), (math.nan, 1.0), (1.0, 0.25))
    assert row["preference_accuracy"] == pytest.approx(0.75)
    assert row["preference_ties"] == pytest.approx(2 / 3)
    assert math.isnan(row_of((math.nan, 1.0))["preference_accuracy"])


@pytest.mark.parametrize(
    ("policy", "settings", "match"),
    [
        ("static", {"objective": "ppo"}, "ppo needs a policy that draws its gates"),
        ("fixed", {"kl_weight": 0.1}, "needs a policy that draws"),
        ("categorical", {"objective": "pathwise"}, "pathwise needs the beta policy"),
        ("categorical", {"objective": "dpo"}, "fixed needs the beta policy; choose epoch"),
    ],
)
def test_policies_that_do_not_fit_are_refused(
    tiny: DemoRun, policy: str, settings: dict[str, Any], match: str
) -> None:
    tiny.model.policy = policy
    model, _ = make_model(tiny)
    with pytest.raises(UsageError, match=match):
        GateTraining(with_gating(tiny, **settings).metatune, model)


@pytest.mark.parametrize("policy", ["categorical", "static", "fixed", "mlp"])
def test_other_policies_still_train(
    tmp_path: Path, few_digits: FewShotData, tiny: DemoRun, policy: str
) -> None:
    tiny.model = dataclasses.replace(tiny.model, policy=policy)
    settings = {"objective": "dpo", "reference": "epoch"} if policy == "categorical" else {}
    folder = RunFolder(tmp_path / "run", {})
    tune(folder, few_digits, with_gating(tiny, epochs=1, **settings))
    row = folder.rows("metatune")[0]
    assert ("policy_kl" in row) == (policy == "categorical")


def test_documented_digits_table(tmp_path: Path, tiny: DemoRun) -> None:
    """`python -m benchmarks.policy_gradient --digits`, smaller."""
    table = digits_table(tiny, tmp_path)
    assert list(table) == list(DIGITS_RECIPES)
    assert all(len(row) == 2 and min(row) > 0 for row in table.values())


def test_help_names_every_choice() -> None:
    texts = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(MetatuneConfig)}
    for field, names in (
        ("objective", OBJECTIVES),
        ("baseline", BASELINES),
        ("rewards", reward_names()),
    ):
        for name in names:
            assert name in texts[field]
    assert ModelConfig().policy == "beta"
    assert (MetatuneConfig().objective, MetatuneConfig().baseline) == ("reinforce", "auto")


def test_a_fixed_gate_without_its_policy_is_told(tiny: DemoRun) -> None:
    model = dataclasses.replace(tiny.model, fixed_alpha=0.3)
    with pytest.warns(UserWarning, match=r"model\.fixed_alpha has no effect here"):
        model_spec(model, backbone_spec(model, 1, 16), 512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed = model_spec(
            dataclasses.replace(model, policy="fixed"), backbone_spec(model, 1, 16), 512
        )
    assert fixed["fixed_alpha"] == 0.3
