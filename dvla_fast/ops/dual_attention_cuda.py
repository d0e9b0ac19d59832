"""Dual attention on CUDA: Triton kernels behind the op schemas, and their float32 arithmetic."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.ops import replay, schemas

PRECISIONS = ("ieee", "tf32x3", "tf32")

_forced: str | None = None


def set_float32_precision(name: str | None) -> None:
    """How the Triton kernels multiply float32 numbers, for the whole process.

    ``"ieee"``: float32 arithmetic. ``"tf32x3"``: tensor cores, three products to nearly float32
    accuracy, up to head dimension 128. ``"tf32"``: tensor cores, 10 bits of mantissa. ``None``
    (default) follows PyTorch's own setting for matrix products: ``"tf32"`` where
    ``torch.set_float32_matmul_precision("high")`` or
    ``torch.backends.cuda.matmul.fp32_precision = "tf32"`` allow it, else ``"ieee"``. Also from
    outside: ``DVLA_FAST_FLOAT32_PRECISION``. Read whenever an op runs, compiled graphs included;
    a CUDA graph keeps what held at its capture.

    Raises:
        ValueError: unknown name.
    """
    global _forced
    if name is not None and name not in PRECISIONS:
        raise ValueError(
            f"set_float32_precision: unknown {name!r}; expected one of {PRECISIONS} or None"
        )
    _forced = name
    if _extension.calls is not None:
        _extension.calls.forget()  # launches of another precision


def float32_precision() -> str:
    """What float32 products run in now; see :func:`set_float32_precision`."""
    if _forced is not None:
        return _forced
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _precision(query: Tensor) -> str:
    # Half types ignore it; one value for them keeps a change from compiling their kernels again.
    return float32_precision() if query.dtype == torch.float32 else "ieee"


def _forget_if_changed(query: Tensor, precision: str) -> None:
    """Drops what was recorded while another thread set another precision: it has the old one."""
    if _precision(query) != precision and _extension.calls is not None:
        _extension.calls.forget()


def _forward(query: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from dvla_fast.kernels.dual_attention import forward  # Triton is imported on first use

    precision = _precision(query)
    recorder = replay.recorder("dual_attention_forward", (query, *args))
    results: tuple[Tensor, ...] = forward(query, *args, precision=precision, recorder=recorder)
    _forget_if_changed(query, precision)
    return results


def _backward(grad_out: Tensor, query: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from dvla_fast.kernels.dual_attention import backward

    precision = _precision(query)
    recorder = replay.recorder("dual_attention_backward", (grad_out, query, *args))
    results: tuple[Tensor, ...] = backward(
        grad_out, query, *args, precision=precision, recorder=recorder
    )
    _forget_if_changed(query, precision)
    return results


for _name, _kernel in (("forward", _forward), ("backward", _backward)):
    schemas.implement_by_triton(f"dual_attention_{_name}", _kernel, _extension.has_autograd)

set_float32_precision(os.environ.get("DVLA_FAST_FLOAT32_PRECISION") or None)
