"""Peak memory of the gate on the CPU, beside the same equations in eager PyTorch with SDPA."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.test_gate import Case, implementation, inputs, ours, run
from dvla_fast import _extension

# Packed copies of weights and sums of images count where images are few. Of what other processors'
# libraries of products take, nothing is known here.
pytestmark = pytest.mark.skipif(
    _extension.capability not in ("avx2", "avx512", "avx512_bf16"),
    reason="the tiles' own packing is measured",
)
CASES = [
    Case(*numbers)
    for numbers in ((5, 192, 196, 9), (5, 384, 49, 9), (5, 384, 49, 45), (25, 384, 49, 45))
]


def peak_of_tensors(call: Callable[[], object], folder: Path) -> int:
    """Most bytes of tensors that a call holds at once, beyond those from before."""
    call()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    record.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_more_than_eager(case: Case, dtype: torch.dtype, backward: bool, tmp_path: Path) -> None:
    gate, image_tokens, text_tokens, gradients = inputs(case)
    gate = copy.deepcopy(gate).to(dtype)
    leaf = image_tokens.to(dtype, copy=True).requires_grad_(backward)
    arguments = (gate, leaf, text_tokens.to(dtype), [g.to(dtype) for g in gradients], backward)
    eager = peak_of_tensors(lambda: run(implementation("eager SDPA"), *arguments), tmp_path)
    fused = peak_of_tensors(lambda: run(ours, *arguments), tmp_path)
    results = image_tokens.numel() * dtype.itemsize
    assert eager > results, "the measure does not see what it is to measure"
    assert fused <= 1.1 * eager
