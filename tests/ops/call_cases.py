"""For the tests of direct calls: witnesses of a call, and tensors that are not plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dvla_fast import _extension

# Factors of scores that Python is to look at.
ODD_SCALES = [1, float("nan"), float("inf"), 1e39, torch.tensor(1.0)]


class Recorder:
    """Stands in for the module and notes of each call whether it was taken."""

    def __init__(self, runs: list[bool]) -> None:
        self.module, self.runs = _extension.calls, runs

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            out = getattr(self.module, name)(*args)
            self.runs.append(out is not None)
            return out

        return call


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    """A subclass whose operations yield it too, by the default __torch_function__."""


class Wrapped(Tensor):
    """A subclass that holds a tensor and works by __torch_dispatch__ alone."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        plain = [x.held if isinstance(x, Wrapped) else x for x in args]
        return tuple(map(Wrapped, func(*plain, **(kwargs or {}))))
