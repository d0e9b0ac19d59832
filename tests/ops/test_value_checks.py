"""Looking for NaN and bad concentrations: where it raises, where NaN comes out, and the switch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dvla_fast import _extension
from dvla_fast.functional import beta_policy, gate_policy, set_value_checks, value_checks

CPP = pytest.param(
    "cpp",
    marks=pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem)),
)
BACKENDS = [CPP, "reference"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    set_value_checks(None)


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
    """Logits, concentrations and actions, of which elements 1, 2 to 5 and 7 are invalid."""
    logits, kappa, action = (torch.full((300,), x, dtype=dtype) for x in (0.3, 2.0, -1.0))
    logits[1] = action[7] = math.nan
    kappa[2:6] = torch.tensor([0.0, -1.0, math.inf, math.nan])
    return logits.to(device), kappa.to(device), action.to(device)


def test_cpus_are_checked_by_default_and_gpus_are_not() -> None:
    cuda = torch.device("cuda", 0)
    assert (value_checks(CPU), value_checks(cuda)) == (True, False)
    for enabled in (True, False):
        set_value_checks(enabled)
        assert (value_checks(CPU), value_checks(cuda)) == (enabled, enabled)
    with pytest.raises(TypeError, match="set_value_checks: expected True, False or None, got 1"):
        set_value_checks(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0", "yes"])
def test_the_environment_sets_it(text: str) -> None:
    code = (
        "import torch;from dvla_fast.functional import value_checks;"
        "print(value_checks(torch.device('cpu')), value_checks(torch.device('cuda')))"
    )
    env = {**os.environ, "DVLA_FAST_VALUE_CHECKS": text}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if text == "yes":
        assert "DVLA_FAST_VALUE_CHECKS='yes': expected 0 or 1" in done.stderr
    else:
        assert done.stdout.split() == [str(text == "1")] * 2, done.stderr


@pytest.mark.parametrize("mode", ["draw", "replay", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_unchecked_elements_are_nan_and_their_neighbours_are_not(
    backend: str, dtype: torch.dtype, mode: str
) -> None:
    logits, kappa, action = inputs(dtype)
    options: dict[str, Any] = {"backend": backend, "deterministic": mode == "mean"}
    if mode == "replay":
        options["action_logit"] = action
    with pytest.raises(ValueError, match=r"NaN found|positive finite"):
        beta_policy(logits, kappa, **options)
    set_value_checks(False)
    bad = [1, 2, 3, 4, 5, 7] if mode == "replay" else [1, 2, 3, 4, 5]
    leaves = logits.clone().requires_grad_(), kappa.clone().requires_grad_()
    torch.manual_seed(0)
    out = beta_policy(*leaves, **options)
    grads = torch.autograd.grad((out.log_prob + out.entropy).sum(), leaves)
    for x in (*out, *(grads if backend == "cpp" else ())):
        assert x.isnan().nonzero().squeeze(1).tolist() == bad
    for x in (logits, kappa, action):
        x[bad] = 1.0
    torch.manual_seed(0)
    clean = beta_policy(logits, kappa, **options)
    keep = [i for i in range(300) if i not in bad]
    if backend == "cpp":  # an element's draw depends on no other
        for mine, theirs in zip(out, clean):
            assert torch.equal(mine[keep], theirs[keep])


def gate_inputs(device: str = "cpu") -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    sizes = ((3, 4, 8), (3, 2, 8), (5, 17), (5,), (1, 5), (1,))
    tensors = [torch.randn(*size, generator=gen) for size in sizes]
    tensors[0][1, 0, 0] = math.nan
    return [x.to(device) for x in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_switch_reaches_the_gate(backend: str) -> None:
    message = "logits: NaN found" + ("; the tokens" if backend == "cpp" else "")
    with pytest.raises(ValueError, match=message):
        gate_policy(*gate_inputs(), 10.0, backend=backend)
    set_value_checks(False)
    out = gate_policy(*gate_inputs(), 10.0, backend=backend)
    assert out.log_prob.isnan().tolist() == [False, True, False]


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
def test_a_compiled_graph_follows_the_switch() -> None:
    torch.compiler.reset()
    logits = torch.tensor([0.0, math.nan])
    compiled = torch.compile(lambda x: beta_policy(x, 2.0).entropy, backend="aot_eager")
    with pytest.raises(ValueError, match="logits: NaN found"):
        compiled(logits)
    set_value_checks(False)
    assert compiled(logits).isnan().tolist() == [False, True]
    torch.compiler.reset()


ASSERTS = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_value_checks import gate_inputs, inputs
from dvla_fast.functional import beta_policy, gate_policy, set_value_checks
backend, what = sys.argv[1:]
logits, kappa, action = (x.cuda() for x in inputs())
good = torch.full_like(kappa, 2.0)
calls = dict(
    logits=lambda: beta_policy(logits, 2.0, backend=backend),
    concentration=lambda: beta_policy(torch.zeros_like(kappa), kappa, backend=backend),
    action_logit=lambda: beta_policy(good, good, action_logit=action, backend=backend),
    gate=lambda: gate_policy(*gate_inputs("cuda"), 10.0, backend=backend),
)
calls[what]()  # not checked by default
torch.cuda.synchronize()
print("unchecked: fine", flush=True)
set_value_checks(True)
beta_policy(good, good, backend=backend)
torch.cuda.synchronize()
print("valid values: fine", flush=True)
calls[what]()
torch.cuda.synchronize()
print("not reached")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["logits", "concentration", "action_logit", "gate"])
@pytest.mark.parametrize("backend", ["triton", "cpp", "reference"])
def test_a_gpu_stops_at_an_invalid_value(backend: str, what: str) -> None:
    """In a process of its own: an assertion on the device ends the use of that device."""
    if backend == "cpp" and (what == "gate" or not _extension.has_cuda):
        pytest.skip("no such compiled kernel here")
    code = ASSERTS.format(folder=os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", code, backend, what], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines() == ["unchecked: fine", "valid values: fine"], done.stderr
    assert done.returncode != 0
    assert "assert" in done.stderr.lower()
    if backend != "reference":
        assert {"gate": "logits"}.get(what, what) in done.stderr


@pytest.mark.gpu
def test_the_check_does_not_wait_for_the_gpu() -> None:
    set_value_checks(True)
    logits = torch.zeros(100, device="cuda")
    tensors = [x.nan_to_num() for x in gate_inputs("cuda")]
    beta_policy(logits, torch.full_like(logits, 2.0))  # compiles what is to be compiled
    gate_policy(*tensors, 10.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        beta_policy(logits, torch.full_like(logits, 2.0))
        gate_policy(*tensors, 10.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
