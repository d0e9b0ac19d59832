"""Peak memory of dual attention on the CPU: no matrix of scores, no copy of a shared text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attention_cases import Shape

from dvla_fast import _extension
from dvla_fast.functional import dual_attention

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MB = 1 << 20

# Scores of the images: 128 MB. A text of 6 MB, 96 MB when every image has a copy; so its values.
SHAPE = Shape(groups=1, images=16, heads=4, rows=256, keys=2048, text=16384, width=24)


def resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def peak_beyond_start(run: Callable[[], object]) -> int:
    """Most memory that the process held during a run beyond what it held before, in bytes."""
    try:
        RESET.write_text("5")
    except OSError:
        pytest.skip("needs Linux' record of the peak of a process")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_score_matrix_and_no_expanded_text(dtype: torch.dtype) -> None:
    t, g, h, p, n, s, d = SHAPE
    shapes = ((t, p, h, d), (g, n, h, d), (g, n, h, d), (t, s, h, d), (t, s, h, d))
    leaves = [torch.randn(x, dtype=dtype).transpose(1, 2).requires_grad_() for x in shapes]
    alpha = torch.rand(g, h, requires_grad=True)
    grad_out = torch.randn(g, p, h, d, dtype=dtype).transpose(1, 2)

    def forward(backend: str = "cpp") -> torch.Tensor:
        return dual_attention(*leaves, alpha, backend=backend)

    def both() -> object:
        return torch.autograd.grad(forward(), (*leaves, alpha), grad_out)

    results = sum(x.nbytes for x in (*leaves, grad_out))
    with torch.no_grad():
        alone = peak_beyond_start(forward)
        plain = peak_beyond_start(lambda: forward("reference"))
    whole = peak_beyond_start(both)
    scores = g * h * p * n * 4
    assert plain > scores, "the measure does not see what it is to measure"
    assert alone < grad_out.nbytes + 16 * MB
    assert whole < results + 64 * MB  # partial sums, and what the forward saves
