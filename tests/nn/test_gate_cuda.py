"""RLAGate on a GPU: the whole layer, its policy included, against itself in float64 on the CPU."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dvla_fast.nn import RLAGate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
TEXT_DIM = 40
# Largest error allowed, as a share of the largest exact value.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class Case(NamedTuple):
    """Text groups, images, image tokens, text tokens, width."""

    groups: int
    images: int
    keys: int
    rows: int
    width: int

    def __str__(self) -> str:
        return "T{}-B{}-N{}-P{}-d{}".format(*self)


CASES = [Case(5, 5, 196, 9, 192), Case(2, 6, 49, 45, 384), Case(1, 3, 7, 70, 40)]


class Given(NamedTuple):
    """A gate and what it is called with."""

    gate: RLAGate
    image_tokens: Tensor
    text_tokens: Tensor
    options: dict[str, Tensor]
    weights: list[Tensor]
    """The loss is the sum of the results times these."""

    def to(self, device: str, dtype: torch.dtype) -> Given:
        def moved(x: Tensor) -> Tensor:
            return x.to(device, dtype) if x.is_floating_point() else x.to(device)

        gate = copy.deepcopy(self.gate).to(device, dtype)
        options = {name: moved(x) for name, x in self.options.items()}
        if "action_logit" in options:  # as the policy gives it
            wide = torch.promote_types(dtype, torch.float32)
            options["action_logit"] = self.options["action_logit"].to(device, wide)
        tokens = [moved(x) for x in (self.image_tokens, self.text_tokens)]
        return Given(gate, *tokens, options, [x.to(device) for x in self.weights])


def make(case: Case, scope: str = "episode", masked: bool = False) -> Given:
    """On the CPU, in values that bfloat16 holds exactly, and the policy off its starting point."""

    def rand(*size: int) -> Tensor:
        return torch.randn(size).bfloat16().float()

    gate = RLAGate(case.width, TEXT_DIM, alpha_scope=scope)
    torch.nn.init.normal_(gate.policy.network.out.weight, std=0.3)
    decisions = case.groups if scope == "episode" else case.images
    options = {"action_logit": rand(decisions)}
    if masked:
        options["image_mask"] = torch.rand(case.images, case.keys) < 0.6
        options["text_mask"] = torch.rand(case.groups, case.rows) < 0.6
        options["image_mask"][:, 0] = options["text_mask"][:, 0] = True
    image_tokens = rand(case.images, case.keys, case.width)
    text_tokens = rand(case.groups, case.rows, TEXT_DIM)
    fused = rand(case.images, case.rows, case.width)
    weights = [rand(*image_tokens.shape), fused, rand(decisions), rand(decisions)]
    return Given(gate.bfloat16().float(), image_tokens, text_tokens, options, weights)


def loss_of(given: Given, *results: Tensor) -> Tensor:
    return torch.stack([(x * w).sum() for x, w in zip(results, given.weights, strict=True)]).sum()


def run(given: Given, gate=None) -> dict[str, Tensor]:
    """Results, and the gradients of the tokens and of every parameter, by name."""
    leaves = {
        "image_tokens": given.image_tokens.detach().requires_grad_(),
        "text_tokens": given.text_tokens.detach().requires_grad_(),
        **dict(given.gate.named_parameters()),
    }
    gate = given.gate if gate is None else gate
    out = gate(leaves["image_tokens"], leaves["text_tokens"], **given.options)
    loss = loss_of(given, out.image_tokens, out.fused, out.log_prob, out.entropy)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {name: x.detach() for name, x in out._asdict().items()}
    return found | {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == want.keys()
    for name, right in want.items():
        error = (got[name].cpu().double() - right).abs().max() / right.abs().max()
        assert error < TOLERANCE[dtype], f"{name}: {error}"


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("scope", ["episode", "image"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients(case: Case, dtype: torch.dtype, scope: str, masked: bool) -> None:
    given = make(case, scope, masked)
    got = run(given.to(DEVICE, dtype))
    assert got["image_tokens"].dtype == got["fused"].dtype == dtype
    assert got["log_prob"].dtype == torch.float32
    assert_close(got, run(given.to("cpu", torch.float64)), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    given = make(CASES[1], masked=True)
    want, given = run(given.to("cpu", torch.float64)), given.to(DEVICE, torch.float32)
    with torch.autocast(DEVICE, dtype):
        got = run(given)
    assert (got["image_tokens"].dtype, got["fused"].dtype) == (torch.float32, dtype)
    assert all(x.dtype == torch.float32 for name, x in got.items() if name.startswith("grad"))
    assert_close(got, want, dtype)


def test_a_replayed_gate_and_its_gradient() -> None:
    given = make(CASES[1])
    alpha = torch.tensor([0.2, 0.7])
    found = []
    for device, dtype in ((DEVICE, torch.float32), ("cpu", torch.float64)):
        here = given.to(device, dtype)
        leaf = alpha.to(device, dtype).requires_grad_()
        out = here.gate(here.image_tokens, here.text_tokens, alpha=leaf)
        (grad,) = torch.autograd.grad(loss_of(here, *out[:2], out.log_prob, out.entropy), leaf)
        found.append({"fused": out.fused.detach(), "grad of alpha": grad})
    assert_close(*found, torch.float32)


def test_compile_fullgraph() -> None:
    torch.compiler.reset()
    given = make(CASES[1], masked=True)
    here = given.to(DEVICE, torch.float32)
    compiled = torch.compile(here.gate, fullgraph=True)
    assert_close(run(here, compiled), run(given.to("cpu", torch.float64)), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph_replay(dtype: torch.dtype) -> None:
    """Captured once, replayed on new numbers: forward and backward."""
    given = make(CASES[0]).to(DEVICE, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(given)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(given)
    for tensor in (given.image_tokens, given.text_tokens, *given.options.values()):
        tensor.copy_(tensor.flip(0))
    graph.replay()
    assert_close(got, run(given.to("cpu", torch.float64)), dtype)


def test_a_replayed_cuda_graph_draws_afresh() -> None:
    given = make(CASES[0]).to(DEVICE, torch.float32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        given.gate(given.image_tokens, given.text_tokens, sample=True)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = given.gate(given.image_tokens, given.text_tokens, sample=True)
    graph.replay()
    first = [x.clone() for x in (out.alpha, out.fused)]
    graph.replay()
    assert not torch.equal(first[0], out.alpha)
    assert not torch.equal(first[1], out.fused)
    assert bool(((out.alpha > 0) & (out.alpha < 1)).all())
