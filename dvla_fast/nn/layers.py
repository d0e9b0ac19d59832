"""Which layers may be read past their forward, what a module computes in, how it starts anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer is a ``kind`` that computes what its weights say and nothing else.

    One that was replaced (LoRA, quantisation), hooked, alone or with all modules, or given another
    ``forward`` (accelerate) must be called instead.
    """
    changed = (
        layer._forward_hooks or layer._forward_pre_hooks
        or layer._backward_hooks or layer._backward_pre_hooks
        or "forward" in layer.__dict__ or _has_any_global_hook()
    )  # fmt: skip
    return type(layer) is kind and not changed


def reset_parts(module: nn.Module) -> None:
    """Initialise all that a module consists of anew; its own parameters and buffers are left to it.

    Raises:
        NotImplementedError: a part has parameters or buffers and no ``reset_parameters``.
    """
    for part in module.children():
        reset: Any = getattr(part, "reset_parameters", None)
        if reset is not None:
            reset()  # and its own parts
        elif part._parameters or part._buffers:
            raise NotImplementedError(
                f"{type(part).__name__} has weights and no reset_parameters(); load weights instead"
            )
        else:
            reset_parts(part)


def lookup(numbers: Sequence[float], index: Tensor, dtype: torch.dtype) -> Tensor:
    """numbers[index] for an index of any shape, in a dtype; past the end, the last number.

    Without a table: one made here would be copied to the GPU at every call, and one kept as a
    buffer is rounded with the weights and lost where a model is made on the meta device.
    """
    picked = torch.full((), numbers[-1], dtype=dtype, device=index.device)
    for i, number in enumerate(numbers[:-1]):
        picked = torch.where(index == i, number, picked)
    return picked.expand(index.shape)


def weight_of(module: nn.Module) -> Tensor:
    """A tensor of the dtype and device of a module, also where its layers were replaced."""
    found = (p for p in module.parameters() if p.is_floating_point())
    # All layers quantised: they take float32 on the CPU.
    return next(found, torch.empty(0, dtype=torch.float32))
