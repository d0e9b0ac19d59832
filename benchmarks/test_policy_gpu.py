"""beta_policy and gate_policy on a GPU beside their PyTorch peers: eager, compiled, as graphs.

Cases and checks are those of ``test_beta_policy.py`` and ``test_gate_policy.py``. Times are of
whole calls, launches included: up to 20 in a row between two synchronisations. At 10⁷ elements a
further row is the time that writing as many numbers takes, below which no forward can go. What
matters most comes first, since a run can be cut off; compiled peers, which take longest to begin,
stand for the other sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import test_beta_policy as beta
from benchmarks import test_gate_policy as gate
from benchmarks.ratios import BOUND
from benchmarks.test_dual_attention_gpu import calls_a_round, peak_mib, synchronised_clock
from dvla_fast import _extension
from dvla_fast.functional import beta_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.benchmark(timer=synchronised_clock),
]

SIZES = (5, 100, 1600, 10_000_000)
MODES = ["forward", "forward+backward"]
COMPILED = "torch.compile"
DRAWS = 200_000


def triton_beta(logits: Tensor) -> beta.Densities:
    out = beta_policy(logits, beta.KAPPA, backend="triton")
    return out.log_prob, out.entropy


def beta_provider(name: str) -> Callable[[Tensor], beta.Densities]:
    if name == "dvla_fast triton" and not _extension.has_cuda:
        pytest.skip("dvla_fast is the Triton kernel here")
    if name == COMPILED:  # the sampler stays PyTorch's own kernel
        torch.compiler.reset()
        return torch.compile(beta.peer, dynamic=False)
    choices = {"dvla_fast": beta.ours, "dvla_fast triton": triton_beta, "eager PyTorch": beta.peer}
    return choices[name]


def gate_provider(name: str) -> Callable[..., gate.Decision]:
    if name == COMPILED:
        torch.compiler.reset()
        return torch.compile(gate.eager, dynamic=False)
    return {"dvla_fast": gate.ours, "eager PyTorch": gate.eager}[name]


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, after a run that compiles what it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept  # what the graph writes to

    return replay


def measure(benchmark, group: str, provider: str, call: Callable[[], object], graph: bool) -> None:
    call()
    benchmark.extra_info["peak_mib"] = peak_mib(call)
    benchmark.group = f"{group} {'graph' if graph else 'eager'}"
    benchmark.name = provider
    run = captured(call) if graph else call
    benchmark.pedantic(run, rounds=15, warmup_rounds=2, iterations=calls_a_round(run))


def check_beta(run: Callable[[Tensor], beta.Densities], n: int, backward: bool) -> None:
    """Mean log-density and entropy of many draws of one policy agree: E[log_prob] = -entropy."""
    logits = torch.full((n,), 0.7, device="cuda", requires_grad=backward)
    draws = [torch.cat(run(logits)).detach().mean() for _ in range(-(-DRAWS // n))]
    assert abs(2 * float(torch.stack(draws).mean())) < 0.02, "wrong: not timed"


def beta_call(provider: str, n: int, mode: str) -> Callable[[], object]:
    run = beta_provider(provider)
    backward = mode == "forward+backward"
    # What is compiled is for one size: the graph that is timed is checked.
    check_beta(run, n if provider == COMPILED else DRAWS, backward)
    logits = torch.randn(n, device="cuda", requires_grad=backward)
    weights = torch.ones(n, device="cuda")

    def call() -> object:
        densities = run(logits)
        return torch.autograd.grad(densities, logits, (weights, weights)) if backward else densities

    return call


def gate_call(provider: str, case: gate.Case, mode: str) -> Callable[[], object]:
    run = gate_provider(provider)
    tensors = [x.cuda() for x in gate.inputs(case)]
    exact = gate.gradients(gate.eager, [x.double().requires_grad_() for x in tensors], False)
    found = gate.gradients(run, [x.clone().requires_grad_() for x in tensors], False)
    for got, want in zip(found, exact):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 1e-3, f"wrong by {error:.2g}: not timed"
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return run(True, *tensors)

        return forward
    leaves = [x.requires_grad_() for x in tensors]
    return lambda: gate.gradients(run, leaves, True)


def time_beta(benchmark, n: int, mode: str, provider: str, graph: bool = False) -> None:
    call = beta_call(provider, n, mode)
    measure(benchmark, f"beta_policy n={n} {mode}", provider, call, graph)


def time_gate(benchmark, case: gate.Case, mode: str, provider: str, graph: bool = False) -> None:
    call = gate_call(provider, case, mode)
    measure(benchmark, f"gate_policy {case} float32 {mode}", provider, call, graph)


@pytest.mark.parametrize("provider", ["dvla_fast", "dvla_fast triton", "eager PyTorch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", SIZES)
def test_beta_eager(benchmark, n: int, mode: str, provider: str) -> None:
    time_beta(benchmark, n, mode, provider)


@pytest.mark.parametrize("provider", [f"{BOUND}writing its four outputs"])
def test_beta_bound(benchmark, provider: str) -> None:
    outputs = torch.empty(4, SIZES[-1], device="cuda")
    group = f"beta_policy n={SIZES[-1]} forward"
    measure(benchmark, group, provider, lambda: outputs.fill_(1.0), False)


@pytest.mark.parametrize("provider", ["dvla_fast", "eager PyTorch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", gate.CASES, ids=str)
def test_gate_eager(benchmark, case: gate.Case, mode: str, provider: str) -> None:
    time_gate(benchmark, case, mode, provider)


@pytest.mark.parametrize("provider", [COMPILED])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", SIZES[1:3])
def test_beta_compiled(benchmark, n: int, mode: str, provider: str) -> None:
    time_beta(benchmark, n, mode, provider)


@pytest.mark.parametrize("provider", ["dvla_fast", "eager PyTorch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", SIZES[:3])
def test_beta_graph(benchmark, n: int, mode: str, provider: str) -> None:
    time_beta(benchmark, n, mode, provider, graph=True)


@pytest.mark.parametrize("provider", ["dvla_fast", "eager PyTorch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", gate.CASES[:3], ids=str)
def test_gate_graph(benchmark, case: gate.Case, mode: str, provider: str) -> None:
    time_gate(benchmark, case, mode, provider, graph=True)


@pytest.mark.parametrize("provider", [COMPILED])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", gate.CASES[:1], ids=str)
def test_gate_compiled(benchmark, case: gate.Case, mode: str, provider: str) -> None:
    time_gate(benchmark, case, mode, provider)
