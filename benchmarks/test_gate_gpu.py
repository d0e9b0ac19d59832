"""RLAGate on a GPU beside the same equations in eager and compiled PyTorch.

Cases of 80 and 1280 images, and checks, are those of ``test_gate.py``. Times are of whole calls,
launches included: up to 20 in a row between two synchronisations; in CUDA graphs, of replays. What
matters most comes first, since a run can be cut off; compiled peers, which take longest to begin,
are in bfloat16, and at 80 images in float32 too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import test_gate as gate
from benchmarks.test_dual_attention_gpu import synchronised_clock
from benchmarks.test_policy_gpu import measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.benchmark(timer=synchronised_clock),
]

DEVICE = "cuda"
MODES = ["forward", "forward+backward"]
FEW = [case for case in gate.CASES if case.images == 80]
MANY = [case for case in gate.CASES if case.images == 1280]
CASES = [
    *((torch.bfloat16, case) for case in FEW),
    *((torch.float32, case) for case in FEW),
    *((torch.bfloat16, case) for case in MANY),
]
COMPILED_CASES = [
    *((torch.bfloat16, case, "graph") for case in FEW),
    *((*case, "eager") for case in CASES),
]
EAGER_CASES = [*CASES, *((torch.float32, case) for case in MANY)]


def time_gate(
    benchmark, case: gate.Case, dtype: torch.dtype, mode: str, provider: str, graph: bool = False
) -> None:
    backward = mode == "forward+backward"
    layer = gate.implementation(provider)
    gate.check(layer, case, dtype, backward, DEVICE)
    given = gate.arguments(case, dtype, backward, DEVICE)

    def call() -> list[Tensor]:
        return gate.run(layer, *given)

    measure(benchmark, f"RLAGate {case} {str(dtype)[6:]} {mode}", provider, call, graph)


@pytest.mark.parametrize("provider", [gate.OURS, "eager matmul", "eager SDPA"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "case"), EAGER_CASES, ids=str)
def test_eager(benchmark, case: gate.Case, dtype: torch.dtype, mode: str, provider: str) -> None:
    time_gate(benchmark, case, dtype, mode, provider)


@pytest.mark.parametrize("provider", [gate.OURS, "eager matmul", "eager SDPA"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_graph(benchmark, case: gate.Case, mode: str, provider: str) -> None:
    time_gate(benchmark, case, torch.bfloat16, mode, provider, graph=True)


@pytest.mark.parametrize("provider", ["torch.compile"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "case", "graph"), COMPILED_CASES, ids=str)
def test_compiled(
    benchmark, case: gate.Case, dtype: torch.dtype, mode: str, provider: str, graph: str
) -> None:
    time_gate(benchmark, case, dtype, mode, provider, graph == "graph")
