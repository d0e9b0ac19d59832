"""Runs the kernels' accuracy tests in Triton's interpreter, on the CPU.

Triton reads ``TRITON_INTERPRET`` when kernels are decorated, its own library functions included:
a process of its own keeps the setting from leaking into other tests. To see single cases:
``TRITON_INTERPRET=1 pytest tests/kernels/test_dual_attention_forward.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@pytest.mark.skipif(
    _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4),
    reason="the interpreter of Triton 3.6 cannot run a loop with NumPy 2.4 or later",
)
@pytest.mark.parametrize(
    ("cases", "selection"),
    [
        ("dual_attention_forward", "float16"),
        ("dual_attention_forward", "not float16"),
        ("dual_attention_backward", "streamed"),
        ("dual_attention_backward", "not streamed"),
        ("dual_attention_fuzz", ""),
        ("beta_policy_kernel", ""),
        ("gate_policy_kernel", ""),
    ],
)
def test_in_the_interpreter(cases: str, selection: str, tmp_path: Path) -> None:
    path = Path(__file__).with_name(f"test_{cases}.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider", "-k", selection]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", str(path), *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,  # on a machine that does other work too
    )
    report = finished.stdout + finished.stderr
    assert finished.returncode == 0, report
    passed = re.search(r"(\d+) passed", report)
    assert passed, report
    assert int(passed[1]) >= 10, report
