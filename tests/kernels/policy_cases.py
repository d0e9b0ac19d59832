"""What the tests of the policy's kernels share, on a GPU or interpreted (``TRITON_INTERPRET=1``).

The kernels promise the C++ op's operations in its order. The interpreter rounds a fused
multiply-add twice, a GPU once; here the interpreter is taught to round once, and then its float32
results must be those of the C++ op to the last bit. In float64 its fused multiply-add has 64 bits,
not 106: rounded twice, rarely, so results may differ in the last digits.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from torch import Tensor

from dvla_fast import _extension

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NEEDS = [
    pytest.mark.skipif(_extension.problem is not None, reason="the C++ extension is not built"),
    *(
        []
        if INTERPRETED
        else [
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ]
    ),
]


def fuse_multiply_adds() -> None:
    """Teaches the interpreter to round a fused multiply-add once."""
    from triton.runtime import interpreter

    def create_fma(_self, x, y, z):  # type: ignore[no-untyped-def]
        wide = np.float64 if x.data.dtype == np.float32 else np.longdouble
        with np.errstate(invalid="ignore", over="ignore"):
            exact = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
            return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def turn_on_assertions(patch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter look at device assertions, which it accepts and ignores."""
    from triton.runtime import interpreter

    def create_assert(_self, condition, message):  # type: ignore[no-untyped-def]
        if not condition.data.all():
            raise ValueError(message)

    builder = interpreter.interpreter_builder
    checking = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)
    patch.setattr(builder, "options", checking)
    patch.setattr(interpreter.InterpreterBuilder, "create_assert", create_assert)


def assert_same(got: Tensor, want: Tensor, what: str = "") -> None:
    """Equal to the last bit, where the machine at hand promises it; else to a few roundings."""
    assert got.shape == want.shape, what
    assert got.dtype == want.dtype, what
    if INTERPRETED and want.dtype == torch.float32:
        relative = 0.0
    else:
        relative = 2e-6 if want.dtype == torch.float32 else 1e-11
    # Derivatives by kappa are differences of numbers near 1: an absolute share of what cancels.
    absolute = relative / 10
    torch.testing.assert_close(
        got.cpu(), want, rtol=relative, atol=absolute, equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )  # fmt: skip


if INTERPRETED:
    fuse_multiply_adds()
