"""Compiles the policy's Triton kernels ahead of time for GPUs that need not be there.

Stack (spilled registers) and shared memory must stay within ``policy_budget.json``; rewrite that
file, after looking at what changed, with ``python tests/kernels/test_policy_compile.py``.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import ahead_of_time  # noqa: E402

beta = importlib.import_module("dvla_fast.kernels.beta_policy")
shared = importlib.import_module("dvla_fast.kernels.gate_policy.shared")
gate_forward = importlib.import_module("dvla_fast.kernels.gate_policy.forward")
gate_backward = importlib.import_module("dvla_fast.kernels.gate_policy.backward")

BUDGET = Path(__file__).with_name("policy_budget.json")
ARCHITECTURES = (80, 90, 100)
REGISTERS_PER_PROCESSOR = 65_536
# ptxas and Triton differ between releases; a disaster is larger than this.
STACK_SLACK = 128
SHARED_SLACK = 2.0  # a few kilobytes of exchange at most; releases of Triton differ
TYPE = {torch.float32: "fp32", torch.float64: "fp64"}


def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def beta_forward(dtype: torch.dtype, *, kappa: bool = False, draw: bool, check: bool) -> Any:
    x, key = empty(1000, dtype=dtype), empty(2, dtype=torch.int64)
    inputs = (x, x if kappa else None, 10.0, None, key if draw else None)
    return beta.forward_step(inputs, (x, x, x, x, empty(4 if kappa else 2, 1000)), True, check)


def beta_backward(dtype: torch.dtype) -> Any:
    x = empty(1000, dtype=dtype)
    return beta.backward_step((empty(4, 1000, dtype=dtype), x, x), (x, x))


# Images, text groups, tokens of both, width, and the text groups of a decision.
GATES = {
    "one": (25, 1, 196, 9, 192, 1),
    "many": (1600, 1600, 49, 45, 384, 0),
    "wide": (32, 16, 49, 45, 1024, 1),
}
UNITS = 128


def gate_steps(gate: str, dtype: torch.dtype, tokens: torch.dtype, masks: bool) -> dict[str, Any]:
    """The two launches forward, the two back."""
    images, groups, keys, rows, width, per_decision = GATES[gate]
    image, text = empty(images, keys, width, dtype=tokens), empty(groups, rows, width, dtype=tokens)
    mask = [empty(*x.shape[:2], dtype=torch.bool) if masks else None for x in (image, text)]
    z = shared.problem_of(image, text, per_decision, 0)
    a, features = z.decisions, 2 * width + 1
    weights = [
        empty(*size, dtype=dtype) for size in ((UNITS, features), (UNITS,), (1, UNITS), (1,))
    ]
    each, state = empty(a, dtype=dtype), empty(a, features, dtype=dtype)
    hidden, pair = empty(a, UNITS, dtype=dtype), empty(2, a, dtype=dtype)
    means = empty(images + groups, width, dtype=dtype)
    results = (each, each, each, each, state, hidden, pair)
    policy = (10.0, None, empty(2, dtype=torch.int64))
    saved, incoming = (state, hidden, pair), [each, 1, each, 1]
    between = (empty(a, 2 * width, dtype=dtype), state, hidden)
    counted = ((mask[0], keys), (mask[1], rows))
    outputs = (empty(images, width, dtype=dtype), empty(groups, width, dtype=dtype), *weights)
    return {
        "means": gate_forward.means_step(z, (image, text, *mask), means),
        "decide": gate_forward.decide_step(z, means, weights, policy, results, True, False),
        "backward": gate_backward.decisions_step(
            z, incoming, state, (weights[0], weights[2]), saved, between
        ),
        "spread": gate_backward.spread_step(
            z, incoming, saved, between, counted, outputs, UNITS
        ),
    }  # fmt: skip


def all_gate_steps() -> Iterator[tuple[str, Any]]:
    for gate in GATES:
        for name, step in gate_steps(gate, torch.float32, torch.bfloat16, gate == "one").items():
            yield f"gate_{name}-{gate}-fp32", step
    for name, step in gate_steps("one", torch.float64, torch.float64, True).items():
        yield f"gate_{name}-one-fp64", step


def steps() -> Iterator[tuple[str, Any]]:
    """(name, launch) of everything that is compiled."""
    for dtype, name in TYPE.items():
        draws = {"draw": (True, False, False), "mean": (False, False, False)}
        draws |= {"draw-kappa": (True, True, False), "draw-checked": (True, False, True)}
        for what, (draw, kappa, check) in draws.items():
            step = beta_forward(dtype, kappa=kappa, draw=draw, check=check)
            yield f"beta_policy-{what}-{name}", step
        yield f"beta_policy_backward-{name}", beta_backward(dtype)
    yield from all_gate_steps()


def variants() -> Iterator[Any]:
    """Everything for sm_90; float32 for the others too, marked slow."""
    for name, step in steps():
        for arch in ARCHITECTURES if "fp32" in name else (90,):
            marks = () if arch == 90 else (pytest.mark.slow,)
            yield pytest.param(arch, step, id=f"{name}-sm{arch}", marks=marks)


def compile_step(arch: int, step: Any) -> tuple[Any, dict[str, Any]]:
    kernel, values, options = ahead_of_time.named(step)
    return ahead_of_time.compile_for(arch, kernel, values, options), options


@pytest.fixture(autouse=True)
def compiled_not_interpreted() -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")


@pytest.mark.parametrize(("arch", "step"), variants())
def test_within_budget(arch: int, step: Any, request: pytest.FixtureRequest) -> None:
    compiled, options = compile_step(arch, step)
    used = ahead_of_time.resources(compiled)
    budget = json.loads(BUDGET.read_text())["variants"][request.node.callspec.id]
    assert used["stack"] <= budget["stack"] + STACK_SLACK, (used, budget)
    assert used["shared"] <= budget["shared"] * SHARED_SLACK + 64, (used, budget)
    assert used["registers"] * options["num_warps"] * 32 <= REGISTERS_PER_PROCESSOR, used


def test_budget_lists_exactly_the_variants() -> None:
    listed = set(json.loads(BUDGET.read_text())["variants"])
    assert listed == {parameter.id for parameter in variants()}


@pytest.mark.parametrize("dtype", TYPE, ids=str)
def test_rounds_as_the_cpu_does(dtype: torch.dtype) -> None:
    """Divisions and roots correctly rounded, nothing flushed to zero, no multiply-add but ours."""
    compiled, _ = compile_step(90, beta_forward(dtype, draw=True, check=False))
    assert not compiled.metadata.enable_fp_fusion  # ptxas would fuse what PTX keeps apart
    ptx = compiled.asm["ptx"]
    for inexact in (".approx", ".full", ".ftz"):
        assert inexact not in ptx, inexact
    kind = "f32" if dtype == torch.float32 else "f64"
    assert f"div.rn.{kind}" in ptx
    assert f"sqrt.rn.{kind}" in ptx


def test_value_checks_are_compiled_in_only_where_asked_for() -> None:
    for check in (False, True):
        step = beta_forward(torch.float32, draw=True, check=check)
        ptx = compile_step(90, step)[0].asm["ptx"]
        assert ("__assertfail" in ptx) == check
        assert ("positive finite" in compile_step(90, step)[0].asm["ttir"]) == check


def _write_budget() -> None:
    measured = {}
    for parameter in variants():
        compiled, _ = compile_step(*parameter.values)
        measured[parameter.id] = ahead_of_time.resources(compiled)
        print(parameter.id, measured[parameter.id], file=sys.stderr, flush=True)
    header = {"triton": triton.__version__, "unit": "a thread; shared: bytes a block"}
    lines = [f"    {json.dumps(name)}: {json.dumps(used)}" for name, used in measured.items()]
    text = ",\n".join(lines)
    head = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in header.items())
    BUDGET.write_text(f'{{\n{head},\n  "variants": {{\n{text}\n  }}\n}}\n')


if __name__ == "__main__":
    _write_budget()
