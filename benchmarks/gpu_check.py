"""Everything that needs a GPU, in one command and under ten minutes.

    make gpu-check
    python -m benchmarks.gpu_check

runs every test marked ``gpu``, compute-sanitizer (memcheck and racecheck, where it is installed)
over small shapes, and the GPU benchmarks, and writes benchmarks/results/<gpu>.json: GPU, driver,
versions, commit, date, what each check said, and every row. Exit status 1 if a check failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUDGET_SECONDS = 590
# Steps in order, each with the most it may take of the time left when it begins. The benchmarks'
# records are apart, so that autotuning the compiled peers, which takes longest, can cost no other.
SHARE = {
    "tests": 0.4,
    "memcheck": 0.2,
    "racecheck": 0.2,
    "policy": 0.3,
    "eager": 0.5,
    "long": 0.5,
    "graph": 1.0,
}
ATTENTION = "benchmarks/test_dual_attention_gpu.py"
SUITES = {
    "policy": ["benchmarks/test_policy_gpu.py"],
    **{name: [ATTENTION, "-k", f"test_{name}"] for name in ("eager", "long", "graph")},
}
SMALL = (
    "(test_matches_float64 and float16 and (2x1x3x5 or 1x3x3x9))"
    " or (test_equals_the_cpu_op and B12T6) or (test_sizes and 129)"
)
KERNEL_TESTS = [
    f"tests/kernels/test_{name}.py"
    for name in (
        "dual_attention_forward", "dual_attention_backward", "beta_policy_kernel",
        "gate_policy_kernel",
    )
]  # fmt: skip


def run(
    name: str, command: Sequence[str], seconds: float, **environment: str
) -> dict[str, float | str]:
    """Runs one step, its output shown; {"outcome": passed, failed or timed out, "seconds"}."""
    print(f"== {name} (at most {seconds:.0f} s): {' '.join(command)}", flush=True)
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, timeout=seconds, check=False
        )
        outcome = "passed" if done.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        outcome = "timed out"
    took = time.monotonic() - begin
    print(f"== {name}: {outcome} in {took:.0f} s", flush=True)
    return {"outcome": outcome, "seconds": round(took, 1)}


def benchmark_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a group and provider, as ``benchmarks.ratios`` reads them, with peak memory."""
    return [
        {
            "group": bench["group"],
            "provider": bench["params"]["provider"],
            "median_us": round(bench["stats"]["median"] * 1e6, 2),
            "peak_mib": bench["extra_info"]["peak_mib"],
        }
        for bench in record["benchmarks"]
    ]


def machine() -> dict[str, Any]:
    """What the numbers were measured with."""
    import triton

    import dvla_fast

    def output(*command: str) -> str:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": output("git", "rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(output("git", "status", "--porcelain")),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dvla_fast": dvla_fast.__version__,
    }


def file_name(gpu: str) -> str:
    """``NVIDIA H200`` to ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu_check: no CUDA device here, nothing to check", file=sys.stderr)
        return 1
    deadline = time.monotonic() + BUDGET_SECONDS

    checks: dict[str, dict[str, Any]] = {}

    def step(name: str, command: Sequence[str], **environment: str) -> None:
        seconds = max(1.0, SHARE[name] * (deadline - time.monotonic()))
        checks[name] = run(name, command, seconds, **environment)

    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    step("tests", [*pytest_command, "-m", "gpu", "tests"])
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            checks[tool] = {"outcome": "not run: compute-sanitizer is not installed", "seconds": 0}
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest_command]
        # Without the caching allocator: one pool would hide an access past a tensor's end.
        step(tool, [*command, *KERNEL_TESTS, "-k", SMALL], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, suite in SUITES.items():
            record = Path(folder) / f"{name}.json"
            step(name, [*pytest_command, *suite, "--benchmark-only", f"--benchmark-json={record}"])
            if record.exists() and record.stat().st_size:
                rows += benchmark_rows(json.loads(record.read_text()))
    facts = machine()
    path = options.output or RESULTS / file_name(facts["gpu"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**facts, "checks": checks, "medians": rows}, indent=1) + "\n")
    temporary.replace(path)
    print(f"{len(rows)} rows written to {path}")
    bad = [name for name, check in checks.items() if check["outcome"] in ("failed", "timed out")]
    if bad:
        print(f"benchmarks.gpu_check: {', '.join(bad)} did not pass", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
