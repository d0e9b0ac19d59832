"""The Triton policy against the C++ op on the same stream, on a GPU or in Triton's interpreter.

``test_interpreter.py`` runs this file with ``TRITON_INTERPRET=1``, in a process of its own.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from policy_cases import DEVICE, INTERPRETED, NEEDS, assert_same, turn_on_assertions
from triton.runtime.errors import InterpreterError

import dvla_fast.functional  # noqa: F401  (the ops)

kernel = importlib.import_module("dvla_fast.kernels.beta_policy")
beta_math = importlib.import_module("dvla_fast.kernels.beta_math")

pytestmark = NEEDS

MEANS = (1e-6, 1e-3, 0.3, 0.5, 0.99, 1 - 1e-6)
CONCENTRATIONS = (1e-2, 0.1, 1.0, 7.9, 10.0, 1e3, 1e6)
NAMES = ("alpha", "action_logit", "log_prob", "entropy", "derivatives")
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float64, id="float64"),
]
KEY = torch.tensor([-1234567890123456789, 987654321987])


def cpu_op(*args: Any) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = torch.ops.dvla_fast.beta_policy_forward.default(*args)
    return results


def compare(
    logits: Tensor,
    kappa: Tensor | None,
    number: float = 0.0,
    given: Tensor | None = None,
    key: Tensor | None = None,
    save: bool = True,
) -> tuple[Tensor, ...]:
    """Runs both and compares everything; returns the kernel's results."""
    arguments = (logits, kappa, number, given, key)
    want = cpu_op(*arguments, save)
    moved = (x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments)
    got = kernel.forward(*moved, save)
    for name, mine, theirs in zip(NAMES, got, want, strict=True):
        assert_same(mine, theirs, name)
    return got


def grid(dtype: torch.dtype, copies: int = 3) -> tuple[Tensor, Tensor]:
    pairs = [(math.log(p) - math.log1p(-p), k) for p in MEANS for k in CONCENTRATIONS] * copies
    logits, kappa = (torch.tensor(column, dtype=dtype) for column in zip(*pairs))
    return logits, kappa


