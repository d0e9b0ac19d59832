"""The native build: what CMake is told, for an installation and for the sanitizer check."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from target import site_packages

ROOT = Path(__file__).resolve().parent.parent


def find_torch():
    """torch of the environment being installed into, or ``None``."""
    for folder in site_packages():
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def tool(name: str) -> str:
    """A build tool: from its PyPI package where installed, as pip does for a build, or PATH."""
    try:
        return str(Path(importlib.import_module(name).BIN_DIR) / name)
    except (ImportError, AttributeError):
        pass
    try:
        return str(Path(importlib.import_module(name).CMAKE_BIN_DIR) / name)
    except (ImportError, AttributeError):
        return shutil.which(name) or ""


def nvcc(cuda: str | None) -> str:
    """CUDA's compiler: CUDACXX, on PATH, or that of an installation of torch's generation of CUDA.

    Args:
        cuda: torch's version of CUDA. What is found on no path may be another program's, years old.
    """
    if found := os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return found
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes if cuda else []):
        if found := shutil.which("nvcc", path=str(Path(home, "bin"))):
            said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
            if f"release {cuda.split('.')[0]}." in said.stdout:
                return found
    return ""


def build(folder: Path, output: Path, targets: tuple[str, ...] = (), **options: str) -> None:
    """Configures and compiles in ``folder``; the results go into the package folder ``output``.

    Args:
        targets: what to make; default everything.
        options: definitions of CMakeLists.txt besides the paths, which are found here.

    Raises:
        subprocess.CalledProcessError: a step failed; it has said why.
    """
    torch = find_torch()
    from torch.utils import cpp_extension

    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "DVLA_OUTPUT": output,
        "DVLA_TORCH_VERSION": torch.__version__,
        "DVLA_TORCH_INCLUDES": ";".join(cpp_extension.include_paths()),
        "DVLA_TORCH_LIBRARIES": ";".join(cpp_extension.library_paths()),
        "DVLA_PYTHON_INCLUDE": sysconfig.get_paths()["include"],
        "DVLA_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        **options,
    }
    if os.environ.get("DVLA_FAST_WERROR") == "1":  # else as the folder was first built: no rebuild
        definitions["DVLA_WERROR"] = "ON"
    if shutil.which("ccache"):
        definitions["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
    cmake, ninja = tool("cmake"), tool("ninja")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder)]
    if ninja:
        configure += ["-G", "Ninja"]
        definitions["CMAKE_MAKE_PROGRAM"] = ninja
    configure += [f"-D{name}={value}" for name, value in definitions.items()]
    environment = os.environ
    if options.get("DVLA_CUDA") == "ON":
        environment = {**os.environ, "CUDACXX": nvcc(torch.version.cuda)}
    subprocess.run(configure, check=True, env=environment)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    make = [cmake, "--build", str(folder), "--parallel", jobs]
    subprocess.run([*make, *(["--target", *targets] if targets else [])], check=True)
