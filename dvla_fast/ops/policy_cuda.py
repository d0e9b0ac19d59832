"""The policy's Triton kernels behind the op schemas, for CUDA tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.ops import schemas


def _beta_forward(*args: Any) -> tuple[Tensor, ...]:
    from dvla_fast.kernels import beta_policy  # Triton is imported on first use

    results: tuple[Tensor, ...] = beta_policy.forward(*args)
    return results


def _beta_backward(*args: Any) -> tuple[Tensor, ...]:
    from dvla_fast.kernels import beta_policy

    results: tuple[Tensor, ...] = beta_policy.backward(*args)
    return results


def _gate_forward(*args: Any) -> tuple[Tensor, ...]:
    from dvla_fast.kernels import gate_policy

    results: tuple[Tensor, ...] = gate_policy.forward(*args)
    return results


def _gate_backward(*args: Any) -> tuple[Tensor, ...]:
    from dvla_fast.kernels import gate_policy

    results: tuple[Tensor, ...] = gate_policy.backward(*args)
    return results


for _name, _kernel in (("forward", _gate_forward), ("backward", _gate_backward)):
    torch.library.impl(f"dvla_fast::gate_policy_{_name}", "CUDA", _kernel, lib=schemas.LIBRARY)
# Where the compiled CUDA kernels are there, they are the op.
for _kernels in ("_triton",) if _extension.has_cuda else ("", "_triton"):
    for _name, _kernel in (("forward", _beta_forward), ("backward", _beta_backward)):
        torch.library.impl(
            f"dvla_fast::beta_policy_{_name}{_kernels}", "CUDA", _kernel, lib=schemas.LIBRARY
        )
