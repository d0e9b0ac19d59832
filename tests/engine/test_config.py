"""Configuration: nested mappings in and out, unknown keys and impossible values refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dvla_fast.cli import main
from dvla_fast.engine.ablate import run_ablate
from dvla_fast.engine.compare import run_compare
from dvla_fast.engine.config import (
    AblateRun,
    DemoRun,
    EvaluateConfig,
    EvaluateRun,
    ExecutionConfig,
    MetatuneConfig,
    MetatuneRun,
    ModelConfig,
    PretrainConfig,
    PretrainRun,
    demo_config,
)
from dvla_fast.engine.demo import run_demo
from dvla_fast.engine.evaluate import run_evaluate
from dvla_fast.engine.metatune import run_metatune
from dvla_fast.engine.predict_images import run_predict
from dvla_fast.engine.pretrain import run_pretrain
from dvla_fast.engine.settings import (
    UsageError,
    checked,
    differences,
    from_mapping,
    read_settings,
    to_dict,
)
from dvla_fast.engine.tool_config import CompareRun, DataCheck, PredictImages, ReportRun
from dvla_fast.nn import DVLA, BetaPolicy, CategoricalPolicy, RLAGate
from dvla_fast.nn.policy import MLPPolicy, build_policy
from dvla_fast.nn.prototype import prototype_logits
from dvla_fast.report.page import run_report
from dvla_fast.rl import (
    ClippedSurrogate,
    EMABaseline,
    GroupRelative,
    PolicyLoss,
    PreferencePairs,
    ReinforceLoss,
    ValueBaseline,
    build_baseline,
    build_objective,
    layer_rewards,
    total_loss,
)


@pytest.mark.parametrize("quick", [False, True])
def test_round_trip(quick: bool) -> None:
    config = demo_config(quick)
    assert from_mapping(DemoRun, to_dict(config)) == config


def test_shipped_yaml_is_the_demo() -> None:
    path = Path(__file__).parents[2] / "configs" / "demo.yaml"
    assert from_mapping(DemoRun, yaml.safe_load(path.read_text())) == demo_config()


USUAL = MetatuneConfig()


@pytest.mark.parametrize(
    ("functions", "defaults"),
    [
        ((ClippedSurrogate, GroupRelative, build_objective), {"clip": USUAL.clip}),
        ((PreferencePairs, build_objective), {"beta": USUAL.preference_beta}),
        ((EMABaseline, build_baseline), {"momentum": USUAL.baseline_momentum}),
        (
            (PolicyLoss,),
            {
                "normalise": USUAL.normalise_advantage,
                "discount": USUAL.discount,
                "kl_weight": USUAL.kl_weight,
                "value_weight": USUAL.value_weight,
            },
        ),
        (
            (PolicyLoss, ReinforceLoss),
            {"entropy_weight": USUAL.entropy_weight, "weight": USUAL.reinforce_weight},
        ),
        (
            (layer_rewards, total_loss),
            {"lambda_sim": USUAL.lambda_sim, "lambda_imp": USUAL.lambda_imp},
        ),
        ((DVLA, prototype_logits), {"temperature": ModelConfig().temperature}),
        ((DVLA, RLAGate, build_policy, BetaPolicy), {"concentration": ModelConfig().concentration}),
        (
            (DVLA, RLAGate, build_policy, BetaPolicy, CategoricalPolicy, MLPPolicy),
            {"hidden_dim": ModelConfig().hidden_dim},
        ),
        ((ValueBaseline, build_baseline), {"hidden_dim": ModelConfig().hidden_dim}),
        ((DVLA, RLAGate, build_policy), {"fixed_alpha": ModelConfig().fixed_alpha}),
    ],
)
def test_what_nobody_gives_is_the_same_from_python(
    functions: tuple[Callable[..., Any], ...], defaults: dict[str, Any]
) -> None:
    for function in functions:
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in defaults} == defaults, function


def test_partial_mapping_keeps_the_other_defaults() -> None:
    config = from_mapping(DemoRun, {"seed": 4, "pretrain": {"epochs": 7}})
    assert (config.seed, config.pretrain.epochs) == (4, 7)
    assert config.pretrain.batch_size == DemoRun().pretrain.batch_size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 4}, r"unknown key.* sed \(did you mean seed\?\)"),
        ({"pretrain": {"epoch": 4}}, r"pretrain.epoch \(did you mean pretrain.epochs\?\)"),
        ({"pretrain": {"augment": {"flop": True}}}, r"did you mean pretrain.augment.flip\?"),
        ({"pretrain": 4}, "pretrain: expected 'name: value' settings, got 4"),
        ({"pretrain": {"epochs": 0}}, "pretrain.epochs: expected at least 1, got 0"),
        ({"evaluate": {"shots": []}}, "evaluate.shots: expected at least 1"),
        ({"evaluate": {"shots": [1, 0]}}, "evaluate.shots: expected at least 1"),
        ({"evaluate": {"shots": [5, 1, 5]}}, "evaluate.shots: 5 is there more than once"),
        ({"evaluate": {"shots": "many"}}, "evaluate.shots: expected int, got 'many'"),
        ({"evaluate": {"shots": [[1]]}}, r"evaluate.shots: expected int, got \[1\]"),
        ({"evaluate": {"way": 1}}, "evaluate.way: expected at least 2, got 1"),
        ({"metatune": {"way": 1}}, "metatune.way: expected at least 2, got 1"),
        ({"evaluate": {"fixed_alpha": 4}}, "evaluate.fixed_alpha: expected 0 to 1, got 4"),
        ({"model": {"fixed_alpha": 3}}, "model.fixed_alpha: expected 0 to 1, got 3"),
        ({"metatune": {"reference_alpha": 0.0}}, "metatune.reference_alpha: expected above 0"),
        ({"metatune": {"rewards": {"acuracy": 1}}}, "metatune.rewards: unknown 'acuracy'"),
        ({"metatune": {"rewards": {"accuracy": "high"}}}, "metatune.rewards.accuracy: expected"),
        ({"metatune": {"rewards": 1}}, "metatune.rewards: expected 'name: value' entries"),
        ({"pretrain": {"drop_path": 1}}, "pretrain.drop_path: expected at least 0 and below 1"),
        ({"model": {"text_scope": "canditate"}}, "text_scope: 'canditate' is unknown; choose one"),
        ({"model": {"alpha_scope": "batch"}}, "model.alpha_scope: 'batch' is unknown"),
        ({"model": {"policy": "gauss"}}, "model.policy: 'gauss' is unknown; choose one of beta"),
        ({"metatune": {"objective": "trpo"}}, "metatune.objective: 'trpo' is unknown"),
        ({"metatune": {"baseline": "mean"}}, "baseline: 'mean' is unknown; choose one of auto,"),
        ({"metatune": {"reference": "best"}}, "metatune.reference: 'best' is unknown"),
        ({"model": {"backbone": "vit"}}, "model.backbone: 'vit' is unknown; choose one of small,"),
        ({"model": {"normalisation": "mine"}}, "normalisation: 'mine' is unknown; choose one of a"),
        ({"data": {"resident": "maybe"}}, "data.resident: 'maybe' is unknown; choose one of auto"),
        ({"semantics": {"seen_images": "ignore"}}, "'ignore' is unknown; choose one of exclude, r"),
        ({"semantics": {"template": "first"}}, "semantics.template: 'first' is unknown"),
        ({"semantics": {"parts": "names"}}, "semantics.parts: 'names' is unknown; choose one of"),
        ({"evaluate": {"episode_list": "other"}}, "evaluate.episode_list: 'other' is unknown"),
        ({"execution": {"precision": "float16"}}, r"unknown; .* bfloat16 \(float16 would need its"),
        ({"evaluate": {"split": "tset"}}, r"evaluate.split: 'tset' .* novel \(or test\)"),
        ({"model": {"gated_layers": [2, 1]}}, "model.gated_layers: expected a list, got 2"),
        ({"seed": -1}, "seed: expected 0 to 9223372036854775807, got -1"),
        ({"seed": 2**63}, "seed: expected 0 to 9223372036854775807"),
        ({"data": {"split_seed": -1}}, "data.split_seed: expected at least 0"),
        ({"seed": True}, "seed: expected int, got True"),
        ({"pretrain": {"lr": -1.0}}, "pretrain.lr: expected at least 0"),
        ({"pretrain": {"lr": float("nan")}}, "pretrain.lr: expected a finite number, got nan"),
        ({"metatune": {"lr": "inf"}}, "metatune.lr: expected a finite number, got inf"),
        ({"model": {"level_weights": [[1, float("nan")]]}}, "expected a finite number, got nan"),
        ({"metatune": {"clip_norm": -1}}, "metatune.clip_norm: expected at least 0, got -1"),
        ({"metatune": {"entropy_weight": -0.1}}, "metatune.entropy_weight: expected at least 0"),
        ({"metatune": {"reinforce_weight": -1}}, "metatune.reinforce_weight: expected at least 0"),
        ({"metatune": {"lambda_sim": -1}}, "metatune.lambda_sim: expected at least 0"),
        ({"metatune": {"lambda_imp": -1}}, "metatune.lambda_imp: expected at least 0"),
        ({"metatune": {"baseline_momentum": 1}}, "expected at least 0 and below 1, got 1"),
        ({"metatune": {"clip": 0}}, "metatune.clip: expected above 0 and below 1, got 0"),
        ({"metatune": {"preference_beta": 0}}, "preference_beta: expected above 0, got 0"),
        ({"metatune": {"augment": {"scale": 1}}}, "augment.scale: expected at least 0 and below 1"),
        ({"pretrain": {"augment": {"shift": 2}}}, "augment.shift: expected 0 to 1, got 2"),
        ({"model": {"temperature": 0}}, "model.temperature: expected above 0, got 0"),
        ({"model": {"concentration": -10}}, "model.concentration: expected above 0, got -10"),
        ({"model": {"num_heads": 0}}, "model.num_heads: expected at least 1, got 0"),
        ({"model": {"hidden_dim": 0}}, "model.hidden_dim: expected at least 1, got 0"),
        ({"model": {"width": -8}}, "model.width: expected at least 1, got -8"),
        ({"metatune": {"backbone_lr": -1e-6}}, "metatune.backbone_lr: expected at least 0"),
        ({"pretrain": {"lr": "fast"}}, "pretrain.lr: expected float, got 'fast'"),
        ({"data": {"holdout": 1}}, "data.holdout: expected above 0 and below 1"),
        ({"metatune": {"augment": {"crop": 2}}}, "metatune.augment.crop: expected 0.01 to 1"),
        ({"pretrain": {"augment": {"crop": 0.0}}}, "augment.crop: expected 0.01 to 1"),
        ({"pretrain": {"augment": {"color_jitter": 1.5}}}, "augment.color_jitter: expected 0 to 1"),
        (
            {"metatune": {"augment": {"rand_augment": "auto"}}},
            "metatune.augment.rand_augment: 'auto' is not of the form",
        ),
        ({"data": {"dataset": 3}}, "data.dataset: expected str, got 3"),
    ],
)
def test_wrong_values(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_mapping(DemoRun, values)


@pytest.mark.parametrize("name", ["kappa", "temperature"])
def test_wrong_values_of_a_sweep(name: str) -> None:
    with pytest.raises(UsageError, match=rf"ablate.{name}: expected above 0, got \[2.0, 0\]"):
        from_mapping(AblateRun, {"ablate": {name: [2.0, 0]}})


def test_words_of_a_list_that_yaml_reads_otherwise() -> None:
    """What the command line hands on where ``true`` is no text."""
    with pytest.raises(UsageError, match=r"variants: \[visual, true\] is no list .* quotes"):
        from_mapping(AblateRun, {"ablate": {"variants": "[visual, true]"}})
    assert from_mapping(AblateRun, {"ablate": {"variants": "[x"}}).ablate.variants == ["[x"]


def test_differences_are_named() -> None:
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}}) == [
        "b.c: 2 -> 4"
    ]


def test_numbers_as_yaml_reads_them() -> None:
    config = from_mapping(DemoRun, yaml.safe_load("pretrain: {lr: 5e-4}\ndata:\n"))
    assert config.pretrain.lr == 5e-4
    assert config.data == DemoRun().data


def test_a_key_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("metatune:\n  lr: 1e-4\nseed: 1\nmetatune:\n  epochs: 3\n")
    again = r"experiment\.yaml: .*line 4: the key 'metatune' is there again, after line 1"
    with pytest.raises(UsageError, match=again):
        read_settings(str(path), MetatuneRun, MetatuneRun())
    with pytest.raises(UsageError, match=again):  # in a file that another command reads
        read_settings(str(path), PretrainRun, PretrainRun())
    for command in (["metatune", "--config"], ["ablate"]):
        assert main([*command, str(path)]) == 2
        assert "line 4: the key 'metatune' is there again" in capsys.readouterr().err
    path.write_text("metatune: {lr: 1e-4, epochs: 3, lr: 1e-3}\n")
    with pytest.raises(UsageError, match="line 1: the key 'lr' is there again"):
        read_settings(str(path), MetatuneRun, MetatuneRun())
    path.write_text(
        "metatune: &plain {lr: 1e-4, epochs: 3}\nevaluate: {episodes: 9}\n"
        "pretrain: {<<: *plain, lr: 5e-4}\n"
    )
    assert read_settings(str(path), PretrainRun, PretrainRun()).pretrain.lr == 5e-4
    assert read_settings(str(path), PretrainRun, PretrainRun()).pretrain.epochs == 3
    assert read_settings(str(path), MetatuneRun, MetatuneRun()).metatune.lr == 1e-4


def test_one_file_for_several_commands(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("pretrain: {epochs: 3}\nsemantics: {top_k: 2}\nevaluate: {episodes: 9}\n")
    assert read_settings(str(path), PretrainRun, PretrainRun()).pretrain.epochs == 3
    with pytest.raises(UsageError, match=r"unknown key.* evaluate, pretrain, semantics"):
        read_settings(str(path), DataCheck, DataCheck())
    for text, words in (
        ("evaluate: {epsodes: 3}", r"evaluate\.epsodes \(did you mean evaluate\.episodes"),
        ("metatune: {rewards: {acuracy: 1}}", r"metatune\.rewards: unknown 'acuracy'"),
        ("metatune: {way: 1}", r"experiment\.yaml: metatune\.way"),
        ("evaluate: {episode_list: autors}", r"evaluate\.episode_list: 'autors' is unknown"),
        ("semantics: {parts: names}", r"semantics\.parts: 'names' is unknown"),
        ("semantics: 3", r"semantics: expected 'name: value'"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_settings(str(path), PretrainRun, PretrainRun())
    # What was trained with is past: the reward may be one that a script of the user's registered.
    path.write_text("metatune: {rewards: {own: 1}}\nevaluate: {episodes: 9}\n")
    assert read_settings(str(path), EvaluateRun, EvaluateRun()).evaluate.episodes == 9
    path.write_text("metatune: {rewards: {own: x}}")
    with pytest.raises(UsageError, match=r"metatune\.rewards\.own"):
        read_settings(str(path), EvaluateRun, EvaluateRun())
    path.write_text("evaluate:\nsemantics:\n")
    assert read_settings(str(path), PretrainRun, PretrainRun()) == PretrainRun()
    path.write_text("")
    assert read_settings(str(path), PretrainRun, PretrainRun()) == PretrainRun()
    path.write_text("evaluation: {episodes: 9}")
    with pytest.raises(UsageError, match=r"unknown key.* evaluation"):
        read_settings(str(path), PretrainRun, PretrainRun())


@pytest.mark.parametrize("cls", [PretrainRun, MetatuneRun, EvaluateRun, AblateRun])
def test_the_record_of_a_command_serves_the_others(cls: type[Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for record in (demo_config(quick=True), PretrainRun(), MetatuneRun(), EvaluateRun()):
        path.write_text(yaml.safe_dump(to_dict(record) | {"seed": 7}))
        assert read_settings(str(path), cls, cls()).seed == 7
    path.write_text("quick: 3")
    with pytest.raises(UsageError, match=r"config\.yaml: quick: expected bool"):
        read_settings(str(path), cls, cls())


def test_a_list_may_be_given_by_its_only_entry() -> None:
    config = from_mapping(DemoRun, {"evaluate": {"shots": 3}, "metatune": {"shots": [2]}})
    assert (config.evaluate.shots, config.metatune.shots) == ([3], [2])
    assert from_mapping(EvaluateRun, {"checkpoints": "a"}).checkpoints == ["a"]


@pytest.mark.parametrize(
    ("given", "kept"), [("test", "novel"), ("val", "monitor"), ("train", "base"), ("base", "base")]
)
def test_splits_have_the_names_of_data_sets_too(given: str, kept: str) -> None:
    assert from_mapping(EvaluateRun, {"evaluate": {"split": given}}).evaluate.split == kept
    assert EvaluateConfig(split=given).split == kept


@pytest.mark.parametrize(
    ("run", "config"),
    [
        (run_pretrain, PretrainRun(pretrain=PretrainConfig(batch_size=0))),
        (run_metatune, MetatuneRun(metatune=MetatuneConfig(reference="epcoh"))),
        (run_evaluate, EvaluateRun(evaluate=EvaluateConfig(split="tset"))),
        (run_demo, DemoRun(execution=ExecutionConfig(precision="half"))),
        (run_ablate, AblateRun(seed="one")),  # type: ignore[arg-type]
        (run_predict, PredictImages(device=0)),  # type: ignore[arg-type]
        (run_compare, CompareRun(classes=-1)),
        (run_report, ReportRun(episodes="first")),  # type: ignore[arg-type]
    ],
)
def test_settings_made_in_python_are_checked_as_a_commands_are(
    run: Callable[[Any], Any], config: Any
) -> None:
    with pytest.raises(
        UsageError, match=rf"^{type(config).__name__}: [a-z_.]+: .*(expected|unknown)"
    ):
        run(config)


def test_warm_up_without_an_end_is_refused_in_python_too(tmp_path: Path) -> None:
    config = PretrainRun(output=str(tmp_path / "run"), device="cpu")
    config.pretrain = PretrainConfig(epochs=2, warmup_epochs=2)
    with pytest.raises(UsageError, match=r"2 of 2 epoch.*never reach.*warmup_epochs 0$"):
        run_pretrain(config, quiet=True)
    assert not (tmp_path / "run").exists()


def test_paths_and_numbers_of_other_libraries_are_settings_too() -> None:
    config = MetatuneRun(checkpoint=Path("a/b"), seed=np.int64(3))  # type: ignore[arg-type]
    config.metatune.lr = np.float32(0.5)  # type: ignore[assignment]
    config.metatune.shots = [np.int32(5)]  # type: ignore[list-item]
    known = checked(config)
    assert (known.checkpoint, known.seed, known.metatune.lr) == ("a/b", 3, 0.5)
    assert known.metatune.shots == [5]
    assert (type(known.seed), type(known.metatune.lr)) == (int, float)
