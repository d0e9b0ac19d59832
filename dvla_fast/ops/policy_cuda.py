"""The policy's Triton kernels behind the op schemas, for CUDA tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dvla_fast import _extension
from dvla_fast.ops import replay, schemas


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

    recorder = replay.recorder("gate_policy_forward", args)
    results: tuple[Tensor, ...] = gate_policy.forward(*args, recorder=recorder)
    return results


def _gate_backward(*args: Any) -> tuple[Tensor, ...]:
    from dvla_fast.kernels import gate_policy

    recorder = replay.recorder("gate_policy_backward", args)
    results: tuple[Tensor, ...] = gate_policy.backward(*args, recorder=recorder)
    return results


for _op, _kernel, _compiled in (
    ("gate_policy_forward", _gate_forward, _extension.has_autograd),
    ("gate_policy_backward", _gate_backward, _extension.has_autograd),
    ("beta_policy_forward", _beta_forward, _extension.has_cuda),
    ("beta_policy_backward", _beta_backward, _extension.has_cuda),
):
    schemas.implement_by_triton(_op, _kernel, _compiled)
