"""The direct call of the policy's op gives what the operator gives, and steps aside for modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from call_cases import Dispatches, Functions, Named, Recorder, Wrapped
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dvla_fast import _extension
from dvla_fast.functional import BetaPolicyOutput, beta_policy
from dvla_fast.ops.beta_policy import draw_key

pytestmark = pytest.mark.skipif(
    _extension.problem is not None, reason="the C++ extension is not built"
)

OP = torch.ops.dvla_fast.beta_policy_forward.default
CPU = torch.device("cpu")


def direct(logits: Any, concentration: Any = 2.5, generator: torch.Generator | None = None) -> Any:
    return _extension.calls.beta_policy(logits, concentration, generator, None, False)


def by_operator(logits: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = OP(logits, None, 2.5, None, draw_key(CPU, generator), False, True)
    return out[:4]


@pytest.mark.parametrize("n", [0, 1, 5, 300])
@pytest.mark.parametrize("own", [False, True])
def test_it_draws_the_operators_key(n: int, own: bool) -> None:
    generator = torch.Generator() if own else None
    source = generator or torch.default_generator
    logits, results = torch.linspace(-4, 4, n), []
    for call in (direct, by_operator):
        source.manual_seed(3)
        draws = [call(logits, generator=generator) for _ in range(2)]
        results.append((*draws[0], *draws[1], source.get_state()))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["plain", "leaf", "parameter", "view"])
def test_results_take_part_in_autograd_as_the_operators_do(
    kind: str, context: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.linspace(-2, 2, 6)
    if kind == "parameter":
        logits = torch.nn.Parameter(logits)
    elif kind != "plain":
        logits.requires_grad_()
    taken = logits[::2] if kind == "view" else logits
    runs = []
    monkeypatch.setattr(_extension, "calls", Recorder(runs))
    results = []
    for call in (lambda: beta_policy(taken, 2.5), lambda: by_operator(taken)):
        torch.manual_seed(3)
        with context():
            out = call()
        grad = None
        if out[2].requires_grad:
            (grad,) = torch.autograd.grad(out[2].sum() + 0.5 * out[3].sum(), logits)
        results.append((out, grad))
    (out, got), (want, by) = results
    assert isinstance(out, BetaPolicyOutput)
    assert runs == [True]
    for ours, theirs in zip(out, want, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad == theirs.requires_grad
        assert ours.is_inference() == theirs.is_inference() == (context is torch.inference_mode)
    assert out.log_prob.requires_grad == (kind != "plain" and context is torch.enable_grad)
    assert not out.alpha.requires_grad
    assert (got is None) == (by is None)
    assert got is None or torch.equal(got, by)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(3, dtype=torch.float64), 2.5),
        (torch.zeros(3, dtype=torch.bfloat16), 2.5),
        (torch.zeros(3, dtype=torch.int64), 2.5),
        (torch.zeros(3, device="meta"), 2.5),
        (torch.zeros(3), 2),
        (torch.zeros(3), torch.tensor(2.5)),
        (torch.zeros(3), None),
        (torch.zeros(3), 0.0),
        (torch.zeros(3), -1.0),
        (torch.zeros(3), math.nan),
        (torch.zeros(3), 1e39),
        ([0.0], 2.5),
        (None, 2.5),
    ],
    ids=lambda arguments: str(getattr(arguments[0], "dtype", arguments[0])) + f"-{arguments[1]}",
)
def test_it_leaves_the_rest_to_the_usual_way(arguments: tuple[Any, Any]) -> None:
    before = torch.get_rng_state()
    assert direct(*arguments) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_errors_are_the_operators() -> None:
    with pytest.raises(ValueError, match="logits: NaN found"):
        direct(torch.tensor([0.0, math.nan]))
    with pytest.raises(TypeError):
        beta_policy(torch.zeros(3), 2.5, generator="seed")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [Functions, Dispatches])
def test_modes_see_the_operator(mode: Callable[[], Any]) -> None:
    logits = torch.linspace(-2, 2, 6)
    torch.manual_seed(3)
    want = by_operator(logits)
    torch.manual_seed(3)
    with mode() as active:
        out = beta_policy(logits, 2.5)
        assert direct(logits) is None
    assert OP in active.seen
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    assert direct(logits) is not None


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        logits = torch.zeros(5, requires_grad=True)
        out = beta_policy(logits, 2.5)
        out.log_prob.sum().backward()
    for tensor in (*out, logits.grad):
        assert isinstance(tensor, FakeTensor)
        assert tensor.shape == (5,)
    assert direct(mode.from_tensor(torch.zeros(5))) is None


@pytest.mark.parametrize("kind", [Named, Wrapped])
def test_subclasses_keep_their_type(kind: type[Tensor]) -> None:
    plain = torch.linspace(-2, 2, 6)
    logits = plain.as_subclass(Named) if kind is Named else Wrapped(plain)
    torch.manual_seed(3)
    want = by_operator(plain)
    torch.manual_seed(3)
    out = beta_policy(logits, 2.5)
    assert direct(logits) is None
    for got, value in zip(out, want, strict=True):
        assert type(got) is kind
        assert torch.equal(getattr(got, "held", got), value)


def test_traces_hold_the_operator() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def draw(logits: Tensor) -> Tensor:
        return beta_policy(logits, 2.5).log_prob

    logits = torch.linspace(-2, 2, 6)
    graph = make_fx(draw)(logits)
    assert OP in {node.target for node in graph.graph.nodes}
    exported = torch.export.export(Draw(), (logits,))
    assert OP in {node.target for node in exported.graph.nodes}
    traced = torch.jit.trace(draw, logits, check_trace=False)
    assert "dvla_fast::beta_policy_forward" in str(traced.graph)
    for function in (graph, exported.module(), traced):
        assert not torch.equal(function(logits), function(logits))  # each call draws afresh


class Draw(torch.nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return beta_policy(logits, 2.5).log_prob


def test_transforms_and_compile_leave_it_aside() -> None:
    logits = torch.linspace(-2, 2, 6)

    def inside(x: Tensor) -> Tensor:
        assert direct(x) is None
        return beta_policy(x, 2.5).log_prob

    rows = torch.vmap(inside, randomness="different")(logits.view(2, 3))
    assert rows.shape == (2, 3)
    grad = torch.func.grad(lambda x: inside(x).sum())(logits)
    assert bool(grad.isfinite().all())
    compiled = torch.compile(Draw(), fullgraph=True, backend="eager")
    assert not torch.equal(compiled(logits), compiled(logits))


def test_checkpointing_replays_its_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.checkpoint import checkpoint

    runs: list[bool] = []
    monkeypatch.setattr(_extension, "calls", Recorder(runs))
    logits = torch.randn(6, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        out = beta_policy(x, 2.5)
        return (out.log_prob + 0.2 * out.entropy).sum()

    torch.manual_seed(5)
    (want,) = torch.autograd.grad(loss(logits), logits)
    for reentrant in (False, True):
        torch.manual_seed(5)
        logits.grad = None
        checkpoint(loss, logits, use_reentrant=reentrant).backward()
        assert torch.equal(logits.grad, want)
    assert all(runs)


def test_other_threads_run_meanwhile() -> None:
    """A large draw holds no lock of the interpreter."""
    import threading
    import time

    done, ticks = threading.Event(), []

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-3)

    logits = torch.zeros(2_000_000)
    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    direct(logits)
    end = time.perf_counter()
    done.set()
    thread.join()
    within = [t for t in ticks if start + (end - start) / 4 < t < end - (end - start) / 4]
    assert within
