"""Runs the fuzz and float64 tests of the C++ kernels, and those of the direct and repeated calls,
under the address and undefined-behaviour sanitizers.

A copy of the package with sanitized libraries is made in ``build/sanitize``; the package in use is
left alone. Exit status 0: nothing found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import native

FOLDER = native.ROOT / "build" / "sanitize"
PACKAGE = FOLDER / "package" / "dvla_fast"


def variant() -> str:
    """The instruction set to check: the last of this machine whose every access is checked.

    Tile instructions reach memory behind the address sanitizer's back. The variant without them
    shares the code but what makes and pads their operands, which it takes where they lie, and the
    gated layer's products in bfloat16, which tiles leave to PyTorch.
    """
    from dvla_fast import _build_info

    return str([name for name in _build_info.cpu_runs() if name != "amx"][-1])


def runtime() -> str | None:
    """The compiler's address-sanitizer runtime, to be loaded before everything else.

    With the C++ library behind it: the runtime looks exceptions up when it starts, and the first
    one thrown (Triton throws some as it is imported) would end the process otherwise.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return ":".join(found) if found[0] not in ("", "libasan.so") else None


def main() -> int:
    asan = runtime()
    if asan is None:
        print("sanitize: skipped, the compiler has no libasan (GCC brings it)", file=sys.stderr)
        return 0
    capability = variant()
    targets = (f"dvla_fast_{capability}", "dvla_fast_autograd", "_calls")
    # What is not built goes along as it is; a copy over what is built here would hide it.
    built = ("_calls.*", *(f"lib{name}.so" for name in targets))
    ignored = shutil.ignore_patterns("__pycache__", *built)
    shutil.copytree(native.ROOT / "dvla_fast", PACKAGE, ignore=ignored, dirs_exist_ok=True)
    options = {"DVLA_SANITIZE": "address,undefined", "DVLA_CUDA": "OFF"}
    native.build(FOLDER, PACKAGE, targets, **options)
    # Neither Python nor torch was built for these checks, hence no leaks and no pairs of new/free.
    env = {
        **os.environ,
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DVLA_FAST_CPU_CAPABILITY": capability,
        "PYTHONPATH": str(PACKAGE.parent),
    }
    where = subprocess.run(
        [sys.executable, "-c", "import dvla_fast; print(dvla_fast.__file__)"],
        env=env, cwd=FOLDER, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout.strip()  # fmt: skip
    if Path(where).parent != PACKAGE:
        print(f"sanitize: {where} was imported instead of {PACKAGE}", file=sys.stderr)
        return 1
    pytest = Path(sys.executable).with_name("pytest")
    names = (
        "fuzz", "fuzz_layer", "gated_attention", "gate_policy",
        "attention_calls", "decision_calls", "layer_calls", "replay",
    )  # fmt: skip
    tests = [f"tests/ops/test_{name}.py" for name in names]
    chosen = (
        "fuzz or calls or replay"
        " or ((values_and_gradients_float64 or narrow_tokens or partly_masked) and cpp)"
    )
    command = [
        pytest,
        "-q",
        "-s",
        "-k",
        chosen,
        "-p",
        "no:cacheprovider",
        "-o",
        f"pythonpath={PACKAGE.parent}",
    ]
    return subprocess.run(
        [*command, *tests, *sys.argv[1:]], env=env, cwd=native.ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
