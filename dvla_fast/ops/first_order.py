"""Backward ops that may not be differentiated again, for the Python twins of the C++ autograd.

``once_differentiable`` does not do under torch.func: there its second derivative is silently 0.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch


def first_order(op: Any, name: str) -> type[torch.autograd.Function]:
    """``op`` as an autograd function whose own backward raises, in eager mode and torch.func."""

    class FirstOrder(torch.autograd.Function):
        generate_vmap_rule = True  # from that of the op

        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(
                f"{name}: second derivatives are not implemented; use the reference backend"
                " (backend='reference' or dvla_fast.set_backend)"
            )

    FirstOrder.forward.__signature__ = _signature(op)  # type: ignore[attr-defined]
    return FirstOrder


def _signature(op: Any) -> inspect.Signature:
    """One parameter an argument: torch.compile counts them to tell whether there is a context."""
    if not isinstance(op, torch._ops.OpOverload):
        return inspect.signature(op)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(a.name, kind) for a in op._schema.arguments])
