"""Runs ``test_dual_attention_forward.py`` in Triton's interpreter, on the CPU.

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

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).with_name("test_dual_attention_forward.py")


@pytest.mark.parametrize("selection", ["float16", "not float16"])
def test_forward_in_the_interpreter(selection: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider", "-k", selection]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", str(CASES), *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = finished.stdout + finished.stderr
    assert finished.returncode == 0, report
    passed = re.search(r"(\d+) passed", report)
    assert passed and int(passed[1]) >= 10, report
