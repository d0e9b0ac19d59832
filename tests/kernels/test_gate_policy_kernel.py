"""The gate's Triton kernels against the C++ op, on a GPU or in Triton's interpreter.

``test_interpreter.py`` runs this file with ``TRITON_INTERPRET=1``, in a process of its own.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from policy_cases import DEVICE, NEEDS

import dvla_fast.functional  # noqa: F401  (the ops)

kernel = importlib.import_module("dvla_fast.kernels.gate_policy")
shared = importlib.import_module("dvla_fast.kernels.gate_policy.shared")

pytestmark = NEEDS

FORWARD = ("alpha", "action_logit", "log_prob", "entropy", "state", "hidden", "derivatives")
BACKWARD = ("image", "text", "hidden_weight", "hidden_bias", "out_weight", "out_bias")
# Sums run in another order than on the CPU: roundings of the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6}
KEY = torch.tensor([-1234567890123456789, 987654321987])


class Case(NamedTuple):
    """Images, text groups, tokens of both, width, hidden units, and the options of pooling."""

    images: int
    groups: int
    keys: int
    rows: int
    width: int
    units: int
    per_decision: int = 1
    used: int = 0

    def __str__(self) -> str:
        return "B{}T{}N{}P{}C{}K{}-{}-{}".format(*self)


# Tokens go 128 at a time, channels 32, units of weight gradients 8, features 32, decisions 16.
CASES = [
    Case(1, 1, 1, 1, 1, 1),
    Case(6, 3, 129, 5, 9, 17),
    Case(12, 6, 33, 5, 33, 10, per_decision=2, used=1),
    Case(6, 2, 7, 130, 16, 9, per_decision=0),
    Case(15, 5, 5, 2, 20, 3, per_decision=5, used=2),
    Case(17, 17, 3, 2, 5, 4),
]


def make(case: Case, dtype: torch.dtype, tokens: torch.dtype | None = None) -> list[Tensor]:
    """Image and text tokens (a view with strides of its own), then the weights."""
    gen = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64).to(dtype)

    features = 2 * case.width + 1
    image = rand(case.keys, case.images, case.width).transpose(0, 1) + 0.5
    text = rand(case.groups, case.rows, 2 * case.width)[..., ::2]
    weights = [rand(case.units, features) / features**0.5, rand(case.units)]
    weights += [rand(1, case.units) / case.units**0.5, rand(1)]
    return [image.to(tokens or dtype), text.to(tokens or dtype), *weights]


def make_masks(case: Case) -> tuple[Tensor, Tensor]:
    """Random masks, one not contiguous; the first image keeps no token."""
    gen = torch.Generator().manual_seed(1)
    image = (torch.rand(case.keys, case.images, generator=gen) < 0.6).T
    image[0] = False
    return image, torch.rand(case.groups, case.rows, generator=gen) < 0.6


def on_device(values: Any) -> list[Any]:
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in values]


def compare(names: tuple[str, ...], got: Any, want: Any) -> None:
    for name, mine, theirs in zip(names, got, want, strict=True):
        assert mine.shape == theirs.shape, name
        assert mine.dtype == theirs.dtype, name
        if theirs.numel() == 0:
            continue
        error = (mine.cpu() - theirs).abs().max()
        # A layer norm of one or two numbers is constant: what remains of gradients is rounding.
        bound = TOLERANCE[theirs.dtype] * max(float(theirs.abs().max()), 0.1)
        assert error <= bound, f"{name}: off by {error:.2g}, at most {bound:.2g}"


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """What the kernels leave unwritten shows as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both_ways(case: Case, tensors: list[Tensor], masks: tuple[Any, Any], *policy: Any) -> None:
    """Forward, and backward from all gradients, from one of them, and from that of the state."""
    ops = torch.ops.dvla_fast
    pooling = (*masks, case.per_decision, case.used)
    arguments = (*tensors[:2], *pooling, *tensors[2:], *policy, True)
    want = ops.gate_policy_forward.default(*arguments)
    compare(FORWARD, kernel.forward(*on_device(arguments)), want)
    *_, state, hidden, derivatives = want
    gen = torch.Generator().manual_seed(2)
    first, second, of_state = (
        torch.randn(x.shape, generator=gen, dtype=torch.float64).to(state)
        for x in (want[2], want[3], state)
    )
    one = torch.ones((), dtype=state.dtype).expand(len(first))  # as the gradient of a sum arrives
    for grads in ((first, second, of_state), (None, one, None), (None, None, of_state)):
        saved = (tensors[2], tensors[4], state, hidden, derivatives)
        arguments = (*grads, *tensors[:2], *pooling, *saved)
        want = ops.gate_policy_backward.default(*arguments)
        compare(BACKWARD, kernel.backward(*on_device(arguments)), want)


