"""Which implementation of an op runs: Triton kernels, the C++ extension, or plain PyTorch.

An op asks :func:`choose` with the implementations that exist for it, best first, each with the
reason why it cannot run (``None``: it can). A user forces one per call (``backend=``), for the
process (:func:`set_backend`) or from outside (``DVLA_FAST_BACKEND``), in that order of precedence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from dvla_fast.errors import BackendError

BACKENDS = ("triton", "cpp", "reference")

_forced: str | None = None


def set_backend(name: str | None) -> None:
    """Use one backend for every op that has it; ``None`` returns to the best for the inputs.

    Raises:
        ValueError: ``name`` is not one of ``"triton"``, ``"cpp"``, ``"reference"``.
    """
    global _forced
    _forced = _checked(name, "set_backend")


def get_backend() -> str | None:
    """The backend forced for this process, or ``None``."""
    return _forced


def choose(op: str, candidates: Sequence[tuple[str, str | None]], requested: str | None) -> str:
    """The first candidate that can run, or the requested one.

    Args:
        op: name of the op, for messages.
        candidates: (backend, reason why it cannot run or ``None``), best first.
        requested: the call's own ``backend=`` argument.

    Raises:
        ValueError: unknown backend name.
        BackendError: the backend asked for cannot run with these inputs.
    """
    wanted = _forced if requested is None else _checked(requested, op)
    if requested is None and wanted is not None and all(name != wanted for name, _ in candidates):
        wanted = None  # an op without the process's backend is not meant
    for name, reason in candidates:
        if reason is None and (wanted is None or wanted == name):
            return name
        if wanted == name:
            raise BackendError(f"{op}: backend {name!r} cannot run here: {reason}")
    raise BackendError(
        f"{op}: no backend {wanted!r} for this op; it has {[name for name, _ in candidates]}"
    )


def _checked(name: str | None, where: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; expected one of {BACKENDS} or None")
    return name


set_backend(os.environ.get("DVLA_FAST_BACKEND") or None)
