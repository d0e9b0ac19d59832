"""Modules made on the meta device start as those that were made with memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dvla_fast.nn import (
    DVLA,
    GatedBackbone,
    ResNet12,
    RLAGate,
    SmallConvAttention,
    clip_vit,
    visformer_tiny,
)
from dvla_fast.nn.policy import POLICIES
from dvla_fast.rl import EMABaseline, ValueBaseline

from .conftest import TEXT_DIM


def emptied(make: Callable[[], nn.Module]) -> nn.Module:
    """A module from the meta device, with NaN and large numbers where memory was never written."""
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for x in (*module.parameters(), *module.buffers()):
            x.fill_(float("nan") if x.is_floating_point() else 7)
    return module


def apply_reset(module: nn.Module) -> None:
    """What training frameworks do, innermost first."""
    module.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else ...)


def check_start(module: nn.Module, made: nn.Module) -> None:
    """Constant where ``made`` is, and of the same spread where that is random."""
    others = made.state_dict()
    for name, x in module.state_dict().items():
        want = others[name]
        if want.numel() < 2 or not want.double().std() > 0:
            assert torch.equal(x, want), name
        else:
            ratio = x.double().std() / want.double().std()
            assert 0.6 < float(ratio) < 1.6, name


@pytest.mark.parametrize("reset", [lambda module: module.reset_parameters(), apply_reset])
@pytest.mark.parametrize("policy", POLICIES)
def test_gate(policy: str, reset: Callable[[nn.Module], None]) -> None:
    def make() -> RLAGate:
        return RLAGate(32, TEXT_DIM, 2, hidden_dim=16, policy=policy)

    gate = emptied(make)
    reset(gate)
    check_start(gate, make())
    out = gate(torch.randn(4, 3, 32), torch.randn(2, 5, TEXT_DIM), sample=False)
    assert out.fused.isfinite().all()
    if policy in ("beta", "static", "mlp"):
        assert torch.equal(out.alpha, torch.full((2,), 0.5))


@pytest.mark.parametrize("reset", [lambda module: module.reset_parameters(), apply_reset])
@pytest.mark.parametrize(
    "backbone", [SmallConvAttention, ResNet12, lambda: visformer_tiny(32)], ids=["small", "r", "v"]
)
def test_model(backbone: Callable[[], GatedBackbone], reset: Callable[[nn.Module], None]) -> None:
    if backbone not in (SmallConvAttention, ResNet12):
        pytest.importorskip("timm")

    def make() -> DVLA:
        return DVLA(backbone(), text_dim=TEXT_DIM, hidden_dim=16)

    model = emptied(make)
    reset(model)
    check_start(model, make())


def test_clip_takes_weights_instead() -> None:
    pytest.importorskip("open_clip")
    model = DVLA(clip_vit(32, "ViT-B-32"))
    with pytest.raises(NotImplementedError, match="VisionTransformer has weights and no reset"):
        model.reset_parameters()


@pytest.mark.parametrize("make", [lambda: EMABaseline(3), lambda: ValueBaseline([4, 6], 16)])
def test_baselines(make: Callable[[], nn.Module]) -> None:
    baseline = emptied(make)
    baseline.reset_parameters()
    check_start(baseline, make())


def test_sharded_gate() -> None:
    """Every rank initialises its own shard: here the first of two, without the other."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        with torch.device("meta"):
            gate = RLAGate(32, TEXT_DIM, 2)
        fsdp.fully_shard(gate, mesh=mesh)
        gate.to_empty(device="cpu")
        shards = {name: p.to_local().detach() for name, p in gate.named_parameters()}
        for shard in shards.values():
            shard.fill_(float("nan"))
        gate.reset_parameters()
        for name, shard in shards.items():
            assert shard.isfinite().all(), name
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gate_is_made_where_and_in_what_it_is_asked(policy: str) -> None:
    gate = RLAGate(16, TEXT_DIM, 2, policy=policy, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in gate.parameters()} == {("meta", torch.bfloat16)}
    torch.manual_seed(0)
    moved = RLAGate(16, TEXT_DIM, 2, policy=policy).double()
    torch.manual_seed(0)
    made = RLAGate(16, TEXT_DIM, 2, policy=policy, dtype=torch.float64)
    torch.testing.assert_close(made.state_dict(), moved.state_dict(), rtol=0, atol=0)