@pytest.mark.parametrize(
    ("case", "masked"),
    [*((case, True) for case in CASES[:5]), (CASES[1], False), (CASES[5], False)],
    ids=str,
)
def test_equals_the_cpu_op_float64(case: Case, masked: bool) -> None:
    masks = make_masks(case) if masked else (None, None)
    tensors = make(case, torch.float64)
    if masked:  # what a mask hides is not read
        tensors[0] = tensors[0].masked_fill(~masks[0].unsqueeze(2), math.nan)
    # Seventeen draws take the interpreter long: the mean will do there.
    both_ways(case, tensors, masks, 0.1, None, None if case is CASES[5] else KEY)


@pytest.mark.parametrize(
    ("case", "tokens"),
    [
        (CASES[1], torch.float32),
        (CASES[3], torch.float32),
        (CASES[2], torch.float16),
        (CASES[3], torch.bfloat16),
    ],
    ids=str,
)
def test_equals_the_cpu_op(case: Case, tokens: torch.dtype) -> None:
    tensors = make(case, torch.float32, tokens)
    both_ways(case, tensors, (None, None), 10.0, None, KEY)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_many_decisions_share_a_program(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MANY_DECISIONS", 1)
    assert problem(case).block_decisions() == 4
    both_ways(case, make(case, torch.float64), make_masks(case), 10.0, None, KEY)


def problem(case: Case) -> Any:
    image, text, *_ = make(case, torch.float64)
    return shared.problem_of(image, text, case.per_decision, case.used)


@pytest.mark.parametrize("mode", ["replay", "mean"])
def test_stored_actions_and_the_mean(mode: str) -> None:
    case = CASES[2]
    given = torch.linspace(-3, 4, 3, dtype=torch.float64) if mode == "replay" else None
    both_ways(case, make(case, torch.float64), (None, None), 10.0, given, None)


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_the_state_alone(case: Case) -> None:
    tensors, masks = make(case, torch.float64), make_masks(case)
    pooling = (*masks, case.per_decision, case.used)
    arguments = (*tensors[:2], *pooling, None, None, None, None, 1.0, None, None, False)
    want = torch.ops.dvla_fast.gate_policy_forward.default(*arguments)
    compare(FORWARD, kernel.forward(*on_device(arguments)), want)
    saved = (None, None, *want[4:])
    arguments = (None, None, torch.ones_like(want[4]), *tensors[:2], *pooling, *saved)
    want = torch.ops.dvla_fast.gate_policy_backward.default(*arguments)
    compare(BACKWARD, kernel.backward(*on_device(arguments)), want)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e18], ids=str)
def test_hostile_tokens(value: float) -> None:
    """Constant images: a norm of 0 in the cosine, no deviation in the layer norm."""
    case = CASES[1]
    tensors = make(case, torch.float32)
    tensors[0] = torch.full_like(tensors[0], value)
    arguments = (*tensors[:2], None, None, 1, 0, *tensors[2:], 10.0, None, None, True)
    got = kernel.forward(*on_device(arguments))
    assert all(bool(x.isfinite().all()) for x in got)
    grads = (got[2], got[3], got[4].clamp(-1, 1))
    saved = (*on_device((tensors[2], tensors[4])), *got[4:])
    arguments = (*grads, *on_device(tensors[:2]), None, None, 1, 0, *saved)
    assert all(bool(x.isfinite().all()) for x in kernel.backward(*arguments))


def test_a_long_mean_does_not_drift() -> None:
    tokens = torch.rand(1, 20_000, 3, dtype=torch.float64).float() + 100
    arguments = (
        tokens,
        torch.ones(1, 1, 3),
        None,
        None,
        1,
        0,
        *(None,) * 4,
        1.0,
        None,
        None,
        False,
    )
    state = kernel.forward(*on_device(arguments))[4]
    assert torch.equal(state[0, :3].cpu(), tokens.double().mean(1)[0].float())


def test_nan_comes_out_where_it_went_in() -> None:
    case = CASES[1]
    tensors = make(case, torch.float32)
    tensors[0][2, 3, 1] = math.nan  # an image of the second decision
    arguments = (*tensors[:2], None, None, 1, 0, *tensors[2:], 10.0, None, KEY, False)
    for x in kernel.forward(*on_device(arguments))[:4]:
        assert x.isnan().tolist() == [False, True, False]


def test_launches() -> None:
    """Two forward and two backward, whatever the sizes."""
    counted: list[int] = []

    def count(_results: object, _scratch: object, launched: list[object]) -> None:
        counted.append(len(launched))

    case = CASES[2]
    tensors, masks = make(case, torch.float32), make_masks(case)
    pooling = (*masks, case.per_decision, case.used)
    arguments = (*tensors[:2], *pooling, *tensors[2:], 10.0, None, KEY, True)
    out = kernel.forward(*on_device(arguments), recorder=count)
    saved = (tensors[2].to(DEVICE), tensors[4].to(DEVICE), *out[4:])
    grads = (out[2], None, None)
    kernel.backward(*grads, *on_device((*tensors[:2], *pooling)), *saved, recorder=count)
    assert counted == [2, 2]
