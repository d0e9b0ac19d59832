"""``dvla-fast doctor``: what is installed, what runs here, and how to get what is missing.

Uses nothing outside torch and the standard library: it must work on the broken installation that
it is asked about.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_EXTRAS = {
    "train": (
        "numpy",
        "scikit-learn",
        "scipy",
        "safetensors",
        "jsonargparse",
        "PyYAML",
        "rich",
        "matplotlib",
        "pillow",
        "tensorboard",
    ),
    "vision": ("timm", "torchvision"),
    "semantics": (
        "accelerate",
        "openai",
        "open-clip-torch",
        "pillow",
        "safetensors",
        "transformers",
    ),
    "distributed": ("accelerate",),
}


def report() -> tuple[str, bool]:
    """Describe this installation.

    Returns:
        The text, and whether everything that the command line needs is there.
    """
    import torch

    import dvla_fast

    lines = [
        f"dvla-fast  {dvla_fast.__version__}",
        f"python     {platform.python_version()} ({platform.platform()})",
        f"torch      {torch.__version__}, {torch.get_num_threads()} CPU threads",
        f"GPU        {_gpu(torch)}",
        "",
        "extension",
    ]
    lines += _extension_lines()
    lines += ["", "build tools", *_build_lines()]
    healthy = True
    for extra, packages in _EXTRAS.items():
        missing = [name for name in packages if _version(name) is None]
        found = ", ".join(f"{name} {_version(name)}" for name in packages if name not in missing)
        lines += ["", f"extra '{extra}'", f"  installed: {found or 'nothing'}"]
        if missing:
            lines.append(f"  missing: {', '.join(missing)}")
            lines.append(f"  remedy: pip install 'dvla-fast[{extra}]'")
            healthy = healthy and extra != "train"
    return "\n".join(lines), healthy


def _extension_lines() -> list[str]:
    import dvla_fast

    try:
        info: Any = dvla_fast.build_info()
    except Exception as error:  # a report about a broken build must not break on it
        return [f"  cannot be examined: {type(error).__name__}: {error}"]
    if isinstance(info, Mapping):
        return [f"  {key}: {value}" for key, value in info.items()]
    return [f"  {line}" for line in str(info).splitlines()]


def _build_lines() -> list[str]:
    """What compiling the extension needs, found or with its remedy."""
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    tools = {
        "C++ compiler": (_which(*compilers), "Debian, Ubuntu: apt install g++"),
        "Python headers": (str(headers) if headers.exists() else None, "apt install python3-dev"),
        "cmake": (_version("cmake") or _which("cmake"), "pip install cmake ninja"),
        "nvcc": (_which(os.environ.get("CUDACXX", ""), "nvcc"), "only for the CUDA kernels"),
    }
    lines = [
        f"  {name}: {found or f'missing ({remedy})'}" for name, (found, remedy) in tools.items()
    ]
    lines.append("  to build: pip install --no-build-isolation -e .  (in the source folder)")
    return lines


def _which(*names: str) -> str | None:
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _gpu(torch: Any) -> str:
    if not torch.cuda.is_available():
        return "none that torch can use (everything runs on the CPU)"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
