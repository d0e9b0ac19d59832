"""Everything that needs a GPU, in one command and under ten minutes.

    make gpu-check
    python -m benchmarks.gpu_check

runs every test marked ``gpu``, compute-sanitizer (memcheck and racecheck, where it works) over
small cases, and the GPU benchmarks, and writes benchmarks/results/<gpu>.json: GPU, driver,
versions, build, commit, date, what each step said, and every row. The file is written anew after
each step; rows of a step that is killed are in a file beside it, .rows. A step whose time is over
is cut off and keeps its finished rows. ``--onto`` adds the steps of one call to an earlier call's
record. Exit status 1 unless every step that can run here passed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import dvla_fast

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUDGET_SECONDS = 570
LEAST_SECONDS = 5  # in less not even torch is imported
GRACE_SECONDS = 15  # for pytest to write its report after an interrupt
PROBE_SECONDS = 60
MOST_PROCESSES = 16
SHOWN_FAILURES = 20
# Steps in order, each with the most it may take of the time left when it begins. The benchmarks
# are apart, so that compiling and autotuning peers, which takes longest, can cost no other.
SHARE = {
    "tests": 0.3,
    "kernels": 0.3,
    "eager": 0.3,
    "policy": 0.25,
    "long": 0.25,
    "graph": 0.45,
    "gate": 0.35,
    "training": 0.6,
    "compiled": 0.45,
    "memcheck": 0.5,
    "racecheck": 1.0,
}
SANITIZERS = ("memcheck", "racecheck")
ATTENTION, POLICY, GATE, TRAINING = (
    f"benchmarks/test_{name}_gpu.py" for name in ("dual_attention", "policy", "gate", "training")
)
BENCHMARKS = {
    "policy": [POLICY],
    "gate": [GATE, "-k", "test_eager"],
    "training": [TRAINING, "-k", "not test_compiled"],  # the file's own name has test_training
    "compiled": [GATE, ATTENTION, TRAINING, "-k", "test_compiled"],
    "graph": [ATTENTION, GATE, "-k", "test_graph"],
    **{name: [ATTENTION, "-k", f"test_{name}"] for name in ("eager", "long")},
}
# Every file with a test marked gpu; each process would collect the others too.
GPU_TESTS = [
    f"tests/{name}.py"
    for name in (
        "kernels/test_dual_attention_backward", "kernels/test_dual_attention_forward",
        "kernels/test_dual_attention_fuzz",
        "kernels/test_beta_policy_kernel", "kernels/test_gate_policy_kernel",
        "kernels/test_dual_attention_tune", "ops/test_beta_policy", "ops/test_dual_attention_cuda",
        "ops/test_gate_policy_cuda", "ops/test_gated_attention_cuda", "ops/test_replay_cuda",
        "ops/test_value_checks", "nn/test_gate_cuda", "engine/test_execution",
    )
]  # fmt: skip
# What the sanitizers look at: odd sizes, masks, no keys; the two of ops/test_beta_policy are CUDA.
SMALL = [
    f"tests/{name}"
    for name in (
        "kernels/test_dual_attention_forward.py::test_matches_float64[2x1x3x5x7x4x40-float16]",
        "kernels/test_dual_attention_forward.py::test_matches_float64[1x3x3x9x70x9x24-float16]",
        "kernels/test_dual_attention_forward.py::test_masks[float32]",
        "kernels/test_dual_attention_forward.py::test_a_path_without_keys_contributes_zero",
        "kernels/test_dual_attention_backward.py::test_matches_float64"
        "[whole-1x3x3x9x70x9x24-float16]",
        "kernels/test_dual_attention_backward.py::test_matches_float64"
        "[streamed-2x1x3x5x7x4x40-float16]",
        "kernels/test_dual_attention_backward.py::test_masks[whole-float32-3]",
        "kernels/test_dual_attention_backward.py::test_masks[streamed-float32-3]",
        "kernels/test_dual_attention_backward.py::test_a_path_without_keys[whole-0-4-2]",
        "kernels/test_beta_policy_kernel.py::test_sizes[(0,)-float32]",
        "kernels/test_beta_policy_kernel.py::test_sizes[(129,)-float32]",
        "kernels/test_gate_policy_kernel.py::test_equals_the_cpu_op"
        "[B12T6N33P5C33K10-2-1-torch.float16]",
        "ops/test_beta_policy.py::test_cuda_draws_the_same_numbers_as_the_cpu[None-torch.float32-]",
        "ops/test_beta_policy.py::test_gradients_on_cuda_are_those_on_the_cpu[cpp]",
        "ops/test_replay_cuda.py::test_the_same_bits",
    )
]
PYTEST = [
    sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider",
    "-o", "junit_family=xunit1",
]  # fmt: skip


def processes() -> int:
    """In how many tests run that are not timed: one without pytest-xdist."""
    if importlib.util.find_spec("xdist") is None:
        return 1
    return min(MOST_PROCESSES, os.cpu_count() or 1)


def in_parallel() -> list[str]:
    """Options of pytest for tests that are not timed.

    Tests are dealt out one by one: the backward's file alone compiles more than 200 kernels.
    """
    return ["-n", str(processes()), "--dist", "worksteal"] if processes() > 1 else []


def under_sanitizer(tool: str) -> list[str]:
    # PyTorch asks CUDA about what may not exist, and takes no for an answer: no error.
    options = ["--report-api-errors", "no", "--error-exitcode", "9"]
    return ["compute-sanitizer", "--tool", tool, *options]


def command(name: str, rows: Path) -> list[str]:
    """What a step runs; the benchmarks append their rows to a file."""
    if name == "tests":
        options = ["-m", "gpu", "--continue-on-collection-errors"]
        return [*PYTEST, *in_parallel(), *options, *GPU_TESTS]
    if name in SANITIZERS:
        return [*under_sanitizer(name), *PYTEST, *SMALL]
    if name == "kernels":  # compiles for the benchmarks, which find in caches what is ready then
        options = ["--benchmark-disable", "-k", "dvla_fast or compile"]
        return [*PYTEST, *in_parallel(), *options, ATTENTION, POLICY, GATE]
    options = ["--benchmark-only", "--benchmark-quiet", f"--rows={rows}"]
    return [*PYTEST, *options, *BENCHMARKS[name]]


def environment(name: str) -> dict[str, str]:
    """What a step sees beside this process's variables."""
    if name in SANITIZERS:  # one pool of memory would hide an access past a tensor's end
        return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if name in ("tests", "kernels"):  # Inductor starts one compiler a core in each process
        threads = max(1, (os.cpu_count() or 1) // processes())
        return {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    return {}


def run(
    name: str, command: Sequence[str], seconds: float, **environment: str
) -> dict[str, float | str | None]:
    """Runs one step, its output shown: outcome (passed, failed or cut off), seconds, exit status.

    The step and all that it starts are one process group, of which nothing outlives this.
    """
    print(f"== {name} (at most {seconds:.0f} s): {' '.join(command)}", flush=True)
    begin = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True
    )
    try:
        outcome = "failed" if process.wait(seconds) else "passed"
    except subprocess.TimeoutExpired:
        outcome = "cut off"
        os.killpg(process.pid, signal.SIGINT)  # pytest then reports what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    took = time.monotonic() - begin
    print(f"== {name}: {outcome} in {took:.0f} s", flush=True)
    return {"outcome": outcome, "seconds": round(took, 1), "status": process.returncode}


def junit_results(report: Path) -> dict[str, Any]:
    """Counts and the names of what failed, from pytest's JUnit file; empty where there is none."""
    try:
        suite = next(ElementTree.parse(report).iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return {}
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('file') or case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": failed}


def check(name: str, seconds: float, folder: Path, rows: Path) -> dict[str, Any]:
    """Runs one step: its outcome, and what its tests said; rows are appended to a file."""
    if seconds < LEAST_SECONDS:
        return {"outcome": "skipped: no time left", "seconds": 0}
    report = folder / f"{name}.xml"
    step = [*command(name, rows), f"--junitxml={report}"]
    result = {**run(name, step, seconds, **environment(name)), **junit_results(report)}
    if result["outcome"] == "passed" and result.get("tests") == result.get("skipped"):
        result["outcome"] = "failed: no test ran"
    return result


@functools.cache
def sanitizer_problem() -> str | None:
    """Why compute-sanitizer cannot be used here: some virtual machines' GPUs it refuses."""
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not installed"
    touch = [sys.executable, "-c", "import torch; torch.ones(1, device='cuda').item()"]
    result = run("compute-sanitizer", [*under_sanitizer("memcheck"), *touch], PROBE_SECONDS)
    return None if result["outcome"] == "passed" else "compute-sanitizer does not work here"


def output(*command: str) -> str | None:
    """What a program prints; None where it is not installed or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine(commit: str | None = None) -> dict[str, Any]:
    """What the numbers are measured with; None for what cannot be known, as without git."""
    import triton

    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    changes = None if commit else output("git", "status", "--porcelain")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dvla_fast": dvla_fast.__version__,
        "build": dvla_fast.build_info(),
    }


def missing_part(build: dict[str, Any]) -> str | None:
    """What is not built, in a line: tests of that would skip, and the check would pass."""
    if build["problem"]:
        return str(build["problem"])
    if not build["cuda_architectures"]:
        return "the extension was built without CUDA (is nvcc on the PATH?)"
    return None


def file_name(gpu: str) -> str:
    """``NVIDIA H200`` to ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def write(record: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def summary(checks: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, result in checks.items():
        lines.append(f"{name}: {result['outcome']}, {result['seconds']} s")
        failed = result.get("failed", [])
        lines += [f"  {test}" for test in failed[:SHOWN_FAILURES]]
        if len(failed) > SHOWN_FAILURES:
            lines.append(f"  and {len(failed) - SHOWN_FAILURES} more, see the record")
    return "\n".join(lines)


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>.json")
    parser.add_argument(
        "--seconds", type=float, default=BUDGET_SECONDS, help="for all steps (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", nargs="+", choices=list(SHARE), default=list(SHARE), help="default: all"
    )
    parser.add_argument("--commit", help="what is checked, where git cannot say it")
    parser.add_argument(
        "--onto", type=Path, help="an earlier record: its other steps, and rows not made anew, stay"
    )
    parser.add_argument(
        "--allow-missing-extension",
        action="store_true",
        help="go on where the extension, or its CUDA part, is not built",
    )
    return parser


def measured(rows: Path) -> list[dict[str, Any]]:
    """The rows of the benchmarks; of a step that was killed, the last may be cut off."""
    *lines, _ = rows.read_text().split("\n")
    return [json.loads(line) for line in lines]


def earlier_record(path: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """What is added to; nothing without a path.

    Raises:
        ValueError: no record, or one of another GPU or commit.
    """
    if path is None:
        return {}
    try:
        earlier = json.loads(path.read_text())
        found = {key: earlier[key] for key in ("gpu", "commit", "checks", "medians")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--onto {path}: not a record of this check ({error!r})") from error
    for key in ("gpu", "commit"):
        if found[key] != record[key]:
            raise ValueError(f"--onto {path}: its {key} is {found[key]}, not {record[key]}")
    return found


def run_steps(
    record: dict[str, Any],
    path: Path,
    steps: Sequence[str],
    deadline: float,
    earlier: dict[str, Any],
) -> None:
    """Fills the record and writes it before the first step, after each, and where it is ended."""
    checks = record["checks"] = {}
    rows = path.with_suffix(".rows")

    def keep() -> None:
        made = measured(rows)
        anew = {(row["group"], row["provider"]) for row in made}
        kept = earlier.get("medians", [])
        record["medians"] = [x for x in kept if (x["group"], x["provider"]) not in anew] + made
        write(record, path)

    path.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, share in SHARE.items():
                keep()
                if name not in steps:
                    unasked = {"outcome": "not run: not asked for", "seconds": 0}
                    checks[name] = earlier.get("checks", {}).get(name, unasked)
                elif name in SANITIZERS and (problem := sanitizer_problem()):
                    checks[name] = {"outcome": f"not run: {problem}", "seconds": 0}
                else:
                    seconds = share * (deadline - time.monotonic())
                    checks[name] = check(name, seconds, Path(folder), rows)
    finally:
        keep()
        rows.unlink()


def main(arguments: list[str] | None = None) -> int:
    begin = time.monotonic()
    options = arguments_parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu_check: no CUDA device here, nothing to check", file=sys.stderr)
        return 1
    record = machine(options.commit)
    problem = missing_part(record["build"])
    if problem and not options.allow_missing_extension:
        print(
            f"benchmarks.gpu_check: {problem}; --allow-missing-extension goes on without it",
            file=sys.stderr,
        )
        return 1
    try:
        earlier = earlier_record(options.onto, record)
    except ValueError as error:
        print(f"benchmarks.gpu_check: {error}", file=sys.stderr)
        return 1
    # Where a shell has put this into the background, steps would ignore their interrupt; and a
    # step, a process group of its own, would go on where this is ended.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    path = options.output or RESULTS / file_name(record["gpu"])
    run_steps(record, path, options.steps, begin + options.seconds - GRACE_SECONDS, earlier)
    print(summary(record["checks"]))
    print(f"{len(record['medians'])} rows written to {path}")
    fine = ("passed", "not run")
    bad = [name for name, it in record["checks"].items() if not it["outcome"].startswith(fine)]
    if bad:
        print(f"benchmarks.gpu_check: {', '.join(bad)} did not pass", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
