"""Maps ``kernels/`` and ``configs/`` into the package and hands the C++ build to CMake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

from native import build, find_torch, nvcc, tool  # noqa: E402


def notice(text: str) -> None:
    print(f"dvla-fast: {text}", file=sys.stderr, flush=True)


def switch(name: str) -> str:
    """0 or 1, or nothing where the environment leaves it to us; anything else would be a guess."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"dvla-fast: {name}={value!r}: expected 0 or 1")
    return value


class CMakeBuild(build_ext):
    """Builds every native part with CMake and puts the results into ``dvla_fast/``."""

    def run(self) -> None:
        reason = self._cannot_build()
        if reason:
            notice(
                f"{reason}; installing without the compiled extension (the plain-PyTorch path"
                " works, slower). `dvla-fast doctor` tells how to get it."
            )
            self.extensions = []
            return
        source = ROOT / "dvla_fast"
        in_place = self.inplace or self.editable_mode
        target = source if in_place else Path(self.build_lib) / "dvla_fast"
        self._cmake(target.resolve())

    def _cannot_build(self) -> str | None:
        if switch("DVLA_FAST_EXTENSION") == "0":
            return "DVLA_FAST_EXTENSION=0"
        if find_torch() is None:
            return "no torch to build against"
        compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
        if not any(shutil.which(name) for name in compilers if name):
            return "no C++ compiler found"
        if not tool("cmake"):
            return "no cmake found"
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
            return "no Python headers found (Debian, Ubuntu: apt install python3-dev)"
        if sys.platform != "linux":
            return f"the native build knows Linux only, not {sys.platform}"
        return None

    def _cmake(self, target: Path) -> None:
        torch = find_torch()
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = folder.with_name(f"{folder.name}-torch{torch.__version__}")
        try:
            build(folder, target, DVLA_CUDA="ON" if self._wants_cuda(torch) else "OFF")
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"dvla-fast: building the extension failed (exit status {error.returncode}). Set"
                " DVLA_FAST_CUDA=0 to leave CUDA out, DVLA_FAST_EXTENSION=0 to install without it."
            ) from None

    def _wants_cuda(self, torch) -> bool:
        """CUDA sources need nvcc and a CUDA torch; no GPU, so that a build farm can make them."""
        asked = switch("DVLA_FAST_CUDA")
        if asked == "0":
            return False
        missing = [
            what
            for what, there in (
                ("a CUDA build of torch", torch.version.cuda),
                ("nvcc", nvcc(torch.version.cuda)),
            )
            if not there
        ]
        if missing and asked == "1":
            raise SystemExit(
                f"dvla-fast: DVLA_FAST_CUDA=1, but there is no {' and no '.join(missing)}"
            )
        if missing:
            notice(f"no {' and no '.join(missing)}: skipping the CUDA sources (Triton serves GPUs)")
        return not missing

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    packages=[
        *find_packages(include=["dvla_fast", "dvla_fast.*"]),
        *(f"dvla_fast.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
        "dvla_fast.configs",
    ],
    package_dir={
        "dvla_fast": "dvla_fast",
        "dvla_fast.kernels": "kernels",
        "dvla_fast.configs": "configs",
    },
    package_data={
        "dvla_fast": [
            "py.typed",
            "semantics/banks/*.json",
            "semantics/prompts/*.txt",
            "semantics/*.json",
            "data/split_lists/*.json",
            "report/assets/*",
        ],
        "dvla_fast.kernels.dual_attention": ["*.json"],
        "dvla_fast.configs": ["*.yaml"],
    },
    ext_modules=[Extension("dvla_fast._build_info", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
