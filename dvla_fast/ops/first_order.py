"""What may be differentiated once, and raises when differentiated again.

``once_differentiable`` does not do under torch.func: there its second derivative is silently 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_REMEDY = "; use the reference backend (backend='reference' or dvla_fast.set_backend)"


def first_order(op: Any, name: str, remedy: str = _REMEDY) -> type[torch.autograd.Function]:
    """``op`` as an autograd function whose own backward raises, in eager mode and torch.func.

    For the backward ops of Python's twins of the C++ autograd, and for :func:`first_order_term`.
    """

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
            raise NotImplementedError(f"{name}: second derivatives are not implemented{remedy}")

    FirstOrder.forward.__signature__ = _signature(op)  # type: ignore[attr-defined]
    return FirstOrder


def first_order_term(name: str, remedy: str = "") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function (value, x, slope), all of one shape, that is ``value`` with a gradient more.

    It adds slope·(x − x) = 0, whose gradient with respect to x is ``slope``. A derivative of that
    gradient, by x or by what ``slope`` hangs on, raises: it would lack the terms of the value.
    """
    scale = first_order(_scaled, name, remedy)

    class FirstOrderTerm(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
            return value.clone()  # + slope·(x − x), which is NaN where x is infinite

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
            ctx.save_for_backward(*inputs[1:])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
            grad_value, grad_x = scale.apply(grad, *ctx.saved_tensors)
            return grad_value, grad_x, None

    def term(value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # It traces no function inside a backward, and refuses second derivatives itself.
            return value + slope.detach() * (x - x.detach())
        result: Tensor = FirstOrderTerm.apply(value, x, slope)
        return result

    return term


def _scaled(grad: Tensor, _x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of value and x; takes x too, so that a second derivative by it meets the error."""
    return grad.clone(), grad * slope


def _signature(op: Any) -> inspect.Signature:
    """One parameter an argument: torch.compile counts them to tell whether there is a context."""
    if not isinstance(op, torch._ops.OpOverload):
        return inspect.signature(op)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(a.name, kind) for a in op._schema.arguments])
