"""Two gloo processes end with the weights of one: same batches, same draws, shared statistics."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dvla_fast.cli import main
from dvla_fast.engine import distributed
from dvla_fast.engine.checkpoint import load_checkpoint
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.run_folder import read_metrics
from dvla_fast.engine.settings import UsageError
from dvla_fast.nn.backbones.visformer import _normed
from tests.data import trees

# 640 images: the batches fall into equal shares to the last one.
SHARED = [
    "--device=cpu", "--data.holdout=0.28", "--model.width=8", "--model.num_heads=4",
    "--model.hidden_dim=8",
]  # fmt: skip
PRETRAIN = [
    "pretrain", *SHARED, "--pretrain.epochs=1", "--pretrain.batch_size=128",
    "--pretrain.warmup_epochs=0", "--pretrain.validation_episodes=8", "--pretrain.views=2",
    "--pretrain.augment.color_jitter=0.2", "--pretrain.augment.crop=0.5",
]  # fmt: skip
METATUNE = [
    "metatune", *SHARED, "--metatune.epochs=2", "--metatune.steps_per_epoch=2",
    "--metatune.episodes_per_step=4", "--metatune.query=5", "--metatune.validation_episodes=4",
    "--metatune.augment.shift=0.1", "--metatune.rewards={accuracy: 1.0, episode_improvement: 1.0}",
]  # fmt: skip
# Further updates from stored draws, in which the backbone has no gradient; noise from the device.
# No class has as many attributes: a warning.
PPO = [
    *METATUNE[:-1], "--metatune.objective=ppo", "--metatune.augment.random_erasing=0.5",
    "--semantics.top_k=99",
]  # fmt: skip
HALF = [*PRETRAIN, "--execution.precision=bfloat16", "--execution.channels_last=true"]
SCRIPT = """
import atexit, sys
from torch import distributed
from dvla_fast.cli import main
atexit.register(lambda: print("in a group:", distributed.is_initialized()))  # the last to run
settings, folder = eval(sys.argv[1]), sys.argv[2]
assert main([*settings[0], f"--output={folder}/pretrain"]) == 0
start = f"--checkpoint={sys.argv[3]}/pretrain/checkpoints/pretrain-last.safetensors"
assert main([*settings[1], start, f"--output={folder}/metatune"]) == 0
assert main([*settings[2], start, f"--output={folder}/ppo"]) == 0
assert main([*settings[3], f"--output={folder}/half"]) == 0
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def launch(count: int, folder: Path, start: Path) -> None:
    port, processes = free_port(), []
    for rank in range(count):
        group = {} if count == 1 else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        arguments = [
            sys.executable,
            "-c",
            SCRIPT,
            repr([PRETRAIN, METATUNE, PPO, HALF]),
            folder,
            start,
        ]
        processes.append(
            subprocess.Popen(
                arguments,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **group},
            )
        )
    for rank, process in enumerate(processes):
        said = "".join(process.communicate(timeout=240))
        assert process.returncode == 0, said
        (folder / f"said-{rank}.txt").write_text(said)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    # Both meta-tune from one start: rounding that pre-training amplifies is not their matter.
    launch(1, folder / "one", folder / "one")
    launch(2, folder / "two", folder / "one")
    return folder / "one", folder / "two"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "stage", "tolerance"),
    [("pretrain", "pretrain", 3e-4), ("metatune", "metatune", 3e-6), ("ppo", "metatune", 3e-6)],
)
def test_same_weights(runs: tuple[Path, Path], run: str, stage: str, tolerance: float) -> None:
    name = f"{run}/checkpoints/{stage}-last.safetensors"
    (one, _), (two, _) = (load_checkpoint(run / name) for run in runs)
    assert one.keys() == two.keys()
    for key, expected in one.items():
        if key.startswith("model.") and expected.is_floating_point():
            # AdamW turns the rounding of a gradient that is zero in theory (the bias of a key) into
            # steps of the size of the rate: absolute, and wider for pre-training's rate.
            torch.testing.assert_close(two[key], expected, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_one_process_writes(runs: tuple[Path, Path]) -> None:
    for stage in ("pretrain", "metatune"):
        one, two = (read_metrics(run / stage) for run in runs)
        assert len(one) == len(two)
        assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], abs=1e-4)
        summaries = [json.loads((run / stage / "summary.json").read_text()) for run in runs]
        assert [summary["processes"] for summary in summaries] == [1, 2]


@pytest.mark.slow
def test_one_process_speaks(runs: tuple[Path, Path]) -> None:
    first, second = ((runs[1] / f"said-{rank}.txt").read_text() for rank in (0, 1))
    lines = ("digits: images of 16 pixels", "warning: ", "run folder  ", "next        dvla-fast ")
    for line in lines:
        assert line in first
        assert line not in second


@pytest.mark.slow
def test_processes_leave_their_group(runs: tuple[Path, Path]) -> None:
    """Gloo's threads have ended when Python does; one that has not can abort the process."""
    for rank in (0, 1):
        assert "in a group: False" in (runs[1] / f"said-{rank}.txt").read_text()


@pytest.mark.slow
def test_mixed_precision(runs: tuple[Path, Path]) -> None:
    one, two = (read_metrics(run / "half")[-1]["loss"] for run in runs)
    assert two == pytest.approx(one, abs=0.02)


