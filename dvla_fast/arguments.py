"""What an argument is, by its type alone: no tensor is read, so that nothing waits for a GPU."""

from __future__ import annotations

from numbers import Integral, Rational, Real

import torch
from torch import Tensor

# The symbols are sizes and numbers of a graph with dynamic shapes. What is usual comes first: an
# abstract class takes longer to ask.
_WHOLE = (int, torch.SymInt, Integral)
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt, Real)


def expect_tensor(name: str, value: object) -> None:
    """Raises TypeError unless the argument of that name is a tensor, neither sparse nor nested."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def expect_real(name: str, value: Tensor) -> None:
    """Likewise for one of real numbers: a complex one would lose its imaginary part."""
    expect_tensor(name, value)
    if value.is_complex():
        raise TypeError(f"{name}: expected real values, got {value.dtype}")


def expect_generator(value: object) -> None:
    """Likewise for ``generator``, which may be None."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(value).__name__}")


def expect_number(name: str, value: object, what: str = "a number") -> None:
    """Likewise for a real number; a tensor is none, for as a number it would lose its gradient.

    Raises ValueError for a whole number or a fraction that no float holds.
    """
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: expected {what}, got {value!r}")
    if isinstance(value, Rational):
        try:
            float(value)
        except OverflowError as error:
            raise ValueError(f"{name}: expected {what}, got one beyond 1.8e308") from error


def expect_whole(name: str, value: object) -> None:
    """Likewise for a whole number, which 3.0 is not."""
    if isinstance(value, bool) or not isinstance(value, _WHOLE):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
