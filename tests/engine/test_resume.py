"""A real process is killed with SIGKILL; resumed, it ends with bit-identical weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dvla_fast.engine.checkpoint import load_checkpoint
from dvla_fast.engine.run_folder import read_metrics

SETTINGS = [
    "--device=cpu",
    "--model.width=8",
    "--model.num_heads=4",
    "--model.hidden_dim=8",
    "--pretrain.epochs=4",
    "--pretrain.warmup_epochs=1",
    "--pretrain.validate_every=2",
    "--pretrain.validation_episodes=10",
    "--metatune.epochs=4",
    "--metatune.steps_per_epoch=2",
    "--metatune.episodes_per_step=2",
    "--metatune.query=5",
    "--metatune.validate_every=2",
    "--metatune.validation_episodes=4",
    "--evaluate.episodes=4",
    "--evaluate.shots=[1]",
]
# One thread: quick for so small a model. Two would be as exact.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvla_fast", "demo", *arguments]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(
        command("--output", str(folder), *SETTINGS), check=True, capture_output=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("marker", ["pre-train: epoch 2/4", "meta-tune: epoch 1/4"])
def test_killed_run_resumes_bit_identically(
    uninterrupted: Path, tmp_path: Path, marker: str
) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        command("--output", str(folder), *SETTINGS), stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:  # ends with the process if the marker never comes
            if marker in line:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()

    # The settings come from the folder: they need not be repeated.
    subprocess.run(
        command("--resume", "--output", str(folder)), check=True, capture_output=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    for name in ("pretrain-last", "pretrain-best", "metatune-last", "metatune-best"):
        expected, _ = load_checkpoint(uninterrupted / "checkpoints" / f"{name}.safetensors")
        tensors, _ = load_checkpoint(folder / "checkpoints" / f"{name}.safetensors")
        assert tensors.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensors[key], tensor), f"{name}: {key}"
    assert read_metrics(folder) == read_metrics(uninterrupted)
