"""dual_attention on a GPU beside its PyTorch peers: eager, compiled, as graphs, long sequences.

Groups and checks as in ``test_dual_attention.py``, whose shapes these are. Times are of whole
calls, launches included: up to 20 in a row between two synchronisations. Peak memory is what one
call allocates above its inputs. What matters most comes first, since a run can be cut off.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.test_dual_attention import (
    COMPILED,
    SHAPES,
    TOLERANCE,
    Shape,
    first_group,
    inputs,
    run,
)
from dvla_fast import reference
from dvla_fast.functional import dual_attention

FEW_SHOT = [shape for shape in SHAPES if shape.keys < 2048]
LONG = [
    Shape(2, 1, 16, 64, 2048, 2048),
    Shape(2, 1, 8, 128, 2048, 2048),
    Shape(1, 1, 8, 128, 8192, 8192),
    Shape(2, 1, 8, 64, 4096, 1024),
]
# Autotuning one graph takes up to a minute: these stand for the others.
GRAPHS = [Shape(5, 1, 8, 24, 196, 9), Shape(1, 80, 8, 24, 196, 45), Shape(1, 80, 8, 48, 49, 45)]
# float32, in which few train on a GPU, on those that stand for the others.
CASES = [
    *((torch.bfloat16, shape) for shape in FEW_SHOT),
    *((torch.float16, shape) for shape in FEW_SHOT),
    *((torch.float32, shape) for shape in GRAPHS),
]
# Compiling takes seconds, too: the same again, float32 for one, and long ones without matmul.
COMPILED_CASES = [
    *((torch.bfloat16, shape, provider) for shape in GRAPHS for provider in COMPILED),
    *((torch.bfloat16, shape, provider) for shape in LONG[:2] for provider in list(COMPILED)[1:]),
    *((torch.float32, GRAPHS[1], provider) for provider in list(COMPILED)[:2]),
]
MODES = ["forward", "forward+backward"]
SDPA = {
    "2xSDPA+lerp flash": SDPBackend.FLASH_ATTENTION,
    "2xSDPA+lerp cudnn": SDPBackend.CUDNN_ATTENTION,
    "2xSDPA+lerp efficient": SDPBackend.EFFICIENT_ATTENTION,
}
EAGER = ["dvla_fast", "matmul+softmax", *SDPA]
ITERATIONS, ROUND_SECONDS = 20, 0.02
# The kernels of compiled peers are tuned by the process that times them: what another one found,
# which compiled them beside others, may not be the fastest.
torch._inductor.config.autotune_local_cache = False


def synchronised_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.benchmark(timer=synchronised_clock),
]


def calls_a_round(call: Callable[[], object]) -> int:
    """Calls between two synchronisations: long ones need no company to hide what those cost."""
    begin = synchronised_clock()
    call()
    took = synchronised_clock() - begin
    return max(1, min(ITERATIONS, int(ROUND_SECONDS / took)))


@functools.cache
def exact(shape: Shape) -> list[Tensor]:
    """Result and gradients of the first group in float64, on the GPU."""
    *leaves, grad_out = (x.cuda().double() for x in first_group(inputs(shape), shape))
    leaves = [x.requires_grad_() for x in leaves]

    def attention(*tensors: Tensor) -> Tensor:
        return reference.dual_attention(*tensors, None, None, shape.width**-0.5)

    return run(attention, [*leaves, grad_out], True)


@functools.lru_cache(maxsize=1)
def inputs_on_gpu(shape: Shape) -> list[Tensor]:
    return [x.cuda() for x in inputs(shape)]


def tensors_for(shape: Shape, dtype: torch.dtype, backward: bool) -> list[Tensor]:
    *five, alpha, grad_out = inputs_on_gpu(shape)
    leaves = [x.to(dtype).detach().requires_grad_(backward) for x in five]
    return [*leaves, alpha.detach().requires_grad_(backward), grad_out.to(dtype)]


def check(results: list[Tensor], shape: Shape, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    for got, want in zip(results, exact(shape)):
        error = (got[: want.shape[0]].double() - want).abs().max() / want.abs().max()
        assert error < tolerance, f"wrong by {error:.2g}: not timed"


def attention_of(provider: str) -> Callable[..., Tensor]:
    if provider == "dvla_fast":
        return dual_attention
    if provider == "matmul+softmax":
        return peers.matmul_softmax
    if provider in COMPILED:
        return peers.compiled(COMPILED[provider])
    if provider == "torch.compile max-autotune":
        torch.compiler.reset()
        return torch.compile(
            peers.matmul_softmax, fullgraph=True, dynamic=False, mode="max-autotune"
        )

    def with_backend(*tensors: Tensor) -> Tensor:
        with sdpa_kernel(SDPA[provider]):
            return peers.sdpa_lerp(*tensors)

    return with_backend


def peak_mib(call: Callable[[], object]) -> float:
    """Memory that one call takes above what is allocated before, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)


def first_results(provider: str, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Results of a call; skips where an attention of PyTorch's cannot run the case, and says why.

    Which error that is depends on the backend: no kernel, no plan, a shape that it refuses.
    """
    try:
        return call()
    except RuntimeError as error:
        if provider not in (*SDPA, "FlexAttention"):
            raise
        pytest.skip(f"{provider} cannot run this: {str(error).strip().splitlines()[0]}")


def measure(
    benchmark, shape: Shape, dtype: torch.dtype, mode: str, provider: str, graph: bool
) -> None:
    backward = mode == "forward+backward"
    tensors = tensors_for(shape, dtype, backward)
    attention = attention_of(provider)

    def call() -> list[Tensor]:
        return run(attention, tensors, backward)

    check(first_results(provider, call), shape, dtype)
    benchmark.extra_info["peak_mib"] = peak_mib(call)
    if graph and provider == "dvla_fast":  # the compiled peer replays its own
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        stream.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            kept = call()  # noqa: F841  (the graph writes to them)
        call = captured.replay
    how = "graph" if graph else "eager"
    benchmark.group = f"dual_attention {shape} {str(dtype)[6:]} {mode} {how}"
    benchmark.name = provider
    benchmark.pedantic(call, rounds=15, warmup_rounds=2, iterations=calls_a_round(call))


@pytest.mark.parametrize("provider", EAGER)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_eager(benchmark, shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> None:
    measure(benchmark, shape, dtype, mode, provider, graph=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", GRAPHS, ids=str)
@pytest.mark.parametrize("provider", ["dvla_fast", "torch.compile max-autotune"])
def test_graph(benchmark, shape: Shape, mode: str, provider: str) -> None:
    measure(benchmark, shape, torch.bfloat16, mode, provider, graph=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "shape", "provider"), COMPILED_CASES, ids=str)
def test_compiled(benchmark, shape: Shape, dtype: torch.dtype, mode: str, provider: str) -> None:
    measure(benchmark, shape, dtype, mode, provider, graph=False)


@pytest.mark.parametrize("provider", ["dvla_fast", *SDPA])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long(benchmark, shape: Shape, mode: str, provider: str) -> None:
    measure(benchmark, shape, torch.bfloat16, mode, provider, graph=False)
