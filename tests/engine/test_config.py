"""Configuration: nested mappings in and out, unknown keys and impossible values refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dvla_fast.engine.config import DemoRun, PretrainRun, demo_config
from dvla_fast.engine.settings import UsageError, differences, from_mapping, read_settings, to_dict
from dvla_fast.engine.tool_config import DataCheck


@pytest.mark.parametrize("quick", [False, True])
def test_round_trip(quick: bool) -> None:
    config = demo_config(quick)
    assert from_mapping(DemoRun, to_dict(config)) == config


def test_shipped_yaml_is_the_demo() -> None:
    path = Path(__file__).parents[2] / "configs" / "demo.yaml"
    assert from_mapping(DemoRun, yaml.safe_load(path.read_text())) == demo_config()


def test_partial_mapping_keeps_the_other_defaults() -> None:
    config = from_mapping(DemoRun, {"seed": 4, "pretrain": {"epochs": 7}})
    assert (config.seed, config.pretrain.epochs) == (4, 7)
    assert config.pretrain.batch_size == DemoRun().pretrain.batch_size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 4}, "unknown key.* sed"),
        ({"pretrain": {"epoch": 4}}, "unknown key.* epoch in PretrainConfig"),
        ({"pretrain": 4}, "expected settings of PretrainConfig"),
        ({"pretrain": {"epochs": 0}}, "epochs must be at least 1"),
        ({"evaluate": {"shots": []}}, "shots must be at least 1"),
        ({"evaluate": {"shots": [1, 0]}}, "shots must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": True}, "seed: expected int, got True"),
        ({"pretrain": {"lr": -1.0}}, "lr must be at least 0"),
        ({"metatune": {"backbone_lr": -1e-6}}, "backbone_lr must be at least 0"),
        ({"pretrain": {"lr": "fast"}}, "lr: expected float, got 'fast'"),
        ({"data": {"dataset": 3}}, "dataset: expected str, got 3"),
    ],
)
def test_wrong_values(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_mapping(DemoRun, values)


def test_differences_are_named() -> None:
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}}) == [
        "b.c: 2 -> 4"
    ]


def test_numbers_as_yaml_reads_them() -> None:
    config = from_mapping(DemoRun, yaml.safe_load("pretrain: {lr: 5e-4}\ndata:\n"))
    assert config.pretrain.lr == 5e-4
    assert config.data == DemoRun().data


def test_one_file_for_several_commands(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("pretrain: {epochs: 3}\nsemantics: {top_k: 2}\nevaluate: {episodes: 9}\n")
    assert read_settings(str(path), PretrainRun, PretrainRun()).pretrain.epochs == 3
    with pytest.raises(UsageError, match=r"unknown key.* evaluate, pretrain, semantics"):
        read_settings(str(path), DataCheck, DataCheck())
    path.write_text("")
    assert read_settings(str(path), PretrainRun, PretrainRun()) == PretrainRun()
    path.write_text("evaluation: {episodes: 9}")
    with pytest.raises(UsageError, match=r"unknown key.* evaluation"):
        read_settings(str(path), PretrainRun, PretrainRun())
