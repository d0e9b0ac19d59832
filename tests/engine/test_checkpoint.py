"""Checkpoints: exact round trips, atomic replacement, and every kind of wrong file refused."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import nn

from dvla_fast import files
from dvla_fast.engine.checkpoint import (
    load_checkpoint,
    load_weights,
    pack_optimizer,
    pack_rng,
    save_checkpoint,
    unpack_optimizer,
    unpack_rng,
)
from dvla_fast.errors import CheckpointError, OutputError, TrainingError

TENSORS = {
    "weight": torch.randn(3, 4),
    "half": torch.randn(2).bfloat16(),
    "count": torch.tensor(7),
    "flag": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, TENSORS, {"kind": "pretrain", "epoch": 3})
    return path


def test_round_trip_is_exact(saved: Path) -> None:
    tensors, info = load_checkpoint(saved)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert (info["kind"], info["epoch"]) == ("pretrain", 3)
    assert json.loads(saved.with_suffix(".json").read_text())["epoch"] == 3
    assert sorted(path.name for path in saved.parent.iterdir()) == [
        "last.json",
        "last.safetensors",
    ]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"last\.safetensors: not a complete"):
        load_checkpoint(saved)


def test_flipped_bit(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(saved)


def test_what_a_resumed_run_needs_is_not_in_the_readable_copy(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.safetensors", TENSORS, {"kind": "x", "resume": {"step": 3}})
    assert "resume" not in json.loads((tmp_path / "last.json").read_text())
    assert load_checkpoint(tmp_path / "last.safetensors")[1]["resume"] == {"step": 3}


def test_foreign_files(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(CheckpointError, match="not a dvla-fast checkpoint"):
        load_checkpoint(tmp_path / "other.safetensors")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_checkpoint(tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_another_kind(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="needs 'metatune'"):
        load_checkpoint(saved, ("metatune",))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_never_replace_good_ones(saved: Path, bad: float) -> None:
    before = saved.read_bytes()
    with pytest.raises(TrainingError, match="'weight' holds NaN or infinity"):
        save_checkpoint(saved, {"weight": torch.tensor([1.0, bad])}, {"kind": "pretrain"})
    assert saved.read_bytes() == before


def test_a_failed_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", no_space)
    with pytest.raises(OutputError, match="No space left"):
        save_checkpoint(saved, TENSORS, {"kind": "pretrain"})
    assert saved.read_bytes() == before
    assert not [name for name in os.listdir(saved.parent) if name.endswith(".tmp")]


def test_a_full_disk_is_told_with_what_to_do(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors has an error of its own for it."""
    before = saved.read_bytes()

    def full(*given: object, **more: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OutputError, match=r"No space left .*free space and continue with --resume"):
        save_checkpoint(saved, {"a": torch.zeros(2)}, {"kind": "metatune"})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.glob(".*")] == []


def test_another_model_is_refused_untouched() -> None:
    module = nn.Linear(4, 3)
    before = module.weight.detach().clone()
    for given, message in [
        ({"model.weight": torch.zeros(3, 4)}, "lacks bias"),
        ({"model.weight": torch.zeros(3, 5), "model.bias": torch.zeros(3)}, r"is \(3, 5\)"),
        (
            {f"model.{name}": torch.zeros(3, 4) for name in ("weight", "bias", "scale")},
            "unknown scale",
        ),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_weights(module, given, "model.", "x.safetensors")
    assert torch.equal(module.weight, before)


def test_optimizer_and_random_states_round_trip(tmp_path: Path) -> None:
    def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            loss = module(torch.randn(5, 4) + random.random() + float(rng.random())).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.Linear(4, 3)
        groups = [{"params": [module.weight], "lr": 0.1}, {"params": [module.bias], "lr": 0.01}]
        return module, torch.optim.AdamW(groups)

    rng = np.random.Generator(np.random.PCG64(3))
    module, optimizer = build()
    train(module, optimizer, 3)
    tensors, scalars = pack_optimizer(optimizer)
    rng_tensors, rng_info = pack_rng(rng)
    path = tmp_path / "state.safetensors"
    weights = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    save_checkpoint(
        path, {**weights, **tensors, **rng_tensors}, {"kind": "x", "o": scalars, "r": rng_info}
    )
    train(module, optimizer, 3)

    other, other_optimizer = build()
    loaded, info = load_checkpoint(path)
    load_weights(other, loaded, "model.", path)
    unpack_optimizer(other_optimizer, loaded, info["o"])
    unpack_rng(rng, loaded, info["r"])
    train(other, other_optimizer, 3)
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(other.bias, module.bias)