def test_shared_statistics_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a large mean and a small spread, where a mean of squares would cancel."""
    monkeypatch.setattr(distributed.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(distributed.distributed, "get_world_size", lambda: 1)
    plain = torch.nn.BatchNorm2d(3)
    shared = copy.deepcopy(plain)
    shared.__class__ = distributed._SyncBatchNorm2d
    images = 300 + 0.1 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.BatchNorm2d(3).double()(images.double())
    torch.testing.assert_close(shared(images).double(), exact, rtol=0, atol=5e-3)
    plain(images)
    torch.testing.assert_close(shared.running_var, plain.running_var)
    half = shared(images.bfloat16())
    assert half.dtype == torch.bfloat16
    assert bool(half.isfinite().all())


def test_shared_statistics_of_all_batches_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a momentum BatchNorm keeps the mean over batches."""
    monkeypatch.setattr(distributed.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(distributed.distributed, "get_world_size", lambda: 1)
    plain = torch.nn.BatchNorm2d(3, momentum=None)
    shared = copy.deepcopy(plain)
    shared.__class__ = distributed._SyncBatchNorm2d
    for _ in range(3):
        images = torch.randn(4, 3, 8, 8)
        plain(images)
        shared(images)
    torch.testing.assert_close(shared.running_mean, plain.running_mean)
    torch.testing.assert_close(shared.running_var, plain.running_var)


NORMS = """
import sys
import torch
from torch import distributed
from dvla_fast.engine.distributed import _SyncBatchNorm2d
from dvla_fast.nn.backbones.visformer import _normed
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
case = torch.load(f"{folder}/case.pt")
found = {}
norm = torch.nn.BatchNorm2d(3)
norm.__class__ = _SyncBatchNorm2d
tokens = case["tokens"].split([2, 3])[rank].requires_grad_()
mask = case["mask"].split([2, 3])[rank]
seen = mask[:, None, :, None]
out = _normed(norm, tokens, mask[:, None, None]) * seen
(out * case["weight"].split([2, 3])[rank]).sum().backward()
found = {"out": out.detach(), "grad": tokens.grad * seen, "weight": norm.weight.grad}
torch.save({**found, "mean": norm.running_mean, "var": norm.running_var}, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def test_shared_statistics_of_unequal_shares(tmp_path: Path) -> None:
    """Padding is left out, so that each process has another number of tokens: they count alike."""
    stream = torch.Generator().manual_seed(0)
    tokens, weight = (torch.randn(5, 3, 7, 1, generator=stream) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([7, 2, 3, 7, 6])[:, None]
    tokens = tokens + torch.arange(5.0)[:, None, None, None]  # the processes' means differ
    torch.save({"tokens": tokens, "weight": weight, "mask": mask}, tmp_path / "case.pt")
    arguments = [[sys.executable, "-c", NORMS, str(rank), str(tmp_path)] for rank in (0, 1)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(line, env=environment) for line in arguments]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]

    norm = torch.nn.BatchNorm2d(3)
    whole, seen = tokens.clone().requires_grad_(), mask[:, None, :, None]
    expected = _normed(norm, whole, mask[:, None, None]) * seen
    (expected * weight).sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([part["out"] for part in parts]), expected.detach())
    assert whole.grad is not None
    torch.testing.assert_close(torch.cat([part["grad"] for part in parts]), whole.grad * seen)
    torch.testing.assert_close(sum(part["weight"] for part in parts), norm.weight.grad)
    for part in parts:
        torch.testing.assert_close(part["mean"], norm.running_mean)
        torch.testing.assert_close(part["var"], norm.running_var)


LEFT = """
import os, signal, sys
from dvla_fast.engine.distributed import Processes
from dvla_fast.errors import TrainingError
processes = Processes("cpu")
processes.wait()
if processes.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    for _ in range(1000):
        processes.wait()
except TrainingError as error:
    print(error)
    os._exit(3)
"""


def test_a_process_that_is_killed_is_told_in_words() -> None:
    port, started = free_port(), []
    for rank in (0, 1):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", LEFT], stdout=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **group},
            )
        )  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [3, -9]
    assert said[0].startswith("another process of this run ended, or cannot be reached; ")
    assert "--resume" in said[0]


def test_a_command_that_shares_nothing_runs_in_the_first_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [*("data", "check", str(trees.split_folders(tmp_path / "photos"))), "--shot=1"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([*data, "--query=1"]) == 0
    assert main(["evaluate", "--checkpoint=nothing", f"--output={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert main([*data, "--query=1"]) == 0
    out, err = capsys.readouterr()
    assert "no problems found" in out
    assert "note: data check runs in one process; the others end here" in err
    assert os.environ["WORLD_SIZE"] == "2"  # for the command that may follow


def test_several_processes_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE alone, as a cluster's own scripts may leave it."""
    accelerate = pytest.importorskip("accelerate")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        with pytest.raises(UsageError, match=r"WORLD_SIZE is 2, but no launcher.*or unset WORLD"):
            Processes("cpu")
    finally:
        accelerate.PartialState._reset_state()


def test_one_process_shares_with_nobody() -> None:
    alone = Processes("cpu")
    assert (alone.rank, alone.count, alone.main) == (0, 1, True)
    assert alone.share(7, "batch") == slice(0, 7)
    values = torch.arange(4.0)
    assert alone.mean(values) is values
    assert alone.gather(values) is values
    assert alone.same("here") == "here"
    assert alone.first(lambda: 3) == 3


def test_uneven_shares_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes("cpu")
    processes.count, processes.rank = 2, 1
    assert processes.share(6, "batch") == slice(3, 6)
    with pytest.raises(UsageError, match="batch_size: 7 do not fall into equal shares for 2"):
        processes.share(7, "batch_size")
