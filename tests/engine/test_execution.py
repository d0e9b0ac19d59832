"""Mixed precision, channels last and compilation train the same model under the same names."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from dvla_fast.data import FewShotData
from dvla_fast.engine import build, models
from dvla_fast.engine import metatune as metatune_module
from dvla_fast.engine.build import seed_everything
from dvla_fast.engine.checkpoint import load_checkpoint, pack_optimizer, unpack_optimizer
from dvla_fast.engine.config import AugmentConfig, DemoRun, ExecutionConfig
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.execution import Execution, adamw
from dvla_fast.engine.gating import GateTraining
from dvla_fast.engine.metatune_steps import Step
from dvla_fast.engine.models import backbone_spec, build_model, build_pretrain_model, model_spec
from dvla_fast.engine.pretrain import Epoch, pretrain
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.stages import StageRun
from dvla_fast.engine.state import TrainingState
from dvla_fast.engine.texts import build_texts
from dvla_fast.errors import MissingDependencyError, OutputError


def trained(
    folder: Path, data: FewShotData, config: DemoRun, execution: Execution
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    spec = backbone_spec(config.model, 1, 16)
    run = RunFolder(folder / "pretrain", {})
    stage = StageRun(run, seed_everything(0), execution=execution)
    start = pretrain(config.pretrain, data, spec, stage)
    rows = run.rows()
    texts, _ = build_texts(config.semantics, data, torch.device("cpu"))
    rng = seed_everything(1)
    described = model_spec(config.model, spec, 512)
    model = build_model(described)
    models.load_backbone(model, spec, start)
    run = RunFolder(folder / "metatune", {})
    stage = StageRun(run, rng, execution=execution)
    best = metatune_module.metatune(config.metatune, model, described, data, texts, stage)
    return rows + run.rows(), load_checkpoint(best)[0]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"precision": "bfloat16", "channels_last": True}, 0.05),
        ({"channels_last": True}, 2e-3),
        ({"compile": True}, 2e-3),
    ],
)
def test_same_training(
    settings: dict[str, Any], tolerance: float, tmp_path: Path, few_digits: FewShotData,
    tiny: DemoRun, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Captures the graphs, forward and backward, without a minute of code generation.
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda x: compiled(x, backend="aot_eager"))
    expected, weights = trained(tmp_path / "plain", few_digits, tiny, Execution())
    rows, others = trained(
        tmp_path / "other", few_digits, tiny, Execution(ExecutionConfig(**settings))
    )
    assert [row["loss"] for row in rows] == pytest.approx(
        [row["loss"] for row in expected], abs=tolerance
    )
    assert {k: (v.dtype, v.shape) for k, v in others.items()} == {
        k: (v.dtype, v.shape) for k, v in weights.items()
    }


def test_the_optimiser_in_one_pass_takes_pytorchs_steps(tmp_path: Path) -> None:
    """In channels last, and after its state was in a file, which has one format for all."""
    images = torch.randn(4, 3, 5, 5)

    def network() -> torch.nn.Conv2d:
        torch.manual_seed(0)
        return torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)

    def step(layer: torch.nn.Conv2d, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        layer(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()

    usual, ours, resumed = network(), network(), network()
    theirs = torch.optim.AdamW(usual.parameters(), lr=0.1)
    mine = adamw(ours.parameters(), lr=0.1)
    for _ in range(2):
        step(usual, theirs), step(ours, mine)
    tensors, info = pack_optimizer(mine)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "state")
    resumed.load_state_dict(ours.state_dict())
    again = adamw(resumed.parameters(), lr=0.1)
    unpack_optimizer(again, load_file(tmp_path / "state"), info)
    for layer, optimizer in ((usual, theirs), (ours, mine), (resumed, again)):
        step(layer, optimizer)
    torch.testing.assert_close(ours.weight, usual.weight)
    assert torch.equal(resumed.weight, ours.weight)


def test_a_parameter_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 5\) is a view with gaps"):
        adamw([torch.nn.Parameter(torch.randn(4, 10)[:, ::2])])


def test_everything_on_still_learns(tmp_path: Path, few_digits: FewShotData, tiny: DemoRun) -> None:
    pytest.importorskip("torchvision")
    recipe = dataclasses.replace(
        tiny.pretrain, epochs=6, views=2, mixup=0.3, cutmix=1.0, clip_norm=5.0,
        quarter_turns=False,
        augment=AugmentConfig(
            crop=0.5, rand_augment="rand-m5-mstd0.5-inc1", color_jitter=0.4, random_erasing=0.25
        ),
    )  # fmt: skip
    spec = backbone_spec(tiny.model, 1, 16)
    run = RunFolder(tmp_path / "run", {})
    execution = Execution(ExecutionConfig(precision="bfloat16", channels_last=True))
    pretrain(recipe, few_digits, spec, StageRun(run, seed_everything(0), execution=execution))
    losses = [row["loss"] for row in run.rows()]
    assert losses[-1] < losses[0]


def test_wandb_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    ended: list[bool] = []
    run = SimpleNamespace(log=logged.append, finish=lambda: ended.append(True))
    started: dict[str, Any] = {}

    def init(**arguments: Any) -> SimpleNamespace:
        started.update(arguments)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    folder = RunFolder(tmp_path / "run", {"seed": 1}, wandb="birds")
    folder.log("pretrain", 3, loss=1.5, alpha=[0.25, 0.5], note="text")
    folder.close()
    assert started["project"] == "birds"
    assert started["config"] == {"seed": 1}
    assert logged == [
        {
            "pretrain/loss": 1.5,
            "pretrain/alpha_0": 0.25,
            "pretrain/alpha_1": 0.5,
            "pretrain/step": 3,
        }
    ]
    assert ended == [True]


def test_a_continuation_may_log_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(log=lambda figures: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **arguments: run))
    RunFolder(tmp_path / "run", {"seed": 1, "wandb": ""}).close()
    again = {"seed": 1, "wandb": "birds"}
    RunFolder(tmp_path / "run", again, resume=True, wandb="birds").close()
    with pytest.raises(OutputError, match="cannot resume with other settings"):
        RunFolder(tmp_path / "run", {**again, "seed": 2}, resume=True)


def test_missing_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependencyError, match="--wandb birds needs wandb"):
        RunFolder(tmp_path / "run", {}, wandb="birds")


@contextlib.contextmanager
def no_waiting() -> Any:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("wanted", [True, False])
def test_cudnn_times_its_convolutions_where_it_is_wanted(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not wanted)
    config = ExecutionConfig(cudnn_benchmark=wanted)
    Execution(config, Processes("cpu"))
    assert torch.backends.cudnn.benchmark != wanted  # of no concern there
    Execution(config, SimpleNamespace(device=torch.device("cuda")))  # type: ignore[arg-type]
    assert torch.backends.cudnn.benchmark == wanted


def second_step(device: torch.device, data: FewShotData, tiny: DemoRun, watch: Any) -> None:
    """A second step of meta-tuning under `watch`: the first one allocates and compiles."""
    texts, _ = build_texts(tiny.semantics, data, device)
    data = build.without_test_split(data.to(device))
    model = build_model(model_spec(tiny.model, backbone_spec(tiny.model, 1, 16), 512)).to(device)
    config = dataclasses.replace(tiny.metatune, augment=AugmentConfig(shift=0.1))
    execution = Execution(ExecutionConfig(precision="bfloat16"), Processes(device.type))
    gates = GateTraining(config, model)
    optimizer = torch.optim.AdamW(metatune_module.parameter_groups(model, config, gates.baseline))
    step = Step(config, model, data, texts, optimizer, gates, execution, 0)
    gates.begin_epoch()
    step(0)
    with watch:
        step(1)


def second_epoch(device: torch.device, data: FewShotData, tiny: DemoRun, watch: Any) -> None:
    """A second epoch of pre-training by the published recipe under `watch`, up to its report."""
    coloured = {
        name: dataclasses.replace(part, images=part.images.repeat(1, 3, 1, 1))
        for name, part in (("base", data.base), ("monitor", data.monitor))
    }
    data = dataclasses.replace(data, **coloured, mean=data.mean.repeat(3), std=data.std.repeat(3))
    data = build.without_test_split(data.to(device))
    recipe = dataclasses.replace(
        tiny.pretrain, views=2, mixup=0.3, cutmix=1.0, clip_norm=5.0, drop_path=0.5,
        augment=AugmentConfig(
            flip=True, crop=0.08, rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4,
            random_erasing=0.25,
        ),
    )  # fmt: skip
    outputs = 3 * len(data.base.class_names)
    model = build_pretrain_model(backbone_spec(tiny.model, 3, 16), outputs, recipe.drop_path)
    optimizer = adamw(model.to(device).parameters())
    execution = Execution(ExecutionConfig(precision="bfloat16"), Processes(device.type))
    epoch = Epoch(recipe, model, data, optimizer, execution, outputs)
    rng = np.random.default_rng(0)
    state = TrainingState(None, "pretrain", {}, {}, optimizer, rng)  # type: ignore[arg-type]
    with contextlib.ExitStack() as watched, pytest.MonkeyPatch.context() as patch:

        def report(totals: torch.Tensor) -> torch.Tensor:
            watched.close()  # reading the epoch's totals may wait
            return torch.zeros(len(totals))

        patch.setattr(execution.processes, "mean", report)
        epoch(state)
        watched.enter_context(watch)
        epoch(state)


@pytest.mark.gpu
@pytest.mark.parametrize("work", [second_step, second_epoch])
def test_a_step_never_waits_for_the_gpu(
    work: Callable, few_digits: FewShotData, tiny: DemoRun
) -> None:
    work(torch.device("cuda"), few_digits, tiny, no_waiting())


class NoCopies(TorchFunctionMode):
    """Refuses tensors made of numbers, which on a GPU are copied there and waited for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and "device" in kwargs
        made = made or func is torch.Tensor.new_tensor
        assert not made or isinstance(args[-1], torch.Tensor), f"{func} of {args[-1]}"
        return func(*args, **kwargs)


@pytest.mark.parametrize("work", [second_step, second_epoch])
def test_a_step_copies_no_numbers_to_the_device(
    work: Callable, few_digits: FewShotData, tiny: DemoRun
) -> None:
    """What a CPU can show of the test above."""
    work(torch.device("cpu"), few_digits, tiny, NoCopies())
