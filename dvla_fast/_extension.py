"""Loads the native parts once: CPU kernels for this machine's instruction set, autograd, CUDA.

``problem`` is ``None`` when the CPU kernels run, else the reason in one line. An installation
without a compiler is legitimate and falls back to plain PyTorch with one warning; an extension
built against another torch is broken and raises at the first use.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dvla_fast import backends
from dvla_fast.errors import BackendError
from dvla_fast.ops import schemas

_LIBRARIES = Path(__file__).parent / "lib"
# Looked up here: torch.compile traces past caches, and torch 2.11 gives up at find_spec.
_TRITON_PROBLEM = None
if importlib.util.find_spec("triton") is None:
    _TRITON_PROBLEM = "Triton is not installed"
elif torch.version.hip is not None:  # its devices are called cuda, too
    _TRITON_PROBLEM = "the Triton kernels are for NVIDIA's GPUs, and this torch is for AMD's (ROCm)"

problem: str | None = None
capability: str | None = None
has_autograd = False
has_cuda = False
calls: Any = None  # the module of direct calls, csrc/calls


def _import_build_info() -> ModuleType | None:
    if importlib.util.find_spec("dvla_fast._build_info") is None:
        return None
    try:
        return importlib.import_module("dvla_fast._build_info")
    except ImportError as error:  # cut short, or of another machine
        raise _not_loading(error) from error


def _not_loading(error: Exception) -> BackendError:
    return BackendError(
        f"dvla_fast: the extension does not load ({error}); build it again:"
        " pip install --no-build-isolation -e . (or set DVLA_FAST_BACKEND=reference to run"
        " without the extension)"
    )


def _choose_capability(info: ModuleType) -> str:
    """The fastest instruction set that this CPU runs, or the one asked for."""
    asked = os.environ.get("DVLA_FAST_CPU_CAPABILITY")
    if not asked:
        return str(info.cpu_capability())
    built, runs = list(info.cpu_capabilities), list(info.cpu_runs())
    if asked not in built:
        raise ValueError(f"DVLA_FAST_CPU_CAPABILITY={asked!r}: built are {built}")
    if asked not in runs:
        raise ValueError(
            f"DVLA_FAST_CPU_CAPABILITY={asked!r}: this CPU has not its instructions; it runs {runs}"
        )
    return asked


def _check_schemas(info: ModuleType) -> None:
    """Raise if the libraries implement other ops than this version defines."""
    source = Path(schemas.__file__)
    if not source.exists():  # installed without sources
        return
    if getattr(info, "schemas", None) != hashlib.sha256(source.read_bytes()).hexdigest():
        raise BackendError(
            "dvla_fast's extension was built from another version of its sources; build it again:"
            " pip install --no-build-isolation -e . (or set DVLA_FAST_BACKEND=reference to run"
            " without the extension)"
        )


def _load() -> None:
    global problem, capability, has_autograd, has_cuda, calls
    info = _import_build_info()
    if info is None:
        problem = (
            "the C++ extension is not built (`dvla-fast doctor` says what it needs; then: pip"
            " install --no-build-isolation -e .)"
        )
        warnings.warn(
            f"dvla_fast: {problem}; using plain PyTorch, which is slower", RuntimeWarning, 2
        )
        return
    if info.torch_version != torch.__version__:
        raise BackendError(
            f"dvla_fast was built against torch {info.torch_version} and meets torch"
            f" {torch.__version__}; build it again: pip install --no-build-isolation -e . (or set"
            " DVLA_FAST_BACKEND=reference to run without the extension)"
        )
    _check_schemas(info)
    capability = _choose_capability(info)
    # The CUDA part loads without a GPU: asking for one would start the driver before a fork.
    has_cuda = bool(info.cuda_architectures) and torch.version.cuda is not None
    try:
        for part in (capability, "autograd", *(["cuda"] if has_cuda else [])):
            torch.ops.load_library(_LIBRARIES / f"libdvla_fast_{part}.so")
        calls = importlib.import_module("dvla_fast._calls")
    except (OSError, ImportError) as error:
        raise _not_loading(error) from error
    has_autograd = True


def needs_python_autograd() -> bool:
    """Whether the ops' gradients must come from Python: no extension, or a torch.func transform.

    functorch does not enter C++ autograd functions, which are otherwise several times faster.
    """
    return not has_autograd or functorch_active()


def runs_plainly() -> bool:
    """Whether a call on a CPU is simply one of the compiled op: no other backend, no transform."""
    return (
        has_autograd
        and backends.get_backend() is None
        and not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
    )


def transforming() -> bool:
    """Whether tensors stand for others (torch.compile, torch.func, make_fx, fake tensors).

    Then they have no values to check.
    """
    if torch.compiler.is_compiling() or functorch_active():
        return True
    return torch._C._len_torch_dispatch_stack() > 0


def functorch_active() -> bool:
    """Whether a torch.func transform runs, outside of torch.compile."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None


def triton_available() -> bool:
    """Whether Triton is installed, for NVIDIA; importing it is left to the first kernel."""
    return _TRITON_PROBLEM is None


def beta_problem(device: torch.device) -> str | None:
    """Why the compiled ``beta_policy`` cannot run on a device, or ``None``."""
    if device.type == "cpu":
        return problem
    if device.type == "cuda":
        return None if has_cuda else "the extension was built without CUDA"
    return f"no kernel for {device.type}"


def beta_triton_problem(device: torch.device) -> str | None:
    """Why the Triton kernels of ``beta_policy`` cannot run on a device, or ``None``."""
    if device.type != "cuda":
        return "the inputs are not on a CUDA device"
    return _TRITON_PROBLEM


def gate_triton_problem(device: torch.device, width: int) -> str | None:
    """Why the Triton kernels of ``gate_policy`` cannot run with such tokens, or ``None``."""
    reason = beta_triton_problem(device)
    if reason is None and not has_autograd:
        return f"its gradients need the extension: {problem}"
    if reason is None and width > 4096:
        return f"width {width}: the Triton kernels go to 4096"
    return reason


def triton_problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton attention kernels cannot run with such inputs, or ``None``."""
    if device.type != "cuda":
        return "the inputs are not on a CUDA device"
    if dtype == torch.float64:
        return "the Triton kernels have no float64"
    if head_dim > 256:
        return f"head dimension {head_dim}: the Triton kernels go to 256"
    return _TRITON_PROBLEM


def build_info() -> dict[str, Any]:
    """What is installed and what will run: versions, instruction sets, CUDA targets, problems.

    Returns:
        A flat dictionary of strings, lists and ``None``; printed by ``dvla-fast doctor``.
    """
    from dvla_fast import __version__

    info = _import_build_info()
    return {
        "dvla_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "built_against_torch": getattr(info, "torch_version", None),
        "compiler": getattr(info, "compiler", None),
        "cpu_capabilities": list(getattr(info, "cpu_capabilities", [])),
        "cpu_runs": list(info.cpu_runs()) if info else [],
        "cpu_capability": capability,
        "cuda_architectures": list(getattr(info, "cuda_architectures", [])),
        "cuda_compiler": getattr(info, "cuda_compiler", None) or None,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "triton": triton_available(),
        "threads": torch.get_num_threads(),
        "forced_backend": backends.get_backend(),
        "problem": problem,
    }


if os.environ.get("DVLA_FAST_BACKEND") == "reference":
    problem = "DVLA_FAST_BACKEND=reference"
else:
    _load()

assert schemas.LIBRARY is not None  # the op schemas exist before any implementation is bound