@pytest.fixture(autouse=True)
def _poison() -> Any:
    """What the kernel leaves unwritten shows as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kappa", ["tensor", 1e-2, 0.1, 10.0, 1e6], ids=str)
@pytest.mark.parametrize("mode", ["draw", "replay", "mean"])
def test_equals_the_cpu_op(mode: str, kappa: float | str, dtype: torch.dtype) -> None:
    """Same generator state, same α: from either the same proposals are taken."""
    logits, each = grid(dtype)
    tensor, number = (each, 0.0) if kappa == "tensor" else (None, float(kappa))
    given = cpu_op(logits, tensor, number, None, KEY, False)[1] if mode == "replay" else None
    compare(logits, tensor, number, given, KEY if mode == "draw" else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (), (129,), (3, 5)], ids=str)
def test_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn(*shape, 2, dtype=dtype)[..., 0]  # not contiguous
    compare(logits, None, 0.7, None, KEY)
    compare(logits, None, 0.7, None, KEY, save=False)
    compare(logits, torch.tensor(2.5, dtype=dtype), 0.0, None, KEY)


def test_a_broadcast_concentration() -> None:
    logits, kappa = torch.randn(4, 33), torch.rand(4, 1) + 0.1
    compare(logits, kappa, 0.0, None, KEY)
    compare(logits, torch.full((1, 33), 3.0), 0.0, logits.flip(0).T.contiguous().T, None)


@triton.jit
def _words_kernel(key, elements, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    offset = (tl.load(key + 1) & 0xFFFFFFFF).to(tl.uint32)
    words = beta_math._draw(tl.load(key), offset, tl.load(elements + i), 0x80000000)
    for word in tl.static_range(4):
        tl.store(out + word * BLOCK + i, words[word].to(tl.int64))


def test_an_element_has_a_64_bit_index_in_the_stream() -> None:
    from dvla_fast import _build_info

    elements = torch.tensor([0, 2**32 - 1, 2**32, 2**33 + 5], device=DEVICE)
    out = torch.empty(4, 4, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](KEY.to(DEVICE), elements, out, 4)
    seed, offset = (int(x) for x in KEY)
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for element, words in zip(elements.tolist(), out.T.tolist()):
        counter = [element & 0xFFFFFFFF, element >> 32, 0x80000000, offset & 0xFFFFFFFF]
        assert words == _build_info.philox4x32(counter, key), element


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kappa", [1e-30, 1e-8, 1e30])
def test_extreme_policies(kappa: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([-1e30, -200.0, 0.0, 90.0, 1e30, -math.inf, math.inf], dtype=dtype)
    got = compare(logits, torch.full_like(logits, kappa), 0.0, None, KEY)
    assert all(bool(x.isfinite().all()) for x in got)
    given = torch.tensor([math.inf, -math.inf, 1e30, 0.0, -0.0, -1e30, 700.0], dtype=dtype)
    compare(logits, None, kappa, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_invalid_values_give_nan_where_they_are(dtype: torch.dtype) -> None:
    logits, kappa = torch.zeros(9, dtype=dtype), torch.full((9,), 2.0, dtype=dtype)
    good = kernel.forward(logits.to(DEVICE), kappa.to(DEVICE), 0.0, None, KEY.to(DEVICE), True)
    logits[1] = math.nan
    kappa[2:6] = torch.tensor([0.0, -1.0, math.inf, math.nan])
    given = torch.zeros(9, dtype=dtype)
    given[7] = math.nan
    for actions, bad in ((None, [1, 2, 3, 4, 5]), (given, [1, 2, 3, 4, 5, 7])):
        moved = (None if x is None else x.to(DEVICE) for x in (actions, KEY))
        got = kernel.forward(logits.to(DEVICE), kappa.to(DEVICE), 0.0, *moved, True)
        for x in got:
            assert x.isnan().nonzero()[:, -1].unique().tolist() == bad
        if actions is None:  # their neighbours draw as if nothing were wrong
            kept = [i for i in range(9) if i not in bad]
            for mine, theirs in zip(got, good):
                assert torch.equal(mine[..., kept], theirs[..., kept])


@pytest.mark.skipif(not INTERPRETED, reason="ends the use of a GPU: tests/ops/test_value_checks.py")
def test_the_checks_see_what_is_invalid_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    turn_on_assertions(monkeypatch)
    fine = torch.ones(5)  # elements beyond the fifth are not there
    run = functools.partial(kernel.forward, save=False, check=True)
    run(fine, fine, 0.0, fine, None)
    run(torch.tensor([math.inf, -math.inf, 1e30, -200.0, 0.0]), fine, 0.0, None, KEY)
    spoilt = fine.clone()
    spoilt[4] = math.nan
    with pytest.raises(InterpreterError, match="logits: NaN found"):
        run(spoilt, fine, 0.0, None, KEY)
    with pytest.raises(InterpreterError, match="action_logit: NaN found"):
        run(fine, fine, 0.0, spoilt, None)
    for bad in (0.0, -1.0, math.inf, math.nan):
        spoilt[4] = bad
        with pytest.raises(InterpreterError, match="concentration: expected positive finite"):
            run(fine, spoilt, 0.0, None, None)
    run = functools.partial(kernel.forward, save=False, check=False)
    run(fine, spoilt, 0.0, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("n", [0, 1, 300])
def test_backward_equals_the_cpu_op(n: int, rows: int, dtype: torch.dtype) -> None:
    derivatives = torch.randn(rows, n, dtype=dtype)
    grad, one = torch.randn(n, dtype=dtype), torch.randn((), dtype=dtype).expand(n)
    for pair in ((grad, None), (None, grad), (grad.flip(0), one), (one, grad)):
        want = torch.ops.dvla_fast.beta_policy_backward.default(derivatives, *pair)
        moved = (None if x is None else x.to(DEVICE) for x in pair)
        got = kernel.backward(derivatives.to(DEVICE), *moved)
        for mine, theirs in zip(got, want, strict=True):
            assert_same(mine, theirs)
